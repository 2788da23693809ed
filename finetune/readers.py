"""Section 6: the rows in each kind of file: JSONL, JSON, CSV, Excel, Parquet, gzipped or not."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet

from finetune.fields import (
    LONGEST_LINE,
    BadRow,
    Doubled,
    cell_value,
    is_empty,
    is_json,
    values_in,
)
from finetune.machine import short
from finetune.rows import MEANT, ROW_FORMATS, holds_rows, with_talks
from finetune.sources import (
    NOT_DATA,
    OLD_OFFICE,
    TABLES,
    other_archive,
    separator_of,
    utf16_codec,
    why_old_office,
)
from qlora_helpers import first_of

HEAD = 2**16  # bytes that are looked at to tell what a file is
BOM = codecs.BOM_UTF8
# An object whose first list holds objects and is no conversation.
HOLDS_LIST = re.compile(rb'{[^][{}]*"(?!messages|conversation|prompt|history)\w+"\s*:\s*\[\s*{')
# A letter outside ASCII in UTF-8; é before a quotation mark in Windows-1252 is none.
IN_UTF8 = re.compile(rb"[\xc3-\xde][\x80-\xbf](?![\x80-\xbf])|[\xe0-\xef][\x80-\xbf]{2}")
KNOWN = {*itertools.chain(*ROW_FORMATS), *MEANT}  # what a table's columns may be called

Source = tuple[str, Any]  # where a row stands (file:line or file:row n), and its line or object


def places_of(files: Sequence[Path]) -> dict[Path, str]:
    """What each file is called in messages: its path below the folder that holds them all."""
    root = os.path.commonpath([file.parent for file in files])
    names = {file: file.relative_to(root).as_posix() for file in files}
    return {file: os.fsencode(name).decode("utf-8", "replace") for file, name in names.items()}


def sources(files: Sequence[Path], wrong: list[str]) -> Iterator[Source]:
    """Every row of some files, with its place; what of the files is no data is added to `wrong`."""
    for file, name in places_of(files).items():
        count = 0
        try:
            for count, row in enumerate(rows_in(file, name), 1):  # noqa: B007
                yield row
        except NotData as error:
            wrong.append(f"{name}: {error}")
        else:
            if not count and len(files) > 1:
                print(f"! {name} holds no rows")


class NotData(Exception):
    """A file that is not what its name says."""


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked where they are gzipped."""
    with file.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        yield gzip.GzipFile(fileobj=stream) if packed else stream  # type: ignore[misc]


def rows_in(file: Path, name: str) -> Iterator[Source]:
    """The rows of one file, by what it is: its first bytes, and its name for CSV alone."""
    try:
        with opened(file) as stream:
            head = stream.read(HEAD)
            stream.seek(0)
            if not head.startswith(TABLES):
                stream = as_utf8(stream, head)
                head = stream.read(HEAD)
                stream.seek(0)
            yield from reader_of(file, head)(stream, name, head)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise NotData(f"a gzip file that is cut short or damaged ({error})") from None
    except PermissionError:
        raise NotData("it may not be read: change its permissions") from None


def reader_of(file: Path, head: bytes) -> Any:
    """The function that reads such a file; raises `NotData` for one that holds no rows."""
    start = head.removeprefix(BOM).lstrip()
    if why := next((told for magic, told in NOT_DATA.items() if start.startswith(magic)), ""):
        raise NotData(why)
    if start.startswith(OLD_OFFICE):
        with opened(file) as stream:
            raise NotData(why_old_office(stream.read()))
    if head.startswith(TABLES[0]):
        return parquet_rows
    if head.startswith(TABLES[1]):
        return excel_rows
    if Path(file.name.lower().removesuffix(".gz")).suffix in (".csv", ".tsv"):
        return csv_rows
    first, _, more = start.partition(b"\n")
    a_line = more.strip() and is_json(first.decode("utf-8", "replace"))
    if start.startswith(b"[") or first.strip() == b"{" or (HOLDS_LIST.match(start) and not a_line):
        return json_rows
    return line_rows


def as_utf8(stream: BinaryIO, head: bytes) -> BinaryIO:
    """The stream, or its text as UTF-8 with newlines, if it is UTF-16 or has old Mac's line ends.

    Such a file is held in memory.
    """
    if codec := utf16_codec(head):
        try:
            stream = io.BytesIO(stream.read().decode(codec).encode())
        except UnicodeDecodeError as error:
            raise NotData(f"neither UTF-8 nor whole UTF-16 ({error.reason})") from None
        head = stream.getvalue()[:HEAD]
    if b"\r" in head and b"\n" not in head:
        stream = io.BytesIO(stream.read().replace(b"\r", b"\n"))
    return stream


