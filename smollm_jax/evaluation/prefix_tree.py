"""Pack texts to be scored into rows in which texts that begin alike share their beginning.

The choices of a question repeat its text. So a row holds prefix trees, one after the other, their nodes in
depth-first order: a token is computed once for all texts that reach it. `model.attention.tree_attention` lets a
node see its ancestors alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Request(NamedTuple):
    """The ids to read, at least one, and what should follow each of the last of these ids."""

    ids: list[int]
    targets: list[int]


class Row:
    """A row of `length` tokens: ids, depths in their tree, and where each token's subtree ends, int32 (T,).

    `requests` are the numbers of those in the row. `nodes` and `targets` list the targets of all, in that order.
    """

    def __init__(self, length: int):
        self.tokens, self.depths = np.zeros((2, length), np.int32)
        self.ends = np.arange(1, length + 1, dtype=np.int32)  # padding sees only itself
        self.used = 0
        self.requests: list[int] = []
        self.nodes: list[int] = []
        self.targets: list[int] = []
        self._path, self._last = np.zeros(0, np.int32), np.zeros(0, np.int32)  # nodes and ids of the last request

    def add(self, number: int, request: Request) -> None:
        """Add a request, which shares what it can with the last one. There must be room."""
        ids = np.asarray(request.ids, np.int32)
        shared = shared_length(self._last, ids)
        end = self.used + len(ids) - shared
        new = np.arange(self.used, end, dtype=np.int32)
        self.tokens[new], self.depths[new] = ids[shared:], np.arange(shared, len(ids))
        self._path, self._last, self.used = np.append(self._path[:shared], new), ids, end
        self.ends[self._path] = end
        self.requests.append(number)
        self.nodes += self._path[len(ids) - len(request.targets) :].tolist()
        self.targets += request.targets


def pack(requests: Sequence[Request], numbers: Sequence[int], length: int) -> list[Row]:
    """Return rows that hold the requests of these `numbers`, none of which is longer than `length`.

    Requests that share at least half of their ids stay together, as far as they fit. The groups are packed by
    first-fit decreasing (Johnson 1973).
    """
    groups: list[tuple[int, list[int]]] = []  # each with the tokens that it takes
    last, size, group = np.zeros(0, np.int32), 0, list[int]()
    for number in sorted(numbers, key=lambda number: requests[number].ids):  # equal beginnings are neighbours
        ids = np.asarray(requests[number].ids, np.int32)
        shared = shared_length(last, ids)
        if group and (2 * shared < len(ids) or size + len(ids) - shared > length):
            groups.append((size, group))
            group, size, shared = [], 0, 0
        last, size = ids, size + len(ids) - shared
        group.append(number)
    groups += [(size, group)] if group else []
    rows, left = list[Row](), np.full(len(groups), length)
    for size, group in sorted(groups, key=lambda one: -one[0]):
        at = int(np.argmax(left >= size))
        left[at] -= size
        rows += [Row(length)] if at == len(rows) else []
        for number in group:
            rows[at].add(number, requests[number])
    return rows


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many ids two texts share from their beginning."""
    both = min(len(one), len(other))
    differs = np.flatnonzero(one[:both] != other[:both])
    return int(differs[0]) if differs.size else both
