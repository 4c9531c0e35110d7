"""Run a decoder layer in five kernels, for a few rows of one token.

The kernels need a GPU from Ampere on. A decode step is launch-bound, and XLA emits sixteen kernels per layer. The
five: norm with query, key and value; attention, with rotation and cache write; attention's output; norm with gate
and up; feed-forward's output. A row is one vector, too little for tensor cores. A program multiplies this vector
with a few rows of weights in f32 and adds in a fixed order. `generation.decoder` decides when the kernels run.

Letters as in model/transformer.py. I inputs, O outputs, R outputs of a program, C inputs or Y keys read at a time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from smollm_jax.kernels.triton_call import LOG2_E, load_f32, store, triton_call
from smollm_jax.model.attention import MASKED
from smollm_jax.model.ops import Rope

# The fastest settings tried on an H200 (benchmarks/RESULTS.md): outputs of a program, of gate and up and of the
# other matrices; inputs and keys read at a time, powers of two; loads of keys in flight
GATED_OUTPUTS, OUTPUTS = 8, 4
INPUTS, KEYS, STAGES = 2_048, 64, 2
MOST_ROWS = 4  # a program multiplies its weights with each row in turn

LayerCache = tuple[jax.Array, jax.Array]  # k_BKSH, v_BKSH: heads first, as their products read them


class LayerWeights(NamedTuple):
    """The arrays of one layer as its kernels read them, and its norms' epsilon."""

    attention_norm_D: jax.Array
    qkv_OD: jax.Array
    o_DI: jax.Array
    mlp_norm_D: jax.Array
    gate_up_OD: jax.Array
    down_DF: jax.Array
    epsilon: float


def layer_step(
    x_BD: jax.Array, rope: Rope, position_B: jax.Array, layer_cache: LayerCache, layer: LayerWeights,
    *, interpret: bool = False,
) -> tuple[jax.Array, LayerCache]:  # fmt: skip
    """Return the layer's output for one token per row, and the cache with that token.

    `rope` is (B, H/2). `position_B` is int32. A position past the end of the cache is not written.
    """
    qkv_BO = norm_product(x_BD, layer.attention_norm_D, layer.qkv_OD, layer.epsilon, interpret=interpret)
    seen_BI, layer_cache = attend(qkv_BO, rope, position_B, layer_cache, interpret=interpret)
    x_BD = add_product("decode_o", x_BD, seen_BI, layer.o_DI, interpret=interpret)
    gated_BF = gated_product(x_BD, layer.mlp_norm_D, layer.gate_up_OD, layer.epsilon, interpret=interpret)
    return add_product("decode_down", x_BD, gated_BF, layer.down_DF, interpret=interpret), layer_cache


def norm_product(
    x_BD: jax.Array, scale_D: jax.Array, weights_OD: jax.Array, epsilon: float, *, interpret: bool = False
) -> jax.Array:
    """Multiply the normed rows by the matrix: (B, O)."""
    outputs, D = weights_OD.shape

    def kernel(x_ref, scale_ref, weights_ref, y_ref):
        row_R = _mask(pl.program_id(0), OUTPUTS, outputs)
        weights = _weights(weights_ref, row_R, D)
        for b in _numbers(len(x_ref)):
            y_R = _product(weights, _normed(x_ref, b, scale_ref, D, epsilon))
            store(y_ref.at[b, :], y_R, row_R)

    inputs = _whole(x_BD), _whole(scale_D), _rows(weights_OD, OUTPUTS)
    return _product_call("decode_qkv", kernel, inputs, OUTPUTS, outputs, interpret)


def gated_product(
    x_BD: jax.Array, scale_D: jax.Array, weights_OD: jax.Array, epsilon: float, *, interpret: bool = False
) -> jax.Array:
    """Return silu(gate) * up (B, F) of the normed rows. The matrix (2F, D) has the gate first."""
    D, F = x_BD.shape[1], len(weights_OD) // 2

    def kernel(x_ref, scale_ref, weights_ref, y_ref):
        row_R = _mask(pl.program_id(0), GATED_OUTPUTS, F)
        gates, ups = (_weights(weights_ref, row_R, D, half) for half in _numbers(2))
        for b in _numbers(len(x_ref)):
            x = _normed(x_ref, b, scale_ref, D, epsilon)
            gate_R, up_R = _product(gates, x), _product(ups, x)
            store(y_ref.at[b, :], gate_R / (1 + jnp.exp2(-LOG2_E * gate_R)) * up_R, row_R)

    inputs = _whole(x_BD), _whole(scale_D), _rows(weights_OD.reshape(2, F, D), GATED_OUTPUTS)
    return _product_call("decode_gated", kernel, inputs, GATED_OUTPUTS, F, interpret)