def line_rows(stream: BinaryIO, name: str, head: bytes) -> Iterator[Source]:
    """The lines of JSONL; raises `NotData` if the first five are all nothing like it."""
    lines = numbered_lines(stream)
    first = list(itertools.islice(lines, 5))
    if first and not any(line.lstrip()[:1] in (b"{", b"[", b'"') for _, line in first):
        shown = first[0][1][:40].decode("utf-8", "replace")
        raise NotData(
            f'no JSONL: it begins with "{shown}", and each line must be '
            '{"prompt": "...", "completion": "..."}'
        )
    yield from ((f"{name}:{number}", line) for number, line in itertools.chain(first, lines))


def numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, from 1, at most `LONGEST_LINE` + 1 bytes of each.

    Bytes are split on newlines alone: `str.splitlines` would break rows at U+2028. Byte-order marks
    are left out, of which files that were put together have several.
    """
    for number in itertools.count(1):
        line = rest = stream.readline(LONGEST_LINE + 1)
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE)
        if not line:
            return
        line = line.removeprefix(BOM)
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def json_rows(stream: BinaryIO, name: str, head: bytes) -> Iterator[Source]:
    """The objects of a JSON array, or of objects that each stand over several lines.

    Lines that are arrays by themselves are `line_rows`' to tell of.
    """
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
        found = list(values_in(text))
    except UnicodeDecodeError as error:
        raise NotData(f"not UTF-8 at byte {error.start + 1}: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if any(map(is_json, filter(str.strip, text.split("\n", 20)[:20]))):
            yield from line_rows(io.BytesIO(data), name, head)
            return
        raise NotData(
            f"broken JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise NotData("JSON that is nested too deeply") from None
    if len(found) > 1 and all(isinstance(each, list) for each in found):
        if not all(map(holds_rows, found)):
            yield from line_rows(io.BytesIO(data), name, head)
            return
        found = [[*itertools.chain(*found)]]
    key, rows = held_list(found[0] if len(found) == 1 else found, name)
    for number, row in enumerate(rows, 1):
        yield f"{name}:{key}row {number}", row


def held_list(rows: list | dict[str, Any], name: str) -> tuple[str, list[Any]]:
    """The rows of a file, and under which key they stand if they are an object's only list.

    What else the object holds is told; raises `NotData` if one of its keys stands twice.
    """
    if isinstance(rows, list):
        return "", rows
    lists = {key: value for key, value in rows.items() if isinstance(value, list)}
    held = [key for key, value in lists.items() if value and isinstance(value[0], dict)]
    if len(held) != 1 or KNOWN & rows.keys():
        return "", [rows]
    if isinstance(rows, Doubled):
        raise NotData(f"the key {rows.doubled[0]!r} stands twice: put what it holds into one list")
    others = [repr(key) for key in rows if key not in held and not is_empty(rows[key])]
    if others:
        print(f"! {name}: only {held[0]!r} is read, not {first_of(others)}")
    return f"{held[0]} ", rows[held[0]]


def csv_rows(stream: BinaryIO, name: str, head: bytes) -> Iterator[Source]:
    """The rows of a table with a heading, by its separator: comma, semicolon, tab or bar."""
    encoding = encoding_of(head)
    if encoding == "cp1252":
        print(f"! {name} is not UTF-8, and is read as Windows-1252: look at the first row, below")
    text = io.TextIOWrapper(stream, encoding, errors="strict", newline="")
    csv.field_size_limit(LONGEST_LINE)
    said, separator = separator_of(head.removeprefix(BOM).decode("utf-8", "replace"))
    try:
        table = csv.reader(text, delimiter=separator, strict=True)
        if said:
            next(table)
        yield from table_rows(table, name)
    except csv.Error as error:
        told = 'is a quote not closed, not written twice ("") within a text, or beside a blank?'
        raise NotData(f"broken CSV at line {table.line_num}: {error}; {told}") from None
    except UnicodeError as error:
        raise NotData(f"not {encoding.removesuffix('-sig')} ({error}): save it as UTF-8") from None


def encoding_of(head: bytes) -> str:
    """UTF-8, or what Windows writes where the file's beginning is not that.

    Raises `NotData` where some of it is UTF-8, as far as its bytes are hardly found side by side in
    Windows-1252, and where a quarter is not ASCII, as in no language that is written so.
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        other = sum(byte > 127 for byte in head) > len(head) / 4
        if other or IN_UTF8.search(head):
            raise NotData(f"not UTF-8 at byte {error.start + 1}: save it as UTF-8") from None
        return "cp1252"
    return "utf-8-sig"


