"""The training stream: batches of packed rows, each with the cursor from which the very same next one follows.

A batch's cursor is a few hundred bytes of JSON: the place of the document that is being cut into rows, how
much of it has been used, and what must not have changed since: the files, the tokenizer, what is held out.
The rows come from a fixed number of lanes, so that processes can make theirs alone and the batches do not
depend on how many there are. numpy only: no JAX here.
"""

from __future__ import annotations

import atexit
import copy
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xxhash

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.packing import Batch, Packer, num_targets
from smollm_jax.data.readers import Cursor
from smollm_jax.data.shuffle import CLOSE_SECONDS, Mixture, Shuffled, TokenizedDocument, check_states, is_count
from smollm_jax.data.sources import Document, Shard, Source, changed_files, mixture, open_source
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.tokenizer.tokenizer import Tokenizer

BATCHES_AHEAD = 4  # made while the device works; two windows of tokens are held anyway


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` when the tokenizer has ids that the model has no row for."""
    require(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer has {tokenizer.vocab_size:,} entries, the model only vocab_size={vocab_size:,}; "
        "give --vocab-size or another --tokenizer",
    )


class ShardStream:
    """One of the streams that the rows of a batch come from: a mixture, and the rows cut from it."""

    def __init__(self, mix: Mixture, seq_len: int):
        self.mix = mix
        self._before = mix.state
        self._carried: int | None = None
        self.packer: Packer[Document] = Packer(self._draw, seq_len)

    def batch(self, rows: int) -> Batch:
        """The next rows; `packer.drawn` then has their documents."""
        # the document that goes on from the batch before is one of this batch's too
        self.packer.drawn[:] = self.packer.drawn[-1:] if self.packer.document is not None else []
        if self._carried is not None:
            self._draw_carried()
        return self.packer.batch(rows)

    @property
    def cursor(self) -> Cursor:
        """The drawing state before the current document, and how much of that has been used."""
        current = self.packer.document is not None
        return {
            "sources": copy.deepcopy(self._before if current else self.mix.state),
            "offset": self.packer.offset if current else None,
        }

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        self.mix.state = copy.deepcopy(cursor["sources"])
        self._before = self.mix.state
        self._carried = cursor["offset"]

    def check(self, cursor: Any) -> None:
        """Raise `ValueError` unless `cursor` may have been one of this lane."""
        check_states(cursor["sources"], self.mix.parts)
        offset = cursor["offset"]
        require(offset is None or is_count(offset), f"offset={offset!r:.40} is no count")

    def prepare(self) -> None:
        for part in self.mix.parts:
            part.prepare()

    def _draw(self) -> TokenizedDocument | None:
        self._before = self.mix.state
        return self.mix.draw()

    def _draw_carried(self) -> None:
        """Take up the document that the cursor had reached the middle of."""
        drawn = self._draw()
        offset, self._carried = self._carried, None
        require(
            drawn is not None and offset is not None and offset < len(drawn[1]),
            "the data cursor is damaged: it points behind the end of a document",
        )
        self.packer.document, self.packer.offset = drawn[1], offset  # type: ignore[index,assignment]
        self.packer.drawn.append(drawn[0])  # type: ignore[index]


class BatchIterator:
    """The batches of a run, one after the other, each with its cursor; synchronous.

    The rows come from `shards` lanes in equal parts, in order. Where not all of them are given, the batches
    hold only those rows, and never end: whether others still have some, this process cannot know.
    """

    def __init__(
        self,
        lanes: dict[int, ShardStream],
        shards: int,
        *,
        batch_size_at: Callable[[int], int],
        steps: int,
    ):
        self.lanes, self.shards, self.batch_size_at, self.steps = lanes, shards, batch_size_at, steps
        self.step = 0

    def __next__(self) -> tuple[Batch, Cursor]:
        if self.step >= self.steps:
            raise StopIteration
        rows = self.batch_size_at(self.step + 1) // self.shards
        made = [lane.batch(rows) for lane in self.lanes.values()]
        batch = Batch(
            np.concatenate([part.tokens for part in made]),
            np.concatenate([part.segment_ids for part in made]),
            min(self.lanes) * rows,
        )
        ended = all(lane.packer.ended for lane in self.lanes.values()) and num_targets(batch) == 0
        if ended and len(self.lanes) == self.shards:
            raise StopIteration
        self.step += 1
        return batch, self.cursor

    @property
    def cursor(self) -> Cursor:
        """Plain JSON: where each lane stands."""
        lanes = {str(shard): lane.cursor for shard, lane in self.lanes.items()}
        return {"step": self.step, **self.fixed, "skipped": _skipped(lanes), "lanes": lanes}

    def documents(self) -> list[dict[str, Any]]:
        """Source, file, row and text of the documents in the batch made last."""
        drawn = [document for lane in self.lanes.values() for document in lane.packer.drawn]
        return [{"source": d.source, "file": d.file, "row": d.row, "text": d.text} for d in drawn]

    def close(self) -> None:
        for lane in self.lanes.values():
            for part in lane.mix.parts:
                part.close()

    def _parts(self) -> list[Shuffled]:
        return next(iter(self.lanes.values())).mix.parts

    @property
    def fixed(self) -> Cursor:
        """What the batches behind a cursor depend on besides the settings."""
        part = self._parts()[0]
        return {
            "shards": self.shards,
            "fingerprints": {part.source.name: part.source.fingerprint for part in self._parts()},
            "tokenizer": part.tokenizer.fingerprint[:16],
            "held_out": xxhash.xxh3_64_hexdigest(repr(sorted(part.excluded)).encode()),
        }

    def seek(self, cursor: Any) -> None:
        """Go on behind `cursor`; raises `ValueError` when that cannot give the batches it would have given."""
        try:
            self._check(cursor)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the data cursor is damaged: {type(error).__name__} {error}") from None
        self.step = cursor["step"]
        for shard, lane in self.lanes.items():
            lane.cursor = cursor["lanes"][str(shard)]

    def _check(self, cursor: Any) -> None:
        afresh = "bring the old ones back, or start afresh with --new-run"
        fixed = self.fixed
        require(isinstance(cursor, dict), f"the data cursor is {type(cursor).__name__}, not an object")
        for part in self._parts():
            then, name = cursor["fingerprints"].get(part.source.name), part.source.name
            require(isinstance(then, str), f"the checkpoint was made with other data than {name}; {afresh}")
            require(
                then == part.source.fingerprint,
                f"the files of {name} changed since the checkpoint ({changed_files(part.source, then)}); {afresh}",
            )
        for key, what in (("tokenizer", "tokenizer"), ("held_out", "held-out documents"), ("shards", "shards")):
            require(cursor[key] == fixed[key], f"the {what} changed since the checkpoint; {afresh}")
        try:
            require(is_count(cursor["step"]), f"step={cursor['step']!r:.40} is no count")
            for shard, lane in self.lanes.items():
                lane.check(cursor["lanes"][str(shard)])
        except ValueError as error:
            raise UserError(f"the data cursor is damaged: {error}") from None


def merged(cursors: list[Cursor]) -> Cursor:
    """The cursor of all lanes, from those of processes that made some each."""
    lanes = {shard: lane for cursor in cursors for shard, lane in cursor["lanes"].items()}
    lanes = {str(shard): lanes[str(shard)] for shard in range(cursors[0]["shards"])}
    return {**cursors[0], "skipped": _skipped(lanes), "lanes": lanes}


def _skipped(lanes: dict[str, Cursor]) -> int:
    return sum(state["skipped"] for lane in lanes.values() for state in lane["sources"])


class PrefetchLoader:
    """Batches made ahead of the device by a thread. `get` never blocks for long, so that a stop is heard."""

    def __init__(self, make: Callable[[Cursor | None], BatchIterator], cursor: Cursor | None):
        self._make = make
        self._queue: queue.Queue[Any] = queue.Queue(BATCHES_AHEAD)
        self._closed = threading.Event()
        self._batches = make(cursor)
        self._thread = threading.Thread(target=self._produce, name="data", daemon=True)
        self._thread.start()
        atexit.register(self.close)

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

    @property
    def fixed(self) -> Cursor:
        """What the batches depend on besides the settings: hashes of files, tokenizer and held-out texts."""
        return self._batches.fixed

    def documents_of(self, cursor: Cursor | None) -> list[dict[str, Any]]:
        """Source, file, row and text of the documents in the batch behind `cursor`."""
        batches = self._make(cursor)
        next(batches)
        return batches.documents()

    def close(self) -> None:
        """Stop making batches."""
        atexit.unregister(self.close)
        self._closed.set()
        self._batches.close()
        self._thread.join(CLOSE_SECONDS)

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


def open_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    batch_size_at: Callable[[int], int],
    steps: int,
    excluded: frozenset[int] = frozenset(),
    resumes: bool = False,
    shards: Iterable[int] | None = None,
) -> Callable[[Cursor | None], BatchIterator]:
    """Open the sources; the result gives the batches behind a cursor, without the texts hashed in `excluded`.

    `shards` are the lanes wanted, neighbours, of the `config.shards`; default: all. Raises
    `ValueError` when a source cannot be opened or is not the one the cursor was made with.
    """
    named: list[tuple[Source, float]] = [
        (open_source(spec, config, resumes=resumes), weight) for spec, weight in mixture(config.data)
    ]
    count = config.shards
    wanted = list(range(count) if shards is None else shards)

    def lane(shard: int) -> ShardStream:
        parts = [
            Shuffled(source, tokenizer, seed=[seed, i], excluded=excluded, share=Shard(shard, count))
            for i, (source, _) in enumerate(named)
        ]
        return ShardStream(Mixture(parts, [weight for _, weight in named]), config.seq_len)

    def make(cursor: Cursor | None) -> BatchIterator:
        lanes = {shard: lane(shard) for shard in wanted}
        batches = BatchIterator(lanes, count, batch_size_at=batch_size_at, steps=steps)
        if cursor is not None:
            batches.seek(cursor)
        if len(lanes) > 1:  # one by one, each would wait for its first window
            for each in lanes.values():
                each.prepare()
        return batches

    return make


def open_stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    batch_size_at: Callable[[int], int],
    steps: int,
    cursor: Cursor | None = None,
    excluded: frozenset[int] = frozenset(),
    shards: Iterable[int] | None = None,
) -> PrefetchLoader:
    """The training stream behind `cursor`: `open_batches`, made ahead of the device.

    With a cursor, also raises `SourceTimeout` when the Hub does not answer for `data_timeout` seconds.
    """
    make = open_batches(
        config,
        tokenizer,
        seed=seed,
        batch_size_at=batch_size_at,
        steps=steps,
        excluded=excluded,
        resumes=cursor is not None,
        shards=shards,
    )
    return PrefetchLoader(make, cursor)
