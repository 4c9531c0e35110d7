"""Exchange values among the processes of one job, which all run the same program.

All processes call `Processes.gather` at the same place, to learn what they must know of each other.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smollm_jax.distributed.watchdog import Watchdog
from smollm_jax.runtime.errors import EXIT_FAILED, SourceTimeout, UserError, one_line, require

FAULTS = (RuntimeError, UserError, SourceTimeout)  # shared, the gravest first. A RuntimeError stands for any other


class PeerLost(RuntimeError):
    """An error: another process did not take part in an exchange."""


class Processes:
    """The processes of the job, of which this one is `index`. A process alone is a job of one.

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
        """Return the JSON values of all processes in their order. Waits until each has called `gather`.

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
        """Raise `UserError` in all processes, naming the JSON values that differ from the first process's."""
        first, *others = self.gather(values)
        for index, theirs in enumerate(others, start=1):
            names = [name for name, value in theirs.items() if value != first.get(name)]
            differ = [f"{name} {first.get(name)!s:.80} and {theirs[name]!s:.80}" for name in names]
            require(not differ, f"process 0 and process {index} were started with different {what}: {differ}")

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run the body in each process. The gravest error of any is raised in all, so that all end in one way."""
        fault = None
        try:
            yield
        except PeerLost:
            raise
        except Exception as error:
            fault = error
        kind = next((i for i in (1, 2) if isinstance(fault, FAULTS[i])), 0)
        shared = self.gather(None if fault is None else [kind, self.index, str(fault)])
        if faults := [theirs for theirs in shared if theirs is not None]:
            kind, index, message = min(faults)
            if index == self.index and fault is not None:
                raise fault
            raise FAULTS[kind](f"process {index}: {message}")

    @contextmanager
    def first_then_rest(self) -> Iterator[None]:
        """Run as `all_or_none`. The other processes enter the body after the first one has left it."""
        for turn_of_first in (True, False):
            with self.all_or_none():
                if self.first == turn_of_first:
                    yield
