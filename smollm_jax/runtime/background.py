"""Run a task in a background thread that never keeps the process from ending.

Python joins the threads of `concurrent.futures` at exit. So a read that stalls in such a thread would keep a
finished run from ending. A `BackgroundTask` is a daemon thread, and waiting for its result can have a time limit.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """A thread that runs `work()`. `result` returns the value of `work()` or raises its error."""

    def __init__(self, work: Callable[[], T]):
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="ahead", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most `seconds`. Returns whether the work is done."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self, seconds: float | None = None) -> T:
        """Return the value of `work()`. Raises its error, or `TimeoutError` after `seconds`."""
        if not self.wait(seconds):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        if self.error is not None:
            raise self.error
        return self._value

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._value = work()
        except BaseException as error:  # raised again by `result`
            self.error = error
