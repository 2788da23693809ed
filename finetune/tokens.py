"""Section 6: text to tokens: the one encoder of prompts and training examples."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from finetune.chat import encode_asked, encode_talks, find_refused, is_chat, write
from finetune.fields import Fields
from finetune.machine import main_first
from qlora_helpers import UserError, format_answer, format_prompt, format_turns, listed

ENCODER = 2  # raised whenever `encode_examples` gives other ids or labels for the same row
TEXTS = ("prompt", "completion", "turns")  # the columns that rows are encoded from
CHARACTERS = 500_000  # that are encoded at once, give or take a row


class Piece(NamedTuple):
    """A part of a row that ends in EOS: what is asked, the answer, whether that is learned."""

    before: str
    answer: str
    trained: bool = True


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer begins a text with BOS by itself.

    Mistral's does, SmolLM2's and Qwen's do not.
    """
    return (
        tokenizer.bos_token_id is not None
        and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], places: bool = True
) -> list[Encoding]:
    """Each text's `ids`, without BOS, and their `places` in it.

    `</s>` or `[INST]` in a text stay plain text. By the tokenizers library itself: what
    transformers wraps around it takes a quarter of the time.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # As `split_special_tokens=True`, which transformers sets in each call.
    backend.encode_special_tokens = True
    try:
        encode = backend.encode_batch if places else backend.encode_batch_fast
        return encode(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens


def pieces_of(prompt: str, completion: str, turns: str | None = None) -> list[Piece]:
    """What is trained of a row (`data.as_columns`), in pieces that end in EOS.

    One for each answer, or the whole text where there is no prompt.
    """
    if turns:
        talk = json.loads(turns)
        answers = [trained for role, _, trained in talk if role == "assistant"]
        pieces = format_turns([(role, text) for role, text, _ in talk])
        return [Piece(*piece, trained) for piece, trained in zip(pieces, answers, strict=True)]
    if not prompt:
        return [Piece("", completion)]
    return [Piece(format_prompt(prompt), format_answer(completion))]


def asked(row: Fields) -> str | list[tuple[str, str]]:
    """What a row asks last: its prompt, or the turns (role, text) before its last answer."""
    turns = row.get("turns")
    return [(role, text) for role, text, _ in json.loads(turns)[:-1]] if turns else row["prompt"]


def as_chat(row: Fields) -> list[dict[str, str]]:
    """What a row asks, as messages; of a whole text its first words."""
    turns = asked(row) or " ".join(row["completion"].split()[:12])
    talk = [("user", turns)] if isinstance(turns, str) else turns
    return [{"role": role, "content": text} for role, text in talk]


def talk_of(prompt: str, completion: str, turns: str | None = None) -> list[Sequence[Any]]:
    """A row's turns: role, text, and whether it is trained; none of a whole text."""
    if turns:
        return json.loads(turns)
    return [("user", prompt, True), ("assistant", completion, True)] if prompt else []


def training_text(row: Fields, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The text that is trained of a row, with EOS between answers shown.

    With a `tokenizer` that writes by the base model's chat template, what that writes.
    """
    talk = talk_of(row["prompt"], row["completion"], row.get("turns"))
    if tokenizer is not None and is_chat(tokenizer) and talk:
        return write(tokenizer, talk).text
    pieces = pieces_of(row["prompt"], row["completion"], row.get("turns"))
    return "[EOS]".join(piece.before + piece.answer for piece in pieces)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str | Sequence[tuple[str, str]]]
) -> list[list[int]]:
    """Ids from which answers are generated, with BOS where the tokenizer has it.

    They are the very ids with which the prompts' examples begin (see `encode_examples`). A prompt
    is a text, or turns (role, text) of which the last is not the assistant's.
    """
    asked = [[("user", p)] if isinstance(p, str) else p for p in prompts]
    if is_chat(tokenizer):
        return encode_asked(tokenizer, asked)
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    talks = [format_turns(talk) for talk in asked]
    texts = [before + answer for talk in talks for before, answer in talk]
    encoded = iter(tokenize(tokenizer, texts, places=False))
    ids = []
    for talk in talks:
        row = [*begin]
        for _, answer in talk:
            row += next(encoded).ids
            if answer:  # an earlier turn of the assistant's, which ends in EOS as in training
                row.append(tokenizer.eos_token_id)
        ids.append(row)
    return ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[tuple[str, str]]
) -> list[int]:
    """`encode_prompts` for one prompt."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    completions: Iterable[str],
    completion_only_loss: bool = True,
    turns: Iterable[str | None] | None = None,
) -> dict[str, list]:
    """`input_ids` and `labels`, both `[rows][length]`, and `length` `[rows]`.

    Each answer ends in EOS, which is trained with it. The labels of what is asked, and of answers
    that are not to be learned, are -100, unless the loss is to be on the whole text. Where an
    answer begins is known from the tokens' places in the text. Raises `ValueError` if one token
    holds the end of a prompt and the start of its answer.
    """
    columns = [*zip(prompts, completions, turns or itertools.repeat(None), strict=False)]
    whole = not completion_only_loss
    if is_chat(tokenizer) and any(talks := [talk_of(*row) for row in columns]):
        return as_examples(encode_talks(tokenizer, talks, whole))
    rows = [pieces_of(*row) for row in columns]
    pieces = [piece for row in rows for piece in row]
    encoded = tokenize(tokenizer, [piece.before + piece.answer for piece in pieces])
    labelled = (label(*pair, tokenizer, whole) for pair in zip(pieces, encoded, strict=True))
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    examples = []
    for row in rows:
        ids, labels = [*begin], begin if whole else [-100] * len(begin)
        for more, marks in itertools.islice(labelled, len(row)):
            ids, labels = ids + more, labels + marks
        examples.append((ids, labels))
    return as_examples(examples)


