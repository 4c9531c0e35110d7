"""Measure the machine's limits for any program: `python -m benchmarks.limits`.

It times reading memory, and matrix products in the three orientations of a layer's forward and backward pass,
in JAX and in PyTorch. From these follow bounds on training and on decoding one row, in tokens/s. Another
program may find a faster product and exceed them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness.peers import torch_device, torch_wait
from benchmarks.harness.sides import Outcome, Ready, compare
from benchmarks.harness.tables import Row, as_command, finish, spread
from benchmarks.harness.workload import Dtype, Preset
from smollm_jax.config.architecture import MODELS
from smollm_jax.runtime.errors import require

READ_BYTES = 512 * 2**20
PRODUCTS = ("X @ W", "G @ W.T", "X.T @ G")
"""Forward, and backward to the inputs and to the weights."""


def by_jax(tokens: int, inputs: int, outputs: int, dtype: Dtype) -> Ready:
    import jax
    import jax.numpy as jnp

    from smollm_jax.runtime.devices import use_precision_of

    use_precision_of(jnp.dtype(dtype))  # otherwise operands of float32 products are rounded
    x, w, g, memory = (
        jnp.ones(shape, dtype) for shape in _shapes(tokens, inputs, outputs, jnp.dtype(dtype).itemsize)
    )
    # two dims of tokens, as in the model: with one, XLA:CPU takes a slower form of X.T @ G in bfloat16
    x, g = (array.reshape(2, tokens // 2, -1) for array in (x, g))
    float32: Any = jnp.float32
    product = partial(jnp.einsum, preferred_element_type=float32)
    programs = {
        "X @ W": (jax.jit(partial(product, "BTI,IO->BTO")), (x, w)),
        "G @ W.T": (jax.jit(partial(product, "BTO,IO->BTI")), (g, w)),
        "X.T @ G": (jax.jit(partial(product, "BTI,BTO->IO")), (x, g)),
        "read": (jax.jit(partial(jnp.sum, dtype=float32)), (memory,)),
    }

    def call(name: str) -> None:
        program, arguments = programs[name]
        jax.block_until_ready(program(*arguments))

    return Ready(partial(_round, call), {"device": str(jax.devices()[0].platform)})


def by_torch(tokens: int, inputs: int, outputs: int, dtype: Dtype) -> Ready:
    import torch

    device = torch_device()
    wait = torch_wait(device)
    kind = getattr(torch, dtype)
    x, w, g, memory = (
        torch.ones(shape, dtype=kind, device=device) for shape in _shapes(tokens, inputs, outputs, kind.itemsize)
    )
    programs: dict[str, Callable[[], Any]] = {
        "X @ W": lambda: x @ w,
        "G @ W.T": lambda: g @ w.T,
        "X.T @ G": lambda: x.T @ g,
        "read": memory.sum,
    }

    def call(name: str) -> None:
        programs[name]()
        wait()

    return Ready(partial(_round, call), {"device": device})


def _shapes(tokens: int, inputs: int, outputs: int, itemsize: int) -> tuple[tuple[int, int], ...]:
    """Return the shapes of X, W, G and of the array that is read."""
    return (tokens, inputs), (inputs, outputs), (tokens, outputs), (READ_BYTES // itemsize // 2**12, 2**12)


def _round(call: Callable[[str], None]) -> dict[str, float]:
    """Return the seconds of each, the faster of two calls, because a limit is wanted."""
    found = {}
    for name in (*PRODUCTS, "read"):
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            call(name)
            seconds.append(time.perf_counter() - began)
        found[name] = min(seconds)
    return found


def limits(
    *,
    preset: Preset = "135M",
    tokens: int = 2_048,
    seq_len: int = 256,
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16"),
    rounds: int = 5,
) -> int:
    """Time products of a feed-forward layer and a read of memory, and derive bounds from them.

    Args:
        preset: Architecture, for the shapes.
        tokens: Rows of the products, an even number.
        seq_len: Tokens per row of the train step to bound.
        dtypes: Dtypes of the operands.
        rounds: Rounds counted.
    """
    require(tokens % 2 == 0, f"--tokens {tokens} must be even")
    model = MODELS[preset]
    shape = tokens, model.hidden_size, 2 * model.intermediate_size
    sides: dict[str, Callable[[], Ready]] = {}
    for dtype in dtypes:
        sides[f"JAX {dtype}"] = partial(by_jax, *shape, dtype)
        sides[f"PyTorch {dtype}"] = partial(by_torch, *shape, dtype)
    outcomes = compare(sides, rounds=rounds)
    flops = 2 * shape[0] * shape[1] * shape[2]
    rows = [
        _row(name, outcome, flops, model.flops_per_token(seq_len), model.num_parameters)
        for name, outcome in outcomes.items()
    ]
    finish(f"limits, {preset}, {shape[0]} x {shape[1]} x {shape[2]}, T = {seq_len}", rows, rounds=rounds)
    return 0


def _row(name: str, outcome: Outcome, flops: int, flops_per_token: int, parameters: int) -> Row:
    if outcome.failed:
        return {"side": name, "failed": outcome.failed}
    best = {what: min(outcome.of(what)) for what in (*PRODUCTS, "read")}
    rates = {what: spread([flops / s / 1e9 for s in outcome.of(what)]) for what in PRODUCTS}
    seconds_a_flop = sum(best[what] for what in PRODUCTS) / (3 * flops)
    itemsize = 4 if name.endswith("32") else 2
    return {
        "side": name,
        "on": outcome.facts["device"],
        **{f"{what}, GFLOP/s": rate for what, rate in rates.items()},
        "read, GB/s": spread([READ_BYTES / s / 1e9 for s in outcome.of("read")]),
        "trains at most, tokens/s": 1 / (flops_per_token * seconds_a_flop),
        "decodes at most, tokens/s": READ_BYTES / best["read"] / (parameters * itemsize),
    }


if __name__ == "__main__":
    as_command(limits, "limits")
