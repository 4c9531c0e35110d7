"""Prove on a user's recipe that a killed run resumes exactly (`verify-resume`).

The recipe runs twice for a few steps, each time as a process. One run goes straight through. The other is killed
at random steps and started again. Ledger, losses and every bit of parameters and optimizer state must agree.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.listing import steps_in
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import Config
from smollm_jax.runs.load import read_run
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.errors import require, run_main, say
from smollm_jax.runtime.huge_pages import environment
from smollm_jax.runtime.signals import StopRequest, leave
from smollm_jax.runtime.trees import flatten

KILLS = 3
POLL_SECONDS = 0.02
# durations and memory in a line of metrics, which differ from run to run
TIMES = {
    "time", "elapsed_seconds", "tokens_per_second", "packed_tokens_per_second",
    "data_wait_seconds", "step_seconds", "eval_seconds", "mfu",
    "peak_memory_gib",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison: what was compared, each with its first difference or None."""

    steps: int
    compared: dict[str, str | None]
    resumes: int  # how often the run was killed and resumed from a checkpoint

    @property
    def exact(self) -> bool:
        return not any(self.compared.values())


def verify_resume(config: Config, folder: Path, *, steps: int) -> Comparison:
    """Run `config` to step `steps` straight and in pieces in `folder`, and compare.

    Raises `UserError` if the recipe itself cannot run.
    """
    require(steps >= 2, f"--verify-steps {steps} must be at least 2")
    require(steps <= config.total_steps, f"--verify-steps {steps}: the run has only {config.total_steps:,} steps")
    straight, pieces = (_short(config, folder / name, steps) for name in ("straight", "pieces"))
    say(f"straight to step {steps}")
    _finish(straight)
    run_dir, rng = Path(pieces.run_dir), random.Random(config.run.seed)
    stops, resumes = sorted(rng.sample(range(1, steps), min(KILLS, steps - 1))), 0
    for stop in stops:
        process = start(pieces)
        while process.poll() is None and (last_step(run_dir) < stop or not steps_in(run_dir / "checkpoints")):
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:  # it ended by itself
            break
        process.kill()
        process.wait()
        resumes += 1
        say(f"killed at step {last_step(run_dir)}")
    _finish(pieces)
    return Comparison(last_step(run_dir), compare_runs(Path(straight.run_dir), run_dir), resumes)


def _short(config: Config, run_dir: Path, steps: int) -> Config:
    """Return the same run up to `steps`, with checkpoints in between to resume from."""
    run = replace(
        config.run, run_dir=str(run_dir), new_run=False, stop_after=steps, export=False, log_every=1, eval_every=0,
        eval_tasks="", checkpoint_every=max(steps // (KILLS + 1), 1), keep_last=2,
    )  # fmt: skip
    return replace(config, run=run)


def start(config: Config, **options: Any) -> subprocess.Popen[str]:
    """Start `config` as a process of its own."""
    path = Path(config.run_dir).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_dict(config)))
    options = {"stdout": sys.stderr} | options  # stdout is for our own result
    command = [sys.executable, "-m", "smollm_jax.training.verify_resume", str(path)]
    return subprocess.Popen(command, text=True, env=os.environ | environment(), **options)


def _finish(config: Config) -> None:
    code = start(config).wait()
    require(code == 0, f"the run itself ended with exit code {code}; see its messages above")


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def compare_runs(one: Path, other: Path) -> dict[str, str | None]:
    """Compare the records of two runs, and every bit of their newest checkpoints. Returns as in `Comparison`."""
    from smollm_jax.checkpoint.manager import read_params

    compared: dict[str, str | None] = {"ledger, losses and norms": None, "samples": None}
    lines = [[{k: v for k, v in x.items() if k not in TIMES} for x in read_metrics(run)] for run in (one, other)]
    if len(lines[0]) != len(lines[1]):
        compared["ledger, losses and norms"] = f"{len(lines[0])} and {len(lines[1])} lines"
    for a, b in zip(*lines, strict=False):
        if a != b:
            names = ", ".join(n for n in a if a[n] != b.get(n)) or "other fields"
            compared["ledger, losses and norms"] = f"step {a['step']}: {names} differ"
            break
    if (one / "samples.txt").read_bytes() != (other / "samples.txt").read_bytes():
        compared["samples"] = "samples.txt differs"
    averages = ("ema",) if read_run(one).optimizer.ema else ()
    for group in ("params", "opt_state", *averages):
        (found_a, a), (found_b, b) = (read_params(run / "checkpoints", group=group) for run in (one, other))
        if found_a.step != found_b.step or found_a.meta["cursor"] != found_b.meta["cursor"]:
            compared["step and cursor"] = f"steps {found_a.step} and {found_b.step}, or their cursors, differ"
        a, b = flatten(a, "/"), flatten(b, "/")
        wrong = len(a.keys() ^ b.keys()) + sum(not _same(a[name], b[name]) for name in a.keys() & b.keys())
        compared[group] = f"{wrong} arrays differ" if wrong else None
    return compared


def _same(x: Any, y: Any) -> bool:
    """Return whether two arrays agree bit for bit. A NaN equals itself."""
    return (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())


if __name__ == "__main__":  # the child: train what a JSON file says

    def main(stop: StopRequest) -> int:
        from smollm_jax.training.fit import fit  # slow, so a signal must find the handler in place

        return fit(from_dict(json.loads(Path(sys.argv[1]).read_text())), stop)

    with StopRequest() as request:
        leave(run_main(lambda: main(request)))
