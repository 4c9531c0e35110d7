"""Limit the time of each activity, so that no process waits forever for another.

JAX's heartbeats tell when a process is dead or stopped (see launch.py), not when it is alive and stuck. A process
that exceeds the time limit of an activity ends itself. The time of an activity that takes all processes, such as a
step, counts only while no process is patient. A patient activity is, for example, waiting for data. So each
process publishes its activity in the key-value store of JAX's coordination service.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from smollm_jax.runtime.errors import EXIT_STOPPED
from smollm_jax.runtime.signals import end_with

AGAIN = "what was saved stands; run the same command in all processes to go on"
TICK_SECONDS = 1.0
LONGEST_TICK_SECONDS = 15.0  # more has not passed between two ticks, whatever the clock says
OWN_SECONDS = 20.0  # for the work of a process between two steps. With JAX's heartbeats less than two minutes
STEP_SECONDS = 45.0  # for which a network may be down in a step, however short steps are
EXCHANGE_SECONDS = 300.0  # for an exchange among processes, including the compilation of its program
LONGEST_SECONDS = 3600.0  # for activities without a measure: the first step, a save, an evaluation's batch, setup
TIMES_THE_USUAL = 20  # the median of recent steps, for a step
KEY = "smollm_jax/activity/"


@dataclass
class Limit:
    """The time limit of an activity, of which `passed` seconds are over."""

    kind: Literal["own", "common", "long"]
    """own: between two steps; common: takes all processes; long: the other processes wait patiently."""
    seconds: float
    what: str
    passed: float = 0.0


class Watchdog:
    """The time limits of process `index` of `count`, valid after `start` until `over` is set."""

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self.over = threading.Event()
        self.others_are_long = True
        self._limits: list[Limit] = []
        self._usual: dict[int, deque[float]] = {}

    def start(self, store: Any) -> None:
        """Start two threads. One shares activities through `store`, a client of JAX's service. One counts time."""
        threading.Thread(target=self._share, args=(store,), name="activities", daemon=True).start()
        threading.Thread(target=self._count, name="watchdog", daemon=True).start()

    def limit(self) -> AbstractContextManager[None]:
        """Leave with exit code 75 after `OWN_SECONDS` without progress between two steps."""
        return self._within(Limit("own", OWN_SECONDS, "the work between two steps"))

    def step(self, rows: int, what: str) -> AbstractContextManager[None]:
        """Limit a step to 20 times the median of recent steps with this batch size."""
        took = self._usual.get(rows)
        usual = min(TIMES_THE_USUAL * statistics.median(took), LONGEST_SECONDS) if took else LONGEST_SECONDS
        return self._within(Limit("common", STEP_SECONDS + usual, what))

    def step_took(self, rows: int, seconds: float) -> None:
        """Record a step's duration with this batch size, including the wait for the next rows."""
        self._usual.setdefault(rows, deque(maxlen=9)).append(seconds)

    def exchange(self) -> AbstractContextManager[None]:
        """Limit an exchange among all processes."""
        return self._within(Limit("common", EXCHANGE_SECONDS, "an exchange among the processes"))

    def patient(self, what: str, seconds: float = LONGEST_SECONDS) -> AbstractContextManager[None]:
        """Limit an activity that may take long. Meanwhile the limits of the other processes stand still."""
        return self._within(Limit("long", seconds, what))

    def reset(self) -> None:
        """Start the current limit again: the activity makes progress."""
        for limit in self._limits[-1:]:
            limit.passed = 0.0

    @contextmanager
    def _within(self, limit: Limit) -> Iterator[None]:
        """Hold a limit. The limit around it starts again afterwards."""
        self._limits.append(limit)
        try:
            yield
        finally:
            self._limits.pop()
            self.reset()

    def _share(self, store: Any) -> None:
        published = ""
        for _ in self._ticks():
            state = "short" if any(limit.kind != "long" for limit in self._limits[-1:]) else "long"
            with suppress(Exception):  # a service that does not answer: JAX's heartbeats end the process
                if state != published:
                    store.key_value_set(f"{KEY}{self.index}", state, allow_overwrite=True)
                    published = state
                found = dict(store.key_value_dir_get(KEY))
                others = [found.get(f"{KEY}{i}") for i in range(self.count) if i != self.index]
                self.others_are_long = any(other != "short" for other in others)

    def _count(self) -> None:
        """Add the time that passes to the current limit. Leaves when the limit is exceeded."""
        for passed in self._ticks():
            for limit in self._limits[-1:]:
                if limit.kind == "common" and self.others_are_long:
                    continue
                limit.passed += passed
                if limit.passed > limit.seconds:
                    words = f"{limit.what} was not done after {limit.seconds:.0f} s"
                    end_with(f"process {self.index} of {self.count}: {words}; {AGAIN}", EXIT_STOPPED)

    def _ticks(self) -> Iterator[float]:
        """Yield the seconds since the last tick, few even after sleep or suspension."""
        before, worked = time.monotonic(), 0.0
        while not self.over.wait(TICK_SECONDS):
            now = time.monotonic()
            yield min(now - before, 2 * TICK_SECONDS) + worked
            before = time.monotonic()
            worked = min(before - now, LONGEST_TICK_SECONDS)
