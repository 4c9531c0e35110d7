"""Work done ahead of its use, in a thread that never keeps the process from ending.

The threads of `concurrent.futures` are joined when Python ends; a read that stalls in one would hold a
finished run. These are daemons, and whoever waits for one may put a limit on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """`work()` under way; `result` waits for it and returns or raises what it did."""

    def __init__(self, work: Callable[[], T]):
        self._work = work
        self._value: T
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is done after at most `seconds`."""
        self._thread.join(seconds)
        return self.done

    def result(self, seconds: float | None = None) -> T:
        """Its outcome; raises `TimeoutError` when it is not done within `seconds`."""
        if not self.wait(seconds):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        if self.error is not None:
            raise self.error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # it is raised where the result is asked for
            self.error = error
