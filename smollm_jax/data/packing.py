"""Documents to full rows. Knows nothing of where tokens come from.

A row holds T+1 tokens and begins with the last token of the row before where a document goes on, so that
every token but a document's first is a target exactly once; only the last row of all has padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np

D = TypeVar("D")


@dataclass(frozen=True)
class Batch:
    """`tokens` and `segment_ids`, int32 (B, T+1); segments count from 1 in each row, 0 is padding.

    Where a process makes only some rows of a batch, they begin at `first_row` of it.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    first_row: int = 0


def num_targets(batch: Batch) -> int:
    """Tokens whose predecessor in the row belongs to the same document."""
    before, after = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    return int(((before == after) & (after != 0)).sum())


@dataclass
class Packer(Generic[D]):
    """Cuts what `draw` gives, documents and their tokens, into rows until it gives None."""

    draw: Callable[[], tuple[D, np.ndarray] | None]
    seq_len: int
    document: np.ndarray | None = None
    """Tokens of the document that the next row goes on with, from `offset`."""
    offset: int = 0
    drawn: list[D] = field(default_factory=list)
    """Documents of the rows made since the caller last emptied it."""
    ended: bool = False

    def row(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        """Fill one row; what the documents do not reach stays as it came."""
        at, segment, size = 0, 1, self.seq_len + 1
        while at < size:
            if self.document is None:
                drawn = None if self.ended else self.draw()
                if drawn is None:
                    self.ended = True
                    return
                self.drawn.append(drawn[0])
                self.document, self.offset = drawn[1], 0
            part = self.document[self.offset : self.offset + size - at]
            tokens[at : at + len(part)] = part
            segment_ids[at : at + len(part)] = segment
            at, self.offset, segment = at + len(part), self.offset + len(part), segment + 1
            if self.offset == len(self.document):
                self.document = None
        if self.document is not None:
            self.offset -= 1  # the next row begins with this row's last token

    def batch(self, rows: int) -> Batch:
        """The next rows; once the documents have ended, rows of padding."""
        tokens = np.zeros((rows, self.seq_len + 1), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i in range(rows):
            self.row(tokens[i], segment_ids[i])
        return Batch(tokens, segment_ids)


def pack(drawn: Iterator[tuple[D, np.ndarray]], seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Documents and their tokens in batches of full rows; only the last batch has padding."""
    packer: Packer[D] = Packer(partial(next, drawn, None), seq_len)
    while True:
        batch = packer.batch(batch_size)
        if packer.ended and not num_targets(batch):
            return
        packer.drawn.clear()
        yield batch
