"""Products of activations with weights, in the form that a device is fast in.

XLA:CPU multiplies bfloat16 at twice the speed where the result is float32, and the gradient of weights that JAX
derives comes out of a product transposed. So on a CPU all three products are written out, with a float32 result.
Elsewhere they are JAX's own. The letters are those of model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

Product = Callable[[str, jax.Array, jax.Array], jax.Array]
"""`product(letters, x, weights)` is their `einsum` in the dtype of x; the weights are float32."""

PRODUCT = "product"  # what remat's policies know the result of one by


def plain_product(letters: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    return checkpoint_name(jnp.einsum(letters, x, weights.astype(x.dtype)), PRODUCT)


def product_of(mesh: Mesh | None) -> Product:
    """The product for the devices of `mesh`; the plain one for none."""
    return wide_product if mesh is not None and mesh.devices.flat[0].platform == "cpu" else plain_product


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
