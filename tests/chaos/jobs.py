"""Stop jobs of several processes and go on with other numbers of them: `python -m tests.chaos.jobs`.

A run is stopped at random moments by what can happen to one process or all of them, and each time goes on with
another number of processes and devices. In the end every batch must be that of the straight run, which one
process made on one device, and every loss its loss but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.runs.records import read_metrics
from tests.chaos.__main__ import scenarios

LAYOUTS = ((1, 1), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2))
"""Processes, and devices of each."""
WAYS = ("kill -9 of the first", "kill -9 of another", "kill -9 of all", "SIGTERM to one", "SIGTERM to all")
LEAVES_SECONDS = 120.0
"""Within which all have to be gone."""
RELATIVE = 1e-3
"""How far a loss may be from the straight run's."""


@dataclass(frozen=True)
class StoppedJob:
    """One start of a job: how it was ended, whether it went on from another layout, and what was wrong."""

    way: str
    elastic: bool
    wrong: str = ""


def started(config: Config, processes: int, devices: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = []
    for i in range(processes):
        compute = config.compute
        if processes > 1:
            compute = replace(compute, coordinator=address, num_processes=processes, process_id=i)
        path = Path(config.run_dir).with_suffix(f".{i}.json")
        path.write_text(json.dumps(to_dict(replace(config, compute=compute))))
        log = Path(config.run_dir).with_suffix(f".{i}.log").open("a")
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-m", "smollm_jax.training.verify_resume", str(path)]
        job.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
    return job


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def ended(job: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes; None for a process that does not end."""
    deadline, result = time.monotonic() + LEAVES_SECONDS, []
    for process in job:
        try:
            result.append(process.wait(max(deadline - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            result.append(None)
    return result


def stop(job: list[subprocess.Popen[bytes]], way: str, rng: random.Random) -> list[subprocess.Popen[bytes]]:
    """End a job in that way; returns the processes that have to notice by themselves."""
    number = signal.SIGTERM if way.startswith("SIGTERM") else signal.SIGKILL
    if way.endswith("all"):
        hit = job
    elif way.endswith("first"):
        hit = job[:1]
    else:
        hit = [rng.choice(job[1:] or job)]
    for process in hit:
        process.send_signal(number)
    return job if number == signal.SIGTERM else [process for process in job if process not in hit]


def pieces(config: Config, rng: random.Random, stops: int) -> list[StoppedJob]:
    """Stop the run up to so many times, then let it finish."""
    run_dir, made, before = Path(config.run_dir), [], None
    for _ in range(stops):
        layout = rng.choice([layout for layout in LAYOUTS if layout != before])
        job, way = started(config, *layout), rng.choice(WAYS)
        target = last_step(run_dir) + rng.randint(1, 8)
        while all(process.poll() is None for process in job) and last_step(run_dir) < target:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        left = stop(job, way, rng)
        codes = ended(left)
        for process in job:
            process.wait()
        if codes and all(code == 0 for code in codes):
            break
        wrong = "" if all(code in (75, 0) for code in codes) else f"exit codes {codes} after {way}, {layout}"
        made.append(StoppedJob(way, before is not None, wrong))
        before = layout
    codes = ended(started(config, *rng.choice(LAYOUTS)))
    if any(codes):
        made.append(StoppedJob("to its end", True, f"exit codes {codes}"))
    return made


def difference(straight: Path, other: Path) -> str:
    """What is not the same in two runs; "" if all is."""
    one, two = read_metrics(straight), read_metrics(other)
    if [x["step"] for x in one] != [x["step"] for x in two]:
        return f"{len(one)} and {len(two)} lines"
    for a, b in zip(one, two, strict=True):
        if a.get("ledger") != b.get("ledger") or a.get("tokens") != b.get("tokens"):
            return f"step {a['step']}: other batches"
        for name in {"loss", "eval_loss"} & a.keys():
            if not math.isclose(a[name], b[name], rel_tol=RELATIVE):
                return f"step {a['step']}: {name} {a[name]} and {b[name]}"
    return ""


def chaos_jobs(folder: Path, *, stops: int, seed: int) -> tuple[list[tuple[StoppedJob, bool]], list[str]]:
    """At least `stops` stops; each with whether all was well with it and its run, and what was not."""
    base = scenarios(folder, folder / "compiled")["mixture"]
    run = replace(base.run, phases="60x8", checkpoint_every=7, eval_every=30)
    config = replace(base, run=run, optimizer=replace(base.optimizer, learning_rate=1e-3))
    straight = replace(config, run=replace(run, run_dir=str(folder / "straight")))
    assert ended(started(straight, 1, 1)) == [0], (folder / "straight.0.log").read_text()
    made: list[tuple[StoppedJob, bool]] = []
    wrong: list[str] = []
    number = 0
    while len(made) < stops:
        number += 1
        run_dir = folder / f"run-{number}"
        done = pieces(replace(config, run=replace(run, run_dir=str(run_dir))), random.Random(seed + number), 4)
        differs = difference(folder / "straight", run_dir)
        problems = [piece.wrong for piece in done if piece.wrong] + ([differs] if differs else [])
        wrong += [f"{run_dir}: {problem}" for problem in problems]
        made += [(piece, not differs and not piece.wrong) for piece in done]
        print(f"run {number}: {len(done)} stops, {'; '.join(problems) or 'as it should be'}", file=sys.stderr)
    return made, wrong


def table(made: list[tuple[StoppedJob, bool]]) -> str:
    """Markdown: a row for each way, and one for going on with another number of processes or devices."""
    tries = Counter(piece.way for piece, _ in made)
    good = Counter(piece.way for piece, well in made if well)
    lines = ["| jobs | tries | same batches, losses to rounding | lost |", "|---|---:|---:|---:|"]
    lines += [f"| {way} | {tries[way]} | {good[way]} | {tries[way] - good[way]} |" for way in WAYS if tries[way]]
    elastic = [well for piece, well in made if piece.elastic]
    lines.append(f"| went on with others | {len(elastic)} | {sum(elastic)} | {elastic.count(False)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = Path(tempfile.mkdtemp(prefix="chaos-jobs-"))
    made, wrong = chaos_jobs(folder, stops=settings.stops, seed=settings.seed)
    print(table(made))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
