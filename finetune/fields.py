"""A value in a data file: one line of JSON, several values in a text, and a field's text."""

from __future__ import annotations

import ast
import contextlib
import datetime
import decimal
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]  # a row as its file has it: values by the names of fields

LONGEST_LINE = 2**20  # bytes, about a quarter of a million tokens; what is longer is no row

UNSEEN = "\0\u200b\u200c\u200d\u2060\ufeff"  # NUL, and what takes no room

# What a value is called that should have been text, in the words of JSON where it has one.
KINDS = {
    type(None): "null",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    datetime.time: "a time of day",
    datetime.timedelta: "a length of time",
    bytes: "bytes",
    tuple: "a tuple",
}
PANDAS = "written by pandas? Use to_json(orient='records', lines=True)"


class Number(str):
    """A number as it stands in the file."""


class NoNumber(str):
    """NaN or an infinity, which JSON does not know and Python's writer writes."""


class NoText(str):
    """A cell of a sheet as it is shown that is no text, and why."""

    why = ""


class BadRow(ValueError):
    """A row of a table that cannot be used: why, and its cells as text."""

    def __init__(self, why: str, cells: Sequence[object]):
        super().__init__(why)
        self.cells = ", ".join("" if cell is None else str(cell) for cell in cells)


class Doubled(dict):
    """An object of JSON in which some keys stand twice."""

    doubled: Sequence[str] = ()


def _object(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        row = Doubled(row)
        row.doubled = [key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n])]
    return row


JSON = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=NoNumber, parse_int=Number, parse_float=Number
)


def parse_json(line: bytes) -> dict[str, Any]:
    """One line as an object; raises `ValueError` with the reason.

    A comma behind it is left out, and Python's way to write a dict is understood. A reason begins
    with its kind, by which reasons are counted; details follow a colon.
    """
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes: is it really one row a line?")
    try:
        text = line.decode("utf-8").strip()
        row = JSON.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        row = nearly_json(text)
        if row is None:
            raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return checked_object(row)


def nearly_json(text: str) -> Any:
    """What stands in a line with a comma behind it, or in Python's spelling; else None.

    Raises `ValueError` for what Python writes and JSON has no word for.
    """
    text = text.removesuffix(",").rstrip()
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        return JSON.decode(text) if text.endswith("}") else None
    if not text.startswith(("{'", "{}")):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        row = ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    require_like_json(tree)
    return row


def require_like_json(tree: ast.AST) -> None:
    """Raise `ValueError` if a value of Python has a tuple or a set, or keys that JSON cannot have.

    JSON knows texts as keys alone, and a key that stands twice would lose a value.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.Set):
            raise ValueError("Python's spelling with a tuple or a set: write lists in [ ] instead")
        keys = [getattr(k, "value", None) for k in node.keys] if isinstance(node, ast.Dict) else []
        if strange := [key for key in keys if not isinstance(key, str)]:
            raise ValueError(f"a key that is no text: {strange[0]!r}; put it in quotes")
        if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise ValueError(f"the same key stands twice: {twice[0]!r}; take one out")


def values_in(text: str) -> Iterator[Any]:
    """The JSON values that stand one after another in a text, commas between them or not.

    A comma before the text's last bracket, which JSON does not allow, is left out.
    """
    text, place = re.sub(r",\s*(\][\s}]*)\Z", r"\1", text), 0
    while True:
        while text[place : place + 1] and text[place] in " \t\r\n,":
            place += 1
        if place == len(text):
            return
        value, place = JSON.raw_decode(text, place)
        yield value


def is_json(line: str) -> bool:
    """Whether a line is a JSON value by itself."""
    try:
        JSON.decode(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def checked_object(row: object) -> dict[str, Any]:
    """`row` if it is an object with keys; else raises `ValueError`."""
    if not isinstance(row, dict):
        raise ValueError('not an object: each line must be {"prompt": "...", "completion": "..."}')
    return row


def is_empty(value: object) -> bool:
    """Whether nothing stands in a field: null, NaN, no text, or a list or object of nothing."""
    if isinstance(value, str):
        return not value.strip() or isinstance(value, NoNumber)
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ([], {})


def is_column(value: object) -> bool:
    """Whether a value is a whole column by its rows' numbers, as pandas writes it by itself."""
    return isinstance(value, dict) and value != {} and all(str(key).isdigit() for key in value)


def kind_of(value: object) -> str:
    """What a value is that should have been text, and what to do."""
    if is_column(value):
        return f"an object: {PANDAS}"
    known = next((name for kind, name in KINDS.items() if isinstance(value, kind)), "")
    kind = value if isinstance(value, NoNumber) else known or f"a {type(value).__name__}"
    return f"{kind}: it must be text in quotes"


def checked_text(value: object, name: str) -> str:
    """`value` as text with something in it, numbers as they stand; else raises `ValueError`."""
    number = isinstance(value, (int, float, decimal.Decimal, datetime.date))
    if isinstance(value, float) and not math.isfinite(value):
        value = NoNumber("NaN" if math.isnan(value) else "Infinity")
    elif number and not isinstance(value, bool):
        return str(value)
    if isinstance(value, NoText):
        raise ValueError(f"{name} is {value}, {value.why}")
    if not isinstance(value, str) or isinstance(value, NoNumber):
        raise ValueError(f"{name} is {kind_of(value)}")
    if not value.strip().strip(UNSEEN).strip():
        raise ValueError(f"{name} is empty")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half of a surrogate pair: a broken emoji?")
    return str(value)


def cell_value(value: object, kind: str) -> object:
    """What a cell of Excel holds, as it is shown; an empty text for nothing.

    `kind` is openpyxl's letter, in which "e" is an error. Excel writes line breaks as `_x000D_`.
    """
    if kind == "e":
        return no_text(str(value), "an error of Excel: mend its formula or empty the cell")
    if isinstance(value, bool):
        return no_text(str(value).upper(), "a Boolean: format the column as text")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date()
    if isinstance(value, str):
        plain = re.sub("_x([0-9A-Fa-f]{4})_", lambda code: chr(int(code[1], 16)), value)
        return plain.replace("\r\n", "\n").replace("\r", "\n")
    return "" if value is None else value


def no_text(shown: str, why: str) -> NoText:
    """A cell that is no text."""
    cell = NoText(shown)
    cell.why = why
    return cell
