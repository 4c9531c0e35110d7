"""Which device holds what: the mesh, and a layout for every array by rule.

Three axes. `data` divides the rows of a batch and repeats the parameters; `fsdp` divides the rows too, and
the parameters and moments with them (ZeRO, Rajbhandari et al. 2020); `tensor` divides heads, feed-forward
and vocabulary (Megatron, Shoeybi et al. 2019). XLA's partitioner does the rest: the results do not depend
on the mesh beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smollm_jax.config.architecture import PARAMETER_DIMS
from smollm_jax.config.settings import MESH_AXES, Config
from smollm_jax.runtime.errors import require

BATCH_AXES = ("data", "fsdp")

# The dims of each parameter, and the dims each axis prefers, best first: an axis takes the first dim that it
# divides and no other axis has. Layers are scanned, so never divided. H comes last: attention contracts H, so its
# sums would cross devices. Norms are too small to divide.
DIMS = {name: dims for path, dims in PARAMETER_DIMS.items() if (name := path.split("/")[-1]) != "scale"}
PREFERRED = {"tensor": "NKFVDH", "fsdp": "DFVNKH"}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of --mesh; without it all devices on `data`, or as few as take the run's steps as fast.

    Raises `ValueError` when there are too few devices, or more than there are rows for.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.compute.mesh_sizes
    several = len({device.process_index for device in devices}) > 1
    if not sizes:
        sizes = {"data": len(devices) if several else _useful(config, len(devices))}
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    count, rows = math.prod(shape), math.prod(shape[: len(BATCH_AXES)])
    needs = f"--mesh {config.compute.mesh} needs {count} devices"
    require(count <= len(devices), f"{needs}, and there are {len(devices)}")
    require(
        count == len(devices) or not several,
        f"{needs}; where several processes share the work it has to use all {len(devices)}",
    )
    most = max(phase.batch_size for phase in config.phases) // config.compute.grad_accum
    require(
        most >= rows,
        f"{most} rows, the largest batch of the phases over --grad-accum, leave some of {rows} devices without "
        "any; give a larger --batch-size, a smaller --grad-accum, or another --mesh",
    )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:count])


def _useful(config: Config, count: int) -> int:
    """The fewest of `count` devices on which a run's steps have as few rows a device as on all of them."""

    def rows_in_turn(devices: int) -> int:
        return sum(phase.steps * -(-phase.batch_size // (devices * parts)) for phase in config.phases)

    parts = config.compute.grad_accum
    return min(range(1, count + 1), key=lambda devices: (rows_in_turn(devices), devices))


def row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded_rows(batch_size: int, mesh: Mesh, parts: int = 1) -> int:
    """`batch_size` and the empty rows that give each device as many as the others, in each of `parts`
    micro-batches.
    """
    each = row_shards(mesh) * parts
    return -(-batch_size // each) * each


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """Of a batch, or of activations: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def by_device(mesh: Mesh) -> NamedSharding:
    """Of an array with one entry a device."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def is_shared(mesh: Mesh) -> bool:
    """Whether several processes hold its devices."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def shards_here(mesh: Mesh, config: Config) -> range:
    """Of the `config.data.shards` lanes of a batch, those with a row on the devices of this process.

    Never none: a process that has nothing but padding keeps the last, which others have too.
    """
    shards, wanted = config.data.shards, set()
    for batch_size in {phase.batch_size for phase in config.phases}:
        rows = padded_rows(batch_size, mesh, config.compute.grad_accum)
        for index in by_row(mesh).addressable_devices_indices_map((rows,)).values():
            first, end, _ = index[0].indices(rows) if index else (0, rows, 1)
            wanted |= {row * shards // batch_size for row in range(first, min(end, batch_size))}
    return range(min(wanted), max(wanted) + 1) if wanted else range(shards - 1, shards)


def on_devices(array: np.ndarray, rows: int, first_row: int, mesh: Mesh) -> jax.Array:
    """The rows of a batch that this process has made, from `first_row` on, as its part of an array of `rows`;
    what lies behind the batch is padding, zeros.
    """
    layout = by_row(mesh)
    if layout.is_fully_addressable and len(array) == rows:
        return jax.device_put(array, layout)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        begin, end, _ = index[0].indices(rows) if index else (0, rows, 1)
        made = array[begin - first_row : end - first_row]
        return np.pad(made, [(0, end - begin - len(made)), *[(0, 0)] * (array.ndim - 1)])

    return jax.make_array_from_callback((rows, *array.shape[1:]), layout, part)


def on_one_device(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a tree, whole, on the first of this process's devices; called by all processes."""
    if not is_shared(mesh):
        return jax.device_put(tree, mesh.devices.flat[0])
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The layout of the parameter, or moment, called `name`; raises `ValueError` where an axis divides no dim."""
    letters = DIMS.get(name, "")
    if not letters or len(letters) != len(shape):
        return PartitionSpec()
    taken: dict[str, str] = {}
    for axis, wanted in PREFERRED.items():
        size = mesh.shape[axis]
        if size == 1:
            continue
        dims = [c for c in wanted if c in letters and c not in taken and shape[letters.index(c)] % size == 0]
        require(
            bool(dims),
            f"--mesh {axis}={size} divides no dim of {name} {dict(zip(letters, shape, strict=True))}; "
            "give a number that does",
        )
        taken[dims[0]] = axis
    return PartitionSpec(*(taken.get(letter) for letter in letters))


def with_layout(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes, such as a train state's, with the layout of each array: `jax.ShapeDtypeStruct` leaves."""

    def laid_out(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition(_last_key(path), leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(laid_out, shapes)


def bytes_a_device(tree: Any) -> int:
    """What the leaves of a tree, arrays or shapes with a layout, take on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def layout_of(tree: Any) -> Any:
    """The shardings of the leaves of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def layout_table(params: Any) -> Iterator[str]:
    """A line for each parameter: name, dims, and which axis divides which dim."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, spec = jax.tree_util.keystr(path, simple=True, separator="/"), leaf.sharding.spec
        letters = DIMS.get(_last_key(path), "")
        divided = [f"{letters[i]} over {axis}" for i, axis in enumerate(spec) if axis is not None]
        dims = " x ".join(f"{size:,}" for size in leaf.shape)
        yield f"{name}: {dims}, {', '.join(divided) or 'whole on each device'}"


def _last_key(path: Any) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
