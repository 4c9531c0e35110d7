"""Read records from Parquet, JSON lines, or text files with documents between blank lines.

A row that cannot be read is a `Record` with the reason. A file that cannot be read raises its parser's error. A
row's size is known before the row is parsed. So no file can fill memory or expand without end. Each record carries
the cursor after it: file, row, and in a text file the byte. Rows that the filter rejects are skipped before they
are parsed.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from smollm_jax.data.conversations import FORMATS, PAIRS, format_of
from smollm_jax.runtime.errors import UserError, one_line, require, say_once

Cursor = dict[str, Any]
RowFilter = Callable[[int], bool]
BOM = b"\xef\xbb\xbf"
LONGEST_BYTES = 2**25  # of a document. A tokenizer takes about 90 times as much memory
TOO_LONG = f"a document above {LONGEST_BYTES // 2**20} MiB, which is the limit; split it"
SEARCHED_BYTES = 2**28  # after a document that is too long, for its end
PIECE_BYTES = 2**18  # of that search: memory for longer pieces is mapped anew for each, ten times as slow
MOST_BLANK = 1_000_000  # lines
MANY_LINES = 100  # of a text file that may have one document per line
LARGEST_RATIO, CHECKED_BYTES = 200, 2**28  # text expands at most 30-fold, a file made to fill memory 1,000-fold


@dataclass(frozen=True)
class Record:
    """A row of a file: its value, or why it cannot be read."""

    value: Any
    row: int
    after: Cursor
    fault: str = ""


@dataclass(frozen=True)
class Columns:
    """The columns to read of a row: `text`, or in chat data any conversation, or a pair of answers.

    `kind` is a `data_kind`. Of text a value is the text, else a dict of columns.
    """

    text: str
    kind: str = "text"

    def among(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns to read of those with `names`. Empty if they are not there."""
        names = tuple(names)
        if self.kind == "pairs":
            return format_of(names, PAIRS)
        return (self.kind == "chat" and format_of(names, FORMATS)) or ((self.text,) if self.text in names else ())

    def required(self, names: Iterable[str], path: str) -> tuple[str, ...]:
        """Return what `among` returns. Raises `UserError` if that is nothing."""
        names = tuple(names)
        wanted = ", ".join(" and ".join(map(repr, columns)) for columns in FORMATS)
        none, remedy = f"none of the columns {wanted}, {self.text!r}", "give --text-column"
        wanted = none if self.kind == "chat" else f"no column {self.text!r}"
        if self.kind == "pairs":
            missing = next((name for name in PAIRS[-1] if name not in names), "")
            wanted, remedy = f"no column {missing!r}", "a pair has 'chosen' and 'rejected'"
        require(bool(self.among(names)), f"{path} has {wanted} but {', '.join(names)}; {remedy}")
        return self.among(names)

    def value(self, row: dict[str, Any]) -> Any:
        return row[self.text] if self.kind == "text" else row


def read_parquet(
    file: BinaryIO, path: str, start: Cursor, columns: Columns, wanted: RowFilter
) -> Iterator[Record]:
    """Yield the wanted rows of a Parquet file from `start` on. Raises `UserError`."""
    import pyarrow.parquet as pq

    first = 0
    with file, pq.ParquetFile(file) as parquet:
        names = list(columns.required(parquet.schema_arrow.names, path))
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows > start["row"]:
                table = parquet.read_row_group(group, columns=names)
                found = table.schema.names  # of two of a name, the first is read
                cells = {name: table.column(found.index(name)) for name in names}
                for row in filter(wanted, range(max(start["row"], first), first + rows)):
                    try:
                        value = columns.value({name: cells[name][row - first].as_py() for name in names})
                        fault = ""
                        if isinstance(value, str) and len(value) > LONGEST_BYTES:
                            value, fault = None, TOO_LONG
                    except UnicodeDecodeError as error:
                        value, fault = None, one_line(error)
                    yield Record(value, row, {**start, "row": row + 1}, fault)
            first += rows


