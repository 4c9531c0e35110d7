"""Stop on request: a signal sets a flag that the loop reads between steps.

The signals are SIGTERM, Ctrl-C and a scheduler's warning. Python runs a signal handler only between two bytecodes
of the main thread, which may compile for minutes. So the signal also wakes a thread of ours. The thread exits at
once if nothing would be lost, or on a second SIGTERM or Ctrl-C. While the main thread is known to be busy, another
thread saves in its place.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Self

from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_STOPPED, open_streams, say

INSISTENT = (signal.SIGTERM, signal.SIGINT)  # a second one leaves at once
# warnings before the end: SLURM and submitit send SIGUSR1 or 2, `ulimit -t` SIGXCPU, a closed terminal SIGHUP
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
AGAIN_SECONDS = 1.0  # a signal sooner after the first is the same request: `timeout` and schedulers send two
SAY_SECONDS = 1.0  # to print the last message, which a full pipe or a stopped terminal blocks
LOOK_SECONDS = 0.1  # between two checks of the thread that saves in the main thread's place


def leave(code: int) -> NoReturn:
    """Exit at once, without the interpreter's teardown.

    The teardown has no handler, so a late signal would turn a finished run into a failed one.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # `run_main` has reported it
                stream.flush()
    finally:  # also if a signal ends the wait for a reader that no longer reads
        os._exit(code)


class StopRequest:
    """A context manager around a run. Its first signal sets `requested`. nohup's SIGHUP stays ignored."""

    def __init__(self) -> None:
        self.requested = False
        self.nothing_to_lose: Callable[[], bool] = lambda: True  # whether everything is on disk
        self._first: float | None = None
        self._save: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        open_streams()
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [s for s in (*INSISTENT, *WARNINGS) if s != signal.SIGHUP or not is_nohup]
        self._previous = {s: signal.signal(s, self._handle) for s in heard}
        threading.Thread(target=self._watch, name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._theirs.close()

    @contextmanager
    def away(self, save: Callable[[], None] | None) -> Iterator[None]:
        """While the main thread is busy for minutes, let another thread handle a stop request.

        That thread calls `save` and exits once there is nothing to lose. With None, no thread does.
        """
        self._save = save
        try:
            yield
        finally:
            with self._lock:  # not during a save
                self._save = None

    def _handle(self, *_: object) -> None:
        self.requested = True

    def _watch(self) -> None:
        while numbers := self._ours.recv(16):
            for name in (signal.Signals(n).name for n in numbers if n in self._previous):
                now = time.monotonic()
                if self._first is None:
                    self._first, self.requested = now, True
                    if self.nothing_to_lose():
                        end_with(f"{name}: nothing to save; run the same command to go on", EXIT_STOPPED)
                    _say(f"{name}: saving and stopping; again, a second later, leaves at once")
                    threading.Thread(target=self._stand_in, name="stop-save", daemon=True).start()
                elif signal.Signals[name] in INSISTENT and now - self._first >= AGAIN_SECONDS:
                    end_with(f"{name} again: leaving at once; the last checkpoint stands", EXIT_FAILED)

    def _stand_in(self) -> None:
        while True:
            with self._lock:
                if self._save is not None:
                    self._save()
                    if self.nothing_to_lose():
                        end_with("stopped, saved; run the same command to go on", EXIT_STOPPED)
            time.sleep(LOOK_SECONDS)


class Interrupt(StopRequest):
    """A stop request of a program that goes on: Ctrl-C alone sets it, and it ends no process.

    A second Ctrl-C raises `KeyboardInterrupt`. Outside the main thread, which has the signals, none is handled.
    """

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._handle)} if is_main else {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: of another language

    def _handle(self, *_: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.requested = now, True
            with contextlib.suppress(RuntimeError):  # the signal came inside a print
                say("interrupted: saving and stopping; again, a second later, leaves at once")
        elif now - self._first >= AGAIN_SECONDS:
            raise KeyboardInterrupt


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())


def end_with(message: str, code: int) -> NoReturn:
    """Print `message` and exit immediately, from any thread, even if stderr is blocked."""
    words = threading.Thread(target=_say, args=(message,), daemon=True)
    words.start()
    words.join(SAY_SECONDS)
    os._exit(code)
