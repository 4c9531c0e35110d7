"""The loop of several processes, who take every step together and end at the same one.

Nobody can leave a step that the others have begun. So each process sends a vote along with its rows of a
batch; the sum comes back with the metrics, the same for all, one step later. A process without rows votes the
step void: it changes nothing, and all stand where they stood before it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from smollm_jax.data.packing import Batch
from smollm_jax.distributed.sharding import by_device, on_devices, padded_rows
from smollm_jax.distributed.watchdog import AGAIN
from smollm_jax.runtime.errors import SourceTimeout, UserError
from smollm_jax.training.evaluation import evaluate_run
from smollm_jax.training.progress import Interval, Pending, report_step, write_line
from smollm_jax.training.run import Run, evaluation_due, save, save_due
from smollm_jax.training.step import ENDED, GO, STOP, VOID

STUCK_SECONDS = 600.0  # after which what no source of data holds up any more is taken for dead

Item = tuple[Batch, dict | None]


@dataclass
class Ballot:
    """This process's part of a step: rows with the cursor behind them, its vote, and why it has no rows."""

    item: Item
    vote: int
    fault: str = ""
    is_mistake: bool = False
    """Whether the fault lies in the data, not in waiting for it."""


def train_together(run: Run) -> str:
    """As `train`. Raises `ValueError` in all processes where the data of one cannot be read."""
    if run.evaluated < run.progress.step and evaluation_due(run):
        evaluate_run(run, partial(save, run))
    pending, interval, ballot = None, Interval(), None
    while run.progress.step < run.last_step:
        waiting_since = time.monotonic()
        ballot = cast(run, ballot)
        interval.data_wait_seconds += time.monotonic() - waiting_since
        step = run.progress.step + 1
        with run.processes.watch.step(run.config.batch_size_at(step), f"step {step}"):
            dispatched = dispatch(run, *ballot.item, votes(run, ballot.vote))
        verdict = settle(run, pending, interval)
        pending = dispatched
        if verdict == GO and not (evaluation_due(run) or save_due(run)):
            continue
        second = settle(run, pending, interval)
        verdict = verdict if verdict >= ENDED else max(verdict, second)
        pending, paused = None, time.monotonic()
        if verdict == ENDED:
            write_line(run, interval)
        if save_due(run) or verdict != GO:
            save(run)
        if verdict != GO:
            return ended(run, verdict, ballot)
        if evaluation_due(run):
            evaluate_run(run, partial(save, run))
        interval.began += time.monotonic() - paused
    verdict = settle(run, pending, interval)
    if verdict == ENDED:
        write_line(run, interval)
    save(run)
    return DONE if verdict == GO or run.progress.step == run.last_step else ended(run, verdict, ballot)


def cast(run: Run, before: Ballot | None) -> Ballot:
    """The next rows, or the reason why there are none, with the vote that says so.

    Who once had none has none from then on, whatever comes: the step after a void one must be void too.
    """
    step = run.progress.step + 1
    shape = (run.config.batch_size_at(step), run.config.data.seq_len + 1)
    nothing = (Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32)), run.progress.cursor)
    if before is not None and before.vote == VOID:
        return replace(before, item=nothing)
    patience = run.config.data.data_timeout + STUCK_SECONDS  # a source's own limit comes first, in its own words
    deadline = time.monotonic() + patience
    try:
        with run.processes.watch.long("a batch of the data", patience + STUCK_SECONDS):
            while (item := run.stream.get(timeout=POLL_SECONDS)) is None:
                if run.stop.requested:
                    return Ballot(nothing, VOID)
                if time.monotonic() > deadline:
                    raise SourceTimeout(f"no data came for {patience:g} s")
    except StopIteration:
        return Ballot(nothing, STOP if run.stop.requested else ENDED)
    except SourceTimeout as error:
        return Ballot(nothing, VOID, f"{error}; {AGAIN}")
    except ValueError as error:
        return Ballot(nothing, VOID, str(error), is_mistake=True)
    padding = not item[0].segment_ids.any()
    return Ballot(item, STOP if run.stop.requested else ENDED if padding else GO)


def votes(run: Run, vote: int) -> jax.Array:
    """An array with this process's vote for each of its devices."""
    mine = np.full(1, vote, np.int32)
    return jax.make_array_from_callback((run.mesh.size,), by_device(run.mesh), lambda _: mine)


def settle(run: Run, pending: Pending | None, interval: Interval) -> int:
    """Take up the outcome of a step: `GO` or `STOP` where it counts; else all go back to where they stood before
    it, and it is `VOID` or `ENDED`.
    """
    if pending is None:
        return GO
    rows = run.config.batch_size_at(pending.step)
    with run.processes.watch.step(rows, f"step {pending.step}"):
        counted, counts = jax.device_get((pending.metrics["votes"], pending.metrics["counts"]))
    run.processes.watch.step_took(rows, time.monotonic() - pending.sent)
    progress = run.progress
    if not counts:
        if pending.step <= progress.step:
            progress.step, progress.cursor = pending.step - 1, pending.cursor_before
        return VOID if counted[VOID] else ENDED
    assert pending.step <= progress.step, "a step was taken after a void one"
    report_step(run, pending, interval)
    return STOP if counted[STOP] else GO


def ended(run: Run, verdict: int, ballot: Ballot | None) -> str:
    """Why all processes end here; raises `ValueError` for data that one of them cannot read."""
    mine = (
        {"fault": ballot.fault, "is_mistake": ballot.is_mistake} if ballot else {"fault": "", "is_mistake": False}
    )
    for index, theirs in enumerate(run.processes.gather(mine)):
        if theirs["is_mistake"]:
            raise UserError(theirs["fault"])
        if theirs["fault"]:
            run.report.say(f"process {index}: {theirs['fault']}")
    return DATA_ENDED if verdict == ENDED else STOPPED


DONE, STOPPED, DATA_ENDED = "done", "stopped", "data ended"
POLL_SECONDS = 0.2


def train(run: Run) -> str:
    """The loop; returns why it ended: `DONE`, `STOPPED` or `DATA_ENDED`."""
    if run.evaluated < run.progress.step and evaluation_due(run):
        evaluate_run(run, partial(save, run))
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
            evaluate_run(run, partial(save, run))
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