def add_product(
    name: str, x_BO: jax.Array, y_BI: jax.Array, weights_OI: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Add the product of the matrix and `y` to `x`: (B, O)."""
    outputs, width = weights_OI.shape

    def kernel(x_ref, y_ref, weights_ref, out_ref):
        row_R = _mask(pl.program_id(0), OUTPUTS, outputs)
        weights = _weights(weights_ref, row_R, width)
        for b in _numbers(len(x_ref)):
            x_R = load_f32(x_ref.at[b, :], row_R)
            store(out_ref.at[b, :], x_R + _product(weights, _vector(y_ref, width, b)), row_R)

    inputs = (x_BO, _columns(len(x_BO), OUTPUTS)), _whole(y_BI), _rows(weights_OI, OUTPUTS)
    return _product_call(name, kernel, inputs, OUTPUTS, outputs, interpret)


def attend(
    qkv_BO: jax.Array, rope: Rope, position_B: jax.Array, layer_cache: LayerCache, *, interpret: bool = False
) -> tuple[jax.Array, LayerCache]:
    """Return attention (B, N*H) of one token per row, and the cache with the token.

    The token attends to the cache and itself. The cache is updated in place if the caller does not use it again.
    `qkv_BO` holds queries, keys and values head after head, not rotated yet. H is a power of 2.
    """
    B, K, S, H = layer_cache[0].shape
    N = qkv_BO.shape[1] // H - 2 * K
    G = N // K
    query = pl.BlockSpec((None, H), lambda b, n: (b, n))
    key = pl.BlockSpec((None, H), lambda b, n: (b, N + n // G))
    value = pl.BlockSpec((None, H), lambda b, n: (b, N + K + n // G))
    half = pl.BlockSpec((None, H // 2), lambda b, _: (b, 0))
    keys = pl.BlockSpec((None, None, pl.cdiv(S, KEYS) * KEYS, H), lambda b, n: (b, n // G, 0, 0))
    cache = [(part, keys) for part in layer_cache]
    heads = [(qkv_BO, query), (qkv_BO, key), (qkv_BO, value)]
    seen_BI, new_k_BKSH, new_v_BKSH = triton_call(
        "decode_attention",
        partial(_attend_kernel, G=G, S=S),
        grid=(B, N),
        inputs=[*heads, (rope[0], half), (rope[1], half), (position_B, _all(B)), *cache],
        outputs=[(jax.ShapeDtypeStruct((B, N * H), qkv_BO.dtype), query), *cache],
        interpret=interpret,
        stages=STAGES,
        aliases={6: 1, 7: 2},
    )
    return seen_BI, (new_k_BKSH, new_v_BKSH)


def _attend_kernel(
    q_ref, k_ref, v_ref, cos_ref, sin_ref, position_ref, old_k_ref, old_v_ref, o_ref, new_k_ref, new_v_ref,
    *, G: int, S: int,
):  # fmt: skip
    H = len(q_ref)
    position = position_ref[pl.program_id(0)]
    q_H = _turned(q_ref, cos_ref, sin_ref).astype(jnp.float32) * (H**-0.5 * LOG2_E)
    k_H, v_H = _turned(k_ref, cos_ref, sin_ref), v_ref[...]
    # other programs of the group may read the cache during this write: none reads the token's slot
    before = jnp.minimum(position, S)

    def look(j, carry):
        o_H, best, total = carry
        keys = pl.ds(j * KEYS, KEYS)
        is_before_Y = j * KEYS + jnp.arange(KEYS) < before
        k_YH, v_YH = (load_f32(ref.at[keys, :], is_before_Y[:, None]) for ref in (old_k_ref, old_v_ref))
        score_Y = jnp.where(is_before_Y, jnp.sum(k_YH * q_H[None, :], axis=1), MASKED)
        new = jnp.maximum(best, jnp.max(score_Y))
        p_Y, shrink = jnp.exp2(score_Y - new), jnp.exp2(best - new)
        return o_H * shrink + jnp.sum(p_Y[:, None] * v_YH, axis=0), new, total * shrink + jnp.sum(p_Y)

    own = jnp.sum(k_H.astype(jnp.float32) * q_H)
    turns = jax.lax.div(before + KEYS - 1, KEYS)
    o_H, _, total = jax.lax.fori_loop(0, turns, look, (v_H.astype(jnp.float32), own, jnp.float32(1)))
    o_ref[...] = (o_H / total).astype(o_ref.dtype)

    @pl.when((jax.lax.rem(pl.program_id(1), G) == 0) & (position < S))
    def write():
        new_k_ref[position, :] = k_H.astype(new_k_ref.dtype)
        new_v_ref[position, :] = v_H.astype(new_v_ref.dtype)


def _turned(x_ref, cos_ref, sin_ref) -> jax.Array:
    """Rotate as `ops.rotate`. A program cannot split an array, so it reads the partner of each entry again."""
    half = len(x_ref) // 2
    i_H = jnp.arange(2 * half)
    first_H = i_H < half
    pair_H = jnp.where(first_H, i_H, i_H - half)
    x_H, partner_H = x_ref[...], x_ref[jnp.where(first_H, i_H + half, i_H - half)]
    sin_H = jnp.where(first_H, -sin_ref[pair_H], sin_ref[pair_H])
    turned_H = x_H.astype(jnp.float32) * cos_ref[pair_H] + partner_H.astype(jnp.float32) * sin_H
    return turned_H.astype(x_ref.dtype)


def _normed(x_ref, b: jax.Array, scale_ref, D: int, epsilon: float) -> list[jax.Array]:
    """Return the normed row in parts, rounded as `RMSNorm` rounds."""
    parts, scales = _vector(x_ref, D, b), _vector(scale_ref, D)
    squares_C = sum(x_C * x_C for x_C in parts)
    root = jax.lax.rsqrt(jnp.sum(squares_C) / D + epsilon)
    normed = [x_C * root * scale_C for x_C, scale_C in zip(parts, scales, strict=True)]
    return [x_C.astype(x_ref.dtype).astype(jnp.float32) for x_C in normed]


def _product(weights: list[jax.Array], x: list[jax.Array]) -> jax.Array:
    """Multiply weights (R, C) by x (C,), both in parts of the inputs: (R,)."""
    return jnp.sum(sum(w_RC * x_C[None, :] for w_RC, x_C in zip(weights, x, strict=True)), axis=1)


def _vector(ref, length: int, *at: jax.Array) -> list[jax.Array]:
    """Load a vector in parts, as f32."""
    parts = enumerate(_turns(length))
    return [load_f32(ref.at[(*at, pl.ds(start, size))], _mask(i, size, length)) for i, (start, size) in parts]


def _weights(ref, row_R: jax.Array | None, inputs: int, *at: jax.Array) -> list[jax.Array]:
    """Load rows of a matrix in parts of the inputs, as f32."""
    parts = []
    for i, (start, size) in enumerate(_turns(inputs)):
        mask_RC, column_C = None if row_R is None else row_R[:, None], _mask(i, size, inputs)
        if column_C is not None:
            mask_RC = column_C[None, :] if mask_RC is None else mask_RC & column_C[None, :]
        parts.append(load_f32(ref.at[(*at, slice(None), pl.ds(start, size))], mask_RC))
    return parts


def _numbers(count: int) -> list[jax.Array]:
    """Return 0 to `count` - 1 as arrays. The interpreter of masked loads takes nothing else."""
    return [jnp.int32(number) for number in range(count)]


def _mask(block, size: int, length: int) -> jax.Array | None:
    """Return a mask of a block's entries within `length`. None if blocks of `size` always fit."""
    return None if length % size == 0 else block * size + jnp.arange(size) < length


def _turns(length: int) -> list[tuple[int, int]]:
    """Return where to start reading a dim of `length`, and how many entries to read."""
    size = min(INPUTS, pl.next_power_of_2(length))
    return [(start, size) for start in range(0, length, size)]


def _width(length: int) -> int:
    return sum(size for _, size in _turns(length))


def _all(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _columns(B: int, block: int) -> pl.BlockSpec:
    return pl.BlockSpec((B, block), lambda i: (0, i))


def _whole(x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
    """Return a vector or rows of vectors, and a spec by which programs read all."""
    return x, _all(*x.shape[:-1], _width(x.shape[-1]))


def _rows(weights: jax.Array, block: int) -> tuple[jax.Array, pl.BlockSpec]:
    """Return weights (..., O, I), and the spec by which a program reads `block` rows."""
    *stack, _, inputs = weights.shape
    return weights, pl.BlockSpec((*stack, block, _width(inputs)), lambda i: (*(0 for _ in stack), i, 0))


def _product_call(name, kernel, inputs, block, outputs, interpret) -> jax.Array:
    """Call a kernel whose programs make `block` of the outputs (B, O) each."""
    (x, _), *_ = inputs
    out = jax.ShapeDtypeStruct((len(x), outputs), x.dtype), _columns(len(x), block)
    grid = (pl.cdiv(outputs, block),)
    return triton_call(name, kernel, grid, inputs, [out], interpret, stages=1)[0]
