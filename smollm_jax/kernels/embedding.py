"""Look up embeddings, with a bitwise-reproducible gradient.

The gradient adds many rows to one place. A GPU adds rows in the order in which its threads arrive. So two runs of
one step differ in their last bits. A CPU and a TPU keep an order. For GPUs a stable sort groups the rows of each
token. A scan adds the rows in a fixed order, and each sum is written once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.kernels.shard import per_device
from smollm_jax.model.ops import reference_embed


def reproducible_embed(mesh: Mesh | None, *, rows: Any = None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return an `embed` whose gradient ignores thread order. Each device sorts only its own `rows`."""

    @jax.custom_vjp
    def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return reference_embed(table_VD, tokens_BT)

    def forward(table_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return reference_embed(table_VD, tokens_BT), (table_VD, tokens_BT)

    def backward(kept: tuple[jax.Array, jax.Array], dx_BTD: jax.Array) -> tuple[jax.Array, None]:
        table_VD, tokens_BT = kept
        sums = partial(sums_by_token, V=table_VD.shape[0])
        total = per_device(mesh, sums, in_specs=PartitionSpec(rows), out_specs=PartitionSpec(), add_over=rows)
        return total(dx_BTD, tokens_BT).astype(table_VD.dtype), None

    embed.defvjp(forward, backward)
    return embed


def sums_by_token(x_BTD: jax.Array, tokens_BT: jax.Array, V: int) -> jax.Array:
    """Return f32 sums (V, D) of x's rows per token. The shapes alone decide the order.

    A segmented scan (Blelloch 1990, section 1.5) adds the rows sorted by token. Each token's last row is its sum.
    """
    tokens_M = tokens_BT.reshape(-1)
    order_M = jnp.argsort(tokens_M, stable=True)
    tokens_M = tokens_M[order_M]
    x_MD = x_BTD.reshape(len(tokens_M), -1)[order_M].astype(jnp.float32)
    differs = tokens_M[1:] != tokens_M[:-1]
    first_M, last_M = (jnp.pad(differs, around, constant_values=True) for around in ((1, 0), (0, 1)))

    def add(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (left_x, left_first), (right_x, right_first) = left, right
        return jnp.where(right_first, right_x, left_x + right_x), left_first | right_first

    sums_MD, _ = jax.lax.associative_scan(add, (x_MD, first_M[:, None]))
    # a row that is not its token's last gets a place of its own past the end, and is dropped
    place_M = jnp.where(last_M, tokens_M, V + jnp.arange(len(tokens_M)))
    empty_VD = jnp.zeros((V, x_MD.shape[1]), jnp.float32)
    return empty_VD.at[place_M].set(sums_MD, mode="drop", unique_indices=True)
