"""Products of activations with weights, in the form that a device is fast in.

XLA:CPU multiplies bfloat16 at twice the speed where the result is float32, and the gradient of weights that JAX
derives comes out of a product transposed. So on a CPU all three products are written out, with a float32 result.
Elsewhere they are JAX's own. The letters are those of model.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smollm_jax.model.ops import PRODUCT, Layer

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def wide_product(letters: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """A product with float32 weights that is formed in float32 and rounded once, as is the gradient of x; that of
    the weights is not rounded. Each letter must stand in two of the three arrays.
    """
    return checkpoint_name(_wide(letters, x, weights), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide(letters: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    return _forward(letters, x, weights)[0]


def _forward(letters: str, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _einsum(letters, x, weights.astype(x.dtype)).astype(x.dtype)
    # not their copy in the dtype of x: the weights are there anyway, and copies of all layers would be stacked
    return y, (x, weights)


def _backward(letters: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weights = kept
    short = weights.astype(x.dtype)
    operands, of_y = letters.split("->")
    of_x, of_weights = operands.split(",")
    dx = _einsum(f"{of_y},{of_weights}->{of_x}", dy, short)
    return dx.astype(x.dtype), _einsum(f"{of_x},{of_y}->{of_weights}", x, dy)


_wide.defvjp(_forward, _backward)


def as_bits(layer: Layer) -> Layer:
    """The layer, keeping uint16 where it kept bfloat16; it must have no residuals that are uint16 already, and
    no gradient goes to what it closes over, but to its arguments only.
    """

    @jax.custom_vjp
    def kept(x_BTD: jax.Array, weights: Any) -> jax.Array:
        return layer(x_BTD, weights)

    def forward(x_BTD: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
        y_BTD, pull = jax.vjp(layer, x_BTD, weights)
        return y_BTD, _seen_as(jnp.uint16, jnp.bfloat16, pull)

    def backward(pull: Any, dy_BTD: jax.Array) -> tuple[jax.Array, Any]:
        return _seen_as(jnp.bfloat16, jnp.uint16, pull)(dy_BTD)

    kept.defvjp(forward, backward)
    return kept


def _seen_as(new: Any, old: Any, tree: Any) -> Any:
    """The same tree with the bits of every `old` array as `new`."""
    return jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(leaf, new) if leaf.dtype == old else leaf, tree)


# Measured on two cores (Zen 5): 3, 8 and 12 rows of weights read at a time are slower than 6, and partial sums
# for more outputs than these, 0.6 MB of them, leave the cache of a core before they are added up.
STREAM_ROWS = 6
STREAM_OUTPUTS = 1536


def _stream(x_I: jax.Array, weights_IO: jax.Array) -> jax.Array:
    """f32 product (O,) of one row with bf16 weights, as a fused multiply-add of a few of their rows at a time.

    XLA makes of it a loop along memory on every core; the products it has do neither for one bf16 row.
    """
    R = max(rows for rows in range(1, STREAM_ROWS + 1) if len(x_I) % rows == 0)
    # else XLA turns the weights to f32 once, before the loop over tokens, and reads twice the bytes in it
    x_I, weights_IO = jax.lax.optimization_barrier((x_I, weights_IO))
    # a bf16 is the upper half of an f32; shifting is five times as fast as XLA's conversion
    bits_IO = weights_IO.view(jnp.uint16).astype(jnp.uint32) << 16
    weights_RSO = bits_IO.view(jnp.float32).reshape(R, -1, weights_IO.shape[1])
    x_RS1 = x_I.astype(jnp.float32).reshape(R, -1, 1)
    part_SO = sum(x_RS1[row] * weights_RSO[row] for row in range(R))
    return jnp.ones(len(x_I) // R) @ part_SO
