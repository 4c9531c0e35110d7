"""Seal a folder with a manifest, and verify it later.

This module knows bytes and names, and nothing of arrays, orbax or JAX. A sealed folder holds a `manifest.json`
with the size and checksum of every file and a digest of itself. So a flipped bit, a missing or a half-written file
is found by reading, whatever library wrote the files. The checksum xxh3_128 guards against accidents at the speed
of memory, not against an attacker.
"""

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from smollm_jax.runtime.files import Damaged, checksum, fsync, read_json, write_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def _manifest_digest(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest of all files below `folder`, with `about` in it, and fsync everything."""
    files, folders = {}, [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            fsync(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
    manifest = {"format": MANIFEST_FORMAT, "about": about, "files": files}
    write_json(folder / MANIFEST, manifest | {"digest": _manifest_digest(manifest)})
    for path in reversed(folders):
        fsync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sealed folder after checking its form and digest. Raises `Damaged`."""
    try:
        if not any(folder.iterdir()):
            raise Damaged("the folder is empty")
    except OSError as error:
        raise Damaged(f"the folder cannot be read: {error.strerror}") from None
    manifest = read_json(folder / MANIFEST, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("digest") != _manifest_digest(manifest):
        raise Damaged(f"{MANIFEST} does not match its own digest")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest.get('format')!r}; {MANIFEST_FORMAT} is read here")
    if not isinstance(manifest.get("about"), dict) or not isinstance(manifest.get("files"), dict):
        raise Damaged(f"{MANIFEST} lacks its files or what they are about")
    for name, entry in manifest["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise Damaged(f"{MANIFEST} names {name!r}, which is not a file below the folder")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "xxh3_128"}:
            raise Damaged(f"{MANIFEST} gives no size and checksum of {name!r}")
    return manifest


def verify(folder: Path, *, parts: set[str] | None = None, checksums: bool = True) -> dict[str, Any]:
    """Return the manifest of a sealed folder if every file is as it was written. Raises `Damaged`.

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
