"""What a layer keeps for its backward pass (its residuals), which the scan over the layers stacks.

XLA:CPU cannot write bfloat16 into a part of an array: for each layer it turns the whole stack, of all layers, into
float32 and back, which was two fifths of a step of 135M. Integers of 16 bits it can write. So on a CPU the
residuals are stacked as the integers that have their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

Layer = Callable[[jax.Array, Any], jax.Array]
"""`layer(x_BTD, weights)` gives x_BTD."""
Keep = Callable[[Layer], Layer]


def as_they_are(layer: Layer) -> Layer:
    return layer


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


def keep_of(mesh: Mesh | None, dtype: Any) -> Keep:
    """How the devices of `mesh` keep residuals when they compute in `dtype`."""
    on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    return as_bits if on_cpu and jnp.dtype(dtype) == jnp.bfloat16 else as_they_are


def _seen_as(new: Any, old: Any, tree: Any) -> Any:
    """The same tree with the bits of every `old` array as `new`."""
    return jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(leaf, new) if leaf.dtype == old else leaf, tree)
