"""Documents in shuffled windows, tokenised ahead of their use, and mixtures of such sources.

The cursor of a source names the start of its window and a place in the window's order; a resume reads the
window again. While one window is in use the next is read and tokenised in a thread of its own, by the
tokenizer's threads: two windows are held at a time, however long the stream.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from smollm_jax.data.readers import Cursor
from smollm_jax.data.sources import WHOLE, Document, Shard, Source
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import SourceTimeout, require
from smollm_jax.tokenizer.tokenizer import Tokenizer

# documents: enough to keep the tokenizer's threads busy, few enough that what it holds a token stays small
TOKENISED_TOGETHER = 256
CLOSE_SECONDS = 5.0
TokenizedDocument = tuple[Document, np.ndarray]


def text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def tokenised(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Documents and their tokens, each ended by eos; a group is tokenised at a time."""
    documents = iter(documents)
    while group := list(islice(documents, TOKENISED_TOGETHER)):
        encoded = tokenizer.encode_batch([document.text for document in group])
        yield from zip(group, (np.append(ids, np.int32(tokenizer.eos_id)) for ids in encoded), strict=True)


@dataclass(frozen=True)
class WindowPosition:
    """Where a window begins."""

    epoch: int
    number: int
    start: Cursor | None


@dataclass(frozen=True)
class Window:
    """Documents in the order in which they are drawn."""

    place: WindowPosition
    drawn: list[TokenizedDocument]
    following: WindowPosition
    skipped: int
    """Rows that could not be read."""


class Shuffled:
    """A share of one source in shuffled windows, epoch after epoch. `state` says which document comes next.

    The window is as much smaller as the share is: together they hold the documents of one window.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seed: list[int],
        excluded: frozenset[int],
        share: Shard = WHOLE,
    ):
        self.source, self.tokenizer, self.excluded, self.share = source, tokenizer, excluded, share
        self.seed = seed if share == WHOLE else [*seed, share.index]
        self.state: Cursor = {
            "window": None, "number": 0, "index": 0, "epoch": 0, "tokens": 0, "skipped": 0, "ended": False,
        }  # fmt: skip
        self._current: Window | None = None
        self._coming: tuple[WindowPosition, BackgroundTask[Window]] | None = None
        atexit.register(self.close)

    def draw(self) -> TokenizedDocument | None:
        """The next document and its tokens, eos included; None when all epochs are over."""
        state = self.state
        while not state["ended"]:
            window = self._window(WindowPosition(state["epoch"], state["number"], state["window"]))
            i = state["index"]
            if i == 0:
                state["skipped"] += window.skipped
            if i < len(window.drawn):
                state["index"] += 1
                state["tokens"] += len(window.drawn[i][1])
                return window.drawn[i]
            require(i == len(window.drawn), f"the cursor points behind a window of {self.source.name}")
            place = window.following
            require(
                window.drawn != [] or window.place.number > 0,
                f"--data {self.source.name} holds no document to train on{self._which()}; the held-out ones are "
                "not counted",
            )
            state |= {"window": place.start, "number": place.number, "index": 0, "epoch": place.epoch}
            state["ended"] = self._is_over(place)
        return None

    def close(self) -> None:
        """Stop reading; wait a little for what is being read ahead.

        A thread inside Arrow when Python ends would bring the process down, so this is done then at the latest.
        """
        atexit.unregister(self.close)
        self.source.closed.set()
        if self._coming is not None:
            self._coming[1].wait(CLOSE_SECONDS)

    def prepare(self) -> None:
        """Begin to read what the first `draw` will need."""
        place = WindowPosition(self.state["epoch"], self.state["number"], self.state["window"])
        if not self.state["ended"] and self._current is None and self._coming is None:
            self._coming = place, BackgroundTask(partial(self._read, place))

    def _which(self) -> str:
        part = self.share
        return (
            ""
            if part == WHOLE
            else f" in part {part.index + 1} of the {part.of} that --shards makes of it (give a smaller one)"
        )

    def _is_over(self, place: WindowPosition) -> bool:
        epochs = self.source.settings.epochs
        return epochs > 0 and place.epoch >= epochs

    def _window(self, place: WindowPosition) -> Window:
        if self._current is None or self._current.place != place:
            ahead, self._coming = self._coming, None
            # a wait that was given up before anyone needed its outcome is begun anew
            stale = ahead is None or (ahead[1].done and isinstance(ahead[1].error, SourceTimeout))
            if ahead is None or stale or ahead[0] != place:
                self._current = self._read(place)
            else:
                self._current = ahead[1].result()
            following = self._current.following
            if following != place and not self._is_over(following):
                self._coming = following, BackgroundTask(partial(self._read, following))
        return self._current

    def _read(self, place: WindowPosition) -> Window:
        size = max(self.source.settings.shuffle_window // self.share.of, 1)
        skipped: list[str] = []
        documents = self.source.documents(place.start, skipped, self.share)
        wanted = (document for document in documents if text_hash(document.text) not in self.excluded)
        drawn = list(tokenised(islice(wanted, size), self.tokenizer))
        if len(drawn) == size:
            following = WindowPosition(place.epoch, place.number + 1, drawn[-1][0].cursor)
        else:
            following = WindowPosition(place.epoch + 1, 0, None)
        order = np.random.default_rng([*self.seed, place.epoch, place.number]).permutation(len(drawn))
        return Window(place, [drawn[i] for i in order], following, len(skipped))


class Mixture:
    """Several shuffled sources; the next document comes from the one furthest behind its share of tokens."""

    def __init__(self, parts: list[Shuffled], weights: list[float]):
        self.parts, self.weights = parts, weights

    @property
    def state(self) -> list[Cursor]:
        return [dict(part.state) for part in self.parts]

    @state.setter
    def state(self, states: list[Cursor]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.state = dict(state)

    def draw(self) -> TokenizedDocument | None:
        while live := [i for i, part in enumerate(self.parts) if not part.state["ended"]]:
            furthest = min(live, key=lambda i: (self.parts[i].state["tokens"] / self.weights[i], i))
            drawn = self.parts[furthest].draw()
            if drawn is not None:
                return drawn
        return None


def check_states(states: Any, parts: list[Shuffled]) -> None:
    """Raise `ValueError` unless `states` is what `Mixture.state` may have been for sources such as these."""
    require(isinstance(states, list) and len(states) == len(parts), f"one state a source, {len(parts)}, is wanted")
    for state, part in zip(states, parts, strict=True):
        names = set(part.state)
        require(
            isinstance(state, dict) and set(state) == names, f"a state has the fields {', '.join(sorted(names))}"
        )
        for name in names - {"window", "ended"}:
            require(is_count(state[name]), f"{name}={state[name]!r:.40} is no count")
        require(isinstance(state["ended"], bool), f"ended={state['ended']!r:.40} is neither true nor false")
        window = state["window"]
        if window is None:
            require(state["number"] == 0, "a window without a start is not the first")
            continue
        require(
            isinstance(window, dict)
            and set(window) == {"file", "row", "byte"}
            and all(map(is_count, window.values()))
            and window["file"] < len(part.source.files),
            f"window={window!r:.80} is no place in {part.source.name}",
        )


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
