"""Make the training batches, each with the cursor from which the same next batch follows.

A cursor is a few hundred bytes of JSON. A cursor holds the document being cut, the offset in it, and hashes of
what must not change. The rows of a batch come from a fixed number of shards. So each process can make its own
rows, and the batches do not depend on the number of processes.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections import deque
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import xxhash

from smollm_jax.config.settings import Config
from smollm_jax.data.best_fit import new_packer
from smollm_jax.data.packing import Batch, num_targets
from smollm_jax.data.readers import Cursor
from smollm_jax.data.shuffle import CLOSE_SECONDS, DAMAGED, ShuffledSource, TokenizedDocument, exclusions, is_count
from smollm_jax.data.sources import Shard, mixture, open_source
from smollm_jax.runtime.errors import UserError, require, say_once
from smollm_jax.tokenizer.tokenizer import Tokenizer

NAMED = {"tokenizer": "tokenizer", "held_out": "held-out documents", "shards": "shards", "template": "template"}
BATCHES_AHEAD = 4  # made while the device works. Two windows of tokens are in memory anyway


def afresh(step: int, tokenizer: str) -> Cursor:
    """Return the cursor of a run that begins to read other data after `step`. `tokenizer` is as in its cursor."""
    return {"step": step, "tokenizer": tokenizer, "afresh": True}


def begins_afresh(cursor: Any) -> bool:
    """Return whether the cursor is one of `afresh`."""
    return cursor.get("afresh") is True


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` if the tokenizer has ids that the model has no embedding for."""
    sizes = f"the tokenizer has {tokenizer.vocab_size:,} entries, the model only vocab_size={vocab_size:,}"
    require(tokenizer.vocab_size <= vocab_size, f"{sizes}; give --vocab-size or another --tokenizer")


class ShardStream:
    """A stream of the rows of shard `index`, packed from a mixture of shuffled sources.

    The next document comes from the source furthest below the share of tokens that its weight asks for.
    """

    def __init__(self, loader: Loader, index: int):
        seed, data = loader.config.run.seed, loader.config.data
        shard = Shard(index, data.shards)
        shuffle = partial(ShuffledSource, tokenizer=loader.tokenizer, excluded=loader.excluded, shard=shard)
        self.mixture = [(shuffle(s, seed=[seed, i]), weight) for i, (s, weight) in enumerate(loader.mixture)]
        self.sources = [source for source, _ in self.mixture]
        self.chat, self.packer = data.is_chat, new_packer(data)
        self.ended = False
        # states of the sources before each document was drawn, from the oldest with a part left
        self._before: deque[list[Cursor]] = deque()
        self._carried: deque[Any] = deque()  # after a seek: what is left of each document that is drawn again

    def batch(self, rows: int) -> Batch:
        """Make the next rows. After the last document, the rows are padding."""
        while (self._carried or self.packer.wants(rows)) and not self.ended:
            before, drawn = self._states(), self._draw()
            left = [self._carried.popleft()] if self._carried else []
            try:
                if drawn is None:
                    self.ended = not left
                    require(self.ended, f"{DAMAGED}: it points past the last document")
                else:
                    self.packer.add(*drawn, *left)
                    self._before.append(before)
            except IndexError:
                raise UserError(f"{DAMAGED}: it points past the end of a document") from None
        return self.packer.batch(rows)

    @property
    def cursor(self) -> Cursor:
        """Return the sources' states before the oldest document with a part left, and what is left.

        That is an offset, or in chat data the parts in the buffer of each document since the oldest.
        """
        left = self.packer.left
        while len(self._before) > len(left):
            self._before.popleft()
        sources = self._before[0] if left else self._states()
        if not self.chat:
            return {"sources": sources, "offset": left[0] if left else None}
        return {"sources": sources, "kept": left, "dropped": sum(state["dropped"] for state in self._states())}

    def seek(self, cursor: Any) -> None:
        """Continue after `cursor`. Raises `UserError` unless it may have been a cursor of this shard."""
        states, count = cursor["sources"], len(self.sources)
        left = cursor["kept"] if self.chat else [] if cursor["offset"] is None else [cursor["offset"]]
        counts = chain.from_iterable(left) if self.chat else left
        fits = isinstance(states, list) and len(states) == count and all(map(is_count, counts))
        require(fits, f"{DAMAGED}: {cursor!r:.200} is not a position in {count} sources")
        for source, state in zip(self.sources, states, strict=True):
            source.seek(state)
        self._carried = deque(left)

    def _states(self) -> list[Cursor]:
        return [dict(source.state) for source in self.sources]

    def _draw(self) -> TokenizedDocument | None:
        drawn = None
        while drawn is None and (live := [pair for pair in self.mixture if not pair[0].state["ended"]]):
            source, _ = min(live, key=lambda pair: pair[0].state["tokens"] / pair[1])  # the first of equals
            drawn = source.draw()
        return drawn