def as_examples(pairs: Iterable[tuple[list[int], list[int]]]) -> dict[str, list]:
    """Ids and labels of rows in columns, with their `length`."""
    ids, labels = map(list, zip(*pairs, strict=True))
    return {"input_ids": ids, "labels": labels, "length": [*map(len, ids)]}


def label(
    piece: Piece, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, whole: bool
) -> tuple[list[int], list[int]]:
    """Ids and labels of one piece, both `[length]`; see `encode_examples`."""
    ids, start = [*encoding.ids, tokenizer.eos_token_id], len(piece.before)
    places = map(encoding.char_to_token, range(start, start + len(piece.answer)))
    answer = next(token for token in places if token is not None)
    # Some tokenizers leave blanks out of their tokens' places, so that a blank is in none.
    while answer and encoding.token_to_chars(answer - 1)[1] > start:
        answer -= 1
    if encoding.token_to_chars(answer)[0] < start:
        raise ValueError("this tokenizer joins the end of the prompt with the start of the answer")
    if not piece.trained:
        answer, whole = len(ids), False
    masked = 0 if whole else answer
    return ids, [-100] * masked + ids[masked:]


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, turns: str | None = None
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row, both `[length]`; see `encode_examples`."""
    examples = encode_examples(tokenizer, [prompt], [completion], turns=[turns])
    return {"input_ids": examples["input_ids"][0], "labels": examples["labels"][0]}


@main_first
def encode_rows(
    rows: Dataset | Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    completion_only_loss: bool = True,
) -> Dataset:
    """`rows` with `input_ids`, `labels` and `length` of every one.

    They are kept on disk, beside the rows where `read_rows` put those, and are made again only if
    the rows, the tokenizer, the setting or `ENCODER` have changed.
    """
    if not isinstance(rows, datasets.Dataset):
        placed = [{"where": f"row {n}"} | row for n, row in enumerate(rows, 1)]
        rows = datasets.Dataset.from_list(placed)
    made_by = [ENCODER, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    if is_chat(tokenizer):
        require_written(rows, tokenizer)
        made_by.append(tokenizer.chat_template)
    made_of = [rows._fingerprint, *made_by, completion_only_loss]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]

    def encode(table: pa.Table) -> pa.Table:
        texts = table["prompt"].to_pylist(), table["completion"].to_pylist()
        talks = table["turns"].to_pylist() if "turns" in table.column_names else None
        for name, column in encode_examples(tokenizer, *texts, completion_only_loss, talks).items():
            kind = pa.int32() if name == "length" else pa.list_(pa.int32())
            table = table.append_column(name, pa.array(column, kind))
        return table

    def encode_parts(table: pa.Table) -> pa.Table:
        return pa.concat_tables(map(encode, parts_of(table)))

    size = rows.data.nbytes / max(1, rows.data.num_rows)  # bytes a row, on average
    at_once = int(min(1000, max(1, 16 * CHARACTERS // max(1, size))))
    encoded = rows.with_format("arrow").map(
        encode_parts,
        batched=True,
        batch_size=at_once,
        writer_batch_size=at_once,
        num_proc=workers(len(rows)),
        new_fingerprint=key,
        desc="Encoding",
    )
    return encoded.with_format(None)


def require_written(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` that lists the rows which cannot be written by the chat template."""

    def refused(table: pa.Table) -> pa.Table:
        texts = [table[name].to_pylist() for name in TEXTS if name in table.column_names]
        talks = [talk_of(*row) for row in zip(*texts, strict=True)]
        pairs = [pair for pair in zip(talks, table["where"].to_pylist(), strict=True) if pair[0]]
        found = [*find_refused(tokenizer, *zip(*pairs, strict=True))] if pairs else []
        return pa.table({"told": pa.array(found, pa.string())})

    options = {"batched": True, "remove_columns": rows.column_names, "desc": "Checking"}
    options |= {"load_from_cache_file": False, "num_proc": workers(len(rows))}
    told = rows.with_format("arrow").map(refused, **options).with_format(None)["told"]
    if len(told):
        title = (
            f"{len(told):,} of {len(rows):,} rows cannot be written by the base model's chat "
            "template; nothing was trained. Set prompt_format = 'question-answer', or mend them:"
        )
        raise UserError(listed(title, told[:10], total=len(told)))


def parts_of(table: pa.Table) -> Iterator[pa.Table]:
    """A batch of rows in parts of about `CHARACTERS`, so that memory does not grow with a row."""
    texts = [table[name] for name in TEXTS if name in table.column_names]
    told = [text for text in texts if not pa.types.is_null(text.type)]
    sizes = sum(pc.fill_null(pc.binary_length(text), 0).to_numpy() for text in told)
    parts = np.cumsum(sizes) // CHARACTERS
    for part in np.unique(parts):
        rows = np.flatnonzero(parts == part)
        yield table.slice(rows[0], len(rows))


def workers(rows: int) -> int | None:
    """How many workers share a pass over so many rows; None where starting them would not pay."""
    count = min(os.cpu_count() or 1, rows // 10_000, 8)
    if count < 2:
        return None
    # Threads in each process besides would gain nothing, and the library warns of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return count
