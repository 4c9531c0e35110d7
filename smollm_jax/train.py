"""Train: move a run from where it stands to its end, and leave everything where the next start finds it.

One step is in flight while the one before it is reported, so that the device never waits for the host.
The records of a step are on disk before a checkpoint of it can be: a resume never misses a line.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from smollm_jax.config import Config
from smollm_jax.config_file import as_dict
from smollm_jax.data import Batch, SourceTimeout, merged
from smollm_jax.examination import examine
from smollm_jax.hardware import peak_flops
from smollm_jax.launchers import join
from smollm_jax.ledger import extended
from smollm_jax.processes import Processes
from smollm_jax.publish import publish
from smollm_jax.report import finite_or_none, read_metrics, say
from smollm_jax.resume import flatten
from smollm_jax.sharding import on_devices, padded_rows
from smollm_jax.start import Run, begin, claim
from smollm_jax.stop import EXIT_FAILED, EXIT_STOPPED, StopRequest
from smollm_jax.watch import LONGEST_SECONDS

DONE, STOPPED, DATA_ENDED = "done", "stopped", "data ended"
POLL_SECONDS = 0.2


class TooManyBadSteps(RuntimeError):
    """Gradients were not finite for --max-bad-steps steps in a row."""


@dataclass
class Pending:
    """A step under way: its metrics are read once the next one has been sent off."""

    step: int
    metrics: dict[str, jax.Array]
    cursor_before: dict[str, Any] | None
    cursor: dict[str, Any] | None
    slots: int
    """Token positions of the batch."""
    sent: float
    """When its sending began, by `time.monotonic`."""


@dataclass
class Interval:
    """Sums since the last line of metrics; evaluations and saves are not part of it."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    steps: int = 0
    targets: int = 0
    slots: int = 0
    data_wait_seconds: float = 0.0
    latest: tuple[Pending, dict[str, Any]] | None = None
    """The last step, and its metrics."""

    def restart(self) -> None:
        vars(self).update(vars(Interval()))


def fit(config: Config, stop: StopRequest) -> int:
    """Train as `config` says, from the newest good checkpoint if there is one; returns the exit code.

    Raises `ValueError` on a mistake in settings or input.
    """
    processes = join(config.compute)
    return processes.ending(lambda: _fit(config, stop, processes))


def _fit(config: Config, stop: StopRequest, processes: Processes) -> int:
    processes.agree_on({n: v for n, v in flatten(as_dict(config)).items() if n != "compute.process_id"})
    processes.require_shared(Path(config.run_dir))
    with processes.together(lambda: claim(config, processes)) as run_dir, processes.watched(run_dir):
        return processes.ending(lambda: _claimed(config, run_dir, stop, processes))


def _claimed(config: Config, run_dir: Path, stop: StopRequest, processes: Processes) -> int:
    from smollm_jax.together import train_together

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


def train(run: Run) -> str:
    """The loop; returns why it ended: `DONE`, `STOPPED` or `DATA_ENDED`."""
    if run.evaluated < run.progress.step and evaluation_due(run):
        examine(run, partial(save, run))
    pending, interval = None, Interval()
    while run.progress.step < run.last_step:
        waiting_since = time.monotonic()
        try:
            item = next_batch(run)
        except ValueError:  # data that cannot be read costs nothing of what was trained before it
            report_step(run, pending, interval)
            save(run)
            raise
        if isinstance(item, str):
            report_step(run, pending, interval)
            if item == DATA_ENDED:
                write_line(run, interval)
            save(run)
            return item
        interval.data_wait_seconds += time.monotonic() - waiting_since
        dispatched = dispatch(run, *item)
        report_step(run, pending, interval)
        pending = dispatched
        if not (evaluation_due(run) or save_due(run) or run.stop.requested):
            continue
        report_step(run, pending, interval)
        paused = time.monotonic()
        if save_due(run) or run.stop.requested:
            save(run)  # first: nothing that happens in an evaluation can cost a checkpoint
        if evaluation_due(run):
            examine(run, partial(save, run))
        interval.began += time.monotonic() - paused
        if run.stop.requested:
            save(run)  # again where the request came during the evaluation
            return STOPPED
    report_step(run, pending, interval)
    save(run)
    return DONE


def next_batch(run: Run) -> tuple[Batch, dict[str, Any]] | str:
    """The next batch and its cursor, or why there is none."""
    while not run.stop.requested:
        try:
            item = run.stream.get(timeout=POLL_SECONDS)
        except StopIteration:
            return DATA_ENDED
        except SourceTimeout as error:
            run.report.say(f"{error}; run the same command to go on")
            return STOPPED
        if item is not None:
            return item
    return STOPPED


def dispatch(run: Run, batch: Batch, cursor: dict[str, Any] | None, *votes: jax.Array) -> Pending:
    """Send a step to the device without waiting for it; `votes` as `make_step` has it."""
    sent, progress = time.monotonic(), run.progress
    rows = run.config.batch_size_at(progress.step + 1)
    padded = padded_rows(rows, run.mesh, run.config.compute.grad_accum)
    arrays = (on_devices(x, padded, batch.first_row, run.mesh) for x in (batch.tokens, batch.segment_ids))
    run.state, metrics = run.steps[rows](run.state, *arrays, *votes)
    before, progress.cursor = progress.cursor, cursor
    progress.step += 1
    return Pending(progress.step, metrics, before, cursor, rows * run.config.data.seq_len, sent)


