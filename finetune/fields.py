"""A value in a data file: one line of JSON, and what stands in a field, as text."""

from __future__ import annotations

import ast
import datetime
import decimal
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]  # a row as its file has it: values by the names of fields

LONGEST_LINE = 2**20  # bytes, about a quarter of a million tokens; what is longer is no row

UNSEEN = "\0\u200b\u200c\u200d\u2060\ufeff"  # NUL, and what takes no room

# What JSON calls a value that should have been text; what is not here is null.
JSON_NAMES = {bool: "true or false", list: "a list", dict: "an object"}


class Number(str):
    """A number as it stands in the file."""


class NoNumber(str):
    """NaN or an infinity, which JSON does not know and Python's writer writes."""


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
    """What stands in a line with a comma behind it, or in Python's spelling; else None."""
    try:
        if text.endswith("},"):
            return JSON.decode(text[:-1])
        return ast.literal_eval(text) if text.startswith(("{'", "{}")) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


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


def checked_text(value: object, name: str) -> str:
    """`value` as text with something in it, numbers as they stand; else raises `ValueError`."""
    number = isinstance(value, (int, float, decimal.Decimal, datetime.date))
    if isinstance(value, float) and not math.isfinite(value):
        value = NoNumber("NaN" if math.isnan(value) else "Infinity")
    elif number and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or isinstance(value, NoNumber):
        kind = value if isinstance(value, NoNumber) else JSON_NAMES.get(type(value), "null")
        raise ValueError(f"{name} is {kind}: it must be text in quotes")
    if not value.strip().strip(UNSEEN).strip():
        raise ValueError(f"{name} is empty")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half of a surrogate pair: a broken emoji?")
    return str(value)
