"""Where documents come from: local files, the Hugging Face Hub, and the prose inside every CPython.

A source yields documents in a fixed order, each with the cursor from which the next one follows. It knows
nothing of tokens, shuffling or rows. `datasets` finds the files of a Hub dataset; they are then read range
by range, so that a resume opens one file at one row group. A fault of the network re-opens the source at
the last cursor, until `timeout` seconds have gone by without a document.
"""

from __future__ import annotations

import ast
import glob
import gzip
import hashlib
import inspect
import json
import logging
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smollm_jax.config import DataConfig, require
from smollm_jax.tokenizer import WAYS_OUT

Cursor = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
BUILTIN = "builtin:python-docs"
SHORTEST_BUILTIN = 80  # characters: shorter docstrings are labels, not prose
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 20.0
PARSE_TRIES = 3  # a truncated read looks like a corrupt file until it has failed this often at one place

logger = logging.getLogger(__name__)


class SourceTimeout(RuntimeError):
    """A source has not answered for --data-timeout seconds."""


class BadData(ValueError):
    """A row or file that cannot be read; the message names it."""


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    file: str
    row: int
    cursor: Cursor = field(repr=False)
    """From here the next document follows."""


@dataclass
class Source:
    """An ordered set of files. `fingerprint` changes with the list of files, their sizes and contents."""

    name: str
    files: list[str]
    fingerprint: str
    settings: DataConfig
    filesystem: Any = None
    skipped: int = 0

    def documents(self, cursor: Cursor | None = None) -> Iterator[Document]:
        """All documents from `cursor` on; raises `SourceTimeout`, or `ValueError` naming what is wrong."""
        cursor = cursor or {"file": 0, "row": 0, "byte": 0}
        alive, wait, failures = time.monotonic(), FIRST_WAIT_SECONDS, 0
        while True:
            try:
                for document in self._read(cursor):
                    cursor, alive, wait, failures = document.cursor, time.monotonic(), FIRST_WAIT_SECONDS, 0
                    yield document
                    alive = time.monotonic()  # the consumer may take its time
                return
            except Exception as error:
                failures += 1
                if self.filesystem is None or not _may_pass(error, failures):
                    cursor = self._bad_file(cursor, error)
                    continue
                silent = time.monotonic() - alive
                if silent > self.settings.data_timeout:
                    raise SourceTimeout(
                        f"{self.name} has not answered for {silent:.0f} s ({_brief(error)})"
                    ) from None
                logger.warning("waiting for %s: %s; trying again in %.1f s", self.name, _brief(error), wait)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _read(self, cursor: Cursor) -> Iterator[Document]:
        for index in range(cursor["file"], len(self.files)):
            start = cursor if index == cursor["file"] else {"file": index, "row": 0, "byte": 0}
            path = self.files[index]
            if path.endswith(".parquet"):
                yield from self._read_parquet(path, start)
            else:
                yield from self._read_text(path, start)

    def _read_parquet(self, path: str, start: Cursor) -> Iterator[Document]:
        import pyarrow.parquet as pq

        column, first = self.settings.text_column, 0
        with self._open(path) as raw, pq.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            require(column in names, f"{path} has no column {column!r} but {', '.join(names)}; give --text-column")
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > start["row"]:
                    values = file.read_row_group(group, columns=[column]).column(0)
                    for offset in range(max(start["row"] - first, 0), rows):
                        row = first + offset
                        after = {"file": start["file"], "row": row + 1, "byte": 0}
                        yield from self._checked(values[offset].as_py(), path, row, after)
                first += rows

    def _read_text(self, path: str, start: Cursor) -> Iterator[Document]:
        entries = _lines if path.endswith((".jsonl", ".jsonl.gz")) else _paragraphs
        with self._open(path) as raw:
            file = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            file.seek(start["byte"])
            for row, (entry, end) in enumerate(entries(file), start["row"]):
                after = {"file": start["file"], "row": row + 1, "byte": start["byte"] + end}
                try:
                    text = entry.decode()
                    value = self._field(json.loads(text), path) if entries is _lines and text.strip() else text
                except MissingColumn:
                    raise
                except (ValueError, RecursionError) as error:
                    self._bad_row(path, row, _brief(error))
                    continue
                yield from self._checked(value, path, row, after)

    def _field(self, entry: Any, path: str) -> Any:
        column = self.settings.text_column
        if not isinstance(entry, dict):
            raise ValueError("not a JSON object")
        if column not in entry:
            raise MissingColumn(
                f"{path} has no column {column!r} but {', '.join(map(str, entry))}; give --text-column"
            )
        return entry[column]

    def _checked(self, value: Any, path: str, row: int, after: Cursor) -> Iterator[Document]:
        if not isinstance(value, str):
            self._bad_row(path, row, f"{self.settings.text_column} is {type(value).__name__}, not text")
        elif not value.isascii() and value.encode("utf-8", "replace").decode() != value:
            self._bad_row(path, row, f"{self.settings.text_column} is not Unicode text: a lone surrogate")
        elif value.strip():
            yield Document(value, self.name, path, row, after)

    def _bad_row(self, path: str, row: int, reason: str) -> None:
        message = f"{path}, row {row}, cannot be read: {reason}"
        if self.settings.on_bad_data == "stop":
            raise BadData(f"{message}; mend it, or give --on-bad-data skip")
        self.skipped += 1
        logger.warning("skipped: %s", message)

    def _bad_file(self, cursor: Cursor, error: Exception) -> Cursor:
        """The cursor behind a file that cannot be read, where that may be skipped; raises otherwise."""
        if isinstance(error, BadData | MissingColumn | SourceTimeout) or not isinstance(
            error, OSError | ValueError | EOFError
        ):
            raise error
        path = self.files[cursor["file"]]
        message = f"{path}, at row {cursor['row']}, cannot be read: {_brief(error)}"
        if self.settings.on_bad_data == "stop":
            raise BadData(f"{message}; mend it, or give --on-bad-data skip") from None
        self.skipped += 1
        logger.warning("skipped the rest of a file: %s", message)
        return {"file": cursor["file"] + 1, "row": 0, "byte": 0}

    def _open(self, path: str) -> Any:
        return self.filesystem.open(path, "rb") if self.filesystem else Path(path).open("rb")


