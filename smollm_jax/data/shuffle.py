"""Shuffle documents in windows, and tokenize them ahead of their use.

The state of a source names the start of its window and an index into the window's order; a resume reads the
window again. While one window is in use, a background thread reads and tokenizes the next. At most two
windows are held at a time, however long the stream.
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
from smollm_jax.data.sources import START, WHOLE, Document, Shard, Source
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import SourceTimeout, require
from smollm_jax.tokenizer.tokenizer import Tokenizer

# documents: enough to keep the tokenizer's threads busy, few enough that memory per token stays small
TOKENIZED_TOGETHER = 256
CLOSE_SECONDS = 5.0
DAMAGED = "the data cursor is damaged"
TokenizedDocument = tuple[Document, np.ndarray]


def text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Yield documents with their tokens, each ended by eos; one group is tokenized at a time."""
    documents = iter(documents)
    while group := list(islice(documents, TOKENIZED_TOGETHER)):
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
    """The documents of a window in shuffled order."""

    position: WindowPosition
    documents: list[TokenizedDocument]
    following: WindowPosition
    skipped: int
    """Rows that could not be read."""


class ShuffledSource:
    """A shard of one source in shuffled windows, epoch after epoch; `state` names the next document.

    The shards' windows together hold as many documents as one window of the whole source.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, *, seed: list[int], excluded: frozenset[int], shard: Shard
    ):
        self.source, self.tokenizer, self.excluded, self.shard = source, tokenizer, excluded, shard
        self.seed = seed if shard == WHOLE else [*seed, shard.index]
        self.state: Cursor = {
            "window": None, "number": 0, "index": 0, "epoch": 0, "tokens": 0, "skipped": 0, "ended": False,
        }  # fmt: skip
        self._current: Window | None = None
        self._next: tuple[WindowPosition, BackgroundTask[Window]] | None = None
        atexit.register(self.close)

    def draw(self) -> TokenizedDocument | None:
        """Return the next document and its tokens, eos included; None after the last epoch."""
        state = self.state
        while not state["ended"]:
            window, i = self._window(self._position()), state["index"]
            if i == 0:
                state["skipped"] += window.skipped
            if i < len(window.documents):
                state["index"] += 1
                state["tokens"] += len(window.documents[i][1])
                return window.documents[i]
            require(i == len(window.documents), f"the cursor points past a window of {self.source.name}")
            require(
                window.documents != [] or window.position.number > 0,
                f"--data {self.source.name} holds no document to train on{self._which()}; held-out documents do "
                "not count",
            )
            following = window.following
            state |= {"window": following.start, "number": following.number, "index": 0}
            state |= {"epoch": following.epoch, "ended": self._is_over(following)}
        return None

    def seek(self, state: Any) -> None:
        """Continue from `state`; raises `UserError` unless it may have been a state of this source."""
        window, names = state["window"], set(self.state)
        counts = [state[name] for name in names - {"window", "ended"}]
        if window is not None:
            counts += [window[name] for name in START]
        require(
            set(state) == names
            and all(map(is_count, counts))
            and isinstance(state["ended"], bool)
            and (state["number"] == 0 if window is None else window["file"] < len(self.source.files))
            and (window is None or set(window) == set(START)),
            f"{DAMAGED}: {state!r:.200} is not a state of {self.source.name}",
        )
        self.state = dict(state)

    def prepare(self) -> None:
        """Begin to read the window that the first `draw` needs."""
        if not self.state["ended"] and self._current is None and self._next is None:
            self._read_ahead(self._position())

    def close(self) -> None:
        """Stop reading; wait up to `CLOSE_SECONDS` for the window that is being read ahead.

        A thread inside Arrow at interpreter exit would crash the process, so `close` also runs at exit.
        """
        atexit.unregister(self.close)
        self.source.closed.set()
        if self._next is not None:
            self._next[1].wait(CLOSE_SECONDS)

    def _position(self) -> WindowPosition:
        return WindowPosition(self.state["epoch"], self.state["number"], self.state["window"])

    def _which(self) -> str:
        index, count = self.shard.index, self.shard.count
        return "" if self.shard == WHOLE else f" in shard {index + 1} of {count} (give a smaller --shards)"

    def _is_over(self, position: WindowPosition) -> bool:
        return 0 < self.source.settings.epochs <= position.epoch

    def _window(self, position: WindowPosition) -> Window:
        if self._current is None or self._current.position != position:
            ahead, self._next = self._next, None
            # a read that timed out before its window was needed is started again
            stale = ahead is None or isinstance(ahead[1].error, SourceTimeout)
            if ahead is None or stale or ahead[0] != position:
                self._current = self._read(position)
            else:
                self._current = ahead[1].result()
            following = self._current.following
            if following != position and not self._is_over(following):
                self._read_ahead(following)
        return self._current

    def _read_ahead(self, position: WindowPosition) -> None:
        self._next = position, BackgroundTask(partial(self._read, position))

    def _read(self, position: WindowPosition) -> Window:
        size = max(self.source.settings.shuffle_window // self.shard.count, 1)
        skipped: list[str] = []
        documents = self.source.documents(position.start, skipped, self.shard)
        kept = (document for document in documents if text_hash(document.text) not in self.excluded)
        in_order = list(tokenize(islice(kept, size), self.tokenizer))
        if len(in_order) == size:
            following = WindowPosition(position.epoch, position.number + 1, in_order[-1][0].cursor)
        else:
            following = WindowPosition(position.epoch + 1, 0, None)
        order = np.random.default_rng([*self.seed, position.epoch, position.number]).permutation(len(in_order))
        return Window(position, [in_order[i] for i in order], following, len(skipped))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
