"""Lay out arrays on devices: the mesh, and a rule for every array.

The mesh has three axes. `data` divides the rows of a batch and repeats the parameters. `fsdp` divides rows,
parameters and moments (ZeRO, Rajbhandari et al. 2020). `tensor` divides heads, feed-forward and vocabulary
(Megatron, Shoeybi et al. 2019). XLA's partitioner does the rest. The results do not depend on the mesh beyond
rounding.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from smollm_jax.config.architecture import ADAPTED, PARAMETER_DIMS, adapter_dims
from smollm_jax.config.settings import MESH_AXES, Config
from smollm_jax.runtime.errors import require

BATCH_AXES = ("data", "fsdp")

# The dims of each parameter, and the dims each axis prefers, best first: an axis takes the first dim that it
# divides and that leaves one for the axis after it. Layers are scanned, so never divided. H comes last: attention
# contracts H, so its sums would cross devices. Norms are too small to divide. An adapter without such
# dims stays whole.
DIMS = {name: dims for path, dims in PARAMETER_DIMS.items() if (name := path.split("/")[-1]) != "scale"}
ADAPTER_DIMS = {
    f"{path.split('/')[-1]}_{part}": dims for path in ADAPTED for part, dims in adapter_dims(path).items()
}
DIMS |= ADAPTER_DIMS
PREFERRED = {"tensor": "NKFVDH", "fsdp": "DFVNKH"}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of --mesh. By default, `data` has all devices, or as few as take the run's steps as fast.

    Raises `UserError` if there are too few devices, or more than there are rows for.
    """
    devices = list(jax.devices() if devices is None else devices)
    several, parts = are_shared(devices), config.compute.grad_accum

    def rows_in_turn(count: int) -> int:
        return sum(phase.steps * -(-phase.batch_size // (count * parts)) for phase in config.phases)

    useful = len(devices) if several else min(range(1, len(devices) + 1), key=rows_in_turn)
    sizes = config.compute.mesh_sizes or {"data": useful}
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    count, rows = math.prod(shape), math.prod(shape[: len(BATCH_AXES)])
    needs = f"--mesh {config.compute.mesh} needs {count} devices"
    require(count <= len(devices), f"{needs}, and there are {len(devices)}")
    all_used = count == len(devices) or not several
    require(all_used, f"{needs}; if several processes share the work it has to use all {len(devices)}")
    most = max(phase.batch_size for phase in config.phases) // parts
    require(
        most >= rows,
        f"{most} rows, the largest batch of the phases over --grad-accum, leave some of {rows} devices without "
        "any; give a larger --batch-size, a smaller --grad-accum, or another --mesh",
    )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:count])


