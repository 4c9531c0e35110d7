"""The processes of one job: how they find each other, agree, and notice that one of them is gone.

Each of them runs the same program. What only one may do (lock, records, exports) the first does; what they
have to know of each other goes through `gather`, which all of them call at the same place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from smollm_jax.distributed.watchdog import AGAIN, BEAT_SECONDS, SILENT_SECONDS, Watchdog, read
from smollm_jax.runtime.console import explain
from smollm_jax.runtime.errors import EXIT_STOPPED, UserError, one_line, require
from smollm_jax.runtime.signals import end_with

T = TypeVar("T")
LEAVING: list[int | None] = []  # the exit code once it is settled; None while the processes come together
SHOWN_SECONDS = 10.0  # within which a change of the run folder has to be seen by all
FIRST_LEAVES_SECONDS = 2.0  # after the others


class PeerLost(RuntimeError):
    """Another process did not take part in what all had to."""


class Processes:
    """All processes of the job; `index` is this one. One alone is a job too."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._left = False
        self.watch = Watchdog(index, count)

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes records."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order; waits until each has given its own.

        Raises `PeerLost` where one is gone.
        """
        if not self.several:
            return [value]
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        try:
            with self.watch.exchange():
                sizes = np.asarray(process_allgather(np.array([data.size]))).ravel()
                # of few different lengths: each is a program to compile
                padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)
                padded[: data.size] = data
                rows = np.asarray(process_allgather(padded)).reshape(self.count, -1)
        except (ValueError, RuntimeError) as error:  # Gloo's comes as the one, others' as the other
            raise PeerLost(one_line(error)) from error
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def require_same(self, value: Any, what: str) -> None:
        """Raise `ValueError` in all processes where they do not agree on a JSON value."""
        values = self.gather(value)
        other = next((i for i, theirs in enumerate(values) if theirs != values[0]), None)
        require(other is None, f"{what} are not the same in process 0 and process {other}")

    def agree_on(self, settings: dict[str, Any]) -> None:
        """Raise `ValueError` naming the settings, flat, in which one process differs from the first."""
        everyone = self.gather(settings)
        for index, theirs in enumerate(everyone):
            differ = [f"{n} {everyone[0].get(n)} and {v}" for n, v in theirs.items() if everyone[0].get(n) != v]
            require(not differ, f"process 0 and process {index} were started with different settings: {differ}")

    def together(self, work: Callable[[], T]) -> T:
        """The outcome of `work`, done in each process; where it fails in one, it fails in all."""
        if not self.several:
            return work()
        from smollm_jax.runtime.errors import SourceTimeout

        result, own, fault = None, None, None
        try:
            result = work()
        except PeerLost:
            raise
        except Exception as error:
            own = error
            kind = (
                "wait" if isinstance(error, SourceTimeout) else "mistake" if isinstance(error, UserError) else ""
            )
            fault = [kind, f"{error}"]
        faults = self.gather(fault)
        if own is not None:
            raise own
        for index, theirs in enumerate(faults):
            if theirs is not None:
                failure = {"wait": SourceTimeout, "mistake": UserError}.get(theirs[0], RuntimeError)
                raise failure(f"process {index}: {theirs[1]}")
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """The outcome of `work`, which leaves something in the run folder that the others then find there: the
        first process does it before them.
        """
        result = self.together(lambda: work() if self.first else None)
        others = self.together(lambda: None if self.first else work())
        return result if self.first else others  # type: ignore[return-value]

    def ending(self, work: Callable[[], int]) -> int:
        """The exit code of `work`. Several processes meet before they leave: the library takes the first to go
        for dead, and aborts the others. A mistake that all have met becomes its exit code here.
        """
        if not self.several:
            return work()
        try:
            code = work()
        except UserError as error:
            code = explain(error)
        if not self._left:
            self._left = True
            LEAVING.append(code)
            self.gather(code)
            if self.first:
                time.sleep(FIRST_LEAVES_SECONDS)
        return code

    @contextmanager
    def watched(self, run_dir: Path) -> Iterator[None]:
        """Inside, leave with exit code 75 when another process falls silent; all see the folder `run_dir`.

        An error of the devices is often what the death of another looks like: it waits until that is known.
        """
        if not self.several:
            yield
            return
        folder = run_dir / ".processes"
        self.together(lambda: folder.mkdir(parents=True, exist_ok=True))
        self.watch.start(folder)
        try:
            with self.watch.long("what comes before or after training"):
                yield
        except Exception as error:
            lost = isinstance(error, PeerLost) or "Gloo" in str(error)
            if lost or type(error).__module__.startswith("jax"):
                time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
            if lost:
                end_with(f"the connection to another process broke: {str(error)[:200]}; {AGAIN}", EXIT_STOPPED)
            raise
        finally:
            self.watch.over.set()

    def require_shared(self, run_dir: Path) -> None:
        """Raise `ValueError` in all processes unless each sees at once what the first writes beside `run_dir`."""
        if not self.several:
            return
        path = run_dir.parent / f".{run_dir.name}.shared"
        token = self.gather(f"{time.time()}")[0]
        for word in (token, f"{token} again"):
            blind = self._blind(path, word)
            require(
                not blind,
                f"what process 0 writes into {run_dir.parent} is not seen by process {', '.join(map(str, blind))} "
                f"within {SHOWN_SECONDS:.0f} s; --run-dir has to be in a folder that all share, and that shows "
                "changes at once",
            )
        if self.first:
            path.unlink(missing_ok=True)

    def _blind(self, path: Path, word: str) -> list[int]:
        """The processes that do not see the `word` that the first writes."""

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.first:
                path.write_text(word)

        self.together(write)
        deadline = time.monotonic() + SHOWN_SECONDS
        while read(path) != word and time.monotonic() < deadline:
            time.sleep(0.1)
        return [i for i, sees in enumerate(self.gather(read(path) == word)) if not sees]
