"""A model with its tokenizer: text in, text out."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from smollm_jax.api.process import as_found
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.errors import require
from smollm_jax.serving.completion import Completer, Dtype, check_text, open_completer
from smollm_jax.tokenizer.streaming import TextOfIds
from smollm_jax.tokenizer.tokenizer import SpecialTokens

NAMES = tuple(field.name for field in fields(Sampling) if field.type in ("int", "float"))
WHOLE = ("max_new_tokens", "top_k", "seed")


class Options(TypedDict, total=False):
    """Keywords of `generate` and `stream`, with the defaults of `Sampling`; without a seed each call draws one."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | Sequence[str]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a text; the first one follows nothing, so it has no probability."""

    text: str  # of several tokens that are one character, the last has it
    id: int
    logprob: float | None  # natural logarithm
    is_argmax: bool | None  # whether no other token was likelier


class Model:
    """A model with its tokenizer, as `smollm_jax.load` opens it."""

    def __init__(self, completer: Completer, name: str):
        assert isinstance(completer.engine, Generator)
        self.completer, self.name, self._generator = completer, name, completer.engine

    @property
    def context(self) -> int:
        """The most tokens of prompt and continuation together."""
        return self.completer.context

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> str: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompt: Sequence[str], **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **options: Unpack[Options]) -> str | list[str]:
        """Return the text that follows a prompt, or a list of texts for a list of prompts.

        max_new_tokens=128, temperature=0 (the likeliest token), top_k, top_p, min_p, repetition_penalty,
        presence_penalty, frequency_penalty, seed, and stop: a string or several that end the text. Raises
        `UserError`.
        """
        sampling, stop = self._choices(options)
        prompts = texts_of(prompt, "generate")
        encoded = [self._encode(text) for text in prompts]
        with as_found():
            texts = [made.text for made in self.completer.complete(encoded, sampling, stop)]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
        """Yield the text that `generate` returns, in pieces as they are made; closing it ends the work."""
        sampling, stop = self._choices(options)
        require(isinstance(prompt, str), f"stream takes one text; {type(prompt).__name__} came")
        return self._pieces(self._encode(prompt), sampling, stop)

    def _pieces(self, ids: list[int], sampling: Sampling, stop: tuple[str, ...]) -> Iterator[str]:
        with closing(self.completer.stream(ids, sampling, stop)) as chunks:  # type: ignore[type-var]
            while True:
                with as_found():  # not around a yield, after which the caller's work goes on
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                if chunk.text:
                    yield chunk.text

    @overload
    def logprobs(self, text: str) -> list[TokenLogprob]: ...  # type: ignore[overload-overlap]
    @overload
    def logprobs(self, text: Sequence[str]) -> list[list[TokenLogprob]]: ...
    def logprobs(self, text: str | Sequence[str]) -> list[TokenLogprob] | list[list[TokenLogprob]]:
        """Return how likely each token of a text was after those before it; a list for a list of texts.

        The text may fill the context. Its logits never exist whole. Raises `UserError`.
        """
        with as_found():
            scored = [self._logprobs(one) for one in texts_of(text, "logprobs")]
        return scored[0] if isinstance(text, str) else scored

    def _logprobs(self, text: str) -> list[TokenLogprob]:
        require(text != "", "the text is empty")
        check_text(text, "the text")
        tokenizer = self.completer.tokenizer
        ids = tokenizer.encode(text).tolist()
        logprobs, are_argmax = self._generator.logprobs(ids)
        decoder = TextOfIds(tokenizer, [])
        pieces = [decoder.feed([token]) for token in ids]
        pieces[-1] += decoder.rest()
        found: list[tuple[float | None, bool | None]] = [(None, None)]
        found += zip(logprobs, are_argmax, strict=True)
        return [
            TokenLogprob(piece, token, *values) for piece, token, values in zip(pieces, ids, found, strict=True)
        ]

    def _encode(self, prompt: str) -> list[int]:
        return self.completer.encode(prompt)

    def _choices(self, options: Any) -> tuple[Sampling, tuple[str, ...]]:
        """Check the keywords; raises `UserError` naming one that is unknown or of the wrong kind."""
        values = dict(options)
        given = values.pop("stop", ())
        stop = (given,) if isinstance(given, str) else given
        good = isinstance(stop, list | tuple) and all(isinstance(one, str) and one for one in stop)
        require(good, f"stop={given!r} must be a text that is not empty, or a list of such texts")
        if values.get("seed") is None:
            values["seed"] = secrets.randbits(32)
        for name, value in values.items():
            close = get_close_matches(name, NAMES, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(NAMES)} or stop"
            require(name in NAMES, f"there is no setting {name!r}; {hint}")
            kind, kinds = ("whole number", int) if name in WHOLE else ("number", int | float)
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            require(is_number, f"{name}={value!r:.40} must be a {kind}")
        return Sampling(**values, stop_ids=self.completer.stop_ids), tuple(stop)

    def __repr__(self) -> str:
        return f"Model({self.name!r}: {self.completer.about}, context {self.context:,} tokens)"


def texts_of(given: Any, function: str) -> list[str]:
    """Return a text or a list of texts as a list; raises `UserError` for anything else, such as token ids."""
    if isinstance(given, str):
        return [given]
    is_list = isinstance(given, Iterable) and not isinstance(given, bytes | dict)
    require(is_list, f"{function} takes a text or a list of texts; {type(given).__name__} came")
    texts = list(given)
    odd = next((one for one in texts if not isinstance(one, str)), "")
    ids = "; for token ids there is smollm_jax.generate" if function == "generate" else ""
    require(isinstance(odd, str), f"{function} takes texts, a list with {type(odd).__name__} came{ids}")
    return texts


def load(
    path: Any, step: int | None = None, *, dtype: Dtype = "auto", special_tokens: SpecialTokens | None = None
) -> Model:
    """Open a run (`Run` or folder), an exported folder or a Hub id; raises `UserError`.

    `step` is a checkpoint of a run, by default the newest good one. dtype "auto": float32 on a CPU, bfloat16
    elsewhere. `special_tokens` that a prompt spells out stay "text", or "parse" makes ids of them.
    """
    choices: dict[str, tuple[Any, ...]] = {
        "dtype": ("auto", "float32", "bfloat16"), "special_tokens": (None, "text", "parse"),
    }  # fmt: skip
    for name, value in (("dtype", dtype), ("special_tokens", special_tokens)):
        require(value in choices[name], f"{name}={value!r} must be one of {', '.join(map(str, choices[name]))}")
    require(
        isinstance(path, str) or hasattr(path, "__fspath__"),
        f"load takes a run, a path or a Hub id; {path!r:.60} came",
    )
    place = path if isinstance(path, str) else path.__fspath__()
    with as_found():
        completer = open_completer(place, dtype=dtype, special_tokens=special_tokens, step=step)
    return Model(completer, Path(place).name or place)
