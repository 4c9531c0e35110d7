"""Read documents from local files, the Hugging Face Hub, or the docs of CPython.

A source yields documents in a fixed order, each with the cursor from which the next document follows. Tokens,
shuffling and rows are not its concern. A row or file that cannot be read stops the run, or is skipped and counted.
The log names such a row or file in both cases.
"""

import io
import logging
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import DataConfig
from smollm_jax.data.documents import Document, content_of
from smollm_jax.data.hub_files import BLOCK_BYTES, HubReader, list_files
from smollm_jax.data.local_files import SUFFIXES, data_files, require_known
from smollm_jax.data.python_docs import python_docs
from smollm_jax.data.python_questions import python_preferences, python_questions
from smollm_jax.data.readers import Columns, Cursor, Record, RowFilter, read_parquet, read_text
from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line, require, say_once
from smollm_jax.runtime.retry import FRESH_SECONDS, WAYS_OUT

START: Cursor = {"file": 0, "row": 0, "byte": 0}
DOCS, QUESTIONS = "builtin:python-docs", "builtin:python-questions"
UNEVEN = 1.1  # how much larger one shard of whole files may be than another: all shards give as many rows
PARSE_TRIES = 3  # fresh reads of a Hub file before it is called corrupt
# The hash of a local file covers all of it if the source is small, else this many probes spread over the
# file, its ends included: an edit between two probes that keeps the size may then go unnoticed.
WHOLE_BYTES, PROBES, PROBE_BYTES = 2**30, 64, 2**16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A part `index` of `count`: every `count`-th file or row."""

    index: int = 0
    count: int = 1

    def has(self, number: int) -> bool:
        return number % self.count == self.index


WHOLE = Shard()


class Source:
    """An ordered set of files. A subclass knows how to open one.

    `sizes` are the bytes of each file. `fingerprint` has one hash per file, of its name, size and content. Setting
    `closed` ends every wait. `revision` and `license` are None where nobody tells them.
    """

    parse_tries = 1
    revision: str | None = None
    license: str | None = None

    def __init__(self, name: str, files: list[str], sizes: list[int], prints: list[str], settings: DataConfig):
        self.name, self.files, self.sizes, self.settings = name, files, sizes, settings
        self.columns = Columns(settings.text_column, settings.data_kind)
        self.fingerprint = " ".join(prints)
        self.closed = threading.Event()

    def open(self, i: int) -> BinaryIO:
        """Open file `i` for reading."""
        raise NotImplementedError

    def records(self, start: Cursor, wanted: RowFilter) -> Iterator[Record]:
        """Yield the wanted rows of file `start["file"]` from `start` on. Raises what its parser raises."""
        path = self.files[start["file"]]
        read = read_parquet if path.endswith(".parquet") else read_text
        return read(self.open(start["file"]), path, start, self.columns, wanted)

    def documents(
        self, cursor: Cursor | None = None, skipped: list[str] | None = None, shard: Shard = WHOLE
    ) -> Iterator[Document]:
        """Yield all documents of a shard from `cursor` on. Appends what is skipped to `skipped`.

        Shard i of n takes every nth file, or every nth row of each file if files would be uneven. Raises
        `SourceTimeout`, or `UserError` naming what is wrong.
        """
        cursor, skipped, tries = cursor or START, [] if skipped is None else skipped, 0
        column, chat = self.columns.text, self.settings.is_chat
        parts = [sum(self.sizes[i :: shard.count]) for i in range(shard.count)]
        by_file = shard.count == 1 or 0 < max(parts) <= UNEVEN * min(parts)
        while cursor["file"] < len(self.files):
            following = {**START, "file": cursor["file"] + 1}
            if by_file and not shard.has(cursor["file"]):
                cursor = following
                continue
            path = self.files[cursor["file"]]
            try:
                for record in self.records(cursor, WHOLE.has if by_file else shard.has):
                    cursor, tries = record.after, 0
                    text, conversation, fault = content_of(record.value, column, chat=chat)
                    if fault := record.fault or fault:
                        self._bad(f"{path}, row {record.row}, cannot be read: {fault}", skipped)
                    elif text.strip():
                        is_pair = conversation is not None or not self.settings.is_pairs
                        require(is_pair, f"{path} holds texts; a pair has the columns 'chosen' and 'rejected'")
                        yield Document(text, self.name, path, record.row, cursor, conversation=conversation)
            except Exception as error:
                if not _is_of_the_file(error):
                    raise
                tries += 1
                if tries < self.parse_tries:
                    logger.warning("reading %s again from row %d: %s", path, cursor["row"], one_line(error))
                    continue
                if by_file or shard.index == 0:  # every shard reads this file, one reports it
                    self._bad(f"{path}, from row {cursor['row']} on, cannot be read: {one_line(error)}", skipped)
            cursor, tries = following, 0

    def changes_since(self, then: str) -> str:
        """Describe how the files differ from those whose fingerprint was `then`."""
        before, now = set(then.split()), self.fingerprint.split()
        new = [file for file, one in zip(self.files, now, strict=True) if one not in before]
        gone = len(before - set(now))
        changes = [f"{gone} of {len(then.split())} files gone or changed"] if gone else []
        changes += [f"new or changed: {', '.join(new[:3])}{' and others' if len(new) > 3 else ''}"] if new else []
        return "; ".join(changes) or "the same files in another order or number"

    def _bad(self, message: str, skipped: list[str]) -> None:
        if self.settings.on_bad_data == "stop":
            raise UserError(f"{message}; skip it with --on-bad-data skip, or repair it") from None
        skipped.append(message)
        logger.warning("skipped: %s", one_line(UserError(message)))


class LocalSource(Source):
    """The local files that a path or glob pattern names."""

    def __init__(self, pattern: str, settings: DataConfig):
        """Raise `UserError` if there are no files, or they cannot be read."""
        try:
            files = data_files(pattern)
            sizes = [Path(path).stat().st_size for path in files]
            whole = sum(sizes) <= WHOLE_BYTES
            prints = [_local_hash(Path(file), size, whole=whole) for file, size in zip(files, sizes, strict=True)]
        except OSError as error:
            raise UserError(f"--data {pattern}: {one_line(error)}") from None
        super().__init__(pattern, files, sizes, prints, settings)

    def open(self, i: int) -> BinaryIO:
        import pyarrow as pa

        path = self.files[i]
        # no Python inside Arrow's reads: a thread caught in one when Python ends brings the process down
        return cast(BinaryIO, pa.OSFile(path) if path.endswith(".parquet") else Path(path).open("rb", BLOCK_BYTES))


class HubSource(Source):
    """The files of a dataset on the Hugging Face Hub."""

    parse_tries = PARSE_TRIES

    def __init__(self, spec: str, settings: DataConfig, *, resumes: bool):
        """Raise `UserError` if there are no files, or as `open_source` if the Hub is silent."""
        patience = settings.data_timeout if resumes else min(FRESH_SECONDS, settings.data_timeout)
        try:
            listing = list_files(spec, settings.split, patience=patience)
        except SourceTimeout as error:
            if resumes:
                raise
            raise UserError(f"--data {error}; {WAYS_OUT}") from None
        self._listing, self.revision, self.license = listing.files, listing.revision, listing.license
        files, sizes = [file.name for file in self._listing], [file.size for file in self._listing]
        require_known(files, spec)
        prints = [_short_hash(file.name, file.size, file.content) for file in self._listing]
        super().__init__(spec, files, sizes, prints, settings)

    def open(self, i: int) -> BinaryIO:
        raw = HubReader(self._listing[i], timeout=self.settings.data_timeout, closed=self.closed)
        # Arrow requests exact ranges. Reading lines needs a buffer
        return cast(BinaryIO, raw if self.files[i].endswith(".parquet") else io.BufferedReader(raw, BLOCK_BYTES))


class BuiltInSource(Source):
    """What every CPython carries, as one file: prose, or questions about it with their answers."""

    def __init__(self, spec: str, settings: DataConfig):
        """Raise `UserError` if the source has no rows of the kind that is read."""
        rows = BUILT_IN[spec].get(settings.data_kind)
        of_kind = f"--data {spec} has no rows of --data-kind {settings.data_kind}"
        if rows is None:
            raise UserError(f"{of_kind}; it has {', '.join(BUILT_IN[spec])}")
        self.rows = rows()
        self.revision = version = ".".join(map(str, sys.version_info[:3]))
        self.license = BUILT_IN_LICENSE
        prints = [_short_hash(version, *self.rows)]
        super().__init__(spec, [f"{spec} of Python {version}"], [], prints, settings)

    def records(self, start: Cursor, wanted: RowFilter) -> Iterator[Record]:
        for row, value in enumerate(self.rows[start["row"] :], start["row"]):
            if wanted(row):
                yield Record(value, row, {**start, "row": row + 1})


BUILT_IN_LICENSE = "PSF-2.0"  # of CPython and its documentation
# of each built-in source, what gives its rows to each kind of data
BUILT_IN: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    DOCS: {"text": python_docs, "chat": python_docs},
    QUESTIONS: {"chat": python_questions, "pairs": python_preferences},
}


def check_source(spec: str) -> None:
    """Raise `UserError` for a built-in source or local files that are not there. Opens nothing."""
    if spec.startswith("builtin:"):
        require(spec in BUILT_IN, f"--data {spec}: the built-in sources are {' and '.join(BUILT_IN)}")
    elif looks_local(spec):
        data_files(spec)


def open_source(spec: str, settings: DataConfig, *, resumes: bool = False) -> Source:
    """Open the source that `spec` names. Raises `UserError` if there is nothing to read.

    If the Hub does not answer, a new run fails within seconds. A run that resumes waits for `data_timeout`
    seconds, then raises `SourceTimeout`.
    """
    if spec.startswith("builtin:"):
        check_source(spec)
        return BuiltInSource(spec, settings)
    if not looks_local(spec):
        return HubSource(spec, settings, resumes=resumes)
    if settings.split not in {recipe.data.split for recipe in RECIPES.values()}:
        say_once(f"--split {settings.split} is for datasets on the Hub; {spec} is read as a whole")
    return LocalSource(spec, settings)


def mixture(data: str) -> list[tuple[str, float]]:
    """Parse `"A=0.7,B=0.3"` to [("A", 0.7), ("B", 0.3)]. The weights sum to 1, and the default weight is 1.

    A path that exists is used as is, whatever commas and equals signs are in its name.
    """
    if _is_path(data):
        return [(data, 1.0)]
    parts, pieces = [], data.split(",")
    while pieces:
        names = (",".join(pieces[:n]).strip() for n in range(len(pieces), 1, -1))
        part = next(
            (name for name in names if _is_path(name) or _is_path(name.rpartition("=")[0])), pieces[0].strip()
        )
        del pieces[: part.count(",") + 1]
        spec, equals, weight = part.rpartition("=")
        try:
            parts.append((spec, float(weight)) if equals and not _is_path(part) else (part, 1.0))
        except ValueError:
            parts.append((part, 1.0))
    require(all(spec for spec, _ in parts), f"--data {data!r}: a part is empty")
    require(all(0 < w < float("inf") for _, w in parts), f"--data {data!r}: every weight must be above 0")
    total = sum(weight for _, weight in parts)
    return [(spec, weight / total) for spec, weight in parts]


def _short_hash(*parts: Any) -> str:
    """Hash to eight hex digits: enough to notice a change, short even for thousands."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())[:8]


