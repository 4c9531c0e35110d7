"""Documents to batches of packed rows, each with the cursor from which the very same next batch follows.

A row holds T+1 tokens and overlaps the next by one, so that every token but a document's first is a target
exactly once and nothing is cut away. Shuffling goes by windows of documents: the cursor names a window's
start and a place in its order, and a resume reads the window again, so that a few hundred bytes of JSON
hold the whole state. A hash over all batches so far, the ledger, goes with it. numpy only: no JAX here.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from smollm_jax.config import DataConfig, require
from smollm_jax.sources import Document, Source, SourceTimeout, mixture, open_source
from smollm_jax.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "HeldOut",
    "SourceTimeout",
    "Stream",
    "check_vocab",
    "heldout",
    "num_targets",
    "open_stream",
    "plain_batches",
]

Cursor = dict[str, Any]
BATCHES_AHEAD = 4  # made while the device works; a window's tokens are held anyway
TOKENISED_TOGETHER = 256  # documents: enough to keep the tokenizer's threads busy
HELD_OUT_EVERY = 10  # one document in so many, from the head of a source, until there are enough


@dataclass(frozen=True)
class Batch:
    """`tokens` and `segment_ids`, int32 (B, T+1); segments count from 1 in each row, 0 is padding."""

    tokens: np.ndarray
    segment_ids: np.ndarray


def num_targets(batch: Batch) -> int:
    """Tokens whose predecessor in the row belongs to the same document."""
    before, after = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    return int(((before == after) & (after != 0)).sum())


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` when the tokenizer has ids that the model has no row for."""
    require(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer has {tokenizer.vocab_size:,} entries, the model only vocab_size={vocab_size:,}; "
        "give --vocab-size or another --tokenizer",
    )


class Shuffled:
    """One source in shuffled windows, epoch after epoch. `state` says which document comes next."""

    def __init__(self, source: Source, tokenizer: Tokenizer, *, seed: list[int], excluded: frozenset[int]):
        self.source, self.tokenizer, self.seed, self.excluded = source, tokenizer, seed, excluded
        self.state: Cursor = {"window": None, "number": 0, "index": 0, "epoch": 0, "tokens": 0, "ended": False}
        self._loaded: tuple[Any, ...] | None = None

    def draw(self) -> tuple[Document, np.ndarray] | None:
        """The next document and its tokens, eos included; None when all epochs are over."""
        while not self.state["ended"]:
            documents, tokens, after = self._window()
            if self.state["index"] < len(documents):
                i = self.state["index"]
                self.state["index"] += 1
                self.state["tokens"] += len(tokens[i])
                return documents[i], tokens[i]
            if documents:
                self.state |= {"window": after, "number": self.state["number"] + 1, "index": 0}
                continue
            require(
                self.state["number"] > 0,
                f"--data {self.source.name} holds no document to train on; the held-out ones are not counted",
            )
            self.state |= {"window": None, "number": 0, "index": 0, "epoch": self.state["epoch"] + 1}
            epochs = self.source.settings.epochs
            self.state["ended"] = epochs > 0 and self.state["epoch"] >= epochs
        return None

    def _window(self) -> tuple[list[Document], list[np.ndarray], Cursor | None]:
        key = (self.state["epoch"], self.state["number"])
        if self._loaded is None or self._loaded[0] != key:
            documents, after = [], self.state["window"]
            for document in self.source.documents(after):
                after = document.cursor
                if text_hash(document.text) not in self.excluded:
                    documents.append(document)
                if len(documents) == self.source.settings.shuffle_window:
                    break
            order = np.random.default_rng([*self.seed, *key]).permutation(len(documents))
            documents = [documents[i] for i in order]
            self._loaded = key, documents, tokenise(self.tokenizer, documents), after
        return self._loaded[1:]  # type: ignore[return-value]


