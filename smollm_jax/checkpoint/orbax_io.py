"""Trees of arrays to files and back; the only door to orbax.

Leaves go by the names of their paths, `params/embedding`; the first part of a name is its group, and a group is
an orbax tree of its own. Nothing heavy is imported until arrays are stored or loaded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.errors import UserError


def group_of(name: str) -> str:
    return name.split("/", maxsplit=1)[0]


def groups_of(named: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(map(group_of, named)))


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree in order, named by their path: dict keys, fields and indices joined by "/"."""
    import jax

    pairs = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    # orbax joins a path by dots
    if len({name.replace(".", "/") for name in named}) != len(pairs) or "" in named:
        raise UserError("the state has leaves that share a name, or none: it must be nested dicts or tuples")
    return named


def is_on_the_host(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or all(device.platform == "cpu" for device in sharding.device_set):
        return True
    return bool(sharding.memory_kind != "device")


def described(named: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named.items()}


def nested(named: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *folders, last = name.split("/")
        branch = tree
        for part in folders:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    items = tree.items()
    return {k: v for n, t in items for k, v in _flat(t, f"{prefix}/{n}" if prefix else n).items()}


def restore_args_for(leaf: Any) -> Any:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    if isinstance(leaf, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)


def _checkpointer(processes: Processes, key: str) -> Any:
    """Of all `processes`, who meet at barriers named after `key`: not on the devices, which the training needs."""
    import jax
    import orbax.checkpoint as ocp

    # a failed save logs a traceback from each of orbax's threads and from the callbacks of those that end after
    # its event loop; it is then raised, and reported here in one line
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # float32 weights shrink by 8 % and take eight times as long
    options = ocp.options.MultiprocessingOptions()
    if processes.several:
        everyone = set(range(processes.count))
        options = ocp.options.MultiprocessingOptions(active_processes=everyone, barrier_sync_key_prefix=key)
    elif jax.distributed.is_initialized():  # one of several reads for itself
        me = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{key}-{me}"
        )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def store(path: Path, leaves: dict[str, Any], processes: Processes) -> None:
    import orbax.checkpoint as ocp

    with _checkpointer(processes, f"{path.parent.name}-{path.name}") as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(nested(leaves)))


def load(path: Path, restore_args: dict[str, Any], processes: Processes) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    args = nested(restore_args)
    with _checkpointer(processes, f"{path.parent.name}-{path.name}-read") as checkpointer:
        return _flat(checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=args)))
