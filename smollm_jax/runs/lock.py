"""Lock a run folder for one process at a time."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Self

from smollm_jax.runtime.errors import UserError, require
from smollm_jax.runtime.files import leads_out

LOCK = ".lock"
METRICS = "metrics.jsonl"  # written from the moment when the first step can begin
# what a run writes in its folder
REFERENCE = "reference.npz"  # of pairs: the log-probs of the model that the run began with
PARENT = "parent.json"  # of a branch: the run and the step that it began at
WRITTEN = (LOCK, "config.json", METRICS, "samples.txt", "loss.png", "tensorboard", "tokenizer", "trackers.json",
           REFERENCE, PARENT, "checkpoints", "export", "export-ema")  # fmt: skip
BEGINNING = ("config.json", "tokenizer", PARENT, REFERENCE, "checkpoints")  # what a start writes before METRICS


class RunLock:
    """A context manager that locks a run folder for writing. Raises `UserError` naming who holds the lock.

    Links that lead out of the folder are refused: a run folder from elsewhere must not write over other files.

    The kernel releases the lock when its process dies, so a dead process leaves nothing to clear away. A start
    that ends with a `UserError` before the first metrics leaves the folder as it was.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / LOCK

    def __enter__(self) -> Self:
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        while not self._is_locked():
            self._file.close()
        # otherwise a forked child would keep the lock after this process has died
        os.register_at_fork(after_in_child=self._file.close)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        myself = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        self._file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, though nobody reads who has it
            self._file.write(json.dumps(myself).encode())
        return self

    def _is_locked(self) -> bool:
        """Lock the file. Returns whether it is still the folder's, and not of a start that was refused."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path.with_name(name) for name in WRITTEN):
                is_safe = not leads_out(path)
                require(
                    is_safe, f"{path} is a link out of the run folder; put what it leads to here, or remove it"
                )
            require(self.path.is_file() or not self.path.exists(), f"{self.path} is not a file; remove it")
            self._file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise UserError(f"--run-dir {self.path.parent} cannot be used as a folder: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with self._file as held:
                held.seek(0)
                use = f"{self.path.parent} is in use by {_describe(held.read(4096))}"
            raise UserError(f"{use}; wait for it, or choose another --run-dir") from None
        except OSError as error:  # such as a network's file system without locks
            self._file.close()
            raise UserError(f"{self.path} cannot be locked: {error.strerror}") from None
        return self.path.is_file() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._file.closed:  # it is, in a forked child
            if kind is not None and issubclass(kind, UserError):
                with contextlib.suppress(OSError):
                    self._leave_nothing()
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _leave_nothing(self) -> None:
        """Remove what a refused start has written and the folders made for it, the lock last."""
        folder = self.path.parent
        if (folder / METRICS).exists():  # it has begun
            return
        for path in (folder / name for name in (*BEGINNING, LOCK) if name not in self._held):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for path in self._made:
            path.rmdir()


def _describe(holder: bytes) -> str:
    try:
        values = json.loads(holder)
        return f"process {int(values['pid'])} on {values['host']} since {values['started']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
