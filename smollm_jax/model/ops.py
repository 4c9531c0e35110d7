"""The functions a model computes with, in plain JAX: the reference for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""`kernel(q_BTNH, k_BTKH, v_BTKH, start_BT)` gives o_BTNH, causal inside each document; `start_BT` as `starts_of`
gives it."""


Lookup = Callable[[jax.Array, jax.Array], jax.Array]
"""`lookup(embedding_VD, tokens_BT)` gives x_BTD."""


def reference_embed(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return embedding_VD[tokens_BT]


Product = Callable[[str, jax.Array, jax.Array], jax.Array]
"""`product(letters, x, weights)` is their `einsum` in the dtype of x; the weights are float32."""

PRODUCT = "product"  # what remat's policies know the result of one by


def reference_linear(letters: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    return checkpoint_name(jnp.einsum(letters, x, weights.astype(x.dtype)), PRODUCT)


Layer = Callable[[jax.Array, Any], jax.Array]
"""`layer(x_BTD, weights)` gives x_BTD."""
Keep = Callable[[Layer], Layer]


def as_they_are(layer: Layer) -> Layer:
    return layer


class Joined(NamedTuple):
    """What a layer does with matrices side by side."""

    heads: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    """`heads(x_BTD, q_DNH, k_DKH, v_DKH, rope)` gives q_BTNH and k_BTKH, turned, and v_BTKH."""
    feed_forward: Callable[..., jax.Array]
    """`feed_forward(x_BTD, gate_DF, up_DF, down_FD)` gives (B, T, D)."""


# What costs next to nothing to compute is computed again for the backward pass, whatever `remat` says: kept, it
# would be most of what a layer keeps. A scan over the layers keeps XLA from merging the two computations; where
# all layers are unrolled it may merge them, and keep what it likes.
cheap = partial(jax.checkpoint, prevent_cse=False)


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + H/2) of each head by the angles in `rope`."""
    cos, sin = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """`silu(gate) * up` (Shazeer 2020), computed in f32 and rounded once: on a CPU each rounding takes time."""
    gated_BTF = jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)
    return gated_BTF.astype(gate_BTF.dtype)
