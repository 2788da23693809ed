"""Section 6: rows longer than `max_length` are left out, or lose what is least needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from finetune.data import drop_duplicates, hash_of, prompt_keys
from finetune.machine import main_first
from finetune.tokens import encode_examples, encode_rows, tokenize
from qlora_helpers import Settings, UserError, many, readable_turns


def shorten(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int, kept: int = 0
) -> str:
    """A `prompt` with which the example has `max_length` tokens at most.

    It loses its beginning, or where its first `kept` characters are an instruction what follows
    them. Empty if there is none, because the rest is too long.
    """

    def excess(text: str) -> int:
        return encode_examples(tokenizer, [head + text], [completion])["length"][0] - max_length

    head = prompt[:kept]
    end = longest_end(tokenizer, prompt[kept:], excess)
    return head + end if end else ""


def longest_end(tokenizer: PreTrainedTokenizerBase, text: str, excess: Callable[[str], int]) -> str:
    """A text without so much of its beginning that `excess`, in tokens, is none; else empty."""
    (encoding,), cut, end = tokenize(tokenizer, [text]), 0, text
    # Again if need be: the rest of a text may have more tokens than it had within the whole.
    while end and (over := excess(end)) > 0:
        cut += over
        end = text[encoding.token_to_chars(cut)[0] :].strip() if cut < len(encoding.ids) else ""
    return end


def shorten_talk(
    tokenizer: PreTrainedTokenizerBase, turns: str, max_length: int, kept: int = 0
) -> str:
    """The newest turns of a conversation, behind its system text, of `max_length` tokens at most.

    If the last question and its answers are too long, that question loses its beginning, or what
    follows its first `kept` characters. Empty if the rest is too long.
    """
    talk = json.loads(turns)
    system = [turn for turn in talk if turn[0] == "system"]
    shorter = ""
    for start in [n for n, turn in enumerate(talk) if turn[0] == "user"]:
        shorter = as_turns([*system, *talk[start:]])
        if length_of(tokenizer, shorter) <= max_length:
            return shorter
    return shorten_question(tokenizer, json.loads(shorter), max_length, kept) if shorter else ""


def shorten_question(
    tokenizer: PreTrainedTokenizerBase, talk: list, max_length: int, kept: int
) -> str:
    """A conversation of one question, of which that loses its beginning; empty if all of it."""

    def with_question(text: str) -> str:
        role, _, *mark = talk[at]
        return as_turns([*talk[:at], [role, head + text, *mark], *talk[at + 1 :]])

    def excess(text: str) -> int:
        return length_of(tokenizer, with_question(text)) - max_length

    at = [role for role, *_ in talk].index("user")
    head, text = talk[at][1][:kept], talk[at][1][kept:]
    end = longest_end(tokenizer, text, excess)
    return with_question(end) if end else ""


def as_turns(talk: list) -> str:
    """A conversation as its column holds it."""
    return json.dumps(talk, ensure_ascii=False)


def length_of(tokenizer: PreTrainedTokenizerBase, turns: str) -> int:
    """How many tokens a conversation has."""
    return encode_examples(tokenizer, [""], [""], turns=[turns])["length"][0]


def shorter_row(tokenizer: PreTrainedTokenizerBase, row: dict, max_length: int) -> dict[str, Any]:
    """The columns of a row that lose something for it to be short enough; an empty prompt if none.

    A whole text is never cut.
    """
    if not row["prompt"]:
        return {"prompt": ""}
    if not row.get("turns"):
        pair = row["prompt"], row["completion"]
        return {"prompt": shorten(tokenizer, *pair, max_length, row.get("kept") or 0)}
    turns = shorten_talk(tokenizer, row["turns"], max_length, row.get("kept") or 0)
    talk = [(role, text) for role, text, _ in json.loads(turns)[:-1]] if turns else []
    return {"prompt": readable_turns(talk), "turns": turns}


def first_question(row: Mapping[str, Any]) -> str:
    """A row's first question, as it stands now: what was shortened may have lost its own."""
    talk = json.loads(row["turns"]) if row.get("turns") else []
    return next((text for role, text, _ in talk if role == "user"), row["prompt"])


