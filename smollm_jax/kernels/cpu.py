"""Replace slow bf16 operations of XLA:CPU: products, stacked residuals, one row times a matrix.

XLA:CPU multiplies bfloat16 at twice the speed if the result is float32. JAX derives the gradient of weights as a
transposed product. So all three products are written out, with a float32 result. Other devices use JAX's own
forms. Letters as in model/transformer.py, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smollm_jax.model.ops import PRODUCT

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_linear(letters: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply by f32 weights in float32 and round once, also for the gradient of x.

    The gradient of the weights is not rounded. Each letter must appear in two of the three arrays.
    """
    return _forward(letters, x, weights)[0]


def _forward(letters: str, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = checkpoint_name(_einsum(letters, x, weights.astype(x.dtype)).astype(x.dtype), PRODUCT)
    # not a copy of the weights in the dtype of x: the weights exist anyway, and a scan would stack the copies
    return y, (x, weights)


def _backward(letters: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weights = kept
    short = weights.astype(x.dtype)
    operands, of_y = letters.split("->")
    of_x, of_weights = operands.split(",")
    dx = _einsum(f"{of_y},{of_weights}->{of_x}", dy, short)
    return dx.astype(x.dtype), _einsum(f"{of_x},{of_y}->{of_weights}", x, dy)


wide_linear.defvjp(_forward, _backward)


def residuals_as_bits(layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `layer` with its bfloat16 residuals stored as uint16.

    XLA:CPU can write uint16, but not bfloat16, into a part of an array. For bfloat16, each layer turns all layers'
    stack into float32 and back: two fifths of a step of 135M. The layer must have no uint16 residuals of its own.
    Only its arguments get gradients, not the arrays it closes over.
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
    """Bit-cast every array of dtype `old` to dtype `new`."""
    return jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(leaf, new) if leaf.dtype == old else leaf, tree)


# Measured on two cores (Zen 5): reading 3, 8 or 12 rows of weights at a time is slower than 6. The partial sums of
# more outputs than these, 0.6 MB, leave the cache of a core before they are added up.
STREAM_ROWS = 6
STREAM_OUTPUTS = 1536


def stream(x_I: jax.Array, weights_IO: jax.Array) -> jax.Array:
    """Return the f32 product (O,) of one row with bf16 weights, by fused multiply-adds.

    A few rows at a time go into a loop along memory on every core. XLA's own products do neither for one bf16 row.
    """
    R = max(rows for rows in range(1, STREAM_ROWS + 1) if len(x_I) % rows == 0)
    # without the barrier XLA converts the weights to f32 before the loop over tokens, which reads twice the bytes
    x_I, weights_IO = jax.lax.optimization_barrier((x_I, weights_IO))
    # a bf16 is the upper half of an f32. Shifting is five times as fast as XLA's conversion
    bits_IO = weights_IO.view(jnp.uint16).astype(jnp.uint32) << 16
    weights_RSO = bits_IO.view(jnp.float32).reshape(R, -1, weights_IO.shape[1])
    x_RS1 = x_I.astype(jnp.float32).reshape(R, -1, 1)
    part_SO = sum(x_RS1[row] * weights_RSO[row] for row in range(R))
    return jnp.ones(len(x_I) // R) @ part_SO
