"""Shuffle documents in windows, and tokenize them ahead of their use.

The state of a source names the start of its window and an index into the window's order. A resume reads the window
again. While one window is in use, a background thread reads the next, so at most two are in memory.
"""

import atexit
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import xxhash

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.chat import encode_to_fit
from smollm_jax.data.documents import Document
from smollm_jax.data.readers import Cursor
from smollm_jax.data.sources import START, WHOLE, Shard, Source
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import SourceTimeout, UserError, require
from smollm_jax.tokenizer.tokenizer import EOS, Tokenizer

# documents: enough to keep the tokenizer's threads busy, few enough that memory per token stays small
TOKENIZED_TOGETHER, CHARACTERS_TOGETHER = 256, 2**24
CLOSE_SECONDS = 5.0
DAMAGED = "the data cursor is damaged"
TokenizedDocument = tuple[Document, np.ndarray]


def text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def exclusions(held_out: Iterable[Document]) -> dict[int, int]:
    """Return the hash of each held-out text, with the characters of it to train on."""
    return {text_hash(one.kept + one.text): len(one.kept) for one in held_out}


def without(excluded: dict[int, int], documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents without held-out text. `excluded` maps the hash of a text to the characters to keep."""
    for document in documents:
        kept = excluded.get(text_hash(document.text), len(document.text))
        if kept == len(document.text):
            yield document
        elif kept:
            yield replace(document, text=document.text[:kept])


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, settings: DataConfig | None = None
) -> Iterator[TokenizedDocument]:
    """Yield documents with their tokens, a text ended by one eos. One group is tokenized at a time.

    The `settings` are needed for chat data. A conversation ends with its template, fits a row, and is empty if
    nothing of it is trained.
    """
    for group in _groups(documents):
        yield from zip(group, _tokens(group, tokenizer, settings), strict=True)


def _tokens(group: list[Document], tokenizer: Tokenizer, settings: DataConfig | None) -> Iterator[np.ndarray]:
    talks: dict[int, np.ndarray] = {}
    end = tokenizer.eos_id
    if settings is not None and settings.is_chat:
        places = [i for i, document in enumerate(group) if document.conversation]
        encoded = encode_to_fit([group[i] for i in places], tokenizer, settings)
        end = tokenizer.special_tokens.get(EOS, end)  # a text ends as the base model's do, not as a turn
        talks = {i: tokens for i, (tokens, _) in zip(places, encoded, strict=True)}
    texts = iter(tokenizer.encode_batch([one.text for i, one in enumerate(group) if i not in talks]))
    for i in range(len(group)):
        ids = talks[i] if i in talks else next(texts)
        ended = i in talks or (len(ids) > 0 and ids[-1] == end)  # by its own post-processor
        yield ids if ended else np.append(ids, np.int32(end))


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == TOKENIZED_TOGETHER or characters >= CHARACTERS_TOGETHER:
            yield group
            group, characters = [], 0
    if group:
        yield group


class Window(NamedTuple):
    """The documents of a window in shuffled order, and the state after it. `skipped` counts unreadable rows."""

    documents: list[TokenizedDocument]
    following: Cursor
    skipped: int


class ShuffledSource:
    """A shard of one source in shuffled windows, epoch after epoch. `state` names the next document.

    The shards' windows together hold as many documents as one window of the whole source.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, *, seed: list[int], excluded: dict[int, int], shard: Shard
    ):
        self.source, self.tokenizer, self.excluded, self.shard = source, tokenizer, excluded, shard
        self.seed = seed if shard == WHOLE else [*seed, shard.index]
        self.state: Cursor = {
            "window": None, "number": 0, "index": 0, "epoch": 0, "tokens": 0, "documents": 0, "skipped": 0,
            "ended": False,
        }  # fmt: skip
        if source.settings.is_chat:
            self.state["dropped"] = 0  # conversations without a turn to train on
        self._current: Window | None = None
        self._next: BackgroundTask[Window] | None = None
        atexit.register(self.close)

    def draw(self) -> TokenizedDocument | None:
        """Return the next document and its tokens, eos included. Returns None after the last epoch.

        Documents without tokens are counted and passed over.
        """
        state = self.state
        while not state["ended"]:
            window, i = self._window(), state["index"]
            if i == 0:
                state["skipped"] += window.skipped
            if i < len(window.documents):
                state["index"] += 1
                if not len(window.documents[i][1]):
                    state["dropped"] += 1
                    continue
                state["tokens"] += len(window.documents[i][1])
                if "documents" in state:  # version 0.1 did not count them
                    state["documents"] += 1
                return window.documents[i]
            require(i == len(window.documents), f"the cursor points past a window of {self.source.name}")
            index, count = self.shard.index, self.shard.count
            where = "" if count == 1 else f" in shard {index + 1} of {count} (give a smaller --shards)"
            if not window.documents and state["number"] == 0:
                empty = f"--data {self.source.name} holds no document to train on{where}"
                raise UserError(f"{empty}; held-out documents do not count")
            if window.following["epoch"] > state["epoch"] and not state["tokens"]:
                settings, what = self.source.settings, f"conversations{where} has an answer that fits"
                what = f"pairs{where} has two different answers that fit" if settings.is_pairs else what
                none = f"none of {state['dropped']:,} {what} --seq-len {settings.seq_len}"
                raise UserError(f"--data {self.source.name}: {none}")
            state |= window.following
            self._current = None
        return None

    def seek(self, state: Any) -> None:
        """Continue from `state`, before the first `draw`. Raises `UserError` if it is no state of this source."""
        start = START if state["window"] is None else state["window"]
        counts = {**state, **start, "window": 0, "ended": 0}
        require(
            set(self.state) - {"documents"} <= set(state) <= set(self.state)
            and set(start) == set(START)
            and all(map(is_count, counts.values()))
            and isinstance(state["ended"], bool)
            and (start["file"] < len(self.source.files) if state["window"] else state["number"] == 0),
            f"{DAMAGED}: {state!r:.200} is not a state of {self.source.name}",
        )
        self.state = dict(state)

    def prepare(self) -> None:
        """Begin to read the window that the first `draw` needs, before that `draw`."""
        if not self.state["ended"]:
            self._next = BackgroundTask(partial(self._read, dict(self.state)))

    def close(self) -> None:
        """Stop reading. Waits up to `CLOSE_SECONDS` for the window that is being read ahead.

        A thread inside Arrow at interpreter exit would crash the process, so `close` also runs at exit.
        """
        atexit.unregister(self.close)
        self.source.closed.set()
        ahead = self._next  # once: the thread that draws may take it at any moment
        if ahead is not None:
            ahead.wait(CLOSE_SECONDS)

    def _window(self) -> Window:
        if self._current is None:
            ahead, self._next = self._next, None
            if ahead is None or isinstance(ahead.error, SourceTimeout):
                # a read ahead that timed out before its window was needed is started again
                self._current = self._read(self.state)
            else:
                self._current = ahead.result()
            if not self._current.following["ended"]:
                self._next = BackgroundTask(partial(self._read, self._current.following))
        return self._current

    def _read(self, state: Cursor) -> Window:
        """Read the window at whose start the source has `state`."""
        size = max(self.source.settings.shuffle_window // self.shard.count, 1)
        skipped: list[str] = []
        documents = self.source.documents(state["window"], skipped, self.shard)
        wanted = islice(without(self.excluded, documents), size)
        in_order = list(tokenize(wanted, self.tokenizer, self.source.settings))
        epoch, number = state["epoch"], state["number"]
        if len(in_order) == size:
            following = {"window": in_order[-1][0].cursor, "number": number + 1, "index": 0, "epoch": epoch}
        else:
            following = {"window": None, "number": 0, "index": 0, "epoch": epoch + 1}
        following["ended"] = 0 < self.source.settings.epochs <= following["epoch"]
        order = np.random.default_rng([*self.seed, epoch, number]).permutation(len(in_order))
        return Window([in_order[i] for i in order], following, len(skipped))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
