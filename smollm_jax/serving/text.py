"""Turn the ids of a text into chunks of text: whole characters, stop strings, progress, and scores of tokens."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from smollm_jax.generation.sampling import Score
from smollm_jax.tokenizer.streaming import TextOfIds
from smollm_jax.tokenizer.tokenizer import Tokenizer


class ScoredToken(NamedTuple):
    """A token of a text, the character of the text at which it begins, and what the model expected there."""

    id: int
    offset: int
    score: Score


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """New text and the progress so far. The last chunk of a text has a `reason`."""

    text: str
    tokens: int = 0  # new tokens so far, without the stop token
    prompt_tokens: int
    seconds: float = 0.0  # since the request started
    seconds_to_first: float | None = None  # until the first token; None before or without a token
    weights: int | str | None = None  # the step of a run, or its export
    reason: str | None = None  # why the text ended: eos, length, context, stop string or cancelled
    scored: tuple[ScoredToken, ...] = ()  # tokens that begin in the text shown so far, if wanted
    prompt_scores: tuple[Score, ...] = ()  # of the prompt's next tokens, each but the first, if wanted


class TextWriter:
    """The text after a prompt, fed with ids as they come. A stop string ends it and is not part of it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._text, self._gate = TextOfIds(tokenizer, list(prompt)), StopStrings(stop)
        self._started = time.perf_counter()
        self._first: float | None = None
        self.made, self._prompt_tokens = 0, len(prompt)
        self._fed = self._shown = 0  # characters
        self._held: list[ScoredToken] = []  # whose text is not shown yet

    @property
    def stopped(self) -> bool:
        """Return whether a stop string came."""
        return self._gate.stopped

    def feed(self, ids: Sequence[int], scored: Iterable[tuple[int, Score]] = ()) -> TextChunk | None:
        """Return the text that new ids complete, if any. After a stop string the text is over.

        `scored` has the score of each id, and after these one of a stop id, which is no text.
        """
        self.made += len(ids)
        if self._first is None and ids:
            self._first = time.perf_counter() - self._started
        scored, text = list(scored), ""
        for i, (token, score) in enumerate(scored):
            self._held.append(ScoredToken(token, self._fed, score))
            if i < len(ids):
                text += self._decoded([token])
        if not scored:
            text = self._decoded(ids)
        shown = self._gate.feed(text)
        if self._gate.stopped:
            return self.chunk(shown, "stop string")
        return self.chunk(shown) if shown else None

    def end(self, reason: str | None) -> TextChunk:
        """Return the rest of the text and why it ended. The rest may hold a stop string."""
        shown = self._gate.feed(self._text.rest())
        return self.chunk(shown + self._gate.held, "stop string" if self._gate.stopped else reason)

    def chunk(self, shown: str, reason: str | None = None, prompt_scores: Sequence[Score] = ()) -> TextChunk:
        """Return `shown` as a chunk, with the progress so far."""
        self._shown += len(shown)
        whole = reason not in (None, "stop string")
        count = sum(whole or token.offset < self._shown for token in self._held)
        ready, self._held = tuple(self._held[:count]), self._held[count:]
        return TextChunk(
            text=shown, tokens=self.made, prompt_tokens=self._prompt_tokens, seconds_to_first=self._first,
            seconds=time.perf_counter() - self._started, reason=reason, scored=ready,
            prompt_scores=tuple(prompt_scores),
        )  # fmt: skip

    def _decoded(self, ids: Sequence[int]) -> str:
        text = self._text.feed(ids)
        self._fed += len(text)
        return text


class StopStrings:
    """A filter that ends a text at the first stop string. `held` may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self.held, self.stopped = tuple(stop), "", False

    def feed(self, text: str) -> str:
        """Return the text that can no longer be part of a stop string."""
        text = self.held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        shown, self.held = text[: len(text) - held], text[len(text) - held :]
        return shown
