"""Time attention over packed rows alone, forward and backward: `python -m benchmarks.attention`.

The sides are the reference, the fused kernels and PyTorch's SDPA, on a layer's queries, keys and values. SDPA sees
one document per row, which is more work than several documents are for the kernels that skip across them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from benchmarks.harness.peers import torch_device, torch_peak, torch_wait
from benchmarks.harness.sides import Outcome, Ready, compare, kind_of, peak_bytes_on, repeated
from benchmarks.harness.tables import Row, as_command, finish, gib, spread
from benchmarks.harness.workload import Dtype, Preset, StepWork, config_of
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import AttentionName

Name = Literal["plain", "pallas", "splash", "sdpa"]


def kernel(work: StepWork, name: AttentionName) -> Ready:
    """Make one of our kernels ready on random heads and the segments of `work`."""
    import jax
    import jax.numpy as jnp

    from benchmarks.breakdown import with_gradients
    from smollm_jax.kernels.check import check_attention
    from smollm_jax.kernels.select import select_attention, with_kernels
    from smollm_jax.model.attention import starts_of
    from smollm_jax.model.ops import REFERENCE
    from smollm_jax.runtime.devices import use_precision_of
    from smollm_jax.runtime.errors import require

    dtype, device = jnp.dtype(work.dtype), jax.devices()[0]
    use_precision_of(dtype)
    select_attention(name, device, dtype)  # raises if it cannot run
    attention = with_kernels(REFERENCE, name).attention
    wrong = check_attention(attention, work.config.model, dtype)
    require(not wrong, f"{name} is not timed, it is wrong: {wrong}")
    start_BT = starts_of(jnp.asarray(work.rows()[1][:, :-1]))
    heads = _head_counts(work.config.model)
    shape, size = start_BT.shape, work.config.model.head_dim
    keys = jax.random.split(jax.random.key(work.seed), len(heads))
    q, k, v, do = (
        jax.random.normal(key, (*shape, n, size)).astype(dtype) for key, n in zip(keys, heads, strict=True)
    )
    began = time.perf_counter()
    program = with_gradients(attention, do, q, k, v, given=(start_BT,))
    facts = {"compile": time.perf_counter() - began, "device": kind_of(device)}

    return Ready(repeated(program, work.steps, jax.block_until_ready), facts, peak_bytes_on(device))


def sdpa(work: StepWork) -> Ready:
    """Make PyTorch's scaled_dot_product_attention ready on random heads."""
    import torch

    device = torch_device()
    size, length = work.config.model.head_dim, work.config.data.seq_len
    options: Any = {"device": device, "dtype": getattr(torch, work.dtype), "requires_grad": True}
    q, k, v, do = (
        torch.randn(work.batch_size, n, length, size, **options) for n in _head_counts(work.config.model)
    )
    wait = torch_wait(device)

    def call() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), do)

    return Ready(repeated(call, work.steps, lambda _: wait()), {"device": device}, torch_peak(device))


def _head_counts(model: ModelConfig) -> tuple[int, int, int, int]:
    """Return the heads of queries, keys, values and the gradient of the output."""
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
        seq_len: Tokens per row.
        documents: Documents packed into a row.
        dtype: Dtype of queries, keys and values.
        kernels: Our kernels by name, and PyTorch's sdpa; a kernel that cannot run here says why.
        calls: Calls per round.
        rounds: Rounds counted.
        seed: Seed of values and documents.
    """
    work = StepWork(config_of(preset, batch_size, seq_len), dtype, documents, calls, seed)
    sides: dict[str, Callable[[], Ready]] = {}
    for name in kernels:
        sides[name] = partial(sdpa, work) if name == "sdpa" else partial(kernel, work, name)
    outcomes = compare(sides, rounds=rounds)
    first = outcomes[kernels[0]]
    title = f"attention, {preset}, {dtype}, {batch_size} x {seq_len}, {documents} documents a row"
    finish(title, [_row(name, outcome.on(first), first, work) for name, outcome in outcomes.items()])
    return 0


def _row(name: str, outcome: Outcome, first: Outcome, work: StepWork) -> Row:
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
