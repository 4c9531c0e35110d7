"""What may change between two starts of a run, and what a resumed run's records keep.

A setting that changes batches, updates or what is measured is refused by name; one that only changes how
the same maths is carried out is named in a note; the rest may differ in silence. More steps are accepted
where every learning rate and batch size up to the checkpoint stays what it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm_jax.config import Config, require
from smollm_jax.config_file import as_dict, from_dict
from smollm_jax.report import SAMPLES_OF

NEUTRAL = {
    "run.run_dir", "run.new_run", "run.stop_after", "run.log_every", "run.eval_every", "run.checkpoint_every",
    "run.keep_last", "run.keep_every", "run.sample_prompts", "run.sample_tokens", "run.export",
    "data.data_timeout", "data.on_bad_data", "optimizer.max_bad_steps", "compute.compilation_cache_dir",
    "compute.dtype",  # what it came to is compared at the start
    "compute.coordinator", "compute.num_processes", "compute.process_id",
    "preset", "recipe",
    "model.bos_token_id", "model.eos_token_id",  # the tokenizer's, and the run keeps its own
}  # fmt: skip
SAME_MATHS = {
    "compute.remat", "compute.unroll", "compute.loss_chunk", "compute.grad_accum",
    "compute.mesh", "compute.attention",
}  # fmt: skip
OF_THE_SCHEDULE = {
    "run.steps", "run.phases", "run.batch_size", "optimizer.schedule", "optimizer.warmup_steps",
    "optimizer.decay_steps", "optimizer.final_learning_rate", "optimizer.learning_rate",
}  # fmt: skip


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"run": {"seed": 0}}` as `{"run.seed": 0}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_settings(
    old: dict[str, Any], config: Config, step: int, schedule_of: Callable[[Config], list[tuple[float, int]]]
) -> list[str]:
    """Notes on harmless changes since `old` (a config.json); `ValueError` names the fields that are not.

    `schedule_of(config)` gives learning rate and batch size of every update up to `step`.
    """
    before, now = flatten(old), flatten(as_dict(config))
    changed = [name for name in now if before.get(name) != now[name] and name not in NEUTRAL]
    notes = [
        f"{name} changed from {before.get(name)} to {now[name]}: same maths, the last bits may differ"
        for name in changed
        if name in SAME_MATHS
    ]
    refused = [name for name in changed if name not in SAME_MATHS | OF_THE_SCHEDULE]
    of_schedule = [name for name in changed if name in OF_THE_SCHEDULE]
    require(
        config.total_steps >= step,
        f"the run stands at step {step}, past --steps {config.total_steps}; ask for more, or use --new-run",
    )
    if of_schedule:
        if schedule_of(from_dict(old)) == schedule_of(config):
            notes.append(f"{', '.join(of_schedule)} changed: all {step} updates so far stay as they were")
        else:
            refused += of_schedule
    changes = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in refused)
    require(
        not refused,
        f"this would change the result of the run at step {step}: {changes}. "
        "Give the old values back, or start afresh with --new-run or another --run-dir",
    )
    return notes


@dataclass(frozen=True)
class Records:
    """What a run's records say after they were cut back to a checkpoint."""

    evaluated: int
    """Last step whose evaluation is on record."""
    ledgers: dict[int, str]
    """The ledger of every step that was on record, those behind the checkpoint too: they must come again."""


def keep_records(run_dir: Path, step: int) -> Records:
    """Cut metrics.jsonl and samples.txt back to `step`: what came after the checkpoint comes again."""
    metrics, samples = run_dir / "metrics.jsonl", run_dir / "samples.txt"
    evaluated, ledgers = 0, {}
    if metrics.exists():
        lines = [(line, read) for line in metrics.read_text().splitlines() if (read := _read(line)) is not None]
        ledgers = {read["step"]: read["ledger"] for _, read in lines if "ledger" in read}
        kept = [(line, read) for line, read in lines if read["step"] <= step]
        evaluated = max((read["step"] for _, read in kept if "eval_loss" in read), default=0)
        _rewrite(metrics, [line for line, _ in kept])
    if samples.exists():
        texts = []
        for line in samples.read_text(encoding="utf-8").splitlines():
            if line.startswith(SAMPLES_OF):
                number = line.removeprefix(SAMPLES_OF)
                if not number.isdecimal() or int(number) > evaluated:
                    break
            texts.append(line)
        _rewrite(samples, texts)
    return Records(evaluated, ledgers)


def _read(line: str) -> dict[str, Any] | None:
    """A line of metrics; None for one that a kill cut short."""
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _rewrite(path: Path, lines: list[str]) -> None:
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    part.replace(path)