def _local_hash(file: Path, size: int, *, whole: bool) -> str:
    """Hash name, size and content of a file. Raises `OSError`."""
    content = xxhash.xxh3_64()
    with file.open("rb") as opened:
        if whole or size <= PROBES * PROBE_BYTES:
            while block := opened.read(PROBES * PROBE_BYTES):
                content.update(block)
        else:
            for probe in range(PROBES):
                opened.seek((size - PROBE_BYTES) * probe // (PROBES - 1))
                content.update(opened.read(PROBE_BYTES))
    return _short_hash(file.name, size, content.hexdigest())


def _is_of_the_file(error: Exception) -> bool:
    """Return whether the file cannot be read or parsed. Other errors are mistakes, timeouts or faults of ours."""
    of_arrow = type(error).__module__.startswith("pyarrow")
    of_parser = of_arrow or isinstance(error, OSError | EOFError | ValueError | zlib.error)
    return of_parser and not isinstance(error, UserError)


def _is_path(spec: str) -> bool:
    return os.path.exists(spec) or os.path.exists(os.path.expanduser(spec))


def looks_local(spec: str) -> bool:
    path = spec.endswith(SUFFIXES) or spec.startswith((".", "/", "~")) or _is_path(spec)
    return path or any(c in spec for c in "*?[") or spec.partition(":")[0].count("/") != 1
