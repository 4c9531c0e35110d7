"""Run each side of a comparison in a process of its own, so that memory and faults stay with their side.

On a CPU all sides live at once and take turns round by round, so that other load on the machine affects them
alike; or each side has the machine for itself, twice. On an accelerator each side has the device for itself,
because nobody else uses it and its memory is scarce.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness.tables import resident
from smollm_jax.runtime.devices import has_accelerator
from smollm_jax.runtime.errors import one_line

Seconds = dict[str, float]
TURNS_ALONE = 2


@dataclass
class Ready:
    """A side that is ready: `run` does one round and returns its seconds by name."""

    run: Callable[[], Seconds]
    facts: dict[str, Any] = field(default_factory=dict)
    device_peak_bytes: Callable[[], int | None] = lambda: None
    """Peak memory on the device so far; None on a CPU, where the process's own memory counts."""


@dataclass
class Outcome:
    """The result of a side; `failed` is one line on why it has no rounds."""

    rounds: list[Seconds] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int | None = None
    processor: dict[str, float] = field(default_factory=dict)
    """Host costs per round, on average: seconds of threads, seconds of the system for them, page faults."""
    failed: str | None = None

    def of(self, name: str) -> list[float]:
        """Return the seconds called `name` of each round."""
        return [seconds[name] for seconds in self.rounds]

    def on(self, reference: Outcome) -> Outcome:
        """Return this outcome, or a failure if it ran on another kind of device than `reference`."""
        here, there = self.facts.get("device"), reference.facts.get("device")
        if self.failed or here == there or None in (here, there):
            return self
        return Outcome(failed=f"it ran on {here}, the other side on {there}")


def repeated(call: Callable[[], Any], times: int, wait: Callable[[Any], Any]) -> Callable[[], Seconds]:
    """Return a round of `times` calls, then `wait(what the last returned)`; its seconds are called "round"."""

    def run() -> Seconds:
        start = time.perf_counter()
        for _ in range(times):
            made = call()
        wait(made)
        return {"round": time.perf_counter() - start}

    return run


def peak_bytes_on(device: Any) -> Callable[[], int | None]:
    """Return a function that gives the peak bytes allocated on a JAX device; None on a CPU."""
    return lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")


def kind_of(device: Any) -> str:
    """Return PyTorch's name for the kind of a JAX device."""
    return "cuda" if device.platform == "gpu" else str(device.platform)


def compare(
    sides: dict[str, Callable[[], Ready]],
    *,
    rounds: int,
    alone: bool = False,
    environments: Mapping[str, dict[str, str]] | None = None,
) -> dict[str, Outcome]:
    """Make every side ready and run its rounds, after one round that is not counted.

    `alone`, on a CPU: no other side is alive meanwhile, and after the others each is made ready once more for the
    same rounds. `environments` holds extra environment variables for a side's process.
    """
    environments = environments or {}
    if not (alone or has_accelerator()):
        return _in_turn(sides, rounds, environments)
    outcomes: dict[str, Outcome] = {}
    for _ in range(1 if has_accelerator() else TURNS_ALONE):
        for name, make in sides.items():
            found, before = _in_turn({name: make}, rounds, environments)[name], outcomes.get(name)
            _show(name, found)  # the lease of a machine may end before the table
            outcomes[name] = _joined(before, found) if before else found
    return outcomes


def _show(name: str, outcome: Outcome) -> None:
    rounds = outcome.rounds or [{}]
    medians = {what: statistics.median(outcome.of(what)) for what in rounds[0]}
    seconds = ", ".join(f"{what} {value:.4g} s" for what, value in medians.items())
    print(f"{name}: {outcome.failed or seconds}", file=sys.stderr, flush=True)


def _joined(before: Outcome, found: Outcome) -> Outcome:
    """Return the first outcome with the rounds of both, or the one that failed."""
    if before.failed or found.failed:
        return before if before.failed else found
    before.rounds += found.rounds
    return before


def _in_turn(
    makes: dict[str, Callable[[], Ready]], rounds: int, environments: Mapping[str, dict[str, str]]
) -> dict[str, Outcome]:
    sides: dict[str, _Side] = {}
    try:
        for name, make in makes.items():  # one after the other, because each times its own start
            with mock.patch.dict(os.environ, environments.get(name, {})):
                sides[name] = _Side(name, make)
        for round_ in range(-1, rounds):
            for side in sides.values():
                seconds = side.ask("round")
                if seconds is not None and round_ >= 0:
                    side.outcome.rounds.append(seconds)
        for side in sides.values():
            if (told := side.ask("used")) is not None:
                side.outcome.peak_bytes, used = told
                side.outcome.processor = {name: value / rounds for name, value in used.items()}
    finally:
        for side in sides.values():
            side.end()
    return {name: side.outcome for name, side in sides.items()}


class _Side:
    def __init__(self, name: str, make: Callable[[], Ready]):
        self.outcome = Outcome()
        context = multiprocessing.get_context("spawn")  # JAX and CUDA do not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), name=name)
        self._process.start()
        theirs.close()
        self.outcome.facts = self._answer() or {}

    def ask(self, order: str) -> Any:
        """Return the answer; None from a side that has failed."""
        if self.outcome.failed is not None:
            return None
        self._connection.send(order)
        return self._answer()

    def end(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            ok, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            ok, answer = False, f"its process ended with exit code {self._process.exitcode}"
        if ok:
            return answer
        self.outcome.failed = answer
        self.outcome.rounds.clear()
        print(f"{self._process.name} failed: {answer}", file=sys.stderr)
        return None


def _serve(connection: Connection, make: Callable[[], Ready]) -> None:
    """Make the side ready, then do a round per order until the connection closes."""
    try:
        ready = make()
        connection.send((True, ready.facts))
        warm: dict[str, float] = {}
        for order in iter(lambda: _received(connection), None):
            if order == "used":
                used = {name: value - warm[name] for name, value in _processor_so_far().items()}
                connection.send((True, (ready.device_peak_bytes() or resident("VmHWM"), used)))
                continue
            answer = ready.run()
            if not warm:
                _forget_resident_peak()
                warm = _processor_so_far()
            connection.send((True, answer))
    except Exception as error:
        if not isinstance(error, ValueError | ImportError):  # their message is enough
            traceback.print_exc()
        connection.send((False, _reason(error)))


def _received(connection: Connection) -> str | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _reason(error: Exception) -> str:
    if any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")):
        return "out of memory"
    return one_line(error)


def _processor_so_far() -> dict[str, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"threads, s": used.ru_utime, "system, s": used.ru_stime, "page faults": used.ru_minflt}


def _forget_resident_peak() -> None:
    """Reset the peak: memory that the compiler held once is not needed by a round."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_child(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` in a process that ends afterwards and so frees its memory on an accelerator."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} ended with exit code {process.exitcode}")