def table_rows(rows: Iterable[Sequence[object]], name: str) -> Iterator[Source]:
    """The rows under a table's heading that are not blank, counted as Excel does: from its first.

    The heading is the first row that is not blank. A name that a format has in small letters may be
    written otherwise there.
    """
    counted = enumerate(rows, 1)
    heading = next((cells for _, cells in counted if not all(map(is_empty, cells))), [])
    names = [str(cell).strip() or f"column {n}" for n, cell in enumerate(heading, 1)]
    names = [name.lower() if name.lower() in KNOWN else name for name in names]
    for number, cells in counted:
        again = [*cells] == [*heading]  # of a file that was put together from several
        if is_filled(cells) and not again:
            yield f"{name}:row {number}", table_row(names, cells)


def is_blank(cell: object) -> bool:
    """Whether nothing stands in a cell."""
    return cell is None or cell == ""


def table_row(names: Sequence[str], cells: Sequence[object]) -> Any:
    """A row by its columns' names, without blank cells of columns that no format knows.

    A `BadRow` if something stands where there is no heading.
    """
    if is_filled(cells[len(names) :]):
        told = f"too many cells: {len(cells)} under a heading of {len(names)}"
        return BadRow(f"{told}: put texts that hold a comma in quotes", cells)
    pairs = [*itertools.zip_longest(names, cells[: len(names)])]
    row = Doubled((name, cell) for name, cell in pairs if name in KNOWN or not is_blank(cell))
    row.doubled = [name for n, name in enumerate(names) if name in names[:n]]
    return with_talks(row)


def excel_rows(stream: BinaryIO, name: str, head: bytes) -> Iterator[Source]:
    """The rows of a workbook's first sheet that has any; a hidden one's only if no other has."""
    data = io.BytesIO(stream.read())
    if why := other_archive(data):
        raise NotData(why)
    try:
        import openpyxl

        book = openpyxl.load_workbook(data, read_only=True, data_only=True, keep_links=False)
        sheets = sorted(book.worksheets, key=lambda sheet: sheet.sheet_state != "visible")
        tables = {sheet.title: cells_of(sheet) for sheet in sheets}
    except ImportError:
        raise NotData(
            "Excel needs a package: run %pip install openpyxl, or save it as CSV"
        ) from None
    except Exception as error:  # its reader raises many kinds
        raise NotData(
            f"a zip archive, or an Excel file that cannot be read ({short(error)})"
        ) from None
    full = [title for title, rows in tables.items() if sum(map(is_filled, rows)) > 1]
    if len(full) > 1:
        print(f"! {name}: only the sheet {full[0]!r} is read, not {', '.join(full[1:])}")
    yield from table_rows(tables[full[0]] if full else [], name)


def is_filled(cells: Sequence[object]) -> bool:
    """Whether something stands in a row."""
    return not all(map(is_blank, cells))


def cells_of(sheet: Any) -> list[list[object]]:
    """The values of a sheet's rows, all as wide as the widest in which something stands."""
    sheet.reset_dimensions()  # which some programs write wrongly
    rows = [[cell_value(cell.value, cell.data_type) for cell in row] for row in sheet.rows]
    filled = (n for row in rows for n, cell in enumerate(row, 1) if cell != "")
    width = max(filled, default=0)
    return [[*row[:width], *[""] * (width - len(row))] for row in rows]


def parquet_rows(stream: BinaryIO, name: str, head: bytes) -> Iterator[Source]:
    """The rows of a Parquet file, some hundred at a time."""
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = Counter(table.schema_arrow.names)
        if twice := [name for name in names if names[name] > 1]:
            raise NotData(f"two columns are called {twice[0]!r}: rename one")
        batches = table.iter_batches(256)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{name}:row {number}", with_talks(row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise NotData(f"a Parquet file that cannot be read ({short(error)})") from None
