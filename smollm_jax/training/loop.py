"""Run the training loop, the same for one process and for many.

A process cannot leave a step that others have begun. Therefore each sends a `Vote` with its rows of a batch. The
summed votes come back with the metrics, equal in all processes, while the next step runs. If one process votes
`VOID`, the step changes nothing, and all return to the state before it. A process alone needs no votes and sends
no step without rows. The verdict of such a process is a stop request or none.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from smollm_jax.config.settings import MESH_AXES
from smollm_jax.data.packing import Batch
from smollm_jax.distributed.sharding import on_devices, padded_rows, sharded
from smollm_jax.distributed.watchdog import AGAIN
from smollm_jax.runtime.errors import SourceTimeout
from smollm_jax.training.evaluation import evaluate_run
from smollm_jax.training.progress import report_step, write_line
from smollm_jax.training.run import Pending, Run, evaluation_due, save, save_due, save_step
from smollm_jax.training.step import Vote

POLL_SECONDS = 0.2
STUCK_SECONDS = 600.0  # added to --data-timeout, so that a source's own error comes first


@dataclass
class Ballot:
    """A process's part in a step: its vote, and any rows with their next cursor."""

    vote: Vote
    item: tuple[Batch, dict[str, Any] | None] | None = None
    fault: Exception | None = None  # why there are no rows: a `SourceTimeout`, or data that cannot be read


def train(run: Run) -> Vote:
    """Train until the last step (`GO`), a stop request (`STOP`) or data's end (`ENDED`).

    One step is on the device while the loop reads the metrics of the step before. So the device never waits for
    the host. Raises `TooManyBadSteps`. Raises `UserError` in all processes if one cannot read its data.
    """
    if run.evaluated < run.progress.step and evaluation_due(run):
        with run.interval.paused():
            evaluate_run(run)
    pending, ballot = None, None
    while run.progress.step < run.last_step:
        ballot = next_ballot(run, ballot)
        sent = dispatch(run, ballot)
        verdict = settle(run, pending)  # of the step before, while the current step runs
        if sent is not None and verdict == Vote.GO and not (evaluation_due(run) or save_step(run)):
            pending = sent
            continue
        last = ballot.vote if sent is None else settle(run, sent)
        verdict, pending = (verdict if verdict >= Vote.ENDED else max(verdict, last)), None
        if verdict == Vote.ENDED:
            write_line(run)
        with run.interval.paused():
            if save_due(run) or verdict != Vote.GO:
                save(run)  # first: nothing that happens in an evaluation can cost a checkpoint
            if verdict != Vote.GO:
                return outcome_of(run, verdict, ballot)
            if evaluation_due(run):
                evaluate_run(run)  # a stop during it is noticed by the next ballot, which saves again
    verdict = settle(run, pending)
    if verdict == Vote.ENDED:
        write_line(run)
    save(run)
    reached = verdict == Vote.GO or run.progress.step == run.last_step
    return Vote.GO if reached else outcome_of(run, verdict, ballot)


def next_ballot(run: Run, before: Ballot | None) -> Ballot:
    """Return the next rows, or the reason why there are none, with the resulting vote."""
    if before is not None and before.vote == Vote.VOID:
        return before  # late rows do not change the ballot: the step already in flight must be void as well
    if run.interrupted:
        return Ballot(Vote.STOP)  # a process alone takes no further step for the sake of others
    began = time.monotonic()
    try:
        item = _wait_for_rows(run)
    except StopIteration:
        return Ballot(Vote.STOP if run.stop.requested and run.job.several else Vote.ENDED)
    except (SourceTimeout, ValueError) as error:  # no earlier step is lost: the loop saves first
        return Ballot(Vote.VOID, fault=error)
    finally:
        run.interval.data_wait_seconds += time.monotonic() - began
    if item is None:
        return Ballot(Vote.VOID)
    padding = not item[0].segment_ids.any()
    return Ballot(Vote.STOP if run.stop.requested else Vote.ENDED if padding else Vote.GO, item)


def _wait_for_rows(run: Run) -> tuple[Batch, dict[str, Any]] | None:
    """Return the loader's next batch and cursor. None if a stop is requested while there is none."""
    patience = run.config.data.data_timeout + STUCK_SECONDS
    deadline = time.monotonic() + patience
    with run.job.watchdog.patient("a batch of the data", patience + STUCK_SECONDS):
        while (item := run.stream.get(timeout=POLL_SECONDS)) is None and not run.stop.requested:
            # a process alone holds nobody up: a slow first window may take its time
            if run.job.several and time.monotonic() > deadline:
                raise SourceTimeout(f"no data came for {patience:g} s")
    return item


def dispatch(run: Run, ballot: Ballot) -> Pending | None:
    """Send a step to the device without waiting for it. None if a process alone has no rows."""
    sent, progress = time.monotonic(), run.progress
    if ballot.item is None and not run.job.several:
        return None
    step, rows = progress.step + 1, run.config.batch_size_at(progress.step + 1)
    empty = (2, rows, run.config.data.seq_len + 1)
    batch, cursor = ballot.item or (Batch(*np.zeros(empty, np.int32)), progress.cursor)
    padded = padded_rows(rows, run.mesh, run.config.compute.grad_accum)
    with run.job.watchdog.step(rows, f"step {step}"):
        arrays = [on_devices(x, padded, batch.first_row, run.mesh) for x in (batch.tokens, batch.segment_ids)]
        if run.reference is not None:
            arrays.append(on_devices(run.reference.of(batch), padded, batch.first_row, run.mesh))
        if run.job.several:
            vote, layout = np.full(1, ballot.vote, np.int32), sharded(run.mesh, MESH_AXES)
            arrays.append(jax.make_array_from_callback((run.mesh.size,), layout, lambda _: vote))
        with jax.transfer_guard("disallow"):  # an array of the host among the arguments would stall the device
            run.state, metrics = run.steps[rows](run.state, *arrays)
    pending = Pending(step, metrics, progress.cursor, cursor, sent)
    progress.step, progress.cursor = step, cursor
    return pending


def settle(run: Run, pending: Pending | None) -> Vote:
    """Wait for a step. Returns `GO` or `STOP` if it counts, else `ENDED` or `VOID`.

    A step that does not count is undone: progress returns to the step before it.
    """
    if pending is None:
        return Vote.GO
    if not run.job.several:
        report_step(run, pending)
        return Vote.STOP if run.stop.requested else Vote.GO
    rows = run.config.batch_size_at(pending.step)
    with run.job.watchdog.step(rows, f"step {pending.step}"):
        votes, counts = jax.device_get((pending.metrics["votes"], pending.metrics["counts"]))
    run.job.watchdog.step_took(rows, time.monotonic() - pending.sent)
    progress = run.progress
    if not counts:
        if pending.step <= progress.step:
            progress.step, progress.cursor = pending.step - 1, pending.cursor_before
        return Vote.VOID if votes[Vote.VOID] else Vote.ENDED
    assert pending.step <= progress.step, "a step counted after a void one"
    report_step(run, pending)
    return Vote.STOP if votes[Vote.STOP] else Vote.GO


def outcome_of(run: Run, verdict: Vote, ballot: Ballot | None) -> Vote:
    """Return why all processes end, `ENDED` or `STOP`. Raises `UserError` in all if one cannot read its data."""
    try:
        with run.job.all_or_none():
            if ballot is not None and ballot.fault is not None:
                raise ballot.fault
    except SourceTimeout as error:
        run.report.say(f"{error}; {AGAIN if run.job.several else 'run the same command to go on'}")
    return Vote.ENDED if verdict == Vote.ENDED else Vote.STOP
