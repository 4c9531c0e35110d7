"""Save, verify and restore checkpoints.

A checkpoint is a sealed folder `checkpoints/STEP` with `meta.json`. Each top-level part of the state (`params`,
`opt_state`, ...) is an orbax tree, so parameters can be read alone. A thread writes the folder under another name
and renames it once complete. The manifest tells whether it still is. Orbax has no checksum on array data, casts
dtypes silently and takes an empty folder for the latest. All three are checked before orbax reads anything.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.arrays import HostCopies, described, leaves_by_name, load, reason, store
from smollm_jax.checkpoint.listing import (
    META,
    Retention,
    VerifiedCheckpoint,
    compare,
    find_checkpoint,
    open_checkpoint,
    quarantine,
    steps_in,
)
from smollm_jax.checkpoint.manifest import seal
from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import Damaged, fsync, write_json
from smollm_jax.runtime.trees import unflatten

TEMPORARY, TRASH = ".tmp-", ".trash-"
CLEAN_SECONDS = (0, 0.1, 0.4)  # before each try to remove folders that a thread may still be writing into

logger = logging.getLogger(__name__)


class CheckpointManager:
    """A run's checkpoints, of which `retention` says which stay.

    Several processes write one checkpoint together, each its own parts of the arrays, into a folder that all see.
    All call `save`, `wait` and `restore` at the same places. A save has failed if it failed in one process.
    """

    def __init__(self, folder: str | Path, *, keep_last: int, keep_every: int, processes: Processes | None = None):
        self.folder, self.processes = Path(folder), processes or Processes()
        self.retention = Retention(keep_last=keep_last, keep_every=keep_every)
        """Which checkpoints stay."""
        self.failed: str | None = None
        """Step and reason if the last save failed."""
        self.newest = 0
        """Step of the last save that is on disk."""
        self.beside_the_step = True
        """Whether the devices of several processes have memory for a second copy of the state."""
        self._thread: threading.Thread | None = None
        self.copies = HostCopies()

    def prepare(self, state: Any) -> None:
        """Touch the host memory for copies of `state`. Otherwise the first save would wait for it."""
        if not self.processes.several:
            self.copies.prepare(state)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copy `state` and return. A thread writes the copy, and its errors end up in `failed`.

        The buffers of `state` may be donated or overwritten as soon as this returns. If several processes have no
        memory for a copy, the state is written before this returns. Waits for a save under way first. Does nothing
        if a good checkpoint of that step exists.
        """
        self.wait()
        json.dumps(meta)  # a mistake of the caller must be raised here, not in the thread
        if self.processes.several:
            leaves = leaves_by_name(_copy_on_devices()(state) if self.beside_the_step else state)
        else:
            leaves = self.copies.of(state)
        temporary, self.failed = self.processes.gather(self._make_room(step))[0]
        if temporary is None:
            return
        # not a daemon, which would be torn down in the middle of orbax's own threads
        self._thread = threading.Thread(
            target=self._write, args=(step, leaves, meta, self.folder / temporary), name=f"save-{step}"
        )
        self._thread.start()
        if self.processes.several and not self.beside_the_step:
            self._thread.join()  # the thread reads the state itself

    def wait(self) -> bool:
        """Wait for a save under way. Returns whether the last save succeeded, True if there was none."""
        if self._thread is not None:
            self.close()
            self.failed = next(filter(None, self.processes.gather(self.failed)), None)
            if self.failed and self.processes.first:
                self.clean()  # the writers of a failed save may go on after the first error
        return self.failed is None

    def close(self) -> None:
        """Wait for a save under way in this process.

        Call this however a run ends, because orbax cannot finish once the interpreter shuts down.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def clean(self) -> None:
        """Remove what dead processes left half written or half deleted. Only the run's lock holder may call."""
        for seconds in CLEAN_SECONDS:
            time.sleep(seconds)
            left = [*self.folder.glob(f"{TEMPORARY}*"), *self.folder.glob(f"{TRASH}*")]
            if not left:
                return
            for path in left:
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, step: int, target: Any) -> Any:
        """Return the state saved at `step` in the structure, layout and dtypes of `target`.

        The leaves of `target` are arrays or `jax.ShapeDtypeStruct`. Raises `UserError` naming leaves that differ,
        or what is damaged.
        """
        import jax

        named = leaves_by_name(target)
        found = find_checkpoint(self.folder, step)
        compare(found, described(named))
        loaded = load(self.folder / str(step), named, found.leaves, self.processes)
        return jax.tree.unflatten(jax.tree.structure(target), [loaded[name] for name in named])

    def _make_room(self, step: int) -> tuple[str | None, str | None]:
        """Return a new folder's name, None if there is nothing to write, and a failure.

        Only the first process looks, and makes the folder.
        """
        if not self.processes.first:
            return None, None
        final, temporary = self.folder / str(step), self.folder / f"{TEMPORARY}{step}-{os.getpid()}"
        try:
            if final.exists():
                try:
                    open_checkpoint(final, step)
                    self.newest = step
                    return None, None
                except Damaged as damage:
                    quarantine(final, damage)
            if self.failed:
                self.clean()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return None, self._could_not(step, error)
        return temporary.name, None

    def _could_not(self, step: int, error: Exception) -> str:
        """Log that a save failed. Returns step and reason."""
        newest = next(map(str, steps_in(self.folder)), "none")
        logger.error("checkpoint %d could not be saved (%s); the newest is %s", step, reason(error), newest)
        return f"step {step}: {reason(error)}"

    def _write(self, step: int, leaves: dict[str, Any], meta: dict[str, Any], temporary: Path) -> None:
        try:
            store(temporary, leaves, self.processes)
            if self.processes.first:
                write_json(temporary / META, meta)
                found = {n: {"shape": shape, "dtype": dtype} for n, (shape, dtype) in described(leaves).items()}
                seal(temporary, {"step": step, "leaves": found})
                temporary.rename(self.folder / str(step))
                fsync(self.folder)
            self.failed, self.newest = None, step
        except Exception as error:  # of any kind: the run continues, and the next save tries again
            shutil.rmtree(temporary, ignore_errors=True)
            self.failed = self._could_not(step, error)
            return
        try:
            if self.processes.first:
                self._remove_old(step)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def _remove_old(self, saved: int) -> None:
        """Apply the retention rule to whole checkpoints. A damaged one neither counts nor is removed."""
        whole = []
        for step in steps_in(self.folder):
            with contextlib.suppress(Damaged):
                open_checkpoint(self.folder / str(step), step, checksums=False)
                whole.append(step)
        # the one just written is known to be good, even if damaged or foreign ones are newer
        kept = {saved, *self.retention.reasons(whole)}
        for step in (step for step in whole if step not in kept):
            trash = self.folder / f"{TRASH}{step}-{os.getpid()}"
            (self.folder / str(step)).rename(trash)
            shutil.rmtree(trash)


@functools.cache
def _copy_on_devices() -> Any:
    """Return the compiled copy of every leaf in the same layout. Each structure of a state is one program."""
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def read_params(
    folder: str | Path, step: int | None = None, *, group: str = "params"
) -> tuple[VerifiedCheckpoint, dict[str, Any]]:
    """Return a checkpoint and one top-level part of its state, as nested numpy dicts.

    Reads no other part from the disk and needs no device. The default step is the newest whose part is good.
    Raises `UserError` if there is none.
    """
    folder = Path(folder)
    found = find_checkpoint(folder, step, group=group)
    names = [name for name in found.leaves if name.split("/")[0] == group]
    require(bool(names), f"checkpoint {found.step} in {folder} holds no {group}")
    stored = {name: found.leaves[name] for name in names}
    loaded = load(folder / str(found.step), dict.fromkeys(names), stored, Processes())
    return found, unflatten(loaded, "/")[group]