class BatchIterator:
    """A synchronous iterator over the batches after `cursor`, each with its own cursor.

    `cursor=None` gives all batches. If the loader has only some shards, the batches hold only the rows of these
    shards and never end. This process cannot know whether the other shards have ended.
    """

    def __init__(self, loader: Loader, cursor: Any):
        """Raise `UserError` if the batches after `cursor` would not be the same."""
        self.loader, self.step = loader, 0
        self.shards = {index: ShardStream(loader, index) for index in loader.shards}
        self.sources = [source for shard in self.shards.values() for source in shard.sources]
        if cursor is not None:
            try:
                loader.check(cursor)
                self.step = cursor["step"]
                for index, shard in self.shards.items() if not begins_afresh(cursor) else ():
                    shard.seek(cursor["lanes"][str(index)])
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{DAMAGED}: {type(error).__name__} {error}") from None
        if len(self.shards) > 1:  # one by one, each would wait for its first window
            for source in self.sources:
                source.prepare()

    def __next__(self) -> tuple[Batch, Cursor]:
        config = self.loader.config
        if self.step >= config.total_steps:
            raise StopIteration
        count = config.data.shards
        rows = config.batch_size_at(self.step + 1) // count
        made = [shard.batch(rows) for shard in self.shards.values()]
        tokens = np.concatenate([part.tokens for part in made])
        segment_ids = np.concatenate([part.segment_ids for part in made])
        batch = Batch(tokens, segment_ids, min(self.shards) * rows)
        ended = len(made) == count and all(shard.ended for shard in self.shards.values())
        if ended and num_targets(batch) == 0:
            raise StopIteration
        self.step += 1
        shards = {str(index): shard.cursor for index, shard in self.shards.items()}
        return batch, {"step": self.step, **self.loader.fixed, **_totals(shards), "lanes": shards}

    def documents(self) -> list[dict[str, Any]]:
        """Return source, file, row and text of each document in the last batch."""
        found = [document for shard in self.shards.values() for document in shard.packer.documents]
        return [{"source": d.source, "file": d.file, "row": d.row, "text": d.text} for d in found]