def are_shared(devices: Iterable[Any]) -> bool:
    """Return whether several processes hold the devices."""
    return len({device.process_index for device in devices}) > 1


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts that the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded_rows(batch_size: int, mesh: Mesh, parts: int = 1) -> int:
    """Return `batch_size` with padding: each device has as many rows in each of `parts` micro-batches."""
    each = row_shards(mesh) * parts
    return -(-batch_size // each) * each


def sharded(mesh: Mesh, axes: tuple[str, ...] = ()) -> NamedSharding:
    """Return a layout that divides the first dim over `axes`. Without axes, arrays are replicated."""
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def shards_here(mesh: Mesh, config: Config) -> range:
    """Return the shards of `config.data.shards` that have a row on this process's devices.

    Never none: a process that has nothing but padding keeps the last shard, which others have too.
    """
    shards, wanted = config.data.shards, set()
    for batch_size in {phase.batch_size for phase in config.phases}:
        rows = np.arange(padded_rows(batch_size, mesh, config.compute.grad_accum))
        for index in sharded(mesh, BATCH_AXES).addressable_devices_indices_map(rows.shape).values():
            wanted |= {int(row) * shards // batch_size for row in rows[index] if row < batch_size}
    return range(min(wanted), max(wanted) + 1) if wanted else range(shards - 1, shards)


def on_devices(array: np.ndarray, rows: int, first_row: int, mesh: Mesh) -> jax.Array:
    """Return a batch of `rows` on the devices. `array` holds this process's rows, from `first_row` on.

    The rows after the batch are padding: zeros.
    """
    layout = sharded(mesh, BATCH_AXES)
    if layout.is_fully_addressable and len(array) == rows:
        return jax.device_put(array, layout)
    whole = np.zeros((rows, *array.shape[1:]), array.dtype)
    whole[first_row : first_row + len(array)] = array
    return jax.make_array_from_callback(whole.shape, layout, whole.__getitem__)


def on_one_device(tree: Any, mesh: Mesh) -> Any:
    """Return a tree with whole arrays on this process's first device. All processes must call."""
    if not are_shared(mesh.devices.flat):
        return jax.device_put(tree, mesh.devices.flat[0])
    whole = jax.jit(lambda tree: tree, out_shardings=sharded(mesh))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the layout of a parameter or moment by its name. Raises `UserError` if an axis divides no dim."""
    letters = DIMS.get(name, "")
    if not letters or len(letters) != len(shape):
        return PartitionSpec()
    sizes = dict(zip(letters, shape, strict=True))
    axes = [axis for axis in PREFERRED if mesh.shape[axis] > 1]
    divided = ([d for d in PREFERRED[axis] if d in sizes and sizes[d] % mesh.shape[axis] == 0] for axis in axes)
    found = next((dims for dims in product(*divided) if len(set(dims)) == len(dims)), None)
    if found is None and name in ADAPTER_DIMS:
        return PartitionSpec()
    asked = ",".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    each = "each axis needs one of its own; give numbers that divide them"
    require(found is not None, f"--mesh {asked} divides no dim of {name} {sizes}: {each}")
    taken = dict(zip(found or (), axes, strict=True))
    return PartitionSpec(*map(taken.get, letters))


def own_layout(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return the layout of `partition`."""
    return NamedSharding(mesh, partition(name, shape, mesh))


def whole_layers_layout(mesh: Mesh, layers: int) -> tuple[list[NamedSharding], int]:
    """Return the layouts on the way from a parameter's to whole layers per device, and the parts of the last one.

    The first layout trades the dims that `fsdp` and `tensor` divide for layers. The second one divides layers over
    `data` too, if a device then has fewer. Without axes there are no layouts.
    """
    sizes, divided = mesh.shape, [axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1]
    parts = math.prod(sizes[axis] for axis in divided)
    stages = [divided] if divided else []
    if -(-layers // (sizes["data"] * parts)) < -(-layers // parts):
        stages, parts = [*stages, [*divided, "data"]], parts * sizes["data"]
    return [NamedSharding(mesh, PartitionSpec(tuple(axes))) for axes in stages], parts


def with_layout(shapes: Any, mesh: Mesh) -> Any:
    """Return a tree of shapes, such as a train state's, as `jax.ShapeDtypeStruct` with layouts."""

    def laid_out(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        spec = partition(keystr(path[-1:], simple=True), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(laid_out, shapes)


def bytes_of(*trees: Any) -> int:
    """Return the bytes of the leaves of trees, arrays or shapes, once for all devices."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def bytes_a_device(tree: Any) -> int:
    """Return the bytes per device of a tree's leaves: arrays, or shapes with a layout."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def layout_of(tree: Any) -> Any:
    """Return the shardings of the leaves of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def layout_table(params: Any) -> Iterator[str]:
    """Yield a line for each parameter: name, dims, and which axis divides which dim."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        named = zip(DIMS.get(keystr(path[-1:], simple=True), ""), leaf.sharding.spec, strict=False)
        divided = ", ".join(f"{letter} over {axis}" for letter, axis in named if axis is not None)
        dims = " x ".join(f"{size:,}" for size in leaf.shape)
        yield f"{keystr(path, simple=True, separator='/')}: {dims}, {divided or 'whole on each device'}"
