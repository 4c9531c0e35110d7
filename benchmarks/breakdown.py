"""Time each part of a train step alone, beside the whole step: `python -m benchmarks.breakdown`.

Each part is compiled alone, forward and backward over all layers on the step's own shapes, and takes turns with
the whole step. The rest is the time that the parts do not explain. A part alone cannot be fused with its
neighbours, so the rest can be negative: fusion saves that much. `benchmarks.profile` shows where the step
itself spends its time; this command shows what a part costs at least, and how fast its products run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.harness.tables import Row, as_command, finish, spread
from benchmarks.harness.workload import COMPUTE, OurStep, Preset, StepWork, config_of, dtype_of, our_step
from smollm_jax.config.settings import ComputeConfig, Config

Program = Callable[[], Any]
"""A function that starts the work of a part and returns arrays to wait for."""


def breakdown(
    *,
    preset: Preset = "135M",
    batch_size: int = 2,
    seq_len: int = 256,
    documents: int = 1,
    rounds: int = 5,
    compute: ComputeConfig = COMPUTE,
    seed: int = 0,
) -> int:
    """Time the parts of a train step and the whole step.

    Args:
        preset: Architecture.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        documents: Documents packed into a row.
        rounds: Rounds counted.
        compute: Settings of the whole step; the parts recompute nothing.
        seed: Seed of tokens, documents and weights.
    """
    import jax

    config = config_of(preset, batch_size, seq_len, compute)
    dtype = dtype_of(compute)
    work = StepWork(config, dtype, documents, steps=1, seed=seed)
    whole = our_step(work)
    programs = {"whole step": whole.run, **parts(work, whole)}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(-1, rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - began)
    title = f"breakdown, {preset}, {dtype}, {batch_size} x {seq_len}, {documents} documents a row, {whole.note}"
    finish(title, rows_of(seconds, config, work.step_tokens), rounds=rounds, compute=vars(compute))
    return 0


def parts(work: StepWork, whole: OurStep) -> dict[str, Program]:
    """Return every part as a program of its own, with its gradients."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model.loss import summed_nll, targets_of
    from smollm_jax.model.transformer import SmolLM, init_params

    config, dtype = work.config, jnp.dtype(work.dtype)
    params = init_params(config.model, work.seed)
    ops = whole.ops
    unroll = config.compute.unroll_for(whole.remat, config.model.num_layers, on_gpu=ops.on_gpu)
    chunk_tokens = config.compute.loss_chunk_for(whole.remat, on_gpu=ops.on_gpu)
    model = SmolLM.from_params(config.model, params, dtype=dtype, unroll=unroll, ops=ops)
    tokens, segment_ids = map(jnp.asarray, work.rows())
    targets, weights = targets_of(tokens, segment_ids)
    shape = (*targets.shape, config.model.hidden_size)
    x_BTD = jax.random.normal(jax.random.key(work.seed), shape).astype(dtype)

    def embed(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return ops.embed(embedding_VD, tokens_BT).astype(dtype)

    def head(x_BTD: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return summed_nll(model.final_norm(x_BTD), head_VD, targets, weights, chunk_tokens, ops.cross_entropy)

    return {
        "embedding": with_gradients(embed, x_BTD, params["embedding"], given=(tokens[:, :-1],)),
        **_block_parts(model, segment_ids[:, :-1], x_BTD),
        "head and loss": with_gradients(head, jnp.float32(1), x_BTD, model.head_VD, given=(targets, weights)),
        "optimizer": _optimizer(config, params),
    }


def _block_parts(model: Any, segment_ids_BT: Any, x_BTD: Any) -> dict[str, Program]:
    """Return the parts of the blocks, over all layers."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model.attention import starts_of
    from smollm_jax.model.transformer import rope_angles

    blocks, config, start_BT = model.blocks, model.config, starts_of(segment_ids_BT)
    positions_BT = jnp.arange(start_BT.shape[1])[None] - start_BT
    rope = rope_angles(positions_BT, head_dim=config.head_dim, theta=config.rope_theta)

    def mixed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, _: jax.Array) -> jax.Array:
        """In place of attention, so that only the projections are timed."""
        return q_BTNH + jnp.repeat(k_BTKH + v_BTKH, config.num_heads // config.num_kv_heads, axis=2)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array) -> jax.Array:
        def layer(x_BTNH: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x_BTNH + model.ops.attention(x_BTNH, k_BTKH, v_BTKH, start_BT), None

        return jax.lax.scan(layer, q_BTNH, length=config.num_layers, unroll=model.unroll)[0]

    q_BTNH, k_BTKH = (
        jax.random.normal(jax.random.key(n), (*x_BTD.shape[:2], n, config.head_dim)).astype(x_BTD.dtype)
        for n in (config.num_heads, config.num_kv_heads)
    )
    over_layers = partial(_over_layers, x_BTD=x_BTD, unroll=model.unroll, keep=model.ops.wrap_layer)
    projections = replace(model.ops, attention=mixed)
    return {
        "attention: projections and rope": over_layers(
            blocks.attention, lambda attention, x: x + attention(x, rope, start_BT, projections)
        ),
        "attention: scores to values": with_gradients(attend, q_BTNH, q_BTNH, k_BTKH, k_BTKH, given=(start_BT,)),
        "feed-forward": over_layers(blocks.mlp, lambda mlp, x: x + mlp(x, model.ops)),
        "norms": over_layers((blocks.attention_norm, blocks.mlp_norm), lambda norms, x: norms[1](norms[0](x))),
    }


def _over_layers(
    modules: Any, apply: Callable[[Any, Any], Any], *, x_BTD: Any, unroll: int, keep: Callable
) -> Program:
    """Compile `apply(modules of a layer, x)` through all layers."""
    import jax
    from flax import nnx

    graphdef, stacked = nnx.split(modules)

    def forward(stacked: Any, x_BTD: Any) -> Any:
        layer = keep(lambda x_BTD, weights: apply(nnx.merge(graphdef, weights), x_BTD))
        return jax.lax.scan(lambda x, weights: (layer(x, weights), None), x_BTD, stacked, unroll=unroll)[0]

    return with_gradients(forward, x_BTD, stacked, x_BTD)


def with_gradients(
    forward: Callable[..., Any], cotangent: Any, *arguments: Any, given: tuple[Any, ...] = ()
) -> Program:
    """Compile `forward(*arguments, *given)` and the gradients of `arguments`.

    `given` is passed at run time too: the compiler would sort and mask a constant once and for all.
    """
    import jax

    def program(cotangent: Any, arguments: Any, given: Any) -> Any:
        out, pull = jax.vjp(lambda *arguments: forward(*arguments, *given), *arguments)
        return out, pull(cotangent)

    compiled = jax.jit(program).lower(cotangent, arguments, given).compile()
    return partial(compiled, cotangent, arguments, given)


def _optimizer(config: Config, params: Any) -> Program:
    import jax
    import jax.numpy as jnp
    import optax

    from smollm_jax.training.optimizer import make_optimizer

    optimizer = make_optimizer(config.optimizer)

    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        scale_and_norm = {"scale": jnp.float32(1), "norm": optax.tree.norm(grads)}
        updates, opt_state = optimizer.update(grads, opt_state, params, **scale_and_norm)
        rate = config.optimizer.learning_rate
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state

    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params).compile()
    grads = jax.tree.map(lambda p: p.copy(), params)
    state = jax.tree.map(lambda p: p.copy(), params), optimizer.init(params)

    def run() -> Any:
        nonlocal state
        state = compiled(*state, grads)
        return state

    return run


def part_flops(config: Config) -> dict[str, int]:
    """Return FLOPs per token of the parts that are matrix products, counted as in `flops_per_token`."""
    m, T = config.model, config.data.seq_len
    return {
        "attention: projections and rope": 12
        * m.num_layers
        * m.hidden_size
        * m.head_dim
        * (m.num_heads + m.num_kv_heads),
        "attention: scores to values": 6 * m.num_layers * T * m.num_heads * m.head_dim,
        "feed-forward": 18 * m.num_layers * m.hidden_size * m.intermediate_size,
        "head and loss": 6 * m.vocab_size * m.hidden_size,
        "whole step": m.flops_per_token(T),
    }


def rows_of(seconds: dict[str, list[float]], config: Config, tokens: int) -> list[Row]:
    """Return a row per part, then their sum, the rest and the whole; shares are of the whole's median."""
    names = [*(name for name in seconds if name != "whole step"), "whole step"]
    flops = part_flops(config)
    rows: list[Row] = []
    for name in names:
        milliseconds = spread([value * 1e3 for value in seconds[name]])
        rate = flops[name] * tokens / milliseconds["median"] / 1e6 if name in flops else None
        rows.append({"part": name, "ms": milliseconds, "GFLOP/s": rate})
    total = rows[-1]["ms"]["median"]
    explained = sum(row["ms"]["median"] for row in rows[:-1])
    between = [{"part": "sum of the parts", "ms": explained}, {"part": "rest", "ms": total - explained}]
    rows[-1:-1] = between
    for row in rows:
        ms = row["ms"]
        row["share"] = (ms["median"] if isinstance(ms, dict) else ms) / total
    return rows


if __name__ == "__main__":
    as_command(breakdown, "breakdown")
