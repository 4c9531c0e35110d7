"""Train a run to its end: take its folder, set it up, train, export.

The functions stand in the order of execution. Each of several processes runs all of them.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.distributed.launch import join_job
from smollm_jax.distributed.processes import Processes
from smollm_jax.runs.convert import export_run
from smollm_jax.runs.lock import RunLock
from smollm_jax.runs.metrics import duration
from smollm_jax.runs.places import check_places
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_STOPPED, SourceTimeout, UserError, install, one_line, say
from smollm_jax.runtime.files import moved_aside
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.runtime.trees import flatten
from smollm_jax.training.branch import Branch
from smollm_jax.training.evaluation import evaluate_run
from smollm_jax.training.loop import train
from smollm_jax.training.progress import TooManyBadSteps
from smollm_jax.training.run import Run
from smollm_jax.training.setup import setup
from smollm_jax.training.step import Vote
from smollm_jax.training.tasks import load_run_tasks


def fit(config: Config, stop: StopRequest, alone: Processes | None = None, *, branch: Branch | None = None) -> int:
    """Train as `config` says, from the newest good checkpoint if there is one. Returns the exit code.

    `alone` keeps this process from looking for others of a job. A `branch` begins at another run's checkpoint.
    Raises `UserError` for a mistake in settings or input.
    """
    joined = join_job(config.compute) if alone is None else nullcontext(alone)
    with joined as job:
        with job.all_or_none():
            check_places(config, has_own=branch is not None)
            config = config if branch is None else branch.settle(config)
        _fit(config, stop, job, branch)
    return job.exit_code  # of several processes, `join_job` has said a mistake and set its code


def _fit(config: Config, stop: StopRequest, job: Processes, branch: Branch | None) -> None:
    """Train, and set the exit code of `job`."""
    with acquire_run_dir(config, job) as run_dir:
        with job.all_or_none():
            if job.first and branch is not None:
                branch.begin(run_dir, config)
        tasks = load_run_tasks(config, job)
        try:
            with closing(setup(config, run_dir, stop, job)) as run:
                run.tasks = tasks
                try:
                    with job.watchdog.limit():
                        verdict = train(run)
                    job.exit_code = finish(run, verdict)
                except TooManyBadSteps as error:
                    run.report.say(f"stopped: {error}")
                    job.exit_code = EXIT_FAILED
        except SourceTimeout as error:  # before training: the last checkpoint is still the newest state
            say(f"{error}; run the same command to go on")
            job.exit_code = EXIT_STOPPED


@contextmanager
def acquire_run_dir(config: Config, job: Processes) -> Iterator[Path]:
    """Hold the run folder and its lock. The first of several processes holds the lock for all.

    --new-run first renames an old folder to RUN.oldN. Raises `UserError` in all processes if the folder is in use,
    or if they were started with different settings.
    """
    settings, run_dir = flatten(to_dict(config), "."), Path(config.run_dir)
    del settings["compute.process_id"]
    job.require_same(settings, "settings")
    with ExitStack() as held:
        with job.all_or_none():
            if job.first and config.run.new_run and (run_dir / "config.json").exists():
                held.enter_context(_old_run_aside(run_dir))
            if job.first:
                held.enter_context(RunLock(run_dir))
        yield run_dir


@contextmanager
def _old_run_aside(run_dir: Path) -> Iterator[None]:
    """Move an old run aside. It comes back if the new one is refused before it begins."""
    with RunLock(run_dir):
        real = Path(os.path.realpath(run_dir))  # a link stays, and leads to the new run
        try:
            aside = moved_aside(real)
        except OSError as error:  # such as a mount point
            reason = f"cannot be moved aside: {error.strerror}; give another --run-dir"
            raise UserError(f"--new-run: {real} {reason}") from None
        real.mkdir()
    say(f"moved the old run to {aside}")
    try:
        yield
    except UserError:
        with suppress(OSError):
            real.rmdir()  # fails if the new run has begun
            aside.rename(real)
            say(f"moved the old run back to {real}")
        raise


def finish(run: Run, verdict: Vote) -> int:
    """Wait for the last checkpoint, export a finished run, print the result. Returns the exit code."""
    if not run.checkpoints.wait():
        run.report.say(f"the last checkpoint could not be saved: {run.checkpoints.failed}")
        return EXIT_FAILED
    step, total = run.progress.step, run.config.total_steps
    if verdict == Vote.ENDED and run.evaluated < step and run.config.run.eval_every:
        evaluate_run(run)
    if verdict == Vote.STOP or run.interrupted:
        again = "the same command without --new-run" if run.config.run.new_run else "the same command"
        run.report.say(f"stopped at step {step:,} of {total:,}, saved; run {again} to go on")
        return EXIT_STOPPED
    if not run.job.first:
        return 0
    if step < total and verdict == Vote.GO:
        print(f"step {step:,} of {total:,}, as --stop-after asked; saved in {run.run_dir}/checkpoints/{step}")
        return 0
    return conclude(run)


def conclude(run: Run) -> int:
    """Export a run that is over and print its result in one line."""
    step, total = run.progress.step, run.config.total_steps
    result = f"{'finished' if step == total else 'the data ended'}: step {step:,} of {total:,}"
    result += f", {run.progress.tokens:,} tokens in {duration(run.progress.elapsed_seconds)}"
    scores = evaluations(read_metrics(run.run_dir))
    for last in scores[-1:]:
        first = f" ({scores[0]['eval_loss']:.4f} before the first step)" if scores[0]["step"] == 0 < step else ""
        result += f", held-out loss {last['eval_loss']:.4f}{first}, {last['eval_bits_per_byte']:.4f} bits per byte"
        if last.get("eval_ema_bits_per_byte") is not None:
            result += f" ({last['eval_ema_bits_per_byte']:.4f} of the moving average)"
    if not run.config.run.export:
        print(f"{result}; python -m smollm_jax export {run.run_dir} --out DIR makes a Hugging Face folder of it")
        return 0
    place = run.run_dir / "export"
    try:
        _, checked = export_run(run.run_dir, place, step=step, aside=True)
        if "ema" in run.state:
            place = run.run_dir / "export-ema"
            export_run(run.run_dir, place, step=step, aside=True, ema=True)
    except (RuntimeError, UserError, OSError) as error:
        print(f"{result}; saved, but not exported to {place}")
        run.report.say(f"the export was rolled back: {one_line(error)}")
        return EXIT_FAILED
    average = f", of the moving average in {run.run_dir / 'export-ema'}" if "ema" in run.state else ""
    print(f"{result}; export in {run.run_dir / 'export'}{average}")
    if run.base is not None:
        run.report.say(f"adapters    {checked}")
    prompt, *_ = *run.config.run.sample_prompts, "Once upon a time"
    where, prompt = shlex.quote(str(run.run_dir)), shlex.quote(prompt)
    needs = "" if find_spec("gradio") else f"{install('serve')} && "
    run.report.say(f"next        {needs}python -m smollm_jax serve {where}")
    talk = f"chat {where}" if run.config.data.is_chat else f"generate {where} --prompt {prompt}"
    run.report.say(f"            python -m smollm_jax {talk}")
    return 0
