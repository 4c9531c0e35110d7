"""The processes of one job, which all run the same program.

What they must know of each other goes through `Processes.gather`, which all of them call at the same place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smollm_jax.distributed.watchdog import Watchdog
from smollm_jax.runtime.errors import EXIT_FAILED, SourceTimeout, UserError, one_line, require

FIRST_LEAVES_SECONDS = 2.0  # after the others: JAX's clients abort when the first process is gone
FAULTS = (RuntimeError, UserError, SourceTimeout)  # shared, the gravest first; a RuntimeError stands for any other


class PeerLost(RuntimeError):
    """Another process did not take part in an exchange."""


class Processes:
    """The processes of the job, of which this one is `index`; a process alone is a job of one.

    The first process alone holds the lock and writes records and exports.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.watchdog = Watchdog(index, count)
        self.exit_code = EXIT_FAILED  # the exit code that this process ends with
        self.leaving = False  # whether `exit_code` is final, whatever happens to the other processes

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes in their order; waits until each has called it.

        Raises `PeerLost` if a process is gone.
        """
        if not self.several:
            return [value]
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        try:
            with self.watchdog.exchange():
                sizes = np.asarray(process_allgather(np.array([data.size]))).ravel()
                # padded to few different lengths, because each is a program to compile
                padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)
                padded[: data.size] = data
                rows = np.asarray(process_allgather(padded)).reshape(self.count, -1)
        except (ValueError, RuntimeError) as error:  # Gloo raises the first, other transports the second
            raise PeerLost(one_line(error)) from error
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def require_same(self, values: dict[str, Any], what: str) -> None:
        """Raise `UserError` in all processes, naming the JSON values in which one differs from the first."""
        everyone = self.gather(values)
        for index, theirs in enumerate(everyone):
            pairs = [(name, everyone[0].get(name), value) for name, value in theirs.items()]
            differ = [f"{name} {first!s:.80} and {value!s:.80}" for name, first, value in pairs if first != value]
            require(not differ, f"process 0 and process {index} were started with different {what}: {differ}")

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run the body in each process; if it fails in one, the same kind of error is raised in all."""
        fault = None
        try:
            yield
        except PeerLost:
            raise
        except Exception as error:
            fault = error
        self._raise_in_all(fault)

    @contextmanager
    def first_then_rest(self) -> Iterator[None]:
        """As `all_or_none`, but the other processes enter the body after the first one has left it."""
        if not self.first:
            self._raise_in_all(None)
        with self.all_or_none():
            yield
        if self.first:
            self._raise_in_all(None)

    def _raise_in_all(self, fault: Exception | None) -> None:
        """Raise the gravest fault of any process in all of them, so that all end in the same way."""
        kind = next((i for i in (1, 2) if isinstance(fault, FAULTS[i])), 0)
        shared = self.gather(None if fault is None else [kind, self.index, str(fault)])
        if not (found := [theirs for theirs in shared if theirs is not None]):
            return
        kind, index, message = min(found)
        if index == self.index and fault is not None:
            raise fault
        raise FAULTS[kind](f"process {index}: {message}")

    def leave(self, code: int) -> None:
        """Wait until all processes are about to leave; `code` becomes the exit code of this one.

        JAX takes a process that leaves early for dead and aborts the others.
        """
        self.exit_code, self.leaving = code, True
        self.gather(code)
        if self.first and self.several:
            time.sleep(FIRST_LEAVES_SECONDS)
