"""Start workers, give them cases, and notice what hangs, dies, or prints a traceback."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.worker import LIMIT_SECONDS, LIMITS, SOUND
from tests.support.paths import ROOT

START_SECONDS = 300.0  # to prepare sound files, on a machine in use
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Result:
    """What came of a case: kind is accepted, refused or failed."""

    target: str
    seed: int
    number: int
    what: str
    kind: str
    seconds: float
    problem: str = ""

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --targets {self.target} --seed {self.seed} --only {self.number}"
        return f"{again}\n    changed: {self.what}\n    {self.problem}"


class Worker:
    """A process that runs the cases of a target in a folder of its own, in a session of its own."""

    def __init__(self, target: str, base: Path, seed: int):
        self.target, self.seed, self.log, self._read = target, seed, base / "worker.log", 0
        for name in ("tmp", "cwd", "home"):
            (base / name).mkdir(exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "TMPDIR": str(base / "tmp"), "HF_HUB_OFFLINE": "1",
            "HOME": str(base / "home"), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        self._buffer = b""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", target, str(base), str(seed)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=base / "cwd",
                start_new_session=True,
            )  # fmt: skip
        self.printed()
        self.sound = self._result(SOUND, START_SECONDS)

    def run(self, number: int) -> Result:
        """Run a case; afterwards the worker may be gone."""
        if self.process.stdin:
            with suppress(OSError):  # it has died
                self.process.stdin.write(f"{number}\n".encode())
                self.process.stdin.flush()
        return self._result(number, LIMITS.get(self.target, LIMIT_SECONDS))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the worker and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def printed(self) -> str:
        """Return what the log holds since the last call."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        self._read += len(text)
        return text.decode("utf-8", "replace")

    def _result(self, number: int, limit: float) -> Result:
        said: dict[str, Any] = {"what": "?", "kind": "failed", "seconds": 0.0, "problem": ""}
        began = time.monotonic()
        # a copy of the files takes time too, which is not the case's
        for seconds in (max(limit, 30.0), limit):
            answer = self._answer(seconds)
            if answer is None:
                is_hung = self.alive
                self.close()
                lines = [line.strip() for line in self.printed().splitlines()]
                frames = [line for line in lines if "/smollm_jax/" in line][:4] if is_hung else lines[-6:]
                ends = f"hangs for {limit:g} s" if is_hung else f"ends the process ({self.process.returncode})"
                said |= {"problem": f"{ends}: {' '.join(frames)[:700]}", "seconds": time.monotonic() - began}
                break
            said |= answer
        printed = self.printed()
        if said["kind"] != "failed" and TRACEBACK in printed:
            said |= {"kind": "failed", "problem": f"prints a traceback: {' '.join(printed.split())[-400:]}"}
        return Result(self.target, self.seed, number, **said)

    def _answer(self, limit: float) -> dict[str, Any] | None:
        """Return the next answer; None if the process ends, or says nothing for so long."""
        deadline, pipe = time.monotonic() + limit, self.process.stdout
        assert pipe is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            more = os.read(pipe.fileno(), 2**16)
            if not more:
                self.process.wait()
                return None
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))


def fuzz(target: str, numbers: Iterable[int], seed: int, seconds: float = float("inf")) -> Iterator[Result]:
    """Run cases of a target by their numbers, from 1 on, until the time is over.

    The sound case comes first, and last: a server has to answer after all that was sent. Of these two a failure
    alone is a result.
    """
    worker, until = None, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{target}-", ignore_cleanup_errors=True) as folder:
        try:
            for number in numbers:
                if worker is None or not worker.alive:
                    if worker is not None:
                        worker.close()
                    worker = Worker(target, Path(folder), seed)
                    if worker.sound.kind != "accepted":
                        yield worker.sound
                        return
                if time.monotonic() > until:
                    break
                yield worker.run(number)
            if worker is not None and worker.alive and (last := worker.run(SOUND)).kind != "accepted":
                yield last
        finally:
            if worker is not None:
                worker.close()


def check(target: str, count: int, seed: int) -> None:
    """Assert that no case of a target fails, and that its changes are neither all harmless nor all too much."""
    results = list(fuzz(target, range(1, count + 1), seed))
    failures = [str(result) for result in results if result.kind == "failed"]
    assert not failures, "\n".join(failures)
    assert len(results) == count
    assert {result.kind for result in results} == {"accepted", "refused"}


def table(results: dict[str, list[Result]], seconds: dict[str, float]) -> str:
    """Markdown: a row for each target."""
    lines = [
        "| target | cases | refused | accepted | slowest, s | seconds | failures |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = {**results, "**all**": [one for found in results.values() for one in found]}
    for name, found in rows.items():
        counts = [f"{sum(one.kind == kind for one in found):,}" for kind in ("refused", "accepted", "failed")]
        slowest, took = max((one.seconds for one in found), default=0.0), seconds.get(name, sum(seconds.values()))
        cells = [name, f"{len(found):,}", *counts[:2], f"{slowest:.1f}", f"{took:.0f}", counts[2]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