def report_step(run: Run, pending: Pending | None, interval: Interval) -> None:
    """Wait for a step's metrics, count what went wrong, and write its line if one is due."""
    if pending is None:
        return
    values = jax.device_get(pending.metrics)
    if pending.step > run.reported:
        run.reported = pending.step
        run.progress.tokens += int(values["targets"])
        run.progress.ledger = extended(run.progress.ledger, values["batch_hash"])
        interval.steps += 1
        interval.targets += int(values["targets"])
        interval.slots += pending.slots
        interval.latest = pending, values
        look_at(run, pending, finite=bool(values["finite"]))
    if pending.step in (1, run.config.total_steps) or pending.step % run.config.run.log_every == 0:
        write_line(run, interval)


def look_at(run: Run, pending: Pending, *, finite: bool) -> None:
    """Show the progress, and compare and count what may have gone wrong."""
    if run.ledgers.get(pending.step, run.progress.ledger) != run.progress.ledger:
        run.report.say(f"step {pending.step}: THE BATCHES ARE NOT THOSE OF THE FIRST TIME; the ledgers differ")
    run.report.progress(pending.step)
    count_bad_step(run, pending, finite=finite)


def write_line(run: Run, interval: Interval) -> None:
    """A line of metrics, unless it is there: of the last step itself, and of the time since the line before."""
    if interval.latest is None or interval.latest[0].step <= run.recorded:
        return
    pending, values = interval.latest
    run.recorded, passed_over = pending.step, skipped(run, pending)
    seconds = max(time.monotonic() - interval.began, 1e-9)
    line = {
        "step": pending.step,
        "loss": finite_or_none(values["loss"].item()),
        "learning_rate": values["learning_rate"].item(),
        "grad_norm": finite_or_none(values["grad_norm"].item()),
        "tokens": run.progress.tokens,
        "tokens_per_second": interval.targets / seconds,
        "data_wait_seconds": interval.data_wait_seconds,
        "step_seconds": seconds / max(interval.steps, 1),
        "bad_steps": run.progress.bad_steps,
        "skipped_documents": passed_over,
        "ledger": run.progress.ledger,
    }
    peak = peak_flops(run.mesh.devices.flat[0])
    if peak is not None:
        flops = interval.slots * run.config.model.flops_per_token(run.config.data.seq_len)
        line["mfu"] = flops / seconds / (peak * run.mesh.size)
    run.report.train(line)
    interval.restart()


def skipped(run: Run, pending: Pending) -> int:
    """Rows and files that --on-bad-data skip has passed over so far, in all processes where it is set."""
    if run.processes.several and run.config.data.on_bad_data == "skip":
        cursors = run.processes.gather(pending.cursor)
        return 0 if None in cursors else int(merged(cursors)["skipped"])
    return int(pending.cursor["skipped"]) if pending.cursor else 0


def count_bad_step(run: Run, pending: Pending, *, finite: bool) -> None:
    """Count a step without finite gradients; raises `TooManyBadSteps`, the batch's documents written out."""
    if finite:
        run.progress.bad_steps_in_a_row = 0
        return
    run.progress.bad_steps += 1
    run.progress.bad_steps_in_a_row += 1
    run.report.say(f"step {pending.step}: loss or gradient not finite; the update is skipped")
    limit = run.config.optimizer.max_bad_steps
    if run.progress.bad_steps_in_a_row < limit:
        return
    raise TooManyBadSteps(
        f"{limit} steps in a row without a finite gradient; {write_documents(run, pending)}, "
        f"the newest checkpoint is {run.saved or 'none'}"
    )


def write_documents(run: Run, pending: Pending) -> str:
    """Write the documents of a step to the run folder; says where, or why that could not be done."""
    part = f".{run.processes.index}" if run.processes.several else ""
    path = run.run_dir / f"bad_step_{pending.step}{part}.jsonl"
    try:
        with run.processes.watch.long("reading documents again", LONGEST_SECONDS + run.config.data.data_timeout):
            documents = run.stream.documents_of(pending.cursor_before)
            path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    except (OSError, ValueError, SourceTimeout, StopIteration) as error:
        return f"the documents of the last could not be written ({error})"
    return f"the documents of the last are in {path}"


def save(run: Run) -> None:
    """Begin a checkpoint of the step the run stands at, unless there is one."""
    step = run.progress.step
    if step == run.saved:
        return
    cursor = merged(run.processes.gather(run.progress.cursor))
    meta = {
        "cursor": cursor,
        "progress": dataclasses.asdict(run.progress) | {"cursor": cursor},
        "config": as_dict(run.config),
        "computed": run.computed,
    }
    with run.processes.watch.long("a save"):
        run.checkpoints.save(step, run.state, meta)
    run.saved = step


def finish(run: Run, outcome: str) -> int:
    """Wait for the last checkpoint, export a finished run, and print the result; returns the exit code."""
    if not run.checkpoints.wait():
        run.report.say(f"the last checkpoint could not be saved: {run.checkpoints.failed}")
        return EXIT_FAILED
    step, total = run.progress.step, run.config.total_steps
    if outcome == DATA_ENDED and run.evaluated < step and run.config.run.eval_every:
        examine(run, partial(save, run))
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
        folder = publish(run.run_dir, run.run_dir / "export", step=step).folder
    except RuntimeError as error:
        print(f"{result}; saved, but not exported")
        run.report.say(f"the export was taken back: {error}")
        return EXIT_FAILED
    print(f"{result}; export in {folder}")
    return 0


def evaluation_due(run: Run) -> bool:
    every, step = run.config.run.eval_every, run.progress.step
    return every > 0 and (step % every == 0 or step == run.config.total_steps)


def save_due(run: Run) -> bool:
    every, step = run.config.run.checkpoint_every, run.progress.step
    # in a row of bad steps nothing new is to be kept, and an older good state must not make room for it
    return step == run.config.total_steps or (
        every > 0 and step % every == 0 and not run.progress.bad_steps_in_a_row
    )
