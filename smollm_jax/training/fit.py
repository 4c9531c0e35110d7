"""Train: move a run from where it stands to its end, and leave everything where the next start finds it.

One step is in flight while the one before it is reported, so that the device never waits for the host.
The records of a step are on disk before a checkpoint of it can be: a resume never misses a line.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.distributed.launch import join
from smollm_jax.distributed.processes import Processes
from smollm_jax.runs.convert import export_run
from smollm_jax.runs.lock import RunLock
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.runtime.console import say
from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_STOPPED, SourceTimeout
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.runtime.trees import flatten
from smollm_jax.training.evaluation import evaluate_run
from smollm_jax.training.loop import DATA_ENDED, DONE, STOPPED, train
from smollm_jax.training.progress import TooManyBadSteps
from smollm_jax.training.run import Run, save
from smollm_jax.training.setup import begin


def fit(config: Config, stop: StopRequest) -> int:
    """Train as `config` says, from the newest good checkpoint if there is one; returns the exit code.

    Raises `ValueError` on a mistake in settings or input.
    """
    processes = join(config.compute)
    return processes.ending(lambda: _fit(config, stop, processes))


def _fit(config: Config, stop: StopRequest, processes: Processes) -> int:
    processes.agree_on({n: v for n, v in flatten(to_dict(config), ".").items() if n != "compute.process_id"})
    processes.require_shared(Path(config.run_dir))
    with processes.together(lambda: acquire_run_dir(config, processes)) as run_dir, processes.watched(run_dir):
        return processes.ending(lambda: _claimed(config, run_dir, stop, processes))


def _claimed(config: Config, run_dir: Path, stop: StopRequest, processes: Processes) -> int:
    from smollm_jax.training.loop import train_together

    try:
        run = begin(config, run_dir, stop, processes)
    except SourceTimeout as error:  # nothing was trained since the last checkpoint, if there is one
        say(f"{error}; run the same command to go on")
        return EXIT_STOPPED
    try:
        with processes.watch.moving():
            outcome = train_together(run) if processes.several else train(run)
        return finish(run, outcome)
    except TooManyBadSteps as error:
        run.report.say(f"stopped: {error}")
        return EXIT_FAILED
    finally:
        run.stream.close()
        run.checkpoints.close()
        run.report.close()


def finish(run: Run, outcome: str) -> int:
    """Wait for the last checkpoint, export a finished run, and print the result; returns the exit code."""
    if not run.checkpoints.wait():
        run.report.say(f"the last checkpoint could not be saved: {run.checkpoints.failed}")
        return EXIT_FAILED
    step, total = run.progress.step, run.config.total_steps
    if outcome == DATA_ENDED and run.evaluated < step and run.config.run.eval_every:
        evaluate_run(run, partial(save, run))
    if outcome == STOPPED or run.interrupted:
        again = "the same command without --new-run" if run.config.run.new_run else "the same command"
        run.report.say(f"stopped at step {step:,} of {total:,}, saved; run {again} to go on")
        return EXIT_STOPPED
    if not run.processes.first:
        return 0
    if step < total and outcome == DONE:
        print(f"step {step:,} of {total:,}, as --stop-after asked; saved in {run.run_dir}/checkpoints/{step}")
        return 0
    return conclude(run)


def conclude(run: Run) -> int:
    """Print the result of a run that is over, and export it."""
    step, total = run.progress.step, run.config.total_steps
    evaluations = [line for line in read_metrics(run.run_dir) if line.get("eval_loss") is not None]
    result = f"{'finished' if step == total else 'the data ended'}: step {step:,} of {total:,}"
    result += f", {run.progress.tokens:,} tokens"
    if evaluations:
        last = evaluations[-1]
        result += f", held-out loss {last['eval_loss']:.4f}, {last['eval_bits_per_byte']:.4f} bits per byte"
    if not run.config.run.export:
        print(f"{result}; python -m smollm_jax export {run.run_dir} --out DIR makes a Hugging Face folder of it")
        return 0
    try:
        folder = export_run(run.run_dir, run.run_dir / "export", step=step).folder
    except RuntimeError as error:
        print(f"{result}; saved, but not exported")
        run.report.say(f"the export was taken back: {error}")
        return EXIT_FAILED
    print(f"{result}; export in {folder}")
    return 0


def acquire_run_dir(config: Config, processes: Processes) -> Claimed:
    """Take the run folder and its lock, until the stack is closed, whose context is the folder.

    --new-run moves an old folder aside first. Of several processes the first has the lock, for all. Raises
    `ValueError` when the folder is in use.
    """
    run_dir, stack = Path(config.run_dir), Claimed(Path(config.run_dir))
    if not processes.first:
        return stack
    if config.run.new_run and (run_dir / "config.json").exists():
        with RunLock(run_dir):
            aside = next(p for n in range(1, 10_000) if not (p := Path(f"{run_dir}.old{n}")).exists())
            run_dir.rename(aside)
        say(f"moved the old run to {aside}")
    stack.enter_context(RunLock(run_dir))
    return stack


class Claimed(ExitStack):
    """A run folder held; entered, it gives the folder."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.run_dir = run_dir

    def __enter__(self) -> Path:  # type: ignore[override]
        return self.run_dir
