"""The watch over the other processes of a job: who is dead, and what takes too long.

Each process has a heart, a thread that counts on in a file of a folder that all see, and an ear that reads those
of the others. One that is stopped or dead falls silent; one that hangs while its heart beats, or devices that
do, are noticed by what the others wait for.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smollm_jax.stop import EXIT_STOPPED, end_with

AGAIN = "what was saved stands; run the same command in all processes to go on"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # after which a process is taken for dead
LONGEST_SECONDS = 3600.0  # for what has no measure: the first step, what all exchange
TIMES_THE_USUAL = 20
BEAT_BYTES = 32


class Watch:
    """Of one process, `index` of `count`; `over` ends it."""

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self.over = threading.Event()
        self._due: list[tuple[float, str]] = []
        self._usual: deque[float] = deque(maxlen=9)

    def start(self, folder: Path) -> None:
        for work, name in ((self._beat, "heartbeat"), (self._listen, "watch")):
            threading.Thread(target=work, args=(folder,), name=name, daemon=True).start()

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Inside, leave with exit code 75 when `what` is not done after `seconds`."""
        self._due.append((time.monotonic() + seconds, f"{what} was not done after {seconds:g} s"))
        try:
            yield
        finally:
            self._due.pop()

    @contextmanager
    def usual(self, seconds: float, what: str) -> Iterator[None]:
        """`within` so many seconds and many times what the like of it took of late."""
        usual = statistics.median(self._usual) if self._usual else LONGEST_SECONDS / TIMES_THE_USUAL
        began = time.monotonic()
        with self.within(seconds + TIMES_THE_USUAL * usual, what):
            yield
        self._usual.append(time.monotonic() - began)

    def _beat(self, folder: Path) -> None:
        """In place, and always as many bytes: on a full disk the heart goes on."""
        beats, file = 0, os.open(folder / str(self.index), os.O_WRONLY | os.O_CREAT, 0o666)
        while not self.over.wait(BEAT_SECONDS):
            beats += 1
            try:
                os.pwrite(file, f"{os.getpid()} {beats}".ljust(BEAT_BYTES).encode(), 0)
            except OSError:
                continue  # a full disk is no death
        os.close(file)

    def _listen(self, folder: Path) -> None:
        last = {i: ("", time.monotonic()) for i in range(self.count) if i != self.index}
        while not self.over.wait(BEAT_SECONDS):
            now = time.monotonic()
            for due, words in list(self._due):
                if now > due:
                    end_with(f"{words}; {AGAIN}", EXIT_STOPPED)
            for i, (words, since) in last.items():
                heard = read(folder / str(i))
                if heard != words:
                    last[i] = heard, now
                elif now - since > SILENT_SECONDS:
                    end_with(
                        f"process {i} of {self.count} has been silent for {SILENT_SECONDS:.0f} s; {AGAIN}",
                        EXIT_STOPPED,
                    )


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
