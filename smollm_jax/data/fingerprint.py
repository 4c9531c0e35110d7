"""Fingerprint the files of a source: one short hash per file, joined by spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

# The hash of a local file covers all of it if the source is small, else this many probes spread over the
# file, its ends included: an edit between two probes that keeps the size may then go unnoticed.
WHOLE_BYTES, PROBES, PROBE_BYTES = 2**30, 64, 2**16


def short_hash(*parts: Any) -> str:
    """Eight hex digits: enough to tell that a file changed, short enough for a cursor of thousands."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())[:8]


def hash_files(files: list[str], sizes: list[int]) -> list[str]:
    """Hash name, size and content of each local file; raises `OSError`."""
    whole = sum(sizes) <= WHOLE_BYTES
    return [
        short_hash(Path(file).name, size, _content_hash(file, size, whole=whole))
        for file, size in zip(files, sizes, strict=True)
    ]


def changed_files(files: list[str], now: str, then: str) -> str:
    """Describe how `files`, with the fingerprint `now`, differ from the files with the fingerprint `then`."""
    before, after = set(then.split()), now.split()
    new = [file for file, one in zip(files, after, strict=True) if one not in before]
    gone = len(before - set(after))
    changes = [f"{gone} of {len(then.split())} files gone or changed"] if gone else []
    changes += [f"new or changed: {', '.join(new[:3])}{' and others' if len(new) > 3 else ''}"] if new else []
    return "; ".join(changes) or "the same files in another order or number"


def _content_hash(file: str, size: int, *, whole: bool) -> str:
    digest = xxhash.xxh3_64()
    with Path(file).open("rb") as opened:
        if whole or size <= PROBES * PROBE_BYTES:
            while block := opened.read(PROBES * PROBE_BYTES):
                digest.update(block)
        else:
            for probe in range(PROBES):
                opened.seek((size - PROBE_BYTES) * probe // (PROBES - 1))
                digest.update(opened.read(PROBE_BYTES))
    return digest.hexdigest()
