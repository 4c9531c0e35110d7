"""The lock of a run folder: one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from smollm_jax.runtime.errors import UserError

LOCK = ".lock"


class RunLock:
    """A context manager that locks a run folder; raises `UserError` naming the process that holds the lock.

    The kernel releases the lock when its process dies, so a dead process leaves nothing to clear away.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--run-dir {self.path.parent} cannot be used as a folder: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096)
            os.close(descriptor)
            use = f"{self.path.parent} is in use by {_describe(holder)}"
            raise UserError(f"{use}; wait for it, or choose another --run-dir") from None
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"{self.path} cannot be locked: {error.strerror}") from None
        self._descriptor = descriptor
        # otherwise a forked child would keep the lock after this process has died
        os.register_at_fork(after_in_child=self._forget)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        myself = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, myself.encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._forget()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _describe(holder: bytes) -> str:
    try:
        values = json.loads(holder)
        return f"process {int(values['pid'])} on {values['host']} since {values['started']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
