"""One row of a data file: the known formats, and what each says as turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.fields import BadRow, Fields, checked_text, is_empty
from finetune.talks import REFUSED, Turn, ordered, read_history, read_talk, refused, talk_in_cell


class Row(NamedTuple):
    """A row as its format means it; the last turn is the assistant's, or the one whole text.

    `unused` names the fields that nothing is made of, `left_out` counts turns after the last
    answer, and `kept` the characters of a question before its second text: what is too long loses
    of that.
    """

    form: str
    turns: list[Turn]
    unused: list[str]
    left_out: int = 0
    kept: int = 0


# Keys of a question and its answer, in the order in which they are looked for.
PAIRS = [
    ("prompt", "completion"),
    ("instruction", "output"),  # Alpaca's
    ("instruction", "response"),  # Dolly's
    ("question", "answer"),
    ("prompt", "response"),
    ("question", "response"),  # OpenOrca's
    ("query", "response"),
    ("input", "output"),
]
TALKS = ("messages", "conversations")
ROW_FORMATS = [PAIRS[0], *((key,) for key in TALKS), *PAIRS[1:], ("text",)]
SYSTEM = ("system", "system_prompt")
# Where a format has a second text, and whether it comes before the question or after it.
SECOND = {"instruction": ("after", ("input", "context")), "question": ("before", ("context",))}
MEANT = ("input", "context", "history", *SYSTEM)  # never dropped: used, or refused by name
ANSWERS = ("completion", "response", "output", "answer")  # nor these beside a text or a talk


def question_of(row: Fields, keys: Sequence[str]) -> tuple[str, int]:
    """A pair's question with the second text that its format knows, and what of it must stay."""
    question = checked_text(row[keys[0]], repr(keys[0]))
    where, names = SECOND.get(keys[0], ("", ()))
    texts = [checked_text(row[n], repr(n)) for n in names if not is_empty(row.get(n))]
    if where == "before":
        return "\n\n".join([*texts, question]), 0
    return "\n\n".join([question, *texts]), len(question) + 2 if texts else 0


def pair_turns(row: Fields, keys: Sequence[str], unused: set[str]) -> tuple[list[Turn], int]:
    """The turns of a question and its answer, either of which may be a list, and `Row.kept`."""
    asked, answer = row[keys[0]], row[keys[1]]
    if isinstance(asked, list):
        before = [t._replace(trained=False) for t in read_talk(asked, keys[0], unused)]
        kept = 0
    else:
        question, kept = question_of(row, keys)
        before = [Turn("user", question)]
    if isinstance(answer, list):
        if answer and not any(isinstance(turn, dict) for turn in answer):
            raise ValueError(f"{keys[1]!r} is a list: it must be text in quotes")
        return before + read_talk(answer, keys[1], unused), kept
    return [*before, Turn("assistant", checked_text(answer, repr(keys[1])))], kept


def format_of(row: Fields) -> tuple[str, ...]:
    """The keys of the row's format; raises `ValueError` that names the nearest if it has none."""
    if worse := [key for key in row if key.startswith("rejected") and not is_empty(row[key])]:
        raise ValueError(f"preferences ({worse[0]!r}): this notebook needs one answer to a row")
    keys = next((keys for keys in ROW_FORMATS if row.keys() >= set(keys)), None)
    if keys:
        return keys
    near = max(ROW_FORMATS, key=lambda keys: len(row.keys() & set(keys)))
    missing = next(key for key in near if key not in row)
    present = ", ".join(map(repr, row))[:100] or "none"
    raise ValueError(f"no {missing!r}: its keys are {present}; the nearest is {'/'.join(near)}")


def require_usable(row: Fields, keys: Sequence[str], used: set[str]) -> None:
    """Raise `ValueError` for what must not be dropped silently: doubled keys, tools, a context."""
    if twice := [key for key in getattr(row, "doubled", ()) if key in used]:
        raise ValueError(f"the same key stands twice in the row: {twice[0]!r}")
    if name := refused({name: row[name] for name in row if name not in used}):
        raise ValueError(f"{REFUSED[name]} ({name!r}): this notebook trains on text alone")
    if name := next((n for n in MEANT if n not in used and not is_empty(row.get(n))), ""):
        form = "/".join(keys)
        raise ValueError(f"{name!r} beside {form}, which has no place for it: put it into the text")
    if len(keys) == 1:
        require_no_answer(row, keys[0])
    if str(row.get("label")).lower() in ("true", "false"):
        raise ValueError(
            "'label' is true or false: are these preferences (KTO)? They would be trained as if "
            "all were right; if it means something else, rename it"
        )


def require_no_answer(row: Fields, key: str) -> None:
    """Raise `ValueError` for an answer beside a whole text or a conversation."""
    there = [name for name in row if name.lower() in ANSWERS and not is_empty(row[name])]
    if there:
        columns = "name the columns prompt and completion"
        place = "make it the last turn" if key in TALKS else columns
        raise ValueError(
            f"{there[0]!r} stands beside {key!r}: if it is the answer, {place}; else take it out"
        )


def read_row(row: Fields) -> Row:
    """A row as turns; raises `ValueError` in plain words for one that cannot be trained as meant.

    The format is told by its keys (`ROW_FORMATS`). A `system` text is the first turn; `history`
    comes before the question.
    """
    keys = format_of(row)
    if len(row) == 2 and keys in PAIRS and type(row) is dict and is_plain(row, keys):
        texts = (checked_text(row[name], repr(name)) for name in keys)
        return Row("/".join(keys), [*map(Turn, ("user", "assistant"), texts)], [])
    used, unused, kept, left_out = {*keys, *SECOND.get(keys[0], ("", ()))[1]}, set[str](), 0, 0
    if keys == ("text",):
        turns = [Turn("text", checked_text(row["text"], "'text'"))]
    elif keys[0] in TALKS:
        used.update(SYSTEM)
        turns = with_system(row, read_talk(row[keys[0]], keys[0], unused))
    else:
        used.update((*SYSTEM, "history"))
        turns, kept = pair_turns(row, keys, unused)
        before = [] if is_empty(row.get("history")) else read_history(row["history"], unused)
        turns = with_system(row, before + turns)
    require_usable(row, keys, used)
    unused.update(name for name in row if name not in used and row[name] is not None)
    if keys != ("text",):
        turns, left_out = ordered(turns)
    return Row("/".join(keys), turns, sorted(unused), left_out, kept)


def is_plain(row: Fields, keys: Sequence[str]) -> bool:
    """Whether a pair's fields are texts: most rows are, and then nothing else has to be asked."""
    return type(row[keys[0]]) is str and type(row[keys[1]]) is str


def with_system(row: Fields, turns: list[Turn]) -> list[Turn]:
    """The turns behind the row's own system text, if it has one; raises `ValueError` for two."""
    there = [name for name in SYSTEM if not is_empty(row.get(name))]
    texts = [checked_text(row[name], repr(name)) for name in there]
    if len(texts) + sum(turn.role == "system" for turn in turns) > 1:
        raise ValueError("two system texts: a row may have one")
    return [Turn("system", text) for text in texts] + turns


def with_talks(row: Any) -> Any:
    """A table's row with the conversations in its cells; a `BadRow` for one that is no JSON."""
    try:
        row.update({name: talk_in_cell(row[name], name) for name in PAIRS[0] if name in row})
    except ValueError as error:
        return BadRow(str(error), [*row.values()])
    return row


def holds_rows(values: list[Any]) -> bool:
    """Whether a list holds objects alone that are no turns of a conversation."""
    return all(isinstance(each, dict) and not {"role", "from"} & each.keys() for each in values)
