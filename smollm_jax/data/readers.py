"""Files to rows: Parquet, JSON lines, and text whose documents are separated by blank lines.

A row that cannot be read is an `Record` that says why; a file that cannot be read raises whatever its parser
does. Each entry carries the cursor behind it: file, row, and in a text file the byte. Rows that are not
wanted are passed over before anything is made of them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from smollm_jax.runtime.errors import UserError, one_line

Cursor = dict[str, Any]
RowFilter = Callable[[int], bool]
BOM = b"\xef\xbb\xbf"


class MissingColumn(UserError):
    """The file has no such column: a mistake in the settings, whatever --on-bad-data says."""


@dataclass(frozen=True)
class Record:
    """One row of a file: its value, or why it cannot be read."""

    value: Any
    row: int
    after: Cursor
    fault: str = ""


def read_parquet(
    open_file: Callable[[], BinaryIO], path: str, start: Cursor, column: str, wanted: RowFilter
) -> Iterator[Record]:
    import pyarrow.parquet as pq

    first = 0
    with open_file() as raw, pq.ParquetFile(raw) as file:
        _require_column(column, file.schema_arrow.names, path)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start["row"]:
                values = file.read_row_group(group, columns=[column]).column(0)
                for offset in range(max(start["row"] - first, 0), rows):
                    row = first + offset
                    if not wanted(row):
                        continue
                    value, fault = None, ""
                    try:
                        value = values[offset].as_py()
                    except UnicodeDecodeError as error:
                        fault = one_line(error)
                    yield Record(value, row, {**start, "row": row + 1}, fault)
            first += rows


def read_text(
    open_file: Callable[[], BinaryIO], path: str, start: Cursor, column: str, wanted: RowFilter
) -> Iterator[Record]:
    """Lines of JSON, or the paragraphs of a text file."""
    json_lines = not path.endswith(".txt")
    with open_file() as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
        file.seek(start["byte"])
        entries = _lines(file) if json_lines else _paragraphs(file)
        for row, (entry, end) in enumerate(entries, start["row"]):
            if row and not wanted(row):  # the first shows whether the column is there
                continue
            value, fault = None, ""
            try:
                text = entry.removeprefix(b"" if row else BOM).decode()
                value = _column_of(text, column, path, row) if json_lines and text.strip() else text
            except MissingColumn:
                raise
            except (ValueError, RecursionError) as error:
                fault = one_line(error)
            if not wanted(row):
                continue
            yield Record(value, row, {**start, "row": row + 1, "byte": start["byte"] + end}, fault)


def _column_of(line: str, column: str, path: str, row: int) -> Any:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise UserError("not a JSON object")
    if row == 0:  # the name is wrong; in a later row, the row is
        _require_column(column, list(value), path)
    elif column not in value:
        raise UserError(f"no {column!r} but {', '.join(value)}")
    return value[column]


def _require_column(column: str, names: list[str], path: str) -> None:
    if column not in names:
        raise MissingColumn(f"{path} has no column {column!r} but {', '.join(names)}; give --text-column")


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    end = 0
    for line in file:
        end += len(line)
        yield line, end


def _paragraphs(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
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