def tokenise(tokenizer: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    """The ids of each document, ended by eos."""
    encoded = tokenizer.encode_batch([document.text for document in documents]) if documents else []
    return [np.append(ids, np.int32(tokenizer.eos_id)) for ids in encoded]


def text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


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

    def draw(self) -> tuple[Document, np.ndarray] | None:
        while live := [i for i, part in enumerate(self.parts) if not part.state["ended"]]:
            furthest = min(live, key=lambda i: (self.parts[i].state["tokens"] / self.weights[i], i))
            drawn = self.parts[furthest].draw()
            if drawn is not None:
                return drawn
        return None


@dataclass
class Packer:
    """Cuts drawn documents into rows of T+1 tokens; `before` is the drawing state before the current one."""

    draw: Callable[[], tuple[Document, np.ndarray] | None]
    seq_len: int
    document: np.ndarray | None = None
    offset: int = 0
    drawn: list[Document] = field(default_factory=list)
    """Documents of the rows made since the caller last emptied it."""

    def row(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        """Fill one row; what the documents do not reach stays as it came."""
        at, segment, size = 0, 1, self.seq_len + 1
        while at < size:
            if self.document is None:
                drawn = self.draw()
                if drawn is None:
                    return
                self.drawn.append(drawn[0])
                self.document, self.offset = drawn[1], 0
            part = self.document[self.offset : self.offset + size - at]
            tokens[at : at + len(part)] = part
            segment_ids[at : at + len(part)] = segment
            at, self.offset = at + len(part), self.offset + len(part)
            if at < size:
                self.document, segment = None, segment + 1
        self.offset -= 1  # the next row begins with this row's last token

    def batch(self, rows: int) -> Batch:
        tokens = np.zeros((rows, self.seq_len + 1), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i in range(rows):
            self.row(tokens[i], segment_ids[i])
        return Batch(tokens, segment_ids)


def pack(drawn: Iterator[tuple[Document, np.ndarray]], seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Documents and their tokens in batches of full rows; only the last batch has padding."""
    packer = Packer(partial(next, drawn, None), seq_len)
    while num_targets(batch := packer.batch(batch_size)):
        packer.drawn.clear()
        yield batch


def plain_batches(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> Iterator[Batch]:
    """The whole of `config.data` once, source after source, in order; only the last batch has padding.

    Raises `ValueError` when there is nothing to read, or as `Source.documents` does.
    """
    documents = (d for spec, _ in mixture(config.data) for d in open_source(spec, config).documents())
    yield from pack(tokenised(documents, tokenizer), config.seq_len, batch_size)


def tokenised(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents and their tokens, a group at a time."""
    while group := list(islice(documents, TOKENISED_TOGETHER)):
        yield from zip(group, tokenise(tokenizer, group), strict=True)


class Batches:
    """The batches of a run, one after the other, each with its cursor; synchronous."""

    def __init__(self, mix: Mixture, config: DataConfig, *, batch_size_at: Callable[[int], int], steps: int):
        self.mix, self.batch_size_at, self.steps = mix, batch_size_at, steps
        self._before = mix.state
        self.packer = Packer(self._draw, config.seq_len)
        self.step, self.ledger = 0, ""

    def _draw(self) -> tuple[Document, np.ndarray] | None:
        self._before = self.mix.state
        return self.mix.draw()

    def __next__(self) -> tuple[Batch, Cursor]:
        if self.step >= self.steps:
            raise StopIteration
        self.packer.drawn.clear()
        batch = self.packer.batch(self.batch_size_at(self.step + 1))
        if num_targets(batch) == 0:
            raise StopIteration
        self.step += 1
        digest = xxhash.xxh3_128(self.ledger.encode())
        digest.update(batch.tokens.tobytes())
        digest.update(batch.segment_ids.tobytes())
        self.ledger = digest.hexdigest()
        return batch, self.cursor

    @property
    def cursor(self) -> Cursor:
        """Plain JSON: the drawing state before the current document, and how much of that has been used."""
        current = self.packer.document is not None
        return {
            "step": self.step,
            "ledger": self.ledger,
            "fingerprints": {part.source.name: part.source.fingerprint for part in self.mix.parts},
            "skipped": sum(part.source.skipped for part in self.mix.parts),
            "sources": copy.deepcopy(self._before) if current else self.mix.state,
            "offset": self.packer.offset if current else None,
        }

    def seek(self, cursor: Cursor) -> None:
        """Go on behind `cursor`; raises `ValueError` when a source's files are not those it was made with."""
        for part in self.mix.parts:
            name, now = part.source.name, part.source.fingerprint
            then = cursor["fingerprints"].get(name)
            require(
                then == now,
                f"the files of {name} changed since the checkpoint: there were {then}, there are {now}; "
                "bring the old ones back, or start afresh with --new-run",
            )
        self.mix.state = cursor["sources"]
        self._before = self.mix.state
        self.step, self.ledger = cursor["step"], cursor["ledger"]
        if cursor["offset"] is not None:
            drawn = self._draw()
            require(drawn is not None, "the cursor points behind the end of the data")
            self.packer.document, self.packer.offset = drawn[1], cursor["offset"]  # type: ignore[index]
            self.packer.drawn.append(drawn[0])  # type: ignore[index]


class Stream:
    """Batches made ahead of the device by a thread. `get` never blocks for long, so that a stop is heard."""

    def __init__(self, make: Callable[[Cursor | None], Batches], cursor: Cursor | None):
        self._make = make
        self._queue: queue.Queue[Any] = queue.Queue(BATCHES_AHEAD)
        self._closed = threading.Event()
        self._batches = make(cursor)
        self._thread = threading.Thread(target=self._produce, name="data", daemon=True)
        self._thread.start()

    def get(self, *, timeout: float) -> tuple[Batch, Cursor] | None:
        """The next batch and its cursor, or None after `timeout` seconds without one.

        Raises `StopIteration` at the end, `SourceTimeout`, or `ValueError` for data that cannot be read.
        """
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self._queue.put(item)  # it stays the end for whoever asks again
            raise item
        return item

    def documents_of(self, cursor: Cursor | None) -> list[dict[str, Any]]:
        """Source, file, row and text of the documents in the batch behind `cursor`."""
        batches = self._make(cursor)
        current = list(batches.packer.drawn)
        next(batches)
        return [
            {"source": d.source, "file": d.file, "row": d.row, "text": d.text}
            for d in current + batches.packer.drawn
        ]

    def close(self) -> None:
        """Stop making batches."""
        self._closed.set()

    def _produce(self) -> None:
        item: Any
        while not self._closed.is_set():
            try:
                item = next(self._batches)
            except BaseException as error:  # it is raised where the batch is asked for
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


def open_stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    batch_size_at: Callable[[int], int],
    steps: int,
    cursor: Cursor | None = None,
    excluded: frozenset[int] = frozenset(),
) -> Stream:
    """The training stream behind `cursor`, without the texts whose hash is in `excluded`.

    Raises `ValueError` when a source cannot be opened or is not the one the cursor was made with.
    """
    named = [(open_source(spec, config), weight) for spec, weight in mixture(config.data)]

    def make(cursor: Cursor | None) -> Batches:
        parts = [
            Shuffled(source, tokenizer, seed=[seed, i], excluded=excluded) for i, (source, _) in enumerate(named)
        ]
        mix = Mixture(parts, [weight for _, weight in named])
        batches = Batches(mix, config, batch_size_at=batch_size_at, steps=steps)
        if cursor is not None:
            batches.seek(cursor)
        return batches

    return Stream(make, cursor)


def head_texts(config: DataConfig) -> Iterator[str]:
    """Texts from the head of each source in turn, but for the held-out ones."""
    out = held_out_hashes(config)
    for spec, _ in mixture(config.data):
        for document in open_source(spec, config).documents():
            if text_hash(document.text) not in out:
                yield document.text


@dataclass(frozen=True)
class HeldOut:
    """Documents that are never trained on, and their tokens."""

    documents: list[Document]
    tokens: list[np.ndarray]
    seq_len: int

    @property
    def hashes(self) -> frozenset[int]:
        return frozenset(text_hash(document.text) for document in self.documents)

    def batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """The documents in rows, in the same order every time; the last batch is filled up with padding."""
        drawn = zip(self.documents, self.tokens, strict=True)
        return islice(pack(drawn, self.seq_len, batch_size), max_batches)


def heldout(config: DataConfig, tokenizer: Tokenizer) -> HeldOut:
    """The first documents of `eval_data`, or every tenth from the head of the training sources.

    Raises `ValueError` when there are none.
    """
    documents = _held_out_documents(config)
    name = config.eval_data or config.data
    require(bool(documents), f"{name} has no document to hold out; give --eval-data, or --eval-documents 0")
    return HeldOut(documents, tokenise(tokenizer, documents), config.seq_len)


def held_out_hashes(config: DataConfig) -> frozenset[int]:
    documents = _held_out_documents(config) if config.eval_documents and not config.eval_data else []
    return frozenset(text_hash(document.text) for document in documents)


def _held_out_documents(config: DataConfig) -> list[Document]:
    every = 1 if config.eval_data else HELD_OUT_EVERY
    documents: list[Document] = []
    for spec, weight in mixture(config.eval_data or config.data):
        wanted = max(1, round(config.eval_documents * weight))
        taken: dict[int, Document] = {}
        for i, document in enumerate(open_source(spec, config).documents(), 1):
            if i % every == 0:
                taken.setdefault(text_hash(document.text), document)
            if len(taken) == wanted:
                break
        documents += taken.values()
    return documents
