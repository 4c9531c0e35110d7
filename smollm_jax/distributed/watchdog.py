"""The watch over the other processes of a job: who is dead, and what takes too long.

Each process has a heart, a thread that counts on in a file of a folder that all see, and an ear that reads those
of the others. One that is stopped or dead falls silent. What a process does has a limit of its own, and one that
does not move while its heart beats ends itself by it. What all do together, such as a step, has one too, but only
time counts in which no process is at something long: else all would leave because one waits for its data.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from smollm_jax.runtime.errors import EXIT_STOPPED
from smollm_jax.runtime.signals import end_with

AGAIN = "what was saved stands; run the same command in all processes to go on"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # after which a process is taken for dead
OWN_SECONDS = 20.0  # for what a process does between two steps; with the silence after it less than a minute
STEP_SECONDS = 45.0  # that a network may be down in a step, however short steps are
EXCHANGE_SECONDS = 300.0  # for what all send each other, and the program that does it to compile
LONGEST_SECONDS = 3600.0  # for what has no measure: the first step, a save, a batch of an evaluation, the start
TIMES_THE_USUAL = 20  # what a step may take
BEAT_BYTES = 32
LONG, SHORT = "long", "short"


@dataclass
class Limit:
    """Of what a process is at; `passed` seconds of it are over.

    `own`: what lies between two steps; `common`: what takes all of them; `long`: what the others wait for in
    patience.
    """

    kind: Literal["own", "common", "long"]
    seconds: float
    what: str
    passed: float = 0.0


class Watchdog:
    """Of one process, `index` of `count`; `over` ends it."""

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self.over = threading.Event()
        self.others_are_long = True
        self._limits: list[Limit] = []
        self._usual: dict[int, deque[float]] = {}

    def start(self, folder: Path) -> None:
        """Have a heart, an ear, and a clock, which waits for no disk."""
        for work in (partial(self._beat, folder), partial(self._listen, folder), self._count):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def moving(self) -> AbstractContextManager[None]:
        """Inside, leave with exit code 75 when this process stands still between two steps."""
        return self._within(Limit("own", OWN_SECONDS, "what lies between steps"))

    def step(self, rows: int, what: str) -> AbstractContextManager[None]:
        """As `moving`, for a step of so many rows, which may take many times what the like of it took of late."""
        took = self._usual.get(rows)
        usual = min(TIMES_THE_USUAL * statistics.median(took), LONGEST_SECONDS) if took else LONGEST_SECONDS
        return self._within(Limit("common", STEP_SECONDS + usual, what))

    def step_took(self, rows: int, seconds: float) -> None:
        """Take these for what a step of so many rows takes, the wait for the next rows included."""
        self._usual.setdefault(rows, deque(maxlen=9)).append(seconds)

    def exchange(self) -> AbstractContextManager[None]:
        """As `moving`, for what all send each other."""
        return self._within(Limit("common", EXCHANGE_SECONDS, "an exchange among the processes"))

    def long(self, what: str, seconds: float = LONGEST_SECONDS) -> AbstractContextManager[None]:
        """As `moving`, for what may take so many seconds, and is waited for by the others."""
        return self._within(Limit("long", seconds, what))

    def moved(self) -> None:
        """The limit that holds begins anew."""
        for limit in self._limits[-1:]:
            limit.passed = 0.0

    @contextmanager
    def _within(self, limit: Limit) -> Iterator[None]:
        """What holds around it begins anew after it."""
        self._limits.append(limit)
        try:
            yield
        finally:
            self._limits.pop()
            self.moved()

    def _state(self) -> str:
        return SHORT if any(limit.kind != "long" for limit in self._limits[-1:]) else LONG

    def _beat(self, folder: Path) -> None:
        """In place, and always as many bytes, so that the heart goes on where a disk is full; closed each time,
        which is when a network's file system shows it to others.
        """
        beats = 0
        while not self.over.wait(BEAT_SECONDS):
            beats += 1
            with suppress(OSError):  # a full disk is no death
                file = os.open(folder / str(self.index), os.O_WRONLY | os.O_CREAT, 0o666)
                try:
                    os.pwrite(file, f"{os.getpid()} {beats} {self._state()}".ljust(BEAT_BYTES).encode(), 0)
                finally:
                    os.close(file)

    def _listen(self, folder: Path) -> None:
        heard: dict[int, tuple[str, float]] = {i: ("", 0.0) for i in range(self.count) if i != self.index}
        for passed in self._ticks():
            for i, (words, silent) in heard.items():
                now = read(folder / str(i))
                heard[i] = now, silent + passed if now == words else 0.0
                if heard[i][1] > SILENT_SECONDS:
                    silence = f"process {i} of {self.count} has been silent for {SILENT_SECONDS:.0f} s"
                    end_with(f"{silence}; {AGAIN}", EXIT_STOPPED)
            self.others_are_long = any(words.split()[-1:] != [SHORT] for words, _ in heard.values())

    def _count(self) -> None:
        """Take from the limit that holds what has passed, and leave when nothing is left."""
        for passed in self._ticks():
            for limit in self._limits[-1:]:
                if limit.kind == "common" and self.others_are_long:
                    continue
                limit.passed += passed
                if limit.passed > limit.seconds:
                    words = f"{limit.what} was not done after {limit.seconds:.0f} s"
                    end_with(f"process {self.index} of {self.count}: {words}; {AGAIN}", EXIT_STOPPED)

    def _ticks(self) -> Iterator[float]:
        """Seconds since the last of them, on a clock that stands while the machine sleeps or a scheduler has
        suspended the job.
        """
        before, worked = time.monotonic(), 0.0
        while not self.over.wait(BEAT_SECONDS):
            now = time.monotonic()
            yield min(now - before, 2 * BEAT_SECONDS) + worked
            before = time.monotonic()
            worked = min(before - now, SILENT_SECONDS / 2)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