class MissingColumn(ValueError):
    """The file has no such column: a mistake in the settings, whatever --on-bad-data says."""


class BuiltinSource(Source):
    """Reference manual and docstrings of the running Python: about 2 MB of English prose, each text once."""

    def _read(self, cursor: Cursor) -> Iterator[Document]:
        texts = python_docs()
        for row in range(cursor["row"], len(texts)):
            yield Document(texts[row], self.name, self.name, row, {"file": 0, "row": row + 1, "byte": 0})


def open_source(spec: str, settings: DataConfig) -> Source:
    """The source that `spec` names; raises `ValueError` when there is nothing to read."""
    if spec.startswith("builtin:"):
        require(spec == BUILTIN, f"--data {spec}: the only built-in source is {BUILTIN}")
        version = f"{BUILTIN} {sys.version_info[:3]}"
        digest = hashlib.sha256("\0".join(python_docs()).encode()).hexdigest()
        return BuiltinSource(BUILTIN, [BUILTIN], f"{version} {digest}", settings)
    if _looks_local(spec):
        return _local(spec, settings)
    return _hub(spec, settings)


def mixture(data: str) -> list[tuple[str, float]]:
    """`"A=0.7,B=0.3"` as [("A", 0.7), ("B", 0.3)], weights summing to one; a lone or bare name weighs 1."""
    parts = []
    for part in data.split(","):
        spec, _, weight = part.strip().rpartition("=")
        try:
            parts.append((spec, float(weight)) if spec else (part.strip(), 1.0))
        except ValueError:
            parts.append((part.strip(), 1.0))
    require(all(spec for spec, _ in parts), f"--data {data!r}: a part is empty")
    require(all(0 < w < float("inf") for _, w in parts), f"--data {data!r}: every weight must be above 0")
    total = sum(weight for _, weight in parts)
    return [(spec, weight / total) for spec, weight in parts]


def _looks_local(spec: str) -> bool:
    return (
        spec.endswith(SUFFIXES)
        or spec.startswith((".", "/", "~"))
        or any(c in spec for c in "*?[")
        or (Path(spec).exists() or spec.count("/") != 1)
    )


