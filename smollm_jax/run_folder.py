"""What keeps a run folder whole: atomic JSON, one process at a time, and folders sealed by a manifest.

It knows bytes and names, and nothing of arrays, orbax or JAX. A sealed folder holds a `manifest.json`
with size and checksum of every file in it and a digest of itself, so that a flipped bit, a missing or
a half-written file is found by reading, whatever library wrote the files. The checksum is xxh3_128: it
guards against accidents at the speed of memory, not against an attacker.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path, PurePosixPath
from typing import Any, Self

import xxhash

from smollm_jax.config import UserError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
LOCK = ".lock"
BLOCK_BYTES = 8 << 20  # large enough that reading and hashing give up the GIL nearly all the time


class Damaged(UserError):
    """A sealed folder is not what was written; the message says what is wrong with it."""


def fsync(path: Path) -> None:
    """Have the file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a file that nobody reads yet, and have it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Replace the file by `value` as JSON: whoever reads it, also after a crash, finds the old or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_json(temporary, value)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def checksum(path: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _manifest_digest(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest of all files below `folder`, with `about` in it, and have everything on the disk."""
    files, folders = {}, [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "xxh3_128": checksum(path),
        }
    manifest = {"format": MANIFEST_FORMAT, "about": about, "files": files}
    write_json(folder / MANIFEST, manifest | {"digest": _manifest_digest(manifest)})
    for path in reversed(folders):
        fsync(path)


def read_json(path: Path) -> Any:
    """What the file holds; raises `Damaged` when that is not JSON, or not a file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Damaged(f"{path.name} is not a file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None
    except Damaged:
        raise
    except (ValueError, RecursionError):
        raise Damaged(f"{path.name} is not JSON") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder, its form and digest checked; raises `Damaged`."""
    try:
        if not any(folder.iterdir()):
            raise Damaged("the folder is empty")
    except OSError as error:
        raise Damaged(f"the folder cannot be read: {error.strerror}") from None
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise Damaged(f"{MANIFEST} is not an object")
    if manifest.get("digest") != _manifest_digest(manifest):
        raise Damaged(f"{MANIFEST} does not match its own digest")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest.get('format')!r}; {MANIFEST_FORMAT} is read here")
    about, files = manifest.get("about"), manifest.get("files")
    if not isinstance(about, dict) or not isinstance(files, dict):
        raise Damaged(f"{MANIFEST} lacks its files or what they are about")
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise Damaged(f"{MANIFEST} names {name!r}, which is not a file below the folder")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "xxh3_128"}:
            raise Damaged(f"{MANIFEST} says nothing usable of {name!r}")
    return manifest


def verify(folder: Path, *, parts: set[str] | None = None, checksums: bool = True) -> dict[str, Any]:
    """The manifest of a sealed folder all of whose files are as they were written; raises `Damaged`.

    `parts` limits the check to files whose first path component is among them.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if parts is not None and name.split("/", maxsplit=1)[0] not in parts:
            continue
        try:
            status = os.stat(folder / name)
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"{name} is not a file")
            if status.st_size != entry["bytes"]:
                raise Damaged(f"{name} has {status.st_size} bytes; {entry['bytes']} were written")
            if checksums and checksum(folder / name) != entry["xxh3_128"]:
                raise Damaged(f"{name} has changed: its checksum is not the one written")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except (OSError, UnicodeError) as error:
            raise Damaged(f"{name!r} cannot be read: {error}") from None
    return manifest


class RunLock:
    """Holds a run folder for this process; raises `ValueError` naming the process that holds it already.

    The kernel drops the lock with its process, so that of a dead one needs no clearing away.
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
        # a forked child would otherwise hold on to the lock after this process has died
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
