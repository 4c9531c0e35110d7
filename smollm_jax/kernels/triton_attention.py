"""Compute flash attention (Dao 2023) on GPUs, only in blocks within a row's documents.

The kernels are written in Pallas and compiled by Triton, for Ampere and later. A block of queries reads keys from
the start of its first document to itself. A block of keys reads queries from itself to the end of its last
document. So a row costs as much as its documents. The G queries of a group share keys and values without a copy.
No sum depends on the order of threads, so the same step gives the same bits.

Scores are in base 2. Letters as in model/transformer.py. A block has X queries or Y keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from smollm_jax.kernels.shard import padded
from smollm_jax.kernels.triton_call import LOG2_E, triton_call
from smollm_jax.model.attention import MASKED

# Queries or keys per block, and loads in flight: for heads of width 64 no other setting tried on an H200 is more
# than 2 % faster (benchmarks/RESULTS.md)
BLOCK = 64
_call = partial(triton_call, stages=3)


def triton_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return causal attention (B, T, N, H) per document, as `packed_attention`. H is a power of 2 >= 16."""
    T = q_BTNH.shape[1]
    return _attention(*padded(BLOCK, q_BTNH, k_BTKH, v_BTKH, start_BT), interpret)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array, interpret: bool
) -> jax.Array:
    """Compute attention. T is a multiple of `BLOCK`. `start_BT`, int32, never falls along T."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, start_BT, interpret)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, start_BT, interpret):
    B, T, N, H = q_BTNH.shape
    at = _Specs(T, H, N // k_BTKH.shape[2])
    lse_BNT = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    inputs = [(q_BTNH, at.block), (k_BTKH, at.head), (v_BTKH, at.head), (start_BT, at.row)]
    outputs = [(q_BTNH, at.block), (lse_BNT, at.numbers)]
    o_BTNH, lse_BNT = _call("attention_forward", _forward_kernel, (B, N, T // BLOCK), inputs, outputs, interpret)
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, start_BT, o_BTNH, lse_BNT)


def _backward(interpret, kept, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, start_BT, o_BTNH, lse_BNT = kept
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    at, blocks = _Specs(T, H, N // K), T // BLOCK
    # the softmax gradient subtracts delta (Dao et al. 2022, section B.4)
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", o_BTNH, do_BTNH, preferred_element_type=jnp.float32)
    # queries see a key until the end of its document, so they see the last key of a block longest
    last_Y = jnp.arange(BLOCK - 1, T, BLOCK)
    end_BY = jnp.sum(start_BT[:, None, :] <= last_Y[None, :, None], axis=-1, dtype=jnp.int32)
    inputs = [(q_BTNH, at.group), (k_BTKH, at.block), (v_BTKH, at.block), (start_BT, at.row), (end_BY, at.ends)]
    inputs += [(do_BTNH, at.group), (lse_BNT, at.group_numbers), (delta_BNT, at.group_numbers)]
    outputs = [(k_BTKH, at.block), (v_BTKH, at.block)]
    grads = _call("attention_backward_keys", _backward_keys_kernel, (B, K, blocks), inputs, outputs, interpret)
    inputs = [(q_BTNH, at.block), (k_BTKH, at.head), (v_BTKH, at.head), (start_BT, at.row)]
    inputs += [(do_BTNH, at.block), (lse_BNT, at.numbers), (delta_BNT, at.numbers)]
    kernel, outputs = _backward_queries_kernel, [(q_BTNH, at.block)]
    (dq_BTNH,) = _call("attention_backward_queries", kernel, (B, N, blocks), inputs, outputs, interpret)
    return dq_BTNH, *grads, None


_attention.defvjp(_forward, _backward)


class _Specs:
    """The block specs for row b, head n, and block i of queries or keys."""

    def __init__(self, T: int, H: int, G: int):
        # a block of one head: queries, keys, or their outputs and gradients; and one number per query of the block
        self.block = pl.BlockSpec((None, BLOCK, None, H), lambda b, n, i: (b, i, n, 0))
        self.numbers = pl.BlockSpec((None, None, BLOCK), lambda b, n, i: (b, n, i))
        # all keys, or values, that the head of queries reads; all queries that read the head of keys
        self.head = pl.BlockSpec((None, T, None, H), lambda b, n, _: (b, 0, n // G, 0))
        self.group = pl.BlockSpec((None, T, G, H), lambda b, n, _: (b, 0, n, 0))
        self.group_numbers = pl.BlockSpec((None, G, T), lambda b, n, _: (b, n, 0))
        self.row, self.ends = (pl.BlockSpec((None, size), lambda b, *_: (b, 0)) for size in (T, T // BLOCK))


def _forward_kernel(q_ref, k_ref, v_ref, start_ref, o_ref, lse_ref):
    first, q_XH, start_X, bounds = _of_queries(q_ref, start_ref)
    scale = _scale(q_XH)

    def look(masked: bool, j, carry):
        o_XH, best_X, sum_X = carry
        keys = pl.ds(j * BLOCK, BLOCK)
        score_XY = plt.dot(q_XH, k_ref[keys, :].T) * scale
        if masked:
            score_XY = jnp.where(_sees(first, start_X, j * BLOCK), score_XY, MASKED)
        new_X = jnp.maximum(best_X, jnp.max(score_XY, axis=1))
        p_XY, shrink_X = jnp.exp2(score_XY - new_X[:, None]), jnp.exp2(best_X - new_X)
        value_XH = plt.dot(p_XY.astype(v_ref.dtype), v_ref[keys, :])
        return o_XH * shrink_X[:, None] + value_XH, new_X, sum_X * shrink_X + jnp.sum(p_XY, axis=1)

    carry = jnp.zeros(q_XH.shape, jnp.float32), jnp.full(BLOCK, MASKED, jnp.float32), jnp.zeros(BLOCK, jnp.float32)
    o_XH, best_X, sum_X = _over(look, carry, *bounds)
    o_ref[...] = (o_XH / sum_X[:, None]).astype(o_ref.dtype)
    lse_ref[...] = best_X + jnp.log2(sum_X)


def _backward_queries_kernel(q_ref, k_ref, v_ref, start_ref, do_ref, lse_ref, delta_ref, dq_ref):
    first, q_XH, start_X, bounds = _of_queries(q_ref, start_ref)
    do_XH, lse_X, delta_X, scale = do_ref[...], lse_ref[...], delta_ref[...], _scale(q_XH)

    def look(masked: bool, j, dq_XH):
        keys = pl.ds(j * BLOCK, BLOCK)
        k_YH = k_ref[keys, :]
        p_XY = jnp.exp2(plt.dot(q_XH, k_YH.T) * scale - lse_X[:, None])
        if masked:
            p_XY = jnp.where(_sees(first, start_X, j * BLOCK), p_XY, 0.0)
        dscore_XY = p_XY * (plt.dot(do_XH, v_ref[keys, :].T) - delta_X[:, None])
        return dq_XH + plt.dot(dscore_XY.astype(k_YH.dtype), k_YH)

    dq_XH = _over(look, jnp.zeros(q_XH.shape, jnp.float32), *bounds)
    dq_ref[...] = (dq_XH * (scale / LOG2_E)).astype(dq_ref.dtype)


def _backward_keys_kernel(q_ref, k_ref, v_ref, start_ref, end_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref):
    block = pl.program_id(2)
    first, k_YH, v_YH = block * BLOCK, k_ref[...], v_ref[...]
    scale, key_Y = _scale(k_YH), first + jnp.arange(BLOCK)
    end = pl.cdiv(end_ref[block], BLOCK)

    def look(g: int, i, carry):
        dk_YH, dv_YH = carry
        queries = pl.ds(i * BLOCK, BLOCK)
        q_XH, do_XH = q_ref[queries, g, :], do_ref[queries, g, :]
        p_YX = jnp.exp2(plt.dot(k_YH, q_XH.T) * scale - lse_ref[g, queries][None, :])
        query_X, start_X = i * BLOCK + jnp.arange(BLOCK), start_ref[queries]
        seen_YX = (key_Y[:, None] >= start_X[None, :]) & (key_Y[:, None] <= query_X[None, :])
        p_YX = jnp.where(seen_YX, p_YX, 0.0)
        dv_YH += plt.dot(p_YX.astype(do_XH.dtype), do_XH)
        dscore_YX = p_YX * (plt.dot(v_YH, do_XH.T) - delta_ref[g, queries][None, :])
        return dk_YH + plt.dot(dscore_YX.astype(q_XH.dtype), q_XH), dv_YH

    carry = jnp.zeros(k_YH.shape, jnp.float32), jnp.zeros(v_YH.shape, jnp.float32)
    for g in range(q_ref.shape[1]):
        carry = jax.lax.fori_loop(block, end, partial(look, g), carry)
    dk_YH, dv_YH = carry
    dk_ref[...] = (dk_YH * (scale / LOG2_E)).astype(dk_ref.dtype)
    dv_ref[...] = dv_YH.astype(dv_ref.dtype)


def _of_queries(q_ref, start_ref):
    """Return a block of queries: first index, queries, document starts, bounds in blocks of keys.

    Some queries see some keys from block `low` on. All queries see all keys from `same` up to the block itself.
    """
    block = pl.program_id(2)
    first = block * BLOCK
    start_X = start_ref[pl.ds(first, BLOCK)]
    low = jax.lax.div(start_ref[first], BLOCK)
    same = jax.lax.div(start_ref[first + BLOCK - 1] + BLOCK - 1, BLOCK)
    return first, q_ref[...], start_X, (low, jnp.clip(same, low, block), block)


def _over(look: Callable, carry: Any, low, same, block):
    carry = jax.lax.fori_loop(low, same, partial(look, True), carry)
    carry = jax.lax.fori_loop(same, block, partial(look, False), carry)
    return look(True, block, carry)


def _sees(first, start_X, first_key):
    query_X, key_Y = first + jnp.arange(BLOCK), first_key + jnp.arange(BLOCK)
    return (key_Y[None, :] >= start_X[:, None]) & (key_Y[None, :] <= query_X[:, None])


def _scale(x_XH) -> float:
    return x_XH.shape[1] ** -0.5 * LOG2_E