def _local(pattern: str, settings: DataConfig) -> Source:
    files = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = sorted(f for path in files for f in (_inside(path) if Path(path).is_dir() else [path]))
    require(bool(files), f"--data {pattern} matches no file; give a path or glob of {', '.join(SUFFIXES)}")
    for path in files:
        require(path.endswith(SUFFIXES), f"--data {path}: expected one of {', '.join(SUFFIXES)}")
    listing = [(Path(path).name, Path(path).stat().st_size) for path in files]
    return Source(pattern, files, _digest(listing), settings)


def _inside(folder: str) -> list[str]:
    return [str(path) for path in Path(folder).rglob("*") if path.name.endswith(SUFFIXES)]


def _hub(spec: str, settings: DataConfig) -> Source:
    repo, _, name = spec.partition(":")
    import datasets
    from huggingface_hub import HfFileSystem

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(repo, name or None)
        found = builder.config.data_files or {}
        require(settings.split in found, f"--data {spec} has no split {settings.split!r} but {', '.join(found)}")
        files = [str(path).removeprefix("hf://") for path in found[settings.split]]
        filesystem = HfFileSystem()
        folders = sorted({path.rpartition("/")[0] for path in files})
        sizes = {e["name"]: e for folder in folders for e in filesystem.ls(folder, detail=True)}
    except ValueError as error:
        raise ValueError(f"--data {spec}: {_brief(error)}") from None
    except Exception as error:
        # whatever a library made of it: without the list of files there is no stream
        raise ValueError(f"--data {spec} cannot be opened on the Hub ({_brief(error)}); {WAYS_OUT}") from None
    listing = []
    for path in files:
        entry = sizes.get(path) or filesystem.info(path)
        content = (entry.get("lfs") or {}).get("sha256") or entry.get("blob_id") or ""
        listing.append((_without_revision(path), entry["size"], content))
    bad = [path for path in files if not path.endswith(SUFFIXES)]
    require(not bad, f"--data {spec}: {(bad or [''])[0]} is none of {', '.join(SUFFIXES)}")
    return Source(spec, files, _digest(listing), settings, filesystem)


def _without_revision(path: str) -> str:
    head, _, tail = path.partition("@")
    return head + "/" + tail.partition("/")[2] if tail else path


def _digest(listing: list[Any]) -> str:
    return f"{len(listing)} files {hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]}"


def _lines(file: Any) -> Iterator[tuple[bytes, int]]:
    end = 0
    for line in file:
        end += len(line)
        yield line, end


def _paragraphs(file: Any) -> Iterator[tuple[bytes, int]]:
    """Documents between blank lines, each with the offset behind it."""
    lines: list[bytes] = []
    end = 0
    for line in file:
        end += len(line)
        if line.strip():
            lines.append(line)
        elif lines:
            yield b"".join(lines).rstrip(b"\r\n"), end
            lines = []
    if lines:
        yield b"".join(lines).rstrip(b"\r\n"), end


def _may_pass(error: Exception, failures: int) -> bool:
    """Whether an error may be the network's: it goes away, or turns out to be the file's own."""
    import httpx
    import pyarrow as pa
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, BadData | MissingColumn):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    if isinstance(error, pa.ArrowInvalid | EOFError | gzip.BadGzipFile):
        return failures < PARSE_TRIES
    return isinstance(error, OSError | httpx.HTTPError | RuntimeError)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


_DOCS: list[str] = []


def python_docs() -> list[str]:
    """The distinct texts of `builtin:python-docs`, in an order fixed by a seed."""
    if not _DOCS:
        texts = dict.fromkeys(text for text in _python_texts() if len(text) >= SHORTEST_BUILTIN)
        ordered = sorted(texts)
        random.Random(0).shuffle(ordered)
        _DOCS.extend(ordered)
    return _DOCS


def _python_texts() -> Iterator[str]:
    from pydoc_data import topics

    yield from (text.strip() for text in topics.topics.values())
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if any(
            part in ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3") for part in parts
        ):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    yield inspect.cleandoc(text).encode("utf-8", "ignore").decode()
