"""Run a kernel on each device of a mesh, over its own part of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.model.ops import Kernel


def over(mesh: Mesh | None, kernel: Kernel, *, rows: Any = None, heads: Any = None) -> Kernel:
    """`kernel` on the devices of `mesh`, each with its rows, and its heads where the axis divides them.

    A kernel is one program to XLA's partitioner, which would have every device compute everything.
    """
    if mesh is None or mesh.size == 1:
        return kernel

    def divided(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array) -> jax.Array:
        divides = heads is not None and k_BTKH.shape[2] % mesh.shape[heads] == 0
        of_heads, of_rows = PartitionSpec(rows, None, heads if divides else None), PartitionSpec(rows)
        return jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(of_heads, of_heads, of_heads, of_rows),
            out_specs=of_heads,
            check_vma=False,  # the kernels do not say over which axes their results vary
        )(q_BTNH, k_BTKH, v_BTKH, start_BT)

    return divided


def _padded(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, `start_BT` last, with T made a multiple of `multiple` by a document of its own."""
    T = arrays[0].shape[1]
    missing = -T % multiple
    *qkv, start_BT = arrays
    padded = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in qkv)
    return *padded, jnp.pad(start_BT, ((0, 0), (0, missing)), constant_values=T)


@dataclass(frozen=True)
class _Where:
    """How kernels run: on the devices of a mesh, each with its `rows`, or interpreted."""

    mesh: Mesh | None
    rows: Any
    interpret: bool

    def run(self, kernel: Callable, *arrays: jax.Array) -> Any:
        kernel = partial(kernel, interpret=self.interpret)
        if self.mesh is None or self.mesh.size == 1:
            return kernel(*arrays)
        rows = PartitionSpec(self.rows)
        return jax.shard_map(kernel, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)
