"""Check a kernel against its reference on the device at hand: values and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.kernels.triton_layer import TOKENS
from smollm_jax.model.attention import packed_attention, starts_of
from smollm_jax.model.loss import Score, reference_cross_entropy
from smollm_jax.model.ops import Joined, Kernel, reference_linear
from smollm_jax.model.transformer import Block, rope_angles
from smollm_jax.runtime.errors import one_line

# Of the largest entry. Rounding alone was seen to give 0.005 and 0.000001, a leak between documents 1
TOLERANCE = {"bfloat16": 0.02, "float32": 0.0001}


def disagreement(kernel: Kernel, config: ModelConfig, dtype: Any, *, seed: int = 0) -> str:
    """In words how `kernel` differs from the plain form on a small packed example, or fails; "" if it agrees.

    Values and gradients, four documents a row, at the model's own heads.
    """
    T, H = 256, config.head_dim
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    q, k, v, do = (jax.random.normal(key, (2, T, n, H)).astype(dtype) for key, n in zip(keys, heads, strict=True))
    ends_2E = jnp.array([[70, 71, 200], [128, 250, 256]])
    index_2T1 = jnp.broadcast_to(jnp.arange(T)[:, None], (2, T, 1))
    start_2T = starts_of(jnp.sum(index_2T1 >= ends_2E[:, None], axis=-1))

    def outcome(attention: Kernel, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, start_2T), *qkv)
        return out, *pull(do.astype(out.dtype))

    try:
        ours = jax.jit(partial(outcome, kernel))(q, k, v)
    except Exception as error:  # whatever a compiler may raise: better a slow run than none
        return f"it does not run here: {one_line(error)}"
    with jax.default_matmul_precision("highest"):  # else a GPU or TPU rounds the operands of f32 products down
        exact = jax.jit(partial(outcome, packed_attention))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for name, a, b in zip(("the output", "dq", "dk", "dv"), ours, exact, strict=True):
        gap = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        if not gap <= TOLERANCE[jnp.dtype(dtype).name]:
            return f"{name} differs from the plain form's by {gap:.2%} of its largest"
    return ""


# Of the loss as a whole, and of the largest gradients, which are near 1
LOSS_TOLERANCE = {"bfloat16": 0.005, "float32": 0.00001}


def loss_disagreement(score: Score, words: int, dtype: Any, *, seed: int = 0) -> str:
    """In words how `score` differs from the plain form on a few tokens, or fails; "" if it agrees."""
    logits_key, targets_key = jax.random.split(jax.random.key(seed))
    logits_BCV = 4 * jax.random.normal(logits_key, (2, 16, words))
    # the last word too: it may stand in a block of words that is not full
    targets_BC = jax.random.randint(targets_key, (2, 16), 0, words).at[0, 0].set(words - 1)
    valid_BC = jnp.arange(16)[None] % 3 > jnp.arange(2)[:, None] - 1
    try:
        nll, d_BCV = jax.jit(lambda logits, targets, valid: score(logits, targets, valid, dtype))(
            logits_BCV, targets_BC, valid_BC
        )
    except Exception as error:  # whatever a compiler may raise: better a slow run than none
        return f"the loss does not run here: {one_line(error)}"
    exact, exact_BCV = reference_cross_entropy(logits_BCV, targets_BC, valid_BC, jnp.float32)
    if not abs(nll / exact - 1) <= LOSS_TOLERANCE["float32"]:
        return f"the loss differs from the plain form's by {abs(nll / exact - 1):.2%}"
    gap = float(jnp.max(jnp.abs(d_BCV - exact_BCV)))
    return "" if gap <= LOSS_TOLERANCE[jnp.dtype(dtype).name] else f"the loss's gradient differs by {gap:.2%}"


def layer_disagreement(ours: Joined, config: ModelConfig, dtype: Any, *, seed: int = 0) -> str:
    """In words how `ours` differs from a layer with each matrix alone, or fails; "" if it agrees. Values and
    gradients, at the model's own shapes.
    """
    T = TOKENS + 3
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
    keys = iter(jax.random.split(jax.random.key(seed), 2 + len(jax.tree.leaves(shapes))))
    weights = jax.tree.map(lambda w: 0.1 * jax.random.normal(next(keys), w.shape), shapes)
    x_BTD, dx_BTD = (jax.random.normal(next(keys), (2, T, config.hidden_size)) for _ in range(2))
    positions_BT = jnp.broadcast_to(jnp.arange(T), (2, T))
    rope = rope_angles(positions_BT, head_dim=config.head_dim, theta=config.rope_theta)

    def mixed(q_BTNH, k_BTKH, v_BTKH):
        return q_BTNH + jnp.repeat(k_BTKH + 2 * v_BTKH, q_BTNH.shape[2] // k_BTKH.shape[2], axis=2)

    def outcome(joined: Joined | None, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        def layer(x_BTD: jax.Array, weights: Any) -> jax.Array:
            block = nnx.merge(graphdef, weights)
            h_BTD = block.attention(x_BTD, rope, mixed, reference_linear, joined)
            return h_BTD + block.mlp(x_BTD, reference_linear, joined)

        out_BTD, pull = jax.vjp(layer, x_BTD, weights)
        return out_BTD, *jax.tree.leaves(pull(dx_BTD.astype(out_BTD.dtype)))

    try:
        found = jax.jit(partial(outcome, ours))(x_BTD.astype(dtype))
    except Exception as error:  # whatever a compiler may raise: better a slow run than none
        return f"a layer does not run here: {one_line(error)}"
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(outcome, None))(x_BTD)
    for a, b in zip(found, exact, strict=True):
        gap = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-6))
        if not gap <= TOLERANCE[jnp.dtype(dtype).name]:
            return f"a layer differs from the plain form by {gap:.2%} of its largest"
    return ""
