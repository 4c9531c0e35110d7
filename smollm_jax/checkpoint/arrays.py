"""Copy a state's arrays to the host, write them with orbax, and read them.

Leaves are named by their paths, such as `params/embedding`. The first part of a name is the leaf's group, and each
group is an orbax tree of its own. Nothing heavy is imported until arrays are copied, stored or loaded.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import UserError, of_machine, one_line, watch_unraisable
from smollm_jax.runtime.files import Damaged
from smollm_jax.runtime.trees import flatten, unflatten

if TYPE_CHECKING:
    import numpy as np

COPY_THREADS = 4  # page faults on fresh host memory limit a single copying thread, not the bus
# orbax takes brackets for a pattern and `gs:/` for a bucket, tensorstore a backslash for a slash: with no error
PLAIN = re.compile(r"[\w/.,=+%@ -]+", re.ASCII)


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Return a pytree's leaves in order, by path: keys, fields and indices joined by "/"."""
    import jax

    pairs = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    # orbax joins a path by dots
    if len({name.replace(".", "/") for name in named}) != len(pairs) or "" in named:
        raise UserError("the state has leaves that share a name, or none: it must be nested dicts or tuples")
    return named


def _is_on_the_host(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or all(device.platform == "cpu" for device in sharding.device_set):
        return True
    return bool(sharding.memory_kind != "device")


def described(named: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each leaf."""
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named.items()}


class HostCopies:
    """A cache of host memory, kept from save to save. Touching fresh pages takes longer than copying."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}
        self._touching: BackgroundTask[None] | None = None

    def prepare(self, state: Any) -> None:
        """Touch the memory for copies of `state` in a thread. Leaves are arrays or `jax.ShapeDtypeStruct`."""
        import numpy as np

        def touch() -> None:
            for name, leaf in leaves.items():
                self._buffers[name] = np.full(leaf.shape, 0, leaf.dtype)  # np.zeros would touch nothing

        leaves = {name: leaf for name, leaf in leaves_by_name(state).items() if _is_on_the_host(leaf)}
        self._touching = BackgroundTask(touch)

    def wait(self) -> None:
        """Wait until the memory of `prepare` is ready."""
        if self._touching is not None:
            self._touching.wait()

    def of(self, state: Any) -> dict[str, np.ndarray]:
        """Return the leaves of `state` by name. The next call reuses their memory."""
        import jax
        import numpy as np

        def copy(name: str, leaf: Any) -> np.ndarray:
            source, buffer = np.asarray(leaf), self._buffers.get(name)
            # on the host, asarray is a view of the very buffer that the next step overwrites
            if not _is_on_the_host(leaf):
                return source
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                buffer = self._buffers[name] = np.empty_like(source)
            np.copyto(buffer, source)
            return buffer

        self.wait()
        named = leaves_by_name(state)
        for leaf in named.values():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            return dict(zip(named, pool.map(copy, named, named.values()), strict=True))


def _restore_args(target: Any) -> Any:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    if target is None or isinstance(target, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=target.shape, dtype=target.dtype, strict=True)


def _checkpointer(processes: Processes, key: str) -> Any:
    """Return a checkpointer of all `processes` with barriers named after `key`.

    The barriers do not use the devices, because the training needs those.
    """
    import jax
    import orbax.checkpoint as ocp

    # a failed save logs a traceback from each of orbax's threads and from the callbacks of threads that end after
    # its event loop. The error is raised as well, and reported here in one line
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    watch_unraisable()
    options: dict[str, Any] = {}
    if processes.several:
        options = {"active_processes": set(range(processes.count)), "barrier_sync_key_prefix": key}
    elif jax.distributed.is_initialized():  # one of several processes reads on its own
        me = jax.process_index()
        options = {"active_processes": {me}, "barrier_sync_key_prefix": f"{key}-{me}", "primary_host": me}
    together = ocp.options.MultiprocessingOptions(**options)
    # compression makes float32 weights 8 % smaller and takes eight times as long
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=together)
    return ocp.Checkpointer(handler, multiprocessing_options=together)


@contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """Yield an absolute path of `folder` that no library below takes for a pattern. May be a link."""
    if PLAIN.fullmatch(str(folder.absolute())):
        yield folder.absolute()
        return
    place = tempfile.gettempdir() if PLAIN.fullmatch(tempfile.gettempdir()) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="smollm-jax-", dir=place) as temporary:
        link = Path(temporary, "folder")
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def store(folder: Path, leaves: dict[str, Any], processes: Processes) -> None:
    """Write named leaves, each group as an orbax tree of its own below `folder`."""
    import orbax.checkpoint as ocp

    with _plain(folder) as plain:
        for group, part in unflatten(leaves, "/").items():
            with _checkpointer(processes, f"{folder.name}-{group}") as checkpointer:
                checkpointer.save(plain / group, args=ocp.args.PyTreeSave({group: part}))
        if processes.first:
            _check_stored(plain, described(leaves))


