"""Section 6: text to tokens. The one encoder, what happens to long rows, and the chat template."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from finetune.machine import main_first
from qlora_helpers import (
    COMPLETION_TEMPLATE,
    PROMPT_TEMPLATE,
    Settings,
    UserError,
    format_example,
    format_prompt,
)

ENCODER = 1  # raised whenever `encode_examples` gives other ids or labels for the same row


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
        return (backend.encode_batch if places else backend.encode_batch_fast)(
            texts, add_special_tokens=False
        )
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[list[int]]:
    """Ids from which answers are generated, with BOS where the tokenizer has it.

    They are the very ids with which the prompts' examples begin (see `encode_examples`).
    """
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    texts = [format_prompt(prompt) for prompt in prompts]
    return [begin + encoding.ids for encoding in tokenize(tokenizer, texts, places=False)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """`encode_prompts` for one prompt."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    completions: Iterable[str],
    completion_only_loss: bool = True,
) -> dict[str, list]:
    """`input_ids` and `labels`, both `[rows][length]`, and `length` `[rows]`: EOS last and trained.

    The labels of the prompt are -100, unless the loss is to be on the whole text. Where the answer
    begins is known from the tokens' places in the text. Raises `ValueError` if one token holds the
    end of the prompt and the start of the answer.
    """
    prompts = list(prompts)
    starts = [format_prompt(prompt) for prompt in prompts]
    texts = [format_example(*pair) for pair in zip(prompts, completions, strict=True)]
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    examples: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    for start, text, encoding in zip(starts, texts, tokenize(tokenizer, texts), strict=True):
        places = map(encoding.char_to_token, range(len(start), len(text)))
        answer = next(token for token in places if token is not None)
        if encoding.token_to_chars(answer)[0] < len(start):
            raise ValueError(
                "this tokenizer joins the end of the prompt with the start of the answer"
            )
        masked = len(begin) + answer if completion_only_loss else 0
        ids = [*begin, *encoding.ids, tokenizer.eos_token_id]
        examples["input_ids"].append(ids)
        examples["labels"].append([-100] * masked + ids[masked:])
        examples["length"].append(len(ids))
    return examples


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row, both `[length]`; see `encode_examples`."""
    examples = encode_examples(tokenizer, [prompt], [completion])
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
    made_of = [rows._fingerprint, *made_by, completion_only_loss]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]

    def encode(table: pa.Table) -> pa.Table:
        texts = table["prompt"].to_pylist(), table["completion"].to_pylist()
        for name, column in encode_examples(tokenizer, *texts, completion_only_loss).items():
            kind = pa.int32() if name == "length" else pa.list_(pa.int32())
            table = table.append_column(name, pa.array(column, kind))
        return table

    options = {"batched": True, "batch_size": 1000, "new_fingerprint": key, "desc": "Encoding"}
    options["num_proc"] = workers(len(rows))
    return rows.with_format("arrow").map(encode, **options).with_format(None)


def workers(rows: int) -> int | None:
    """How many workers share a pass over so many rows; None where starting them would not pay."""
    count = min(os.cpu_count() or 1, rows // 10_000, 8)
    if count < 2:
        return None
    # Threads in each process besides would gain nothing, and the library warns of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return count


def shorten(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int
) -> str:
    """The end of `prompt` with which the example has `max_length` tokens at most.

    Empty if there is none, because the answer is too long.
    """

    def excess(text: str) -> int:
        return encode_examples(tokenizer, [text], [completion])["length"][0] - max_length

    (encoding,), cut, end = tokenize(tokenizer, [prompt]), 0, prompt
    # Again if need be: the rest of a prompt may have more tokens than it had within the whole.
    while end and (over := excess(end)) > 0:
        cut += over
        end = prompt[encoding.token_to_chars(cut)[0] :].strip() if cut < len(encoding.ids) else ""
    return end


@main_first
def fit_length(data: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Dataset:
    """Encoded rows of at most `max_length` tokens; the others are left out or shortened.

    Prints what became of them. Raises `UserError` instead if `too_long = "stop"`, and if no row
    is left.

    A row is never cut at its end: that would take its EOS away, and a model that never sees EOS
    never stops. `too_long = "truncate"` takes the beginning of the prompt away and keeps its end
    and the whole answer; a row whose answer alone is too long is left out.
    """
    max_length, too_long = settings.max_length, settings.too_long
    lengths = np.array(data["length"][:])
    over = np.flatnonzero(lengths > max_length)
    if not len(over):
        return data
    kept, long = data.select(np.flatnonzero(lengths <= max_length)), data.select(over)
    told = tell_long(lengths, long, max_length)
    if too_long == "stop":
        raise UserError(
            f"{told}\nShorten them, raise max_length, or set too_long = 'drop' or 'truncate'."
        )
    if too_long == "truncate":
        texts = long.select_columns(["prompt", "completion", "where"]).map(
            lambda prompt, answer: {"prompt": shorten(tokenizer, prompt, answer, max_length)},
            input_columns=["prompt", "completion"],
            load_from_cache_file=False,
            desc="Shortening",
        )
        texts = texts.select([n for n, prompt in enumerate(texts["prompt"][:]) if prompt])
        if len(texts):
            again = encode_rows(texts, tokenizer, settings.completion_only_loss)
            kept = datasets.concatenate_datasets([kept, again])
    if not len(kept):
        raise UserError(
            f"Every row is longer than max_length = {max_length}: "
            "raise it in the hyperparameter cell."
        )
    gone, lost = len(data) - len(kept), lengths.sum() - sum(kept["length"][:])
    less = len(over) - gone
    cut = f"{less:,} lost the beginning of their prompt, " if too_long == "truncate" else ""
    print(f"{told}\n{cut}{gone:,} are left out: {lost:,} tokens less.")
    return kept


def tell_long(lengths: Any, long: Dataset, max_length: int) -> str:
    """How many rows exceed `max_length` tokens, the first ten's lines, and what would hold them."""
    lines = ", ".join(long["where"][:10]) + (" …" if len(long) > 10 else "")
    most = sorted(lengths.tolist())[math.ceil(0.99 * len(lengths)) - 1]
    return (
        f"{len(long):,} of {len(lengths):,} rows are longer than "
        f"max_length = {max_length:,} tokens: {lines}\n"
        f"max_length = {most:,} would keep 99 % of the rows, {max(lengths):,} all."
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format as a Jinja chat template, so that it travels with the saved tokenizer.

    Its rendering gives exactly `encode_prompt`'s ids; a conversation is written as `read_turns`
    writes it. Tokenizers of SentencePiece's kind put a space before the first word of a text but
    not after a `<s>` written into it, so Mistral's template writes that space itself. Raises
    `ValueError` if neither form gives the ids that were trained.
    """
    question, answer = PROMPT_TEMPLATE.split("{prompt}"), COMPLETION_TEMPLATE.split("{completion}")
    quoted = [json.dumps(part) for part in (*question, *answer)]
    turns = (
        "{% set answered = messages[-1]['role'] == 'assistant' %}"
        "{% set asked = messages[:-1] if answered else messages %}"
        f"{{{{ {quoted[0]} }}}}"
        "{% for message in asked %}"
        "{% if asked | length > 1 or message['role'] != 'user' %}"
        "{{ message['role'] | capitalize + ': ' }}{% endif %}"
        "{{ message['content'] + ('' if loop.last else '\\n\\n') }}"
        "{% endfor %}"
        f"{{{{ {quoted[1]} }}}}"
        "{% if answered %}"
        f"{{{{ {quoted[2]} + messages[-1]['content'] + {quoted[3]} + eos_token }}}}"
        "{% endif %}"
    )
    chat = [{"role": "user", "content": "a"}]
    for start in ("{{ bos_token }}", "{{ bos_token + ' ' }}") if adds_bos(tokenizer) else ("",):
        asked = tokenizer.apply_chat_template(chat, chat_template=start + turns, return_dict=True)
        if asked["input_ids"] == encode_prompt(tokenizer, "a"):
            return start + turns
    raise ValueError("no chat template gives this tokenizer the ids that were trained")
