"""One line of a data file: the known formats, and what each says as prompt and completion."""

from __future__ import annotations

import json
import re
from typing import Any

from qlora_helpers import format_turns

LONGEST_LINE = 2**20  # bytes, about a quarter of a million tokens; what is longer is no row

# The keys of each known format: a row is of the first whose keys it has.
ROW_FORMATS = [
    ("prompt", "completion"),
    ("messages",),
    ("instruction", "output"),
    ("question", "answer"),
]

# What JSON calls a value that should have been text; what is not here is null.
JSON_NAMES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("the same key stands twice in the row")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def parse_json(line: bytes) -> dict[str, Any]:
    """One line of strict JSON, as an object; raises `ValueError` with the reason.

    A reason begins with its kind, by which reasons are counted; details follow a colon.
    """
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes: is it really one row a line?")
    try:
        row = STRICT_JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError('not an object: each line must be {"prompt": "...", "completion": "..."}')
    return row


def checked_text(value: Any, name: str) -> str:
    """`value` if it is text with something in it; else raises `ValueError`."""
    if not isinstance(value, str):
        kind = JSON_NAMES.get(type(value), "null")
        raise ValueError(f"{name} is {kind}: it must be text in quotes")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half of a surrogate pair: a broken emoji?")
    return value


def read_turns(messages: Any) -> tuple[str, str]:
    """Prompt and completion of a conversation; raises `ValueError` with the reason.

    The last turn, the assistant's, is trained; the others are the prompt, which `format_turns`
    writes, and `chat_template` in the same way.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("'messages' is no conversation: it must be a list of at least two turns")
    turns = [turn if isinstance(turn, dict) else {} for turn in messages]
    if any(turn.get("role") not in ("system", "user", "assistant") for turn in turns):
        raise ValueError("a turn's 'role' is none of system, user, assistant")
    if turns[-1]["role"] != "assistant":
        raise ValueError("the last turn is not the assistant's")
    *asked, answer = [checked_text(turn.get("content"), "a turn's 'content'") for turn in turns]
    roles = [turn["role"] for turn in turns[:-1]]
    return format_turns(list(zip(roles, asked, strict=True))), answer


def parse_row(line: bytes) -> tuple[str, str, str]:
    """One line of JSONL as format, prompt and completion; raises `ValueError` in plain words.

    The format is told by its keys: `prompt/completion`, `messages`, `instruction/output` (Alpaca's;
    a paragraph with its `input`, if it has one, is added to the prompt) or `question/answer`.
    """
    row = parse_json(line)
    keys = next((keys for keys in ROW_FORMATS if row.keys() >= set(keys)), None)
    if keys is None:
        near = next((keys for keys in ROW_FORMATS if row.keys() & set(keys)), ROW_FORMATS[0])
        missing = next(key for key in near if key not in row)
        present = ", ".join(map(repr, row))[:100] or "none"
        raise ValueError(f"no {missing!r}: its keys are {present}")
    if keys == ("messages",):
        prompt, completion = read_turns(row["messages"])
    else:
        prompt, completion = (checked_text(row[key], repr(key)) for key in keys)
    if keys[0] == "instruction" and row.get("input") not in (None, ""):
        prompt += "\n\n" + checked_text(row["input"], "'input'")
    return "/".join(keys), prompt, completion
