"""Time a train step on conversations and on pairs of answers: `python -m benchmarks.fine_tuning`.

All sides have the same tokens in rows of equal segments. In conversations and pairs, the second half of a segment
is trained. A step on pairs computes the log-probs of the answers first, in a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from benchmarks.harness.sides import Ready, compare
from benchmarks.harness.tables import Row, as_command, finish, gib, spread
from benchmarks.harness.workload import COMPUTE, Dtype, Preset, StepWork, config_of
from benchmarks.train import ours
from smollm_jax.config.settings import ComputeConfig
from smollm_jax.runtime import huge_pages
from smollm_jax.runtime.errors import require

SIDES: dict[str, Literal["text", "chat", "pairs"]] = {"pre-training": "text", "SFT": "chat", "DPO": "pairs"}


def measured(work: StepWork, rounds: int) -> list[Row]:
    """Return a row per side, with its seconds over those of SFT in the same round."""
    data, makes = work.config.data, dict[str, Callable[[], Ready]]()
    for name, kind in SIDES.items():
        config = replace(work.config, data=replace(data, data_kind=kind))
        makes[name] = partial(ours, replace(work, config=config))
    outcomes = compare(makes, rounds=rounds, environments=dict.fromkeys(SIDES, huge_pages.environment()))
    rows = []
    for name, outcome in outcomes.items():
        row: Row = {"side": name, "dtype": work.dtype, "batch": work.batch_size}
        if outcome.failed or outcomes["SFT"].failed:
            rows.append(row | {"failed": outcome.failed or "there is no SFT to compare with"})
            continue
        seconds = outcome.of("round")
        over = [a / b for a, b in zip(seconds, outcomes["SFT"].of("round"), strict=True)]
        rows.append(
            row
            | {
                "tokens/s": spread([work.steps * work.step_tokens / value for value in seconds]),
                "time over SFT's": spread(over),
                "peak GiB": gib(outcome.peak_bytes),
                "remat": outcome.facts["remat"],
                "attention": outcome.facts["attention"],
                "first loss": outcome.facts["loss"],
            }
        )
    return rows


def fine_tuning(
    *,
    preset: Preset = "135M",
    batch_size: int = 2,
    seq_len: int = 256,
    documents: int = 2,
    dtypes: tuple[Dtype, ...] = ("float32",),
    steps: int = 1,
    rounds: int = 5,
    compute: ComputeConfig = COMPUTE,
    seed: int = 0,
) -> int:
    """Time steps of pre-training, SFT and DPO on the same tokens, in turn.

    Args:
        preset: Architecture.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        documents: Segments in a row, an even number: two are a pair.
        dtypes: Compute dtypes over float32 parameters.
        steps: Steps per round.
        rounds: Rounds counted.
        compute: Other settings. The dtype stands in `dtypes`.
        seed: Seed of the tokens.
    """
    require(compute.dtype == "auto", "the dtypes to compare are given by --dtypes, not --dtype")
    require(documents > 0 and documents % 2 == 0, f"--documents {documents} must be even: two are a pair")
    config = config_of(preset, batch_size, seq_len, compute)
    works = [StepWork(config, dtype, documents, steps, seed) for dtype in dtypes]
    rows = [row for work in works for row in measured(work, rounds)]
    title = f"train step, {preset}, T = {seq_len}, {documents} segments a row"
    finish(title, rows, steps=steps, rounds=rounds, compute=vars(compute), seed=seed)
    return 0


if __name__ == "__main__":
    as_command(fine_tuning, "fine_tuning")
