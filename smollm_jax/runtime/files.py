"""Files that are complete or absent: written aside and renamed, and JSON that may be damaged."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smollm_jax.runtime.errors import UserError, of_machine, one_line


class Damaged(UserError):
    """A file is not what was written; the message says what is wrong with it."""


def fsync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand_home(path: str | Path) -> Path:
    """Return a path with its "~" replaced; raises `UserError` if nobody knows that home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {one_line(error)}; set HOME, or give a path without ~") from None


@contextmanager
def named_failure(path: str | Path) -> Iterator[None]:
    """Give the refusal of a disk the name of the file: a write has none, and a library in Rust no `OSError`."""
    try:
        yield
    except Exception as error:
        if (refused := of_machine(error)) is None or refused.filename is not None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`; rename it to `path` if the block succeeds, else remove it.

    A reader finds the old file or folder or the new one, never a part of it, also after the process dies. Raises
    `OSError` for a file to be written where a folder is, or for a full disk, with the name of `path`.
    """
    part, old = (path.with_name(f".{path.name}.{word}-{os.getpid()}") for word in ("part", "old"))
    _remove(part)
    try:
        with named_failure(path):
            yield part
        if part.is_dir() and path.is_dir():  # a rename replaces a file, but no folder that holds something
            path.rename(old)
        part.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        _remove(part)
        _remove(old)


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


def read_json(path: Path, name: str | None = None) -> Any:
    """Return the content of a JSON file; raises `Damaged`, whose message names it by `name` or its path."""
    try:
        if path.is_file() or not path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        problem = "is not a file"  # a pipe would keep the reader waiting
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON: {error}"
    raise Damaged(f"{name or path} {problem}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