def _check_stored(folder: Path, leaves: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise `Damaged` unless each group's index holds its leaves, and each file all their bytes."""
    import ml_dtypes  # noqa: F401 - numpy knows bfloat16 with it
    import numpy as np
    import tensorstore as ts

    for group in {name.split("/")[0] for name in leaves}:
        base = {"driver": "file", "path": f"{folder / group}/"}
        index = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = [key.decode() for key in index.list().result()]
        for name, (shape, dtype) in leaves.items():
            if name.split("/")[0] != group:
                continue
            prefix = name.replace("/", ".") + "/"
            if f"{prefix}.zarray" not in keys:
                raise Damaged(f"{name} is missing in what was written")
            about = json.loads(index[f"{prefix}.zarray"])
            chunks = [key for key in keys if key.startswith(prefix) and not key.endswith("/.zarray")]
            count = math.prod(-(-size // chunk) for size, chunk in zip(shape, about["chunks"], strict=True))
            size = math.prod(about["chunks"]) * np.dtype(dtype).itemsize
            # the last byte of each chunk: a file cut short does not have it
            ends = [index.read(key, byte_range=slice(size - 1, size)).result().value for key in chunks]
            if tuple(about["shape"]) != shape or list(map(len, ends)) != [1] * count:
                raise Damaged(f"{name} is not whole in what was written")


def load(
    folder: Path, targets: dict[str, Any], stored: dict[str, tuple[tuple[int, ...], str]], processes: Processes
) -> dict[str, Any]:
    """Read named leaves from their orbax trees below `folder`, which `stored` describes.

    A leaf gets the layout and dtype of its target, an array or `jax.ShapeDtypeStruct`. None reads a numpy array.
    Raises `Damaged` if orbax cannot read what the manifest vouches for.
    """
    import orbax.checkpoint as ocp

    named: dict[str, Any] = {}
    args = {name: _restore_args(target) for name, target in targets.items()}
    with _plain(folder) as plain:
        for group, part in unflatten(args, "/").items():
            with _checkpointer(processes, f"{folder.name}-{group}-read") as checkpointer:
                restore = ocp.args.PyTreeRestore(restore_args={group: part})
                try:
                    # orbax reads on after an error, and its threads print theirs
                    _check_stored(plain, {n: leaf for n, leaf in stored.items() if n.split("/")[0] == group})
                    named |= flatten(checkpointer.restore(plain / group, args=restore), "/")
                except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError) as error:
                    if isinstance(error, OSError) and of_machine(error):  # a permission, say: nothing is damaged
                        raise
                    raise Damaged(f"{folder / group} is damaged: {reason(error)}") from None
    return named


def reason(error: Exception) -> str:
    """Return an error in one line. Of tensorstore's paragraph, keeps the operating system's words only."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return one_line(error)
