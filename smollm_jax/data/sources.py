"""Where documents come from: local files, the Hugging Face Hub, and the prose inside every CPython.

A source yields documents in a fixed order, each with the cursor from which the next one follows. It knows
nothing of tokens, shuffling or rows. What cannot be read is named, by file and row, and stops the run or is
skipped and counted; it never goes unmentioned.
"""

from __future__ import annotations

import glob
import io
import logging
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.hub_files import BLOCK_BYTES, HubFile, Refused, Remote, list_files
from smollm_jax.data.python_docs import python_docs
from smollm_jax.data.readers import Cursor, MissingColumn, Record, RowFilter, read_parquet, read_text
from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line, require
from smollm_jax.runtime.retry import FRESH_SECONDS, WAYS_OUT

START: Cursor = {"file": 0, "row": 0, "byte": 0}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
BUILTIN = "builtin:python-docs"
# A local file's fingerprint is taken from all of it where the source is small, and else from so many places
# of it, its ends among them: an edit in between that keeps the size may then go unnoticed.
WHOLE_BYTES, PROBES, PROBE_BYTES = 2**30, 64, 2**16
UNEVEN = 1.1  # how much larger one share of files may be than another: all of them give as many rows
PARSE_TRIES = 3  # of a remote file, read afresh each time, before it is called corrupt

logger = logging.getLogger(__name__)


class BadData(UserError):
    """A row or file that cannot be read; the message names it."""


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    file: str
    row: int
    cursor: Cursor = field(repr=False)
    """From here the next document follows."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `of`."""

    index: int = 0
    of: int = 1

    def has(self, number: int) -> bool:
        return number % self.of == self.index


WHOLE = Shard()


@dataclass
class Source:
    """An ordered set of files. `fingerprint` has a hash a file: of its name, size and content."""

    name: str
    files: list[str]
    fingerprint: str
    settings: DataConfig
    open: Callable[[int], BinaryIO]
    sizes: list[int] = field(default_factory=list)
    """Bytes of each file."""
    remote: bool = False
    closed: threading.Event = field(default_factory=threading.Event)
    """Set: no more waiting."""

    def documents(
        self, cursor: Cursor | None = None, skipped: list[str] | None = None, share: Shard = WHOLE
    ) -> Iterator[Document]:
        """All documents of a share from `cursor` on; what is skipped is appended to `skipped`.

        A share is every so-manieth file, or where that would not make even shares, row of each file.
        Raises `SourceTimeout`, or `ValueError` naming what is wrong.
        """
        cursor, skipped, tries = cursor or START, [] if skipped is None else skipped, 0
        by_file = self.is_even(share.of)
        while cursor["file"] < len(self.files):
            if by_file and not share.has(cursor["file"]):
                cursor = {**START, "file": cursor["file"] + 1}
                continue
            path = self.files[cursor["file"]]
            try:
                for entry in self._entries(path, cursor, WHOLE.has if by_file else share.has):
                    cursor, tries = entry.after, 0
                    fault = entry.fault or _fault(entry.value, self.settings.text_column)
                    if fault:
                        self._bad(f"{path}, row {entry.row}, cannot be read: {fault}", skipped)
                    elif entry.value.strip():
                        yield Document(entry.value, self.name, path, entry.row, cursor)
            except (BadData, MissingColumn, Refused, SourceTimeout):
                raise
            except Exception as error:
                if not _is_of_the_file(error):
                    raise
                tries += 1
                if self.remote and tries < PARSE_TRIES:
                    logger.warning("reading %s again from row %d: %s", path, cursor["row"], one_line(error))
                    continue
                if by_file or share.index == 0:  # where it is in all shares, one tells
                    self._bad(f"{path}, from row {cursor['row']} on, cannot be read: {one_line(error)}", skipped)
            cursor, tries = {**START, "file": cursor["file"] + 1}, 0

    def is_even(self, shares: int) -> bool:
        """Whether every so-manieth file makes shares of nearly the same size."""
        parts = [sum(self.sizes[i::shares]) for i in range(shares)]
        return shares == 1 or (min(parts) > 0 and max(parts) <= UNEVEN * min(parts))

    def _entries(self, path: str, start: Cursor, wanted: RowFilter) -> Iterator[Record]:
        if self.name == BUILTIN:
            return _builtin(start, wanted)
        read = read_parquet if path.endswith(".parquet") else read_text
        return read(partial(self.open, start["file"]), path, start, self.settings.text_column, wanted)

    def _bad(self, message: str, skipped: list[str]) -> None:
        if self.settings.on_bad_data == "stop":
            raise BadData(
                f"{message}; pass over it with --on-bad-data skip, or mend it and start afresh"
            ) from None
        skipped.append(message)
        logger.warning("skipped: %s", message)


def _fault(value: Any, column: str) -> str:
    """Why a value is no text; empty if it is."""
    if not isinstance(value, str):
        return f"{column} is {type(value).__name__}, not text"
    if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
        return f"{column} is not Unicode text: a lone surrogate"
    return ""


def _is_of_the_file(error: Exception) -> bool:
    """Whether a file cannot be read or parsed, as against a fault of this program."""
    return isinstance(error, OSError | EOFError | ValueError | zlib.error) or type(error).__module__.startswith(
        "pyarrow"
    )


def _builtin(start: Cursor, wanted: RowFilter) -> Iterator[Record]:
    for row, text in enumerate(python_docs()[start["row"] :], start["row"]):
        if wanted(row):
            yield Record(text, row, {**start, "row": row + 1})


