"""A conversation in a data file: whose turns, in which order, and which are to be learned."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from finetune.fields import JSON, PANDAS, Doubled, Fields, checked_text, is_column, is_empty


class Turn(NamedTuple):
    """One turn: whose (`system`, `user`, `assistant`, or `text` for a whole text), and its text.

    `trained` says whether an assistant's turn is to be learned.
    """

    role: str
    text: str
    trained: bool = True


REFUSED = {
    "tools": "tool definitions",
    "functions": "tool definitions",
    "tool_calls": "tool calls",
    "function_call": "tool calls",
    "images": "images",
    "image": "an image",
    "videos": "videos",
    "audios": "audio",
    "audio": "audio",
}
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_call")
# Fields by which a turn says whether it is to be trained: 0 or false is no.
MARKS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
USED = {"role", "from", "content", "value", *MARKS}


def refused(fields: Fields) -> str:
    """The first name of `REFUSED` under which something stands; empty if there is none.

    In a table's cell a list or an object of nothing is written out.
    """
    there = (name for name in REFUSED if name in fields and fields[name] not in ("[]", "{}"))
    return next((name for name in there if not is_empty(fields[name])), "")


def parts_as_text(value: object, unused: set[str], key: str) -> object:
    """A turn's content that is a list of text parts, as one text; anything else as it is.

    What a part holds besides is added to `unused`, under `key`. Raises `ValueError` for a part
    that is no text.
    """
    if not isinstance(value, list) or not value:
        return value
    texts = []
    for part in value:
        fields = part if isinstance(part, dict) else {"text": part}
        if isinstance(part, Doubled):
            raise ValueError(f"the same key stands twice in a turn's part: {part.doubled[0]!r}")
        kind = refused(fields) or fields.get("type", "text")
        text = fields.get("text", fields.get("value"))
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"a turn holds a part that is no text: {kind!r}")
        others = fields.keys() - {"type", "text", "value"}
        more = (name for name in others if not is_empty(fields[name]))
        unused.update(f"{key}[].content[].{name}" for name in more)
        texts.append(text)
    return "".join(texts)


def one_of(turn: Fields, name: str, other: str) -> Any:
    """What stands under either of two names; raises `ValueError` for different things under both.

    A role may be spelled in both ways ("user" and "human").
    """
    there = [turn[each] for each in (name, other) if not is_empty(turn.get(each))]
    meant = {str(ROLES.get(str(value), value)) for value in there}
    if len(meant) > 1:
        raise ValueError(f"a turn has {name!r} and {other!r}, which differ")
    return there[0] if there else turn.get(name, turn.get(other))


def read_turn(turn: object, unused: set[str], key: str) -> Turn | None:
    """One turn of `key`'s list; None for an empty system text. Raises `ValueError`."""
    turn = checked_turn(turn)
    said = one_of(turn, "role", "from")
    name = refused(turn)
    if said in TOOL_ROLES or name:
        what = REFUSED.get(name, "tool calls")
        raise ValueError(f"{what}: this notebook trains on text alone, leave such rows out")
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"a turn's 'role' is none of system, user, assistant: {said!r}")
    content = parts_as_text(one_of(turn, "content", "value"), unused, key)
    if role == "system" and is_empty(content):
        return None
    for name, value in turn.items():
        if name not in USED and not is_empty(value):
            unused.add(f"{key}[].{name}")
    return Turn(role, checked_text(content, "a turn's 'content'"), is_trained(turn, role))


def checked_turn(turn: object) -> dict[str, Any]:
    """`turn` if it is an object whose used keys stand once; else raises `ValueError`."""
    if not isinstance(turn, dict):
        raise ValueError("a turn is no object with 'role' and 'content'")
    if isinstance(turn, Doubled):
        raise ValueError(f"the same key stands twice in a turn: {turn.doubled[0]!r}")
    return turn


def is_trained(turn: Fields, role: str) -> bool:
    """Whether a turn is to be learned, by its own mark; raises `ValueError` for an unclear one."""
    for name in MARKS:
        value = turn.get(name)
        if is_empty(value):
            continue
        known = {"0": False, "0.0": False, "1": True, "1.0": True, "False": False, "True": True}
        wanted = known.get(str(value))
        if wanted is None or (wanted and role != "assistant"):
            told = f"{ascii(str(value))[1:-1]:.40}, which cannot be done"
            raise ValueError(f"a turn of the {role} has {name!r}: {told}")
        if not wanted:
            return False
    return True


TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|from)["']""")  # how a conversation's text begins


def talk_in_cell(cell: object, name: str) -> object:
    """The conversation in a table's cell, or the cell as it is if it holds none.

    Raises `ValueError` for one in Python's spelling, which is not JSON.
    """
    if not isinstance(cell, str) or not TALK.match(cell):
        return cell
    try:
        return JSON.decode(cell)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(broken_talk(cell, name)) from None


def broken_talk(cell: str, name: str) -> str:
    """What to say of a conversation in a cell that is no JSON."""
    if re.match(r"\s*\[\s*\{\s*'", cell):
        hint = "export with to_json(orient='records', lines=True)"
        return f"{name!r} is a conversation in Python's spelling: {hint}"
    return f"{name!r} is broken JSON in a cell"


def read_talk(talk: object, key: str, unused: set[str]) -> list[Turn]:
    """The turns of a conversation; raises `ValueError` with the reason."""
    if isinstance(talk, str) and talk.lstrip().startswith("["):  # a table's cell
        try:
            talk = JSON.decode(talk)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(broken_talk(str(talk), key)) from None
    if not isinstance(talk, list):
        told = PANDAS if is_column(talk) else "it must be a list of turns"
        raise ValueError(f"{key!r} is no conversation: {told}")
    read = (read_turn(turn, unused, key) for turn in talk)
    return [turn for turn in read if turn]


def ordered(turns: list[Turn]) -> tuple[list[Turn], int]:
    """Turns up to the last answer to learn, those of one role and mark joined, and how many follow.

    Raises `ValueError` for a conversation that is none.
    """
    answers = [n for n, turn in enumerate(turns, 1) if turn.role == "assistant"]
    end = max((n for n in answers if turns[n - 1].trained), default=0)
    joined: list[Turn] = []
    for turn in turns[:end]:
        same = joined and joined[-1].role == turn.role
        if same and (joined[-1].trained == turn.trained or turn.role != "assistant"):
            turn = turn._replace(text=f"{joined.pop().text}\n\n{turn.text}")
        joined.append(turn)
    roles = [turn.role for turn in joined]
    if not end:
        what = "none of the answers is to be trained" if answers else "no turn is the assistant's"
        raise ValueError(f"{what}: there is nothing to learn")
    if "system" in roles[1:]:
        raise ValueError("a system turn comes after others: it must be the first")
    if roles[0] == "assistant":
        raise ValueError("the assistant speaks first: there is nothing that it answers")
    return joined, len(turns) - end


def read_history(history: object, unused: set[str]) -> list[Turn]:
    """Earlier turns: pairs of question and answer (LLaMA-Factory's Alpaca), or turns."""
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        roles = ("user", "assistant")
        return [
            Turn(role, checked_text(text, "a text in 'history'"))
            for pair in history
            for role, text in zip(roles, pair, strict=True)
        ]
    return read_talk(history, "history", unused)