class Loader:
    """The training data of a run, opened once. A `BatchIterator` reads the data from any cursor on.

    `fixed` has what the batches depend on besides the settings: hashes of files, tokenizer and held-out texts.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        held_out: Iterable[TokenizedDocument] = (),
        *,
        shards: Iterable[int] | None = None,
        resumes: bool = False,
    ):
        """Open the sources, without the texts of `held_out`. Raises as `open_source` does.

        `shards` are the neighbouring shards wanted of the `config.data.shards`. None gives all.
        """
        data = config.data
        self.config, self.tokenizer = config, tokenizer
        self.mixture = [(open_source(spec, data, resumes=resumes), weight) for spec, weight in mixture(data.data)]
        self._report_copies()
        self.origins = [{"revision": one.revision, "license": one.license} for one, _ in self.mixture]
        self.excluded = exclusions(one for one, _ in held_out)
        self.shards = list(range(data.shards) if shards is None else shards)
        self.fixed: Cursor = {
            "shards": data.shards,
            "fingerprints": {source.name: source.fingerprint for source, _ in self.mixture},
            "tokenizer": tokenizer.fingerprint[:16],
            "held_out": xxhash.xxh3_64_hexdigest(repr(sorted(self.excluded)).encode()),
        }
        if data.is_chat:
            self.fixed["template"] = xxhash.xxh3_64_hexdigest(str(tokenizer.chat_template).encode())

    def _report_copies(self) -> None:
        """Log files that are read more than once, as by two parts of a mixture."""
        first: dict[str, str] = {}
        pairs = (zip(x.fingerprint.split(), x.files, strict=True) for x, _ in self.mixture)
        if copies := [file for one, file in chain.from_iterable(pairs) if first.setdefault(one, file) is not file]:
            say_once(f"read twice: {len(copies)} files have name and content of another, such as {copies[0]}")

    def check(self, cursor: Any) -> None:
        """Raise `UserError` if `cursor` belongs to other data."""
        afresh = "bring the old ones back, or train afresh with --new-run"
        if begins_afresh(cursor):  # the tokenizer alone is the same
            cursor = self.fixed | {name: cursor[name] for name in ("step", "tokenizer")}
        before = cursor["fingerprints"]
        # by place in the mixture, because data may have moved. Two sources of one name have one fingerprint
        places = list(before.values()) if len(before) == len(self.mixture) else []
        for i, (source, _) in enumerate(self.mixture):
            name, now, then = source.name, source.fingerprint, places[i] if places else before.get(source.name)
            require(isinstance(then, str), f"the checkpoint was made with other data than {name}; {afresh}")
            changes = source.changes_since(then)
            require(now == then, f"the files of {name} changed since the checkpoint ({changes}); {afresh}")
        for key in self.fixed.keys() & NAMED.keys():
            require(cursor[key] == self.fixed[key], f"the {NAMED[key]} changed since the checkpoint; {afresh}")
        require(is_count(cursor["step"]), f"{DAMAGED}: step={cursor['step']!r:.40} is not a count")


def merge_cursors(cursors: list[Cursor]) -> Cursor:
    """Merge the cursors of processes that made different shards into the cursor of all shards."""
    merged = {index: shard for cursor in cursors for index, shard in cursor["lanes"].items()}
    shards = {str(index): merged[str(index)] for index in range(cursors[0]["shards"])}
    return {**cursors[0], **_totals(shards), "lanes": shards}


def _totals(shards: dict[str, Cursor]) -> Cursor:
    """Return the rows that could not be read, and in chat data the conversations without a target."""
    skipped = sum(state["skipped"] for shard in shards.values() for state in shard["sources"])
    dropped = [shard["dropped"] for shard in shards.values() if "dropped" in shard]
    return {"skipped": skipped} | ({"dropped": sum(dropped)} if dropped else {})


class PrefetchLoader:
    """A thread that prefetches batches. `get` never blocks for long, so that a stop is noticed."""

    def __init__(self, loader: Loader, cursor: Any):
        """Begin after `cursor`. Raises as `BatchIterator` does."""
        self.loader = loader
        self._queue: queue.Queue[Any] = queue.Queue()
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._closed = threading.Event()
        self._batches = BatchIterator(loader, cursor)
        self._thread = threading.Thread(target=self._produce, name="data", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def get(self, *, timeout: float) -> tuple[Batch, Cursor] | None:
        """Return the next batch and its cursor, or None after `timeout` seconds without one.

        Raises `StopIteration` at the end, `SourceTimeout`, or `UserError` for data that cannot be read.
        """
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self._queue.put(item)  # every later call raises it again
            raise item
        self._room.release()
        return item

    def documents_of(self, cursor: Cursor | None) -> list[dict[str, Any]]:
        """Return source, file, row and text of each document in the batch after `cursor`."""
        batches = BatchIterator(self.loader, cursor)
        next(batches)
        return batches.documents()

    def close(self) -> None:
        """Stop making batches."""
        atexit.unregister(self.close)
        self._closed.set()
        self._room.release()
        for source in self._batches.sources:
            source.close()
        self._thread.join(CLOSE_SECONDS)

    def _produce(self) -> None:
        try:
            while not self._closed.is_set():
                self._queue.put(next(self._batches))
                self._room.acquire()
        except BaseException as error:  # `get` raises it
            self._queue.put(error)
