"""The rows of the embedding that tokens stand for, and a gradient of it that is the same bits each time.

The gradient adds many rows to one place. A GPU does so in whatever order its threads come, so that two runs
of one step differ in their last bits; a CPU and a TPU keep an order. For GPUs the rows of the same token are
brought together by a stable sort, added in a fixed order, and each token's sum is written once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.model.ops import Lookup, reference_embed


def repeatable_lookup(mesh: Mesh | None, *, rows: Any = None) -> Lookup:
    """A lookup whose gradient depends on no order of threads; each device sorts its own rows only."""

    @jax.custom_vjp
    def lookup(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return reference_embed(embedding_VD, tokens_BT)

    def forward(embedding_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return reference_embed(embedding_VD, tokens_BT), (embedding_VD, tokens_BT)

    def backward(kept: tuple[jax.Array, jax.Array], dx_BTD: jax.Array) -> tuple[jax.Array, None]:
        embedding_VD, tokens_BT = kept
        V = embedding_VD.shape[0]
        if mesh is None or mesh.size == 1:
            return sums_by_token(dx_BTD, tokens_BT, V).astype(embedding_VD.dtype), None

        def here(dx_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            return jax.lax.psum(sums_by_token(dx_BTD, tokens_BT, V), rows)

        by_row, everywhere = PartitionSpec(rows), PartitionSpec()
        summed = jax.shard_map(here, mesh=mesh, in_specs=(by_row, by_row), out_specs=everywhere, check_vma=False)
        return summed(dx_BTD, tokens_BT).astype(embedding_VD.dtype), None

    lookup.defvjp(forward, backward)
    return lookup


def sums_by_token(x_BTD: jax.Array, tokens_BT: jax.Array, V: int) -> jax.Array:
    """f32 sums (V, D) of the rows of x that belong to each token, in an order that only the shapes decide.

    A segmented scan (Blelloch 1990, section 1.5) over the rows sorted by token; the last of each token is its sum.
    """
    tokens_M = tokens_BT.reshape(-1)
    order_M = jnp.argsort(tokens_M, stable=True)
    tokens_M = tokens_M[order_M]
    x_MD = x_BTD.reshape(len(tokens_M), -1)[order_M].astype(jnp.float32)
    differs = tokens_M[1:] != tokens_M[:-1]
    first_M, last_M = (
        jnp.pad(differs, (1, 0), constant_values=True),
        jnp.pad(differs, (0, 1), constant_values=True),
    )

    def add(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (left_x, left_first), (right_x, right_first) = left, right
        return jnp.where(right_first, right_x, left_x + right_x), left_first | right_first

    sums_MD, _ = jax.lax.associative_scan(add, (x_MD, first_M[:, None]))
    # rows that are nobody's last go past the end, each to a place of its own, and are dropped
    place_M = jnp.where(last_M, tokens_M, V + jnp.arange(len(tokens_M)))
    empty_VD = jnp.zeros((V, x_MD.shape[1]), jnp.float32)
    return empty_VD.at[place_M].set(sums_MD, mode="drop", unique_indices=True)