def read_text(raw: BinaryIO, path: str, start: Cursor, columns: Columns, wanted: RowFilter) -> Iterator[Record]:
    """Yield the wanted JSON lines, or paragraphs of a text file, from `start` on. Raises `UserError`."""
    json_lines = not path.endswith(".txt")
    with raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
        if file is raw:
            file.seek(start["byte"])
        else:
            _pass_over(file, start["byte"])
        lines = _lines(file, raw)
        row = piece = None
        for row, (piece, end) in enumerate(lines if json_lines else _paragraphs(lines), start["row"]):
            if row and not wanted(row):  # the first row shows whether the column exists
                continue
            try:
                if len(piece) > LONGEST_BYTES:
                    raise ValueError(TOO_LONG)
                text = piece.removeprefix(b"" if row else BOM).decode()
                value, fault = _value_of(text, columns, path, row) if json_lines and text.strip() else (text, "")
            except UserError:  # a mistake in the settings, whatever --on-bad-data says
                raise
            except (ValueError, RecursionError) as error:
                value, fault = None, one_line(error)
            if wanted(row):
                yield Record(value, row, {**start, "row": row + 1, "byte": start["byte"] + end}, fault)
        if row == 0 and piece and not json_lines and (count := piece.count(b"\n")) >= MANY_LINES:
            say_once(f"{path} is one document of {count + 1:,} lines: a blank line would end a document")


def _pass_over(file: BinaryIO, size: int) -> None:
    """Read `size` bytes of a packed file as `_lines` would, so that damage further on costs the same lines."""
    while size > 0 and (line := file.readline(min(size, LONGEST_BYTES))):
        size -= len(line)


def _value_of(line: str, columns: Columns, path: str, row: int) -> tuple[Any, str]:
    """Return the value of a JSON line, and the fault if it is unreadable."""
    if row == 0 and line.lstrip().startswith("["):
        return None, "a JSON array; expected an object on each line, as jq -c '.[]' writes them"
    value = json.loads(line)
    if not isinstance(value, dict):
        return None, "not a JSON object"
    if row == 0:  # the setting is wrong. In a later row, the row is wrong
        columns.required(value, path)
    elif not columns.among(value):
        named = {"chat": "conversation", "pairs": "pair of chosen and rejected"}
        missing = named.get(columns.kind, repr(columns.text))
        return None, f"no {missing} but {', '.join(value)}"
    return columns.value({name: value[name] for name in columns.among(value)}), ""


def _lines(file: BinaryIO, raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield each line with the offset after it. A longer line is cut to `LONGEST_BYTES` plus one byte."""
    end, blank, checked = 0, 0, CHECKED_BYTES
    while line := file.readline(LONGEST_BYTES + 1):
        end += len(line)
        if len(line) > LONGEST_BYTES:
            searched, rest = 0, line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(PIECE_BYTES)
                searched += len(rest)
                if searched > SEARCHED_BYTES:
                    raise ValueError(f"{TOO_LONG}: no end of it within {SEARCHED_BYTES // 2**20:,} MiB")
            end += searched
        blank = blank + 1 if line.isspace() else 0
        if blank > MOST_BLANK:
            raise ValueError(f"more than {MOST_BLANK:,} blank lines in a row")
        if end > checked and file is not raw:
            ratio, checked = file.tell() / max(raw.tell(), 1), end + CHECKED_BYTES
            if ratio > LARGEST_RATIO:
                raise ValueError(f"it expands {ratio:,.0f}-fold, as no text does")
        yield line, end


def _paragraphs(lines: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Yield the documents between blank lines, each with the offset after it. Cuts a long one as `_lines`."""
    found: list[bytes] = []
    end = size = 0
    for line, end in lines:
        if line.strip():
            if size <= LONGEST_BYTES:
                found.append(line)
            size += len(line)
        elif found:
            yield b"".join(found).rstrip(b"\r\n"), end
            found, size = [], 0
    if found:
        yield b"".join(found).rstrip(b"\r\n"), end
