"""Pack tokenized documents into full rows.

A row holds T+1 tokens. If a document continues in the next row, that row begins with the last token of this one.
So every token except a document's first is a target exactly once. Only the last row of all has padding.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

D = TypeVar("D")


@dataclass(frozen=True)
class Batch:
    """A batch of rows: `tokens` and `segment_ids`, int32 (B, T+1).

    Segments count from 1 in each row, and 0 is padding. If a process makes only some rows, its rows begin at
    `first_row`. `text_bytes`, in a batch to score, holds the UTF-8 bytes of text that each token stands for. In a
    conversation, a token that is read and is no target has the segment -s instead of s. Of pairs of answers, the
    chosen have the odd segments, each followed by the rejected.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    first_row: int = 0
    text_bytes: np.ndarray | None = None


def are_targets(segment_ids_BT1: np.ndarray) -> np.ndarray:
    """Return which tokens but the first are targets, bool (B, T), by the rule of `model.loss.targets_of`."""
    before, after = segment_ids_BT1[:, :-1], segment_ids_BT1[:, 1:]
    return (np.abs(before) == after) & (after > 0)


def num_targets(batch: Batch) -> int:
    """Count the tokens whose predecessor in the row belongs to the same document, without mere context."""
    return int(are_targets(batch.segment_ids).sum())


class Packer(Generic[D]):
    """A queue that cuts documents into rows. Call `add` until `rows` is enough for a `batch`."""

    def __init__(self, seq_len: int):
        self.rows = 0
        """Full rows that `batch` can make now."""
        self.documents: list[D] = []
        """Documents in the last batch, in order."""
        self._size = seq_len + 1
        self._queue: deque[tuple[D, np.ndarray]] = deque()
        self._offset = 0  # into the first document of the queue
        self._open = 0  # tokens in the row after the full ones

    def wants(self, rows: int) -> bool:
        """Return whether a batch of `rows` rows needs more documents."""
        return self.rows < rows

    @property
    def state(self) -> int | None:
        """Return the offset at which the next row continues the first document. None if the queue is empty."""
        return self._offset if self._queue else None

    @property
    def left(self) -> list[int]:
        """Return `state` for each document of the queue after a batch: one or none."""
        return [self._offset] if self._queue else []

    def add(self, document: D, tokens: np.ndarray, offset: int = 0) -> None:
        """Append a document from `offset` of its tokens, int32 (n,), on. Raises `IndexError` if that is past n."""
        if offset >= len(tokens):
            raise IndexError(offset)
        if not self._queue:
            self._offset = offset
        self._queue.append((document, tokens))
        self._open += len(tokens) - offset
        while self._open >= self._size:
            self.rows += 1
            self._open -= self._size
            self._open += self._open > 0  # the token that the next row begins with

    def batch(self, rows: int) -> Batch:
        """Cut the next rows. Rows past the last document are padding."""
        tokens = np.zeros((rows, self._size), np.int32)
        segment_ids = np.zeros_like(tokens)
        self.documents = []
        for i in range(rows):
            self._fill(tokens[i], segment_ids[i])
        self.rows, self._open = (self.rows - rows, self._open) if rows <= self.rows else (0, 0)
        return Batch(tokens, segment_ids)

    def _fill(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        at, segment = 0, 1
        while self._queue and at < self._size:
            document, ids = self._queue[0]
            if not self.documents or self.documents[-1] is not document:
                self.documents.append(document)
            part = ids[self._offset : self._offset + self._size - at]
            tokens[at : at + len(part)] = part
            segment_ids[at : at + len(part)] = segment
            at, self._offset, segment = at + len(part), self._offset + len(part), segment + 1
            if self._offset == len(ids):
                self._queue.popleft()
                self._offset = 0
        if self._offset > 0:
            self._offset -= 1  # the next row begins with this row's last token


def pack(
    documents: Iterable[tuple[D, np.ndarray]], seq_len: int, batch_size: int, packer: Any = None
) -> Iterator[Batch]:
    """Pack documents and their tokens into batches, by default of full rows with padding only in the last."""
    packer = Packer(seq_len) if packer is None else packer
    for document, tokens in documents:
        packer.add(document, tokens)
        while not packer.wants(batch_size):
            yield packer.batch(batch_size)
    while num_targets(last := packer.batch(batch_size)):
        yield last
