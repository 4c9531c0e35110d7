"""Time a train step, ours and Hugging Face Llama + PyTorch: `python -m benchmarks.train`.

Architecture, weights, rows, AdamW, clip and precision are the same; attention in PyTorch is SDPA. The peer does
not keep packed documents apart, so its rows are one document each, and ours hold `--documents`. With several
`--batch-sizes`, a second table compares the sides at their best batch size.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.harness.peers import Form, torch_training
from benchmarks.harness.sides import Outcome, Ready, compare, in_child, kind_of, peak_bytes_on, repeated
from benchmarks.harness.tables import Row, as_command, finish, gib, show, spread
from benchmarks.harness.workload import COMPUTE, Dtype, Preset, StepWork, config_of, our_step, write_model
from smollm_jax.config.settings import ComputeConfig
from smollm_jax.runtime import huge_pages
from smollm_jax.runtime.errors import require


def ours(work: StepWork) -> Ready:
    import jax

    from smollm_jax.training.compile import compiled_bytes

    step = our_step(work)
    began = time.perf_counter()
    loss = float(step.run()["loss"])
    device = step.mesh.devices.flat[0]
    facts = {
        "first step": step.compile_seconds + time.perf_counter() - began,
        "remat": step.remat,
        "attention": step.ops.kernels,
        "planned GiB": gib(compiled_bytes(step.program)),
        "loss": loss,
        "device": kind_of(device),
    }
    return Ready(repeated(step.run, work.steps, jax.block_until_ready), facts, peak_bytes_on(device))


def measured(work: StepWork, peers: tuple[Form, ...], rounds: int, *, alone: bool = False) -> list[Row]:
    """Return a row per side."""
    sides: dict[str, Callable[[], Ready]] = {"ours": partial(ours, work)}
    with tempfile.TemporaryDirectory(prefix="train-benchmark-") as folder:
        if peers:
            in_child(write_model, work.config.model, work.config.run.seed, Path(folder) / "hf")
        sides |= {
            f"HF + PyTorch {form}": partial(torch_training, work, form, Path(folder) / "hf") for form in peers
        }
        # our side runs with the huge pages that a run advises, the peer as its users run it
        outcomes = compare(sides, rounds=rounds, alone=alone, environments={"ours": huge_pages.environment()})
    ours_ran = outcomes["ours"]
    return [_row(name, outcome.on(ours_ran), ours_ran, work, alone) for name, outcome in outcomes.items()]


def _row(name: str, outcome: Outcome, reference: Outcome, work: StepWork, alone: bool) -> Row:
    row: Row = {"side": name, "dtype": work.dtype, "batch": work.batch_size}
    if outcome.failed:
        return row | {"failed": outcome.failed}
    seconds = outcome.of("round")
    rate = spread([work.steps * work.step_tokens / value for value in seconds])
    flops = rate["median"] * work.config.model.flops_per_token(work.config.data.seq_len)
    faster = None
    if name != "ours" and not reference.failed:
        rounds = reference.of("round")
        faster = spread([a / b for a, b in zip(seconds, rounds, strict=True)])
        if alone:  # the rounds of two sides are minutes apart
            faster = spread([statistics.median(seconds) / statistics.median(rounds)])
    return row | {
        "tokens/s": rate,
        "GFLOP/s": flops / 1e9,
        "MFU": None,
        "compile, s": outcome.facts["first step"] - statistics.median(seconds) / work.steps,
        **{f"{name} a step": value / work.steps for name, value in outcome.processor.items()},
        "peak GiB": gib(outcome.peak_bytes),
        "planned GiB": outcome.facts.get("planned GiB"),
        "remat": outcome.facts.get("remat"),
        "attention": outcome.facts.get("attention"),
        "first loss": outcome.facts["loss"],
        "ours is faster by": faster,
    }


def with_mfu(rows: list[Row]) -> list[Row]:
    """Add the MFU to the rows if the device's peak is known; last, because JAX takes its memory then."""
    import jax
    import ml_dtypes  # noqa: F401 - lets numpy know bfloat16
    import numpy as np

    from smollm_jax.runtime.devices import peak_flops

    peaks = {dtype: peak_flops(jax.devices()[0], np.dtype(dtype)) for dtype in {row["dtype"] for row in rows}}
    return [
        row | {"MFU": row["GFLOP/s"] * 1e9 / peak} if (peak := peaks[row["dtype"]]) and "GFLOP/s" in row else row
        for row in rows
    ]


def best_of(rows: list[Row]) -> list[Row]:
    """Return each side at its best batch size, a row per dtype, and how much faster ours is there."""
    table: list[Row] = []
    for side, dtype in dict.fromkeys((row["side"], row["dtype"]) for row in rows):
        ran = [row for row in rows if (row["side"], row["dtype"]) == (side, dtype) and "tokens/s" in row]
        if not ran:
            continue
        best = max(ran, key=lambda row: row["tokens/s"]["median"])
        rate = best["tokens/s"]["median"]
        our = next((row["tokens/s"] for row in table if (row["side"], row["dtype"]) == ("ours", dtype)), None)
        faster = our / rate if our and side != "ours" else None
        table.append(
            {"side": side, "dtype": dtype, "best batch": best["batch"], "tokens/s": rate, "MFU": best["MFU"]}
            | {"ours is faster by": faster}
        )
    return table


def train(
    *,
    preset: Preset = "135M",
    batch_sizes: tuple[int, ...] = (2,),
    seq_len: int = 256,
    documents: int = 1,
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16"),
    peers: tuple[Form, ...] = ("eager",),
    steps: int = 1,
    rounds: int = 5,
    alone: bool = False,
    compute: ComputeConfig = COMPUTE,
    seed: int = 0,
) -> int:
    """Time whole training steps, ours and PyTorch's.

    Args:
        preset: Architecture.
        batch_sizes: Rows per step; give several to find the best of each side.
        seq_len: Tokens per row.
        documents: Documents packed into a row of our side.
        dtypes: Compute dtypes over float32 parameters.
        peers: Forms of Hugging Face + PyTorch to compare with; none: our side only.
        steps: Steps per round.
        rounds: Rounds counted; with `alone` twice as many.
        alone: Time each side while no other is alive, as on an accelerator.
        compute: Settings of our side. Its dtype stands in `dtypes`.
        seed: Seed of the tokens and documents.
    """
    require(compute.dtype == "auto", "the dtypes to compare are given by --dtypes, not --dtype")
    rows: list[Row] = []
    for dtype in dtypes:
        for size in batch_sizes:
            config = config_of(preset, size, seq_len, compute)
            found = measured(StepWork(config, dtype, documents, steps, seed), peers, rounds, alone=alone)
            if len(dtypes) * len(batch_sizes) > 1:
                show(f"so far: {dtype}, batch {size}", found)
            rows += found
    rows = with_mfu(rows)
    finish(
        f"train step, {preset}, T = {seq_len}, {documents} documents a row of ours",
        rows,
        summary=best_of(rows),
        steps=steps,
        rounds=rounds,
        alone=alone,
        compute=vars(compute),
        seed=seed,
    )
    return 0


if __name__ == "__main__":
    as_command(train, "train")
