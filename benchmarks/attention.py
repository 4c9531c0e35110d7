"""Attention over packed rows alone, forward and backward: `python -m benchmarks.attention`.

The plain form and every fused kernel that takes its place, and PyTorch's SDPA, on a layer's queries, keys and
values. SDPA sees one document a row, which is more work for those who use that there are several.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from benchmarks.measure import Row, as_command, finish, gib, spread
from benchmarks.sides import Outcome, Ready, compare, kind_of
from benchmarks.work import Dtype, Preset, Work, config_of
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import AttentionName

Name = Literal["plain", "pallas", "splash", "sdpa"]


def kernel(work: Work, name: AttentionName) -> Ready:
    """One of ours, compiled, on random heads and the segments of `work`."""
    import jax
    import jax.numpy as jnp

    from benchmarks.breakdown import with_gradients
    from smollm_jax.kernels.check import disagreement
    from smollm_jax.kernels.select import choose, kernel_of
    from smollm_jax.model.attention import starts_of
    from smollm_jax.runtime.devices import use_precision_of
    from smollm_jax.runtime.errors import require

    dtype, device = jnp.dtype(work.dtype), jax.devices()[0]
    use_precision_of(dtype)
    choose(name, device, dtype)  # raises where it cannot run
    wrong = disagreement(kernel_of(name), work.config.model, dtype)
    require(not wrong, f"{name} is not timed, it is wrong: {wrong}")
    start_BT = starts_of(jnp.asarray(work.rows()[1][:, :-1]))
    heads = _head_counts(work.config.model)
    shape, size = start_BT.shape, work.config.model.head_dim
    keys = jax.random.split(jax.random.key(work.seed), len(heads))
    q, k, v, do = (
        jax.random.normal(key, (*shape, n, size)).astype(dtype) for key, n in zip(keys, heads, strict=True)
    )
    began = time.perf_counter()
    program = with_gradients(kernel_of(name), do, q, k, v, given=(start_BT,))
    facts = {"compile": time.perf_counter() - began, "device": kind_of(device)}

    def run() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(work.steps):
            made = program()
        jax.block_until_ready(made)
        return {"round": time.perf_counter() - start}

    return Ready(run, facts, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


def sdpa(work: Work) -> Ready:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    size, length = work.config.model.head_dim, work.config.data.seq_len
    options: Any = {"device": device, "dtype": getattr(torch, work.dtype), "requires_grad": True}
    q, k, v, do = (
        torch.randn(work.batch_size, n, length, size, **options) for n in _head_counts(work.config.model)
    )

    def run() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(work.steps):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (q, k, v), do)
        if device == "cuda":
            torch.cuda.synchronize()
        return {"round": time.perf_counter() - start}

    return Ready(run, {"device": device}, torch.cuda.max_memory_allocated if device == "cuda" else lambda: None)


def _head_counts(model: ModelConfig) -> tuple[int, int, int, int]:
    """Of queries, keys, values and the gradient of what comes out."""
    return model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads


def attention(
    *,
    preset: Preset = "135M",
    batch_size: int = 2,
    seq_len: int = 256,
    documents: int = 1,
    dtype: Dtype = "float32",
    kernels: tuple[Name, ...] = ("plain", "pallas", "splash", "sdpa"),
    calls: int = 5,
    rounds: int = 5,
    seed: int = 0,
) -> int:
    """Time attention over packed rows, forward and backward, by kernel.

    Args:
        preset: Architecture, for its heads.
        batch_size: Rows.
        seq_len: Tokens a row.
        documents: Documents packed into a row.
        dtype: Of queries, keys and values.
        kernels: Ours by name, and sdpa, PyTorch's; one that cannot run here says why.
        calls: Calls a round.
        rounds: Rounds counted.
        seed: Of values and documents.
    """
    work = Work(config_of(preset, batch_size, seq_len), dtype, documents, calls, seed)
    sides: dict[str, Callable[[], Ready]] = {}
    for name in kernels:
        sides[name] = partial(sdpa, work) if name == "sdpa" else partial(kernel, work, name)
    outcomes = compare(sides, rounds=rounds)
    first = outcomes[kernels[0]]
    title = f"attention, {preset}, {dtype}, {batch_size} x {seq_len}, {documents} documents a row"
    finish(title, [_row(name, outcome.on(first), first, work) for name, outcome in outcomes.items()])
    return 0


def _row(name: str, outcome: Outcome, first: Outcome, work: Work) -> Row:
    if outcome.failed:
        return {"kernel": name, "failed": outcome.failed}
    seconds = outcome.of("round")
    model, length = work.config.model, work.config.data.seq_len
    flops = 6 * length * model.num_heads * model.head_dim * work.step_tokens  # the causal half, as in a step
    ms = spread([value * 1e3 / work.steps for value in seconds])
    faster = None if first.failed else [a / b for a, b in zip(first.of("round"), seconds, strict=True)]
    return {
        "kernel": name,
        "ms": ms,
        "GFLOP/s": flops / ms["median"] / 1e6,
        "compile, s": outcome.facts.get("compile"),
        "peak GiB": gib(outcome.peak_bytes),
        "faster than the first": spread(faster) if faster else None,
    }


if __name__ == "__main__":
    as_command(attention, "attention")