def unmixed(rows: Dataset) -> Dataset:
    """Rows of which some were shortened: none twice, and those that ask the same under one key.

    By their old keys `split_rows` would put them on both sides.
    """
    if "key" not in rows.column_names:
        return rows
    keys, asked = prompt_keys(rows), rows.select_columns(["prompt", "turns"])
    now = [hash_of(first_question(row)) if row["prompt"] else key
           for key, row in zip(keys, asked, strict=True)]  # fmt: skip
    together = keys_together(keys, now)
    return drop_duplicates(rows.remove_columns("key").add_column("key", together))


def keys_together(keys: Sequence[str], now: Sequence[str]) -> list[str]:
    """One key for all rows that share a question, be it the first one before or after shortening.

    `keys` and `now` are the hashes of these, `[rows]`. Rows that were not shortened keep theirs,
    unless a shortened one asks what two of them ask.
    """
    parent: dict[str, str] = {}
    whole = {was for was, other in zip(keys, now, strict=True) if was == other}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for was, other in zip(keys, now, strict=True):
        one, two = root(was), root(other)
        if one in whole and two not in whole:
            one, two = two, one
        parent[one] = two
    return [root(key) for key in keys]


@main_first
def fit_length(data: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Dataset:
    """Encoded rows of at most `max_length` tokens; the others are left out or shortened.

    Prints what became of them. Raises `UserError` instead if `too_long = "stop"`, and if no row
    is left.

    A row is never cut at its end: that would take its EOS away, and a model that never sees EOS
    never stops. `too_long = "truncate"` takes the beginning of the prompt away, or of what an
    instruction is about, or the oldest turns, and keeps the whole answer; a row whose answer alone
    is too long is left out.
    """
    max_length, too_long = settings.max_length, settings.too_long
    lengths = np.array(data["length"][:])
    over = np.flatnonzero(lengths > max_length)
    if not len(over):
        print(f"{many(len(data), 'row')}, none cut: the longest has {max(lengths):,} tokens.")
        return data
    kept, long = data.select(np.flatnonzero(lengths <= max_length)), data.select(over)
    told = tell_long(lengths, long, max_length)
    if too_long == "stop":
        raise UserError(
            f"{told}\nShorten them, raise max_length, or set too_long = 'drop' or 'truncate'."
        )
    if too_long == "truncate":
        texts = long.remove_columns(["input_ids", "labels", "length"]).map(
            lambda row: shorter_row(tokenizer, row, max_length),
            load_from_cache_file=False,
            desc="Shortening",
        )
        texts = texts.select([n for n, prompt in enumerate(texts["prompt"][:]) if prompt])
        if len(texts):
            again = encode_rows(texts, tokenizer, settings.completion_only_loss)
            kept = datasets.concatenate_datasets([kept, again])
            kept = unmixed(kept)
    if not len(kept):
        raise UserError(
            f"Every row is longer than max_length = {max_length}: raise it in section 2."
        )
    gone, lost = len(data) - len(kept), lengths.sum() - sum(kept["length"][:])
    less = len(over) - gone
    cut = f"Cut at the prompt's beginning: {less:,}. " if too_long == "truncate" else ""
    print(f"{told}\n{cut}Left out: {gone:,}. That makes {many(lost, 'token')} less.")
    return kept


def tell_long(lengths: ndarray, long: Dataset, max_length: int) -> str:
    """How many rows exceed `max_length` tokens, the first ten's lines, and what would hold them."""
    lines = ", ".join(long["where"][:10]) + (" …" if len(long) > 10 else "")
    most = sorted(lengths.tolist())[math.ceil(0.99 * len(lengths)) - 1]
    return (
        f"Longer than max_length = {max_length:,} tokens: {len(long):,} of "
        f"{many(len(lengths), 'row')}, {lines}\n"
        f"max_length = {most:,} would keep 99 % of the rows, {max(lengths):,} all."
    )
