"""The texts that answer a request, and their JSON as completions and as chat completions.

Log-probabilities are of the model's own logits, before temperature, penalties and filters.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from smollm_jax.generation.sampling import Sampling, Score
from smollm_jax.serving.openai_errors import Body
from smollm_jax.tokenizer.streaming import TextOfIds
from smollm_jax.tokenizer.tokenizer import HALF, Tokenizer

FINISH = {"eos": "stop", "stop string": "stop", "cancelled": "stop", "length": "length", "context": "length"}


class Prompt(NamedTuple):
    """The ids of a prompt and its text. `offsets` has the character of the text at which each id begins."""

    ids: list[int]
    text: str
    offsets: list[int]


class Token(NamedTuple):
    """A token of a choice. The first token of a text has no score."""

    id: int
    offset: int
    score: Score | None


class Part(NamedTuple):
    """A part of choice `number`. The last part has a `reason`."""

    number: int
    text: str
    tokens: Sequence[Token]
    made: int  # new tokens so far
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A text to write. Without `sampling` it is the prompt alone. `top` tokens are told, if scores are."""

    index: int
    prompt: Prompt
    sampling: Sampling | None
    stop: tuple[str, ...]
    echo: bool
    top: int | None

    @property
    def scored(self) -> bool:
        return self.top is not None


def offsets_of(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return where each id begins in a text. A special token that the text lacks has no characters."""
    decoder, offsets, at = TextOfIds(tokenizer, []), [], 0
    special = {token: name for name, token in tokenizer.special_tokens.items()}
    for token in ids:
        offsets.append(min(at, len(text)))
        if token in special:
            at += len(special[token]) if text.startswith(special[token], at) else 0
        else:
            at += len(decoder.feed([token]))
    return offsets


class TokenTexts:
    """The texts of single tokens, remembered."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._texts = tokenizer, dict[int, str]()

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], skip_special=False)
        return self._texts[token]


class CompletionForm:
    """The JSON of /v1/completions."""

    prefix, object, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts):
        self.texts = texts

    def whole(self, part: Part, top: int | None) -> Body:
        """Return a choice as a whole, or a part of a choice in a stream."""
        logprobs = None if top is None else self.logprobs(part.tokens, top)
        return {"index": part.number, "text": part.text, "logprobs": logprobs, "finish_reason": finish(part)}

    def delta(self, part: Part, top: int | None, *, is_first: bool) -> Body:  # noqa: ARG002 - of chats
        return self.whole(part, top)

    def logprobs(self, tokens: Sequence[Token], top: int) -> Body:
        """Return the four lists of OpenAI. `top_logprobs` has the token itself too, with the very same number."""
        found: list[tuple[Any, Any]] = []
        for token in tokens:
            if token.score is None:
                found.append((None, None))
                continue
            likely, value = dict[str, float](), logprob(token.id, token.score)
            for one, its_value in token.score.likeliest[:top]:
                likely.setdefault(self.texts[one], its_value)  # of two tokens with one text the likelier one
            likely.setdefault(self.texts[token.id], value)
            found.append((value, likely))
        return {
            "tokens": [self.texts[token.id] for token in tokens],
            "token_logprobs": [value for value, _ in found],
            "top_logprobs": [likely for _, likely in found],
            "text_offset": [token.offset for token in tokens],
        }


class ChatForm:
    """The JSON of /v1/chat/completions. `stop_ids` are no part of a message."""

    prefix, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, stop_ids: Sequence[int]):
        self.texts, self.stop_ids = texts, frozenset(stop_ids)

    def whole(self, part: Part, top: int | None) -> Body:
        """Return a choice as a whole."""
        return self._choice(part, top, message={"role": "assistant", "content": part.text})

    def delta(self, part: Part, top: int | None, *, is_first: bool) -> Body:
        """Return a part of a choice in a stream."""
        role = {"role": "assistant"} if is_first else {}
        return self._choice(part, top, delta=role | {"content": part.text})

    def _choice(self, part: Part, top: int | None, **written: Body) -> Body:
        logprobs = None if top is None else self.logprobs(part.tokens, top)
        return {"index": part.number, **written, "logprobs": logprobs, "finish_reason": finish(part)}

    def logprobs(self, tokens: Sequence[Token], top: int) -> Body:
        """Return a list of tokens, each with its likeliest alternatives."""
        content = []
        for token in tokens:
            if token.score is not None and token.id not in self.stop_ids:
                likely = [self._token(*one) for one in token.score.likeliest[:top]]
                content.append(self._token(token.id, logprob(token.id, token.score)) | {"top_logprobs": likely})
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> Body:
        text = self.texts[token]
        return {"token": text, "logprob": value, "bytes": None if HALF in text else list(text.encode())}


Form = CompletionForm | ChatForm


def logprob(token: int, score: Score) -> float:
    """Return a token's log-probability: if it is among the likeliest, the number that stands there."""
    return next((value for one, value in score.likeliest if one == token), score.logprob)


def finish(part: Part) -> str | None:
    return part.reason and FINISH[part.reason]


def usage(prompt_tokens: int, made: int) -> Body:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}


def body_of(head: Body, form: Form, parts: Sequence[Part], top: int | None, counts: Body) -> bytes:
    """Return the JSON of whole choices. Each is encoded alone, so that other threads get their turn between."""
    choices = b",".join(json.dumps(form.whole(part, top)).encode() for part in parts)
    ends = json.dumps({"usage": counts}).encode()
    return json.dumps(head).encode()[:-1] + b', "choices": [' + choices + b"], " + ends[1:]
