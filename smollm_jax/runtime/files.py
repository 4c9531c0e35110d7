"""Write files that are complete or absent (written aside, renamed). Read JSON that may be damaged."""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import xxhash

from smollm_jax.runtime.errors import UserError, of_machine, one_line

BLOCK_BYTES = 8 << 20  # large enough that reading and hashing give up the GIL nearly all the time
LARGEST_WHOLE = 2**29  # bytes of a file that is read whole: the largest tokenizer.json known has 35 MB


class Damaged(UserError):
    """A file that is not as it was written. The message says what is wrong."""


def fsync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Return a checksum of a file's content, against accidents and not against an attacker."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def expand_home(path: str | Path) -> Path:
    """Return a path that exists, or with its "~" replaced. Raises `UserError` for an unknown home folder."""
    try:
        return Path(path) if os.path.exists(path) else Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {one_line(error)}; set HOME, or give a path without ~") from None


def matching(pattern: str) -> list[str]:
    """Return the paths that a path or glob pattern names. A path that exists, or its beginning, is no pattern.

    Raises as `expand_home`.
    """
    path = expand_home(pattern)
    if os.path.exists(path):
        return [str(path)]
    base = next(folder for folder in path.parents if os.path.exists(folder))
    found = glob.glob(os.path.join(glob.escape(str(base)), path.relative_to(base)), recursive=True)
    return [str(Path(name)) for name in found]


def leads_out(path: Path) -> bool:
    """Return whether `path` is a link out of its folder. The Hub's cache links snapshots/ID/FILE to blobs/HASH."""
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return not (target.is_relative_to(folder) or target.is_relative_to(blobs))


@contextmanager
def named_failure(path: str | Path) -> Iterator[None]:
    """Add the file's name to a disk's refusal. A write has no name, and a library in Rust raises no `OSError`."""
    try:
        yield
    except Exception as error:
        if (refused := of_machine(error)) is None or refused.filename is not None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`. Renames it to `path` if the block succeeds, else removes it.

    A reader finds the old file or folder or the new one, never a part, also after the process dies. The next
    writer removes what a dead writer left. A folder that cannot be renamed, as a mount point, is filled in place.
    Raises `OSError` with the name of `path` for a full disk, or for a file over a folder.
    """
    is_fixed = path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))
    where = path if is_fixed else path.parent
    part, old = (where / f".{path.name}.{word}-{os.getpid()}" for word in ("part", "old"))
    with _cleaned(where, (path.name,)):
        try:
            _remove(part)  # left by a dead process with our number, or a link that somebody put there
            with named_failure(path):
                yield part
            is_full = part.is_dir() and path.is_dir()  # a folder that holds something cannot be replaced
            if is_full and (is_fixed or not _renamed(path, old)):
                _fill(path, part)
            else:
                part.replace(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            _remove(part)
            _remove(old)


def moved_aside(path: Path) -> Path:
    """Rename a file or folder to a free name, NAME.oldN. Returns the new path."""
    aside = next(new for n in count(1) if not os.path.lexists(new := path.with_name(f"{path.name}.old{n}")))
    path.rename(aside)
    return aside


def clean_left_overs(folder: Path, names: Iterable[str], *, is_locked: bool = False) -> None:
    """Remove what dead processes left in `folder` while they wrote one of `names`.

    An old version without successor gets its name back. Does nothing while a process writes there. Does nothing on
    a file system without locks, unless the caller holds another lock of the folder.
    """
    with _cleaned(folder, names, is_locked=is_locked):
        pass


@contextmanager
def _cleaned(folder: Path, names: Iterable[str], *, is_locked: bool = False) -> Iterator[None]:
    """Clean up in `folder`, then share its lock. While one process holds it alone, all left-overs are dead."""
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.(part|old)-\d+")
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # not there yet, or not to be read
        yield
        return
    try:
        with suppress(OSError):  # in use, or a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                if not is_locked:
                    raise
            for path in folder.iterdir():
                if found := pattern.fullmatch(path.name):
                    if found[2] == "old" and not (folder / found[1]).exists():
                        path.rename(folder / found[1])
                    _remove(path)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _renamed(path: Path, new: Path) -> bool:
    """Rename a folder. Returns False if it is a mount point."""
    try:
        path.rename(new)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def held_in(folder: Path) -> list[Path]:
    """Return the entries of `folder`, in order, without the lost+found of a mounted disk."""
    is_disk = os.path.ismount(folder)
    return sorted(path for path in folder.iterdir() if not (is_disk and path.name == "lost+found"))


def _fill(folder: Path, part: Path) -> None:
    """Replace the content of `folder` by the content of `part`.

    The README.md of an export tells what else belongs to the export. So README.md is removed last and comes first.
    """
    for path in reversed(held_in(folder)):
        if path != part:
            _remove(path)
    for path in sorted(part.iterdir(), key=lambda path: (path.is_file(), path.name)):
        shutil.move(path, folder / path.name)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to a new file and fsync it."""
    with named_failure(path):
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        fsync(path)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace the file by `value` as JSON, and wait until it is on the disk."""
    with written_aside(path) as part:
        write_json(part, value)
    fsync(path.parent)


def read_whole(path: Path) -> bytes:
    """Return the content of a file; raises `Damaged` for a size that would only fill the memory."""
    size, most = path.stat().st_size, f"at most {LARGEST_WHOLE:,} are read of a file of its kind"
    if size > LARGEST_WHOLE:
        raise Damaged(f"{path} has {size:,} bytes; {most}")
    return path.read_bytes()


def read_json(path: Path, name: str | None = None) -> Any:
    """Return the content of a JSON file. Raises `Damaged`, which names it by `name` or its path."""
    try:
        if path.is_file() or not path.exists():
            return json.loads(read_whole(path).decode())
        problem = "is not a file"  # a pipe would keep the reader waiting
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except Damaged:
        raise
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON: {error}"
    raise Damaged(f"{name or path} {problem}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
