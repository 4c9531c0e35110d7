"""What is known of steps under way: metrics, lines, steps without finite gradients."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any

import jax

from smollm_jax.data.batch_hash import extended
from smollm_jax.data.loader import merged
from smollm_jax.distributed.watchdog import LONGEST_SECONDS
from smollm_jax.runs.metrics import finite_or_none
from smollm_jax.runtime.devices import peak_flops
from smollm_jax.runtime.errors import SourceTimeout
from smollm_jax.training.run import Run


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