def open_source(spec: str, settings: DataConfig, *, resumes: bool = False) -> Source:
    """The source that `spec` names; raises `ValueError` when there is nothing to read.

    A Hub that does not answer is an error within seconds, but for a run that resumes: that waits for
    `data_timeout` seconds, then raises `SourceTimeout`.
    """
    if spec.startswith("builtin:"):
        require(spec == BUILTIN, f"--data {spec}: the only built-in source is {BUILTIN}")
        version = ".".join(map(str, sys.version_info[:3]))
        digest = _hash(version, *python_docs())
        return Source(BUILTIN, [f"{BUILTIN} of Python {version}"], digest, settings, _nothing)
    return _local(spec, settings) if _looks_local(spec) else _hub(spec, settings, resumes)


def mixture(data: str) -> list[tuple[str, float]]:
    """`"A=0.7,B=0.3"` as [("A", 0.7), ("B", 0.3)], weights summing to one; a lone or bare name weighs 1."""
    parts = []
    for part in data.split(","):
        spec, equals, weight = part.strip().rpartition("=")
        try:
            parts.append((spec, float(weight)) if equals else (weight, 1.0))
        except ValueError:
            parts.append((part.strip(), 1.0))
    require(all(spec for spec, _ in parts), f"--data {data!r}: a part is empty")
    require(all(0 < w < float("inf") for _, w in parts), f"--data {data!r}: every weight must be above 0")
    total = sum(weight for _, weight in parts)
    return [(spec, weight / total) for spec, weight in parts]


def changed_files(source: Source, then: str) -> str:
    """In words, what became of a source whose fingerprint was `then`."""
    before, now = then.split(), source.fingerprint.split()
    new = [path for path, one in zip(source.files, now, strict=True) if one not in set(before)]
    gone = len(set(before) - set(now))
    words = [f"{gone} of {len(before)} files gone or changed"] if gone else []
    words += [f"new or changed: {', '.join(new[:3])}{' and others' if len(new) > 3 else ''}"] if new else []
    return "; ".join(words) or "the same files in another order or number"


def _looks_local(spec: str) -> bool:
    return (
        spec.endswith(SUFFIXES)
        or spec.startswith((".", "/", "~"))
        or any(c in spec for c in "*?[")
        or Path(spec).exists()
        or spec.partition(":")[0].count("/") != 1
    )


def _local(pattern: str, settings: DataConfig) -> Source:
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = sorted(f for path in found for f in (_inside(path) if Path(path).is_dir() else [path]))
    require(bool(files), f"--data {pattern} matches no file; give a path or glob of {', '.join(SUFFIXES)}")
    _require_known(files, pattern)
    try:
        sizes = [Path(path).stat().st_size for path in files]
        whole = sum(sizes) <= WHOLE_BYTES
        prints = [
            _hash(Path(path).name, size, _content(path, size, whole=whole))
            for path, size in zip(files, sizes, strict=True)
        ]
    except OSError as error:
        raise UserError(f"--data {pattern}: {one_line(error)}") from None
    return Source(pattern, files, " ".join(prints), settings, lambda i: _open_local(files[i]), sizes)


def _open_local(path: str) -> BinaryIO:
    import pyarrow as pa

    # no Python inside Arrow's reads: a thread caught in one when Python ends brings the process down
    return cast(BinaryIO, pa.OSFile(path) if path.endswith(".parquet") else Path(path).open("rb"))


def _inside(folder: str) -> list[str]:
    return [str(path) for path in Path(folder).rglob("*") if path.name.endswith(SUFFIXES)]


def _content(path: str, size: int, *, whole: bool) -> str:
    """A hash of a file: of all of it, or of probes spread over it."""
    digest = xxhash.xxh3_64()
    with Path(path).open("rb") as file:
        if whole or size <= PROBES * PROBE_BYTES:
            while block := file.read(PROBES * PROBE_BYTES):
                digest.update(block)
        else:
            for probe in range(PROBES):
                file.seek((size - PROBE_BYTES) * probe // (PROBES - 1))
                digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()


# one listing a process: what is held out and what is trained on come from the same revision
_files_of = cache(list_files)


def _hub(spec: str, settings: DataConfig, resumes: bool) -> Source:
    patience = settings.data_timeout if resumes else min(FRESH_SECONDS, settings.data_timeout)
    try:
        listing = _files_of(spec, settings.split, patience=patience)
    except SourceTimeout as error:
        if resumes:
            raise
        raise UserError(f"--data {error}; {WAYS_OUT}") from None
    files = [file.name for file in listing]
    _require_known(files, spec)
    prints = [_hash(file.name, file.size, file.content) for file in listing]
    sizes = [file.size for file in listing]
    source = Source(spec, files, " ".join(prints), settings, _nothing, sizes, remote=True)
    source.open = lambda i: _remote(listing[i], source)
    return source


def _remote(file: Remote, source: Source) -> BinaryIO:
    raw = HubFile(file, timeout=source.settings.data_timeout, closed=source.closed)
    # Arrow asks for exactly what it wants; lines want a buffer
    return cast(BinaryIO, raw if file.name.endswith(".parquet") else io.BufferedReader(raw, BLOCK_BYTES))


def _nothing(index: int) -> BinaryIO:
    raise AssertionError(f"file {index} of a source without files")


def _require_known(files: list[str], spec: str) -> None:
    unknown = [path for path in files if not path.endswith(SUFFIXES)]
    require(not unknown, f"--data {spec}: {(unknown or [''])[0]} is none of {', '.join(SUFFIXES)}")


def _hash(*parts: Any) -> str:
    """Eight hex digits: enough to tell that a file changed, short enough for a cursor of thousands."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())[:8]
