"""A train step of ours and of Hugging Face Llama + PyTorch: `python -m benchmarks.train`.

Same architecture, weights, rows, AdamW, clip and precision; attention in PyTorch is SDPA. The peer does not keep
packed documents apart: its rows are one document each, ours hold `--documents`. With several
`--batch-sizes` a second table sets the best of each side against the best of the other.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import Row, as_command, finish, gib, show, spread
from benchmarks.sides import Outcome, Ready, compare, in_child, kind_of
from benchmarks.work import COMPUTE, Dtype, Preset, Work, config_of, our_step, write_model
from smollm_jax.config.settings import ComputeConfig
from smollm_jax.runtime import huge_pages

Form = Literal["eager", "compile", "max-autotune"]


def ours(work: Work) -> Ready:
    import jax

    from smollm_jax.training.compile import compiled_bytes

    step = our_step(work)
    began = time.perf_counter()
    loss = float(step.run()["loss"])
    facts = {
        "first step": step.compile_seconds + time.perf_counter() - began,
        "remat": step.remat,
        "attention": step.attention,
        "planned GiB": gib(compiled_bytes(step.program)),
        "loss": loss,
        "device": kind_of(step.mesh.devices.flat[0]),
    }

    def run() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(work.steps):
            metrics = step.run()
        jax.block_until_ready(metrics)
        return {"round": time.perf_counter() - start}

    device = step.mesh.devices.flat[0]
    return Ready(run, facts, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


def peer(work: Work, form: Form, folder: Path) -> Ready:
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # ours compiles from nothing too
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    step = _torch_step(work, form, device, folder)
    tokens = torch.tensor(work.rows()[0], device=device).long()
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(work.steps):
            step(ids, labels)
        wait()
        return {"round": time.perf_counter() - start}

    wait()
    began = time.perf_counter()
    loss = step(ids, labels).item()
    wait()
    facts = {"first step": time.perf_counter() - began, "loss": loss, "device": device}
    return Ready(run, facts, torch.cuda.max_memory_allocated if device == "cuda" else lambda: None)


def _torch_step(work: Work, form: Form, device: str, folder: Path) -> Callable[..., Any]:
    """The step of a person who knows PyTorch: compiled with its loss, fused AdamW."""
    import torch
    from transformers import AttentionInterface, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    # of rows that are one document each SDPA needs to know no more than that they are causal; compiled,
    # transformers would give it a mask of all pairs of tokens, with which it is slow
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    settings = work.config.optimizer
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("causal")
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )

    def loss_of(ids: Any, labels: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=work.dtype == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    if form != "eager":
        mode = "max-autotune-no-cudagraphs" if form == "max-autotune" else None
        loss_of = torch.compile(loss_of, dynamic=False, mode=mode)

    def step(ids: Any, labels: Any) -> Any:
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measured(work: Work, peers: tuple[Form, ...], rounds: int, *, alone: bool = False) -> list[Row]:
    """A row a side."""
    sides: dict[str, Callable[[], Ready]] = {"ours": partial(ours, work)}
    with tempfile.TemporaryDirectory(prefix="train-benchmark-") as folder:
        if peers:
            in_child(write_model, work.config.model, work.config.run.seed, Path(folder) / "hf")
        sides |= {f"HF + PyTorch {form}": partial(peer, work, form, Path(folder) / "hf") for form in peers}
        # ours with the huge pages that a run advises to ask for, the peer as its users run it
        outcomes = compare(sides, rounds=rounds, alone=alone, environments={"ours": huge_pages.environment()})
    ours_ran = outcomes["ours"]
    return [_row(name, outcome.on(ours_ran), ours_ran, work, alone) for name, outcome in outcomes.items()]


def _row(name: str, outcome: Outcome, reference: Outcome, work: Work, alone: bool) -> Row:
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
        if alone:  # the rounds of two sides were minutes apart
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
    """The rows with their share of the device's peak, where that is known; asked last, as JAX takes memory."""
    import jax

    from smollm_jax.runtime.devices import peak_flops

    peak = peak_flops(jax.devices()[0])
    return [row | {"MFU": row["GFLOP/s"] * 1e9 / peak} if peak and "GFLOP/s" in row else row for row in rows]


def best_of(rows: list[Row]) -> list[Row]:
    """Each side at its best batch size, a row for each dtype, and how much faster ours is there."""
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
        batch_sizes: Rows a step; several to find the best of each side.
        seq_len: Tokens a row.
        documents: Documents packed into a row of ours.
        dtypes: Compute dtypes over float32 parameters.
        peers: Forms of Hugging Face + PyTorch to time beside ours; none: ours alone.
        steps: Steps a round.
        rounds: Rounds counted; with `alone` twice as many.
        alone: No other side is alive while one is timed, as on an accelerator.
        compute: Of our side, but for its dtype.
        seed: Of the tokens and documents.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        for size in batch_sizes:
            config = config_of(preset, size, seq_len, compute)
            found = measured(Work(config, dtype, documents, steps, seed), peers, rounds, alone=alone)
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
