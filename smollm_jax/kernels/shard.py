"""Run a kernel on each device's part of the arrays, with padding to its blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


def per_device(
    mesh: Mesh | None, fn: Callable[..., Any], *, in_specs: Any, out_specs: Any, add_over: Any = None
) -> Callable[..., Any]:
    """Return `fn` run on each device, on the parts that the specs give.

    A kernel is opaque to XLA's partitioner, which would have every device compute everything. `add_over` names
    mesh axes to sum the results over. Without a mesh, or on one device, `fn` comes back unchanged.
    """
    if mesh is None or mesh.size == 1:
        return fn

    def part(*arrays: Any) -> Any:
        return fn(*arrays) if add_over is None else jax.lax.psum(fn(*arrays), add_over)

    # check_vma: kernels do not say over which axes their results vary
    return jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def attention_per_device(
    mesh: Mesh | None, kernel: Callable[..., jax.Array], *, rows: Any = None, heads: Any = None
) -> Callable[..., jax.Array]:
    """Return an attention kernel run per device, on its `rows`. Divides the `heads` too if they divide evenly."""
    if mesh is None or mesh.size == 1:
        return kernel

    def divided(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array) -> jax.Array:
        divides = heads is not None and k_BTKH.shape[2] % mesh.shape[heads] == 0
        by_head, by_row = PartitionSpec(rows, None, heads if divides else None), PartitionSpec(rows)
        each = per_device(mesh, kernel, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head)
        return each(q_BTNH, k_BTKH, v_BTKH, start_BT)

    return divided


def padded(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return q, k, v and `start_BT` with T a multiple of `multiple`. The padding is a document of its own."""
    *qkv, start_BT = arrays
    T = start_BT.shape[1]
    pad = [(0, 0), (0, -T % multiple)]
    return *(jnp.pad(x, [*pad, (0, 0), (0, 0)]) for x in qkv), jnp.pad(start_BT, pad, constant_values=T)
