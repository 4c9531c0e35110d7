"""Pack whole conversations into rows, from a bounded buffer.

A row begins with the oldest document of the buffer. Then follows the longest one that still fits, again and again.
What remains of the row is padding. So every document is used after as many rows as the buffer holds at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.packing import Batch, Packer

SECOND = -(2**30)  # added to the first token of the second of two segments
BUFFER = 128  # documents. More would fill rows of short conversations no better, and cost time at a resume
D = TypeVar("D")


def new_packer(config: DataConfig) -> Any:
    """Return the packer of a kind of data: `BestFitPacker` for conversations, else `Packer`."""
    return (BestFitPacker if config.is_chat else Packer)(config.seq_len)


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """Return the ids of tokens with the marks of `context` and `SECOND` removed."""
    tokens = np.where(tokens < SECOND, tokens - SECOND, tokens)
    return np.where(tokens < 0, ~tokens, tokens)


def context(ids: np.ndarray) -> np.ndarray:
    """Return `ids` as the ids of tokens that are no targets: ~id, which is negative."""
    return ~ids


@dataclass(frozen=True)
class Piece(Generic[D]):
    """A part of a document, to be held by one row: part `part` of the `number`th document."""

    document: D
    tokens: np.ndarray
    number: int
    part: int


class BestFitPacker(Generic[D]):
    """A buffer of documents, and the rows made of them. Documents hold tokens as `context` gives them.

    A document may be of two segments, with `SECOND` added to the `context` that the second begins with.

    A document longer than a row is divided into rows, each of which begins with the last token of the one before.
    """

    def __init__(self, seq_len: int):
        self.documents: list[D] = []
        """Documents in the last batch, in order."""
        self._size = seq_len + 1
        self._buffer: list[Piece[D]] = []  # in the order of their numbers
        self._rows: list[list[Piece[D]]] = []
        self._added = 0

    def wants(self, rows: int) -> bool:
        """Make rows while the buffer is full. Return whether a batch of `rows` rows needs more documents."""
        while len(self._rows) < rows and len(self._buffer) >= BUFFER:
            self._rows.append(self._row())
        return len(self._rows) < rows

    def add(self, document: D, tokens: np.ndarray, kept: list[int] | None = None) -> None:
        """Append a document, or after a resume only its parts `kept`. Raises `IndexError` for a part too many."""
        starts = range(0, max(len(tokens) - 1, 1), self._size - 1)
        for part in range(len(starts)) if kept is None else kept:
            piece = tokens[starts[part] : starts[part] + self._size]
            self._buffer.append(Piece(document, piece, self._added, part))
        self._added += 1

    @property
    def left(self) -> list[list[int]]:
        """Return the parts in the buffer, for each document from the oldest in the buffer on."""
        first = self._buffer[0].number if self._buffer else self._added
        kept: list[list[int]] = [[] for _ in range(first, self._added)]
        for piece in self._buffer:
            kept[piece.number - first].append(piece.part)
        return kept

    def batch(self, rows: int) -> Batch:
        """Return the next rows. Rows past the last document are padding."""
        while len(self._rows) < rows and self._buffer:
            self._rows.append(self._row())
        made, self._rows = self._rows[:rows], self._rows[rows:]
        tokens = np.zeros((rows, self._size), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i, row in enumerate(made):
            _fill(tokens[i], segment_ids[i], row)
        self.documents = list({id(piece.document): piece.document for row in made for piece in row}.values())
        return Batch(tokens, segment_ids)

    def _row(self) -> list[Piece[D]]:
        return list(self._fitting())

    def _fitting(self) -> Iterator[Piece[D]]:
        piece, room = self._buffer.pop(0), self._size
        while True:
            yield piece
            room -= len(piece.tokens)
            lengths = [len(one.tokens) if len(one.tokens) <= room else 0 for one in self._buffer]
            if not any(lengths):
                return
            piece = self._buffer.pop(lengths.index(max(lengths)))  # the oldest of equals


def _fill(tokens: np.ndarray, segment_ids: np.ndarray, row: list[Piece[D]]) -> None:
    at = segment = 0
    for piece in row:
        part = piece.tokens
        segment_of = segment + 1 + np.cumsum(part < SECOND)
        tokens[at : at + len(part)] = ids_of(part)
        segment_ids[at : at + len(part)] = np.where(part >= 0, segment_of, -segment_of)
        at, segment = at + len(part), int(segment_of[-1])
