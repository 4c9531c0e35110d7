"""Lock a run folder for one process at a time."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from smollm_jax.runtime.errors import UserError, require
from smollm_jax.runtime.files import leads_out

LOCK = ".lock"
# what a run writes in its folder
WRITTEN = (LOCK, "config.json", "metrics.jsonl", "samples.txt", "loss.png", "tensorboard", "tokenizer",
           "checkpoints", "export")  # fmt: skip


class RunLock:
    """A context manager that locks a run folder for writing. Raises `UserError` naming who holds the lock.

    Links that lead out of the folder are refused: a run folder from elsewhere must not write over other files.

    The kernel releases the lock when its process dies, so a dead process leaves nothing to clear away.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / LOCK

    def __enter__(self) -> Self:
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
        # otherwise a forked child would keep the lock after this process has died
        os.register_at_fork(after_in_child=self._file.close)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        myself = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        self._file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, though nobody reads who has it
            self._file.write(json.dumps(myself).encode())
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:  # it is, in a forked child
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _describe(holder: bytes) -> str:
    try:
        values = json.loads(holder)
        return f"process {int(values['pid'])} on {values['host']} since {values['started']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
