"""Files that are whole or absent: atomic JSON, fsync, and reading JSON that may be damaged."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from smollm_jax.runtime.errors import UserError


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
