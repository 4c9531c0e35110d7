"""Save, verify and restore checkpoints.

A checkpoint is a sealed folder `checkpoints/STEP`: one orbax tree for each top-level part of the state
(`params`, `opt_state`, ...), so that the parameters can be read without the rest, and `meta.json`.
It is written under another name by a thread of its own and appears by one rename, so a folder named by
its step was complete once; whether it still is, the manifest tells. Orbax has no checksum on array data,
casts dtypes without a word and takes an empty folder for the latest: all that is checked here, before it
is asked for anything. Nothing heavy is imported until arrays are saved or loaded.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm_jax.checkpoint.listing import (
    META,
    CheckpointInfo,
    VerifiedCheckpoint,
    compare,
    list_checkpoints,
    named_step,
    quarantine,
    steps_in,
    verified_checkpoints,
)
from smollm_jax.checkpoint.manifest import seal, verify
from smollm_jax.checkpoint.orbax_io import (
    described,
    group_of,
    groups_of,
    is_on_the_host,
    leaves_by_name,
    load,
    nested,
    restore_args_for,
    store,
)
from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.errors import UserError, one_line
from smollm_jax.runtime.files import Damaged, fsync, write_json

if TYPE_CHECKING:
    import numpy as np


TEMPORARY, TRASH = ".tmp-", ".trash-"
COPY_THREADS = 4  # page faults on the fresh host memory, not the bus, bound a single copying thread

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Failure:
    step: int
    message: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


class CheckpointManager:
    """A run's checkpoints; the newest `keep_last` and each step that `keep_every` divides (0: none) stay.

    Several processes write one together, each its own parts of the arrays, into a folder that all of them see;
    they call `save`, `wait` and `restore` at the same places, and a save has failed where it did in one.
    """

    def __init__(self, folder: str | Path, *, keep_last: int, keep_every: int, processes: Processes | None = None):
        self.folder = Path(folder)
        self.processes = processes or Processes()
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.failed: Failure | None = None
        self.newest = 0
        """Step of the last save that is on disk."""
        self.beside_the_step = True
        """Whether the devices of several processes have room for a second copy of the state."""
        self._thread: threading.Thread | None = None
        self._preparing: threading.Thread | None = None
        self._buffers: dict[str, np.ndarray] = {}
        self._copy: Any = None

    def prepare(self, state: Any) -> None:
        """Have the host memory for copies of `state` (arrays or `jax.ShapeDtypeStruct`) ready before the first
        save, which would else wait for it: touching fresh pages takes longer than copying into them.
        """
        if self.processes.several:
            return
        shapes = {name: leaf for name, leaf in leaves_by_name(state).items() if is_on_the_host(leaf)}

        def touch() -> None:
            import numpy as np

            for name, leaf in shapes.items():
                self._buffers[name] = np.empty(leaf.shape, leaf.dtype)
                self._buffers[name].fill(0)

        self._preparing = threading.Thread(target=touch, name="save-memory", daemon=True)
        self._preparing.start()

    def prepared(self) -> None:
        """Wait until what `prepare` began is done."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copy `state` and return; the writing goes on behind, its errors end up in `failed`. Where several
        processes have no room for a copy it is written before this returns.

        The buffers of `state` may be donated or overwritten as soon as this returns. Waits for a save
        still under way. Does nothing where a good checkpoint of that step exists.
        """
        self.wait()
        json.dumps(meta)  # the caller's mistake is to surface here, not in the thread
        temporary = self.folder / f"{TEMPORARY}{step}-{os.getpid()}"
        if self.processes.several:
            leaves = self._device_copies(state) if self.beside_the_step else leaves_by_name(state)
            temporary = self.folder / str(self.processes.gather(temporary.name)[0])
        else:
            leaves = self._host_copies(state)
        room, self.failed = self._make_room(step, temporary)
        told = self.processes.gather([room, self.failed and vars(self.failed)])[0]
        self.failed = Failure(**told[1]) if told[1] else None
        if not told[0]:
            return
        # not a daemon, which would be torn down in the middle of orbax's own threads
        self._thread = threading.Thread(
            target=self._write, args=(step, leaves, meta, temporary), name=f"save-{step}"
        )
        self._thread.start()
        if self.processes.several and not self.beside_the_step:
            self._thread.join()  # what it reads is the state itself

    def wait(self) -> bool:
        """Wait for a save under way; whether the last one succeeded (none yet counts as success)."""
        if self._thread is not None:
            self.close()
            failures = self.processes.gather(self.failed and vars(self.failed))
            self.failed = next((Failure(**failure) for failure in failures if failure), None)
        return self.failed is None

    def close(self) -> bool:
        """Wait for a save under way, however a run ends: orbax cannot finish once the interpreter goes down.

        Whether it succeeded, as far as this process knows.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.failed is None

    def clean(self) -> None:
        """Remove what dead processes left half written or deleted; only for the holder of the run's lock."""
        for path in self.folder.glob(".*"):
            if path.name.startswith((TEMPORARY, TRASH)):
                shutil.rmtree(path, ignore_errors=True)

    def latest_good(self, expect: Any = None, *, quarantine: bool = False) -> VerifiedCheckpoint | None:
        """The newest checkpoint that verifies; bad ones on the way are reported and, if asked, renamed.

        `expect` is a target as for `restore`; a mismatch with what was found raises `ValueError`.
        """
        found = next(verified_checkpoints(self.folder, rename=quarantine), None)
        if found is not None and expect is not None:
            compare(found, described(leaves_by_name(expect)))
        return found

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at `step` in the structure, layout and dtypes of `target`, whose leaves are arrays
        or `jax.ShapeDtypeStruct`; raises `ValueError` naming leaves that differ, or what is damaged.
        """
        import jax

        named = leaves_by_name(target)
        found = named_step(self.folder, step)
        compare(found, described(named))
        loaded: dict[str, Any] = {}
        for group in groups_of(named):
            args = {name: restore_args_for(leaf) for name, leaf in named.items() if group_of(name) == group}
            loaded |= load(self.folder / str(step) / group, args, self.processes)
        return jax.tree.unflatten(jax.tree.structure(target), [loaded[name] for name in named])

    def list(self) -> list[CheckpointInfo]:
        return list_checkpoints(self.folder)

    def _device_copies(self, state: Any) -> dict[str, Any]:
        """Every leaf again, in the same layout, which the next step does not overwrite."""
        import jax
        import jax.numpy as jnp

        if self._copy is None:
            self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        return leaves_by_name(self._copy(state))

    def _host_copies(self, state: Any) -> dict[str, np.ndarray]:
        """Every leaf in host memory that nothing else refers to but the next save, which waits for this one."""
        import jax
        import numpy as np

        def copy(item: tuple[str, Any]) -> np.ndarray:
            name, leaf = item
            # where they are the host's own, asarray is a view of the very buffer that the next step overwrites
            if not is_on_the_host(leaf):
                return np.asarray(leaf)
            source, buffer = np.asarray(leaf), self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                # kept from save to save: the first touch of fresh pages takes longer than the copy
                buffer = self._buffers[name] = np.empty_like(source)
            np.copyto(buffer, source)
            return buffer

        self.prepared()
        named = leaves_by_name(state)
        for leaf in named.values():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            return dict(zip(named, pool.map(copy, named.items()), strict=True))

    def _make_room(self, step: int, temporary: Path) -> tuple[bool, Failure | None]:
        """Whether the checkpoint is to be written; the first process looks, and makes the folder for it."""
        if not self.processes.first:
            return False, None
        final = self.folder / str(step)
        try:
            if final.exists():
                try:
                    verify(final)
                    self.newest = step
                    return False, None
                except Damaged as reason:
                    quarantine(final, reason)
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            return False, self._could_not(step, error)
        return True, None

    def _could_not(self, step: int, error: Exception) -> Failure:
        """Say that a save failed."""
        message, kept = _reason(error), steps_in(self.folder)
        newest = kept[0] if kept else "none"
        logger.error("checkpoint %d could not be saved (%s); the newest is %s", step, message, newest)
        return Failure(step=step, message=message)

    def _write(self, step: int, leaves: dict[str, Any], meta: dict[str, Any], temporary: Path) -> None:
        try:
            self._write_and_rename(step, leaves, meta, temporary)
            self.failed, self.newest = None, step
        except Exception as error:  # whatever it is: the run goes on, and the next save tries again
            shutil.rmtree(temporary, ignore_errors=True)
            self.failed = self._could_not(step, error)
            return
        try:
            if self.processes.first:
                self._remove_old(step)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def _write_and_rename(self, step: int, leaves: dict[str, Any], meta: dict[str, Any], temporary: Path) -> None:
        for group in groups_of(leaves):
            part = {name: leaf for name, leaf in leaves.items() if group_of(name) == group}
            store(temporary / group, part, self.processes)
        if not self.processes.first:
            return
        write_json(temporary / META, meta)
        found = {n: {"shape": shape, "dtype": dtype} for n, (shape, dtype) in described(leaves).items()}
        seal(temporary, {"step": step, "leaves": found})
        temporary.rename(self.folder / str(step))
        fsync(self.folder)

    def _remove_old(self, saved: int) -> None:
        """Apply the retention rule to whole checkpoints; what is damaged neither counts nor goes."""
        whole = []
        for step in steps_in(self.folder):
            try:
                verify(self.folder / str(step), checksums=False)
                whole.append(step)
            except Damaged:
                continue
        for step in whole[self.keep_last :]:
            # the one just written is the one known to be good, also when damaged or foreign ones are newer
            if step == saved or (self.keep_every and step % self.keep_every == 0):
                continue
            trash = self.folder / f"{TRASH}{step}-{os.getpid()}"
            (self.folder / str(step)).rename(trash)
            shutil.rmtree(trash)


def read_params(
    folder: str | Path, step: int | None = None, *, group: str = "params"
) -> tuple[VerifiedCheckpoint, dict[str, Any]]:
    """One top-level part of the state as nested dicts of numpy arrays, and the checkpoint it comes from.

    Reads no other part from the disk, and needs no device. Without `step`: the newest whose part is
    good; raises `ValueError` where there is none.
    """
    import numpy as np
    import orbax.checkpoint as ocp

    folder = Path(folder)
    if step is None:
        found = next(verified_checkpoints(folder, group=group), None)
        if found is None:
            raise UserError(f"{folder} holds no good checkpoint")
    else:
        found = named_step(folder, step, group=group)
    names = [name for name in found.leaves if group_of(name) == group]
    if not names:
        raise UserError(f"checkpoint {found.step} in {folder} holds no {group}")
    args = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
    loaded = load(folder / str(found.step) / group, args, Processes())
    return found, nested(loaded)[group]


def _reason(error: Exception) -> str:
    """One line; of tensorstore's paragraph only what the operating system said, such as a full disk."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return one_line(error)
