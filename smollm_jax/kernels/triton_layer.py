"""Fuse the projections of attention and feed-forward, for GPUs from Ampere on.

Queries, keys and values are one product, gate and up another: fewer and larger products. XLA would read everything
again for each part of their gradients. A kernel writes all parts in one pass over memory. Letters as in
model/transformer.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.kernels.shard import per_device
from smollm_jax.kernels.triton_call import LOG2_E, load_f32, store, triton_call
from smollm_jax.model.ops import rotate, swiglu

# Features of one token per program of the feed-forward; tokens per program of the heads. Other sizes tried
# on an H200 were slower, or within 4 %
NUMBERS, TOKENS = 1_024, 64


def fused_layer(
    mesh: Mesh | None = None, *, rows: Any = None, interpret: bool = False
) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """Return `project_heads` and `feed_forward` (see `Ops`) for devices that divide `rows`, but no matrix."""

    def run(kernel: Callable[..., Any], *arrays: jax.Array) -> Any:
        by_row = PartitionSpec(rows)
        return per_device(mesh, partial(kernel, interpret=interpret), in_specs=by_row, out_specs=by_row)(*arrays)

    def project_heads(x_BTD, q_DNH, k_DKH, v_DKH, rope, *, linear):
        D, N, H = q_DNH.shape
        weights_DE = jnp.concatenate([w.reshape(D, -1) for w in (q_DNH, k_DKH, v_DKH)], axis=1)
        y_BTE = linear("BTD,DE->BTE", x_BTD, weights_DE)
        cos_BTH, sin_BTH = (x[:, :, 0] for x in rope)
        return _heads(run, N, y_BTE.reshape(*x_BTD.shape[:2], -1, H), cos_BTH, sin_BTH)

    def feed_forward(x_BTD, gate_DF, up_DF, down_FD, *, linear):
        y_BTE = linear("BTD,DE->BTE", x_BTD, jnp.concatenate([gate_DF, up_DF], axis=1))
        return _gated(run, y_BTE, down_FD)

    return project_heads, feed_forward


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _heads(run: Callable[..., Any], N: int, y_BTEH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> Any:
    """Split `y_BTEH` into heads of queries, keys and values, and rotate the queries and keys."""
    return _heads_forward(run, N, y_BTEH, cos_BTH, sin_BTH)[0]


def _heads_forward(_run, N, y_BTEH, cos_BTH, sin_BTH):
    # XLA's own forward is as fast as a kernel
    K = (y_BTEH.shape[2] - N) // 2
    rope = cos_BTH[:, :, None], sin_BTH[:, :, None]
    heads = rotate(y_BTEH[:, :, :N], rope), rotate(y_BTEH[:, :, N : N + K], rope), y_BTEH[:, :, N + K :]
    return heads, (cos_BTH, sin_BTH)


def _heads_backward(run, _N, kept, gradients):
    return run(_heads_gradient, *gradients, *kept), None, None


_heads.defvjp(_heads_forward, _heads_backward)


def _heads_gradient(dq_BTNH, dk_BTKH, dv_BTKH, cos_BTH, sin_BTH, *, interpret):
    B, T, N, H = dq_BTNH.shape
    M, K = B * T, dk_BTKH.shape[2]

    def block(x: Any) -> tuple[Any, pl.BlockSpec]:
        return x, pl.BlockSpec((TOKENS, *x.shape[1:]), lambda i: (i, *(0,) * (x.ndim - 1)))

    inputs = [block(x.reshape(M, *x.shape[2:])) for x in (dq_BTNH, dk_BTKH, dv_BTKH, cos_BTH, sin_BTH)]
    outputs = [block(jax.ShapeDtypeStruct((M, N + 2 * K, H), dq_BTNH.dtype))]

    def kernel(dq_ref, dk_ref, dv_ref, cos_ref, sin_ref, dy_ref):
        inside = (pl.program_id(0) * TOKENS + jnp.arange(TOKENS) < M)[:, None]
        cos, sin = load_f32(cos_ref, inside), load_f32(sin_ref, inside)
        halves, at = (pl.ds(0, H // 2), pl.ds(H // 2, H // 2)), 0
        for ref, turned in ((dq_ref, True), (dk_ref, True), (dv_ref, False)):
            for n in range(ref.shape[1]):
                a, b = (load_f32(ref.at[:, jnp.int32(n), part], inside) for part in halves)
                if turned:  # rotate back
                    a, b = a * cos + b * sin, b * cos - a * sin
                for part, x in zip(halves, (a, b), strict=True):
                    store(dy_ref.at[:, jnp.int32(at), part], x, inside)
                at += 1

    (dy_MEH,) = triton_call("heads_backward", kernel, (pl.cdiv(M, TOKENS),), inputs, outputs, interpret)
    return dy_MEH.reshape(B, T, N + 2 * K, H)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(run: Callable[..., Any], y_BTE: jax.Array, down_FD: jax.Array) -> jax.Array:
    """Return `silu(gate) * up` times `down_FD`. `y_BTE` holds gate, then up (Shazeer 2020)."""
    return _gated_forward(run, y_BTE, down_FD)[0]


def _gated_forward(_run, y_BTE, down_FD):
    # XLA's own forward is as fast as a kernel
    down_FD = down_FD.astype(y_BTE.dtype)
    gate_BTF, up_BTF = jnp.split(y_BTE, 2, axis=-1)
    return jnp.einsum("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), down_FD), (y_BTE, down_FD)


def _gated_backward(run, kept, dout_BTD):
    y_BTE, down_FD = kept
    da_BTF = jnp.einsum("BTD,FD->BTF", dout_BTD, down_FD)
    dy_BTE, a_BTF = run(_gated_gradient, y_BTE, da_BTF)
    return dy_BTE, jnp.einsum("BTF,BTD->FD", a_BTF, dout_BTD).astype(jnp.float32)


_gated.defvjp(_gated_forward, _gated_backward)


def _gated_gradient(y_BTE, da_BTF, *, interpret):
    B, T, F = da_BTF.shape
    M = B * T
    arrays = y_BTE.reshape(M, 2 * F), da_BTF.reshape(M, F)
    blocks = [(x, pl.BlockSpec((None, x.shape[1]), lambda m, _: (m, 0))) for x in arrays]

    def kernel(y_ref, da_ref, dy_ref, a_ref):
        first = pl.program_id(1) * NUMBERS
        inside = first + jnp.arange(NUMBERS) < F
        of_gate, of_up = pl.ds(first, NUMBERS), pl.ds(F + first, NUMBERS)
        gate, up, da = (load_f32(x, inside) for x in (y_ref.at[of_gate], y_ref.at[of_up], da_ref.at[of_gate]))
        sigmoid = 1 / (1 + jnp.exp2(-LOG2_E * gate))
        silu = gate * sigmoid
        store(dy_ref.at[of_gate], da * up * (sigmoid + silu * (1 - sigmoid)), inside)
        store(dy_ref.at[of_up], da * silu, inside)
        store(a_ref.at[of_gate], silu * up, inside)

    grid = M, pl.cdiv(F, NUMBERS)
    dy_ME, a_MF = triton_call("gated_backward", kernel, grid, blocks, blocks, interpret)
    return dy_ME.reshape(B, T, 2 * F), a_MF.reshape(B, T, F)
