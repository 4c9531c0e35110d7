"""Write metrics.jsonl, and count the steps without finite gradients.

The lines of a step are on disk before its checkpoint can be, so a resume misses none.
"""

import json
import time

import jax

from smollm_jax.config.preference import FIGURES
from smollm_jax.data.batch_hash import extend
from smollm_jax.data.loader import merge_cursors
from smollm_jax.distributed.watchdog import LONGEST_SECONDS
from smollm_jax.runs.metrics import finite_or_none
from smollm_jax.runtime.devices import peak_flops, peak_memory
from smollm_jax.runtime.errors import SourceTimeout
from smollm_jax.runtime.files import written_aside
from smollm_jax.training.run import Interval, Pending, Run, count_seconds


class TooManyBadSteps(RuntimeError):
    """An error for gradients that were not finite for --max-bad-steps steps in a row."""


def report_step(run: Run, pending: Pending) -> None:
    """Wait for a step's metrics, check and count them. Writes a line every --log-every steps."""
    values, interval = jax.device_get(pending.metrics), run.interval
    run.progress.tokens += int(values["targets"])
    run.progress.ledger = extend(run.progress.ledger, values["batch_hash"])
    interval.steps += 1
    interval.targets += int(values["targets"])
    interval.filled += int(values.get("filled", 0))
    interval.slots += run.config.batch_size_at(pending.step) * run.config.data.seq_len
    interval.latest = pending, values
    if run.ledgers.get(pending.step, run.progress.ledger) != run.progress.ledger:
        run.report.say(f"step {pending.step}: THE BATCHES DIFFER FROM THE FIRST TIME; the ledgers differ")
    run.report.progress(pending.step)
    if values["finite"]:
        run.progress.bad_steps_in_a_row = 0
        counted = int(values.get("pairs", values["targets"]))
        run.progress.nats += values["loss"].item() * counted
        run.progress.targets += counted
        if "pairs" in values:
            sums = run.progress.figures
            run.progress.figures = {x: sums.get(x, 0.0) + values[x].item() * counted for x in FIGURES}
    elif values.get("overflow", False):
        run.progress.skipped_steps += 1
        halved = f"the loss scale is now {values['loss_scale'].item():g}"
        run.report.say(f"step {pending.step}: a gradient overflows float16; the update is skipped, {halved}")
    else:
        count_bad_step(run, pending)
    if pending.step in (1, run.config.total_steps) or pending.step % run.config.run.log_every == 0:
        write_line(run)


def write_line(run: Run) -> None:
    """Write the step's metrics line once. Means and rates are since the last line, other values of the step."""
    interval = run.interval
    if interval.latest is None:
        return
    pending, values = interval.latest
    skipped, dropped = (counted_documents(run, pending, kind) for kind in ("skipped", "dropped"))
    seconds = max(time.monotonic() - interval.began, 1e-9)
    count_seconds(run)
    progress = run.progress
    line = {
        "step": pending.step,
        "time": time.time(),
        "elapsed_seconds": progress.elapsed_seconds,
        "loss": progress.nats / progress.targets if progress.targets else None,
        "step_loss": finite_or_none(values["loss"].item()),
        "learning_rate": values["learning_rate"].item(),
        "grad_norm": finite_or_none(values["grad_norm"].item()),
        "tokens": run.progress.tokens,
        "tokens_per_second": interval.targets / seconds,
        "data_wait_seconds": interval.data_wait_seconds,
        "step_seconds": seconds / interval.steps,
        "bad_steps": run.progress.bad_steps,
        "skipped_documents": skipped,
        "ledger": run.progress.ledger,
        "peak_memory_gib": peak_memory(run.mesh.local_mesh.devices.flat[0]) / 2**30,
    }
    if "z_loss" in values:
        line["z_loss"] = finite_or_none(values["z_loss"].item())
    if "loss_scale" in values:
        line |= {"loss_scale": values["loss_scale"].item(), "skipped_steps": progress.skipped_steps}
    peak = peak_flops(run.mesh.devices.flat[0], run.dtype)
    if peak is not None:
        flops = interval.slots * run.config.model.flops_per_token(run.config.data.seq_len)
        line["mfu"] = flops / seconds / (peak * run.mesh.size)
    if run.config.data.is_chat:
        slots = run.config.batch_size_at(pending.step) * (run.config.data.seq_len + 1)
        line |= {
            "packed_tokens_per_second": interval.filled / seconds,
            "padding_share": 1 - int(values["filled"]) / slots,
            "dropped_pairs" if run.config.data.is_pairs else "dropped_conversations": dropped,
        }
    if run.config.data.is_pairs:
        line["pairs"] = progress.targets
        line |= {x: finite_or_none(total / progress.targets) for x, total in progress.figures.items()}
    run.report.train(line)
    run.interval, progress.nats, progress.targets, progress.figures = Interval(), 0.0, 0, {}


def counted_documents(run: Run, pending: Pending, kind: str) -> int:
    """Return the rows and files that all processes have "skipped" so far, or conversations "dropped"."""
    can_differ = run.config.data.is_chat if kind == "dropped" else run.config.data.on_bad_data == "skip"
    if run.job.several and can_differ:
        cursors = run.job.gather(pending.cursor)
        return 0 if None in cursors else int(merge_cursors(cursors)[kind])
    return int(pending.cursor.get(kind, 0)) if pending.cursor else 0


def count_bad_step(run: Run, pending: Pending) -> None:
    """Count a step without finite gradients. Raises `TooManyBadSteps` after --max-bad-steps in a row."""
    run.progress.bad_steps += 1
    run.progress.bad_steps_in_a_row += 1
    run.report.say(f"step {pending.step}: loss or gradient not finite; the update is skipped")
    if run.progress.bad_steps_in_a_row >= run.config.optimizer.max_bad_steps:
        raise TooManyBadSteps(
            f"{run.progress.bad_steps_in_a_row} steps in a row without a finite gradient; "
            f"{write_documents(run, pending)}, the newest checkpoint is {run.saved or 'none'}"
        )


def write_documents(run: Run, pending: Pending) -> str:
    """Write the documents of a step to the run folder. Returns where they are, or why there are none."""
    part = f".{run.job.index}" if run.job.several else ""
    path = run.run_dir / f"bad_step_{pending.step}{part}.jsonl"
    patience = LONGEST_SECONDS + run.config.data.data_timeout
    try:
        with run.job.watchdog.patient("reading documents again", patience):
            documents = run.stream.documents_of(pending.cursor_before)
            with written_aside(path) as aside:  # replaces anything of this name, and follows no link
                aside.write_text("".join(json.dumps(document) + "\n" for document in documents))
    except (OSError, ValueError, SourceTimeout, StopIteration) as error:
        return f"the documents of the last could not be written ({error})"
    return f"the documents of the last are in {path}"
