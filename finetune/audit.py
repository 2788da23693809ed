"""Section 6: every encoded row is checked before it may train, and a few are shown."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from IPython.display import Image
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from finetune.chat import Controls, Turns, borders, control_ids, is_chat
from finetune.machine import main_first
from finetune.tokens import (
    TEXTS,
    Piece,
    adds_bos,
    parts_of,
    pieces_of,
    talk_of,
    tokenize,
    workers,
)
from qlora_helpers import UserError, listed, many


def find_mistake(
    ids: list[int],
    labels: list[int],
    prompt: list[int],
    begin: list[int],
    eos: int,
    control: set[int],
    masked: int,
) -> str:
    """What is wrong with one encoded piece, or nothing; `masked` labels must be -100."""
    inside, first = ids[len(begin) : -1], slice(masked, masked + 1)
    checks = {
        "does not end in EOS: is it cut short?": ids[-1:] != [eos],
        "does not begin with exactly one BOS": ids[: len(begin)] != begin or ids[:2] == begin * 2,
        "has a control token inside its text": not control.isdisjoint(inside),
        "does not begin with the tokens of its prompt": ids[: len(prompt)] != prompt,
        "has an EOS that is not trained": masked < len(ids) and labels[-1:] != [eos],
        "has a label on its prompt": labels[:masked] != [-100] * masked,
        "has no label on the first token of its answer": labels[first] != ids[first],
        "has a label that is not its token": labels[masked:] != ids[masked:],
    }
    return next((mistake for mistake, found in checks.items() if found), "")


def find_mistakes(
    ids: list[int], labels: list[int], pieces: list[Piece], befores: list[list[int]], **known: Any
) -> str:
    """What is wrong with one encoded row, or nothing.

    It is cut behind each EOS, and each part must be one of `pieces`, which begin with `befores`;
    `known` has `begin`, `eos`, `control` and `whole`, whether all but -100 is trained.
    """
    whole, begin = known.pop("whole"), known.pop("begin")
    ends = [n + 1 for n, token in enumerate(ids) if token == known["eos"]] or [len(ids)]
    if ends[-1] != len(ids):
        ends.append(len(ids))
    parts = [*itertools.pairwise([0, *ends])]
    if len(parts) > len(pieces):
        return "has a control token inside its text: an end"
    for number, ((start, end), piece, before) in enumerate(
        zip(parts, pieces, befores, strict=False)
    ):
        first = begin if number == 0 else []
        prompt = first + before
        masked = (0 if whole else len(prompt)) if piece.trained else end - start
        one = ids[start:end], labels[start:end]
        if mistake := find_mistake(*one, prompt=prompt, masked=masked, begin=first, **known):
            return mistake
    return "" if len(parts) == len(pieces) else "does not end each answer in EOS"


def find_mistakes_in_talk(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], talk: Turns, whole: bool
) -> str:
    """What is wrong with one row that the base model's chat template wrote, or nothing."""
    expected = [*ids] if whole else [-100] * len(ids)
    if ids[-1] != tokenizer.eos_token_id:
        return "does not end in EOS: is it cut short?"
    for asked, told, trained in borders(tokenizer, talk):
        if ids[: len(asked)] != asked:
            return "does not begin with the tokens of its prompt"
        if ids[: len(told)] != told:
            return "has other tokens than its answer's"
        answer = slice(len(asked), len(told))
        expected[answer] = ids[answer] if trained else [-100] * len(ids[answer])
    try:
        Controls(tokenizer).require(talk, ids)
    except ValueError:
        return "has a control token inside its text"
    if len(told) != len(ids):
        return "goes on behind its last answer"
    return "" if labels == expected else "has labels that are not those of its answers"


def mistakes_in(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, whole: bool
) -> Iterator[tuple[str, str]]:
    """What is `"wrong"` in encoded rows, and the lines that hold an `"unknown"` token."""
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    known = {"begin": begin, "eos": tokenizer.eos_token_id, "control": control_ids(tokenizer)}
    unknown = {tokenizer.unk_token_id} - {None, *known["control"]}
    texts = [table[name].to_pylist() for name in TEXTS if name in table.column_names]
    talks = [talk_of(*row) for row in zip(*texts, strict=True)]
    chat = is_chat(tokenizer) and any(talks)
    rows = [[] if chat else pieces_of(*row) for row in zip(*texts, strict=True)]
    befores = [piece.before for row in rows for piece in row]
    encoded = iter(tokenize(tokenizer, befores, places=False))
    columns = [table[name].to_numpy() for name in ("where", "input_ids", "labels")]
    for where, ids, labels, pieces, talk in zip(*columns, rows, talks, strict=True):
        ids, labels, asked = ids.tolist(), labels.tolist(), [next(encoded).ids for _ in pieces]
        if chat:
            found = find_mistakes_in_talk(tokenizer, ids, labels, talk, whole)
        else:
            found = find_mistakes(ids, labels, pieces, asked, whole=whole, **known)
        if found:
            yield "wrong", f"{where} {found}"
        if not unknown.isdisjoint(ids):
            yield "unknown", where


@main_first
def audit_labels(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, completion_only_loss: bool = True
) -> str:
    """Check every row that is about to be trained, and say in a sentence what was found.

    Raises `UserError` that names the lines of rows that would mis-train. What is asked is encoded
    once more, as for generating answers; every row must begin with just these ids, be trained on
    all that follows up to EOS, and so on for each answer: the encoder, which knows the borders from
    the tokens' places, is not asked.
    """

    def mistakes(table: pa.Table) -> pa.Table:
        whole = not completion_only_loss
        found = [each for part in parts_of(table) for each in mistakes_in(part, tokenizer, whole)]
        kinds, told = zip(*found, strict=True) if found else ((), ())
        return pa.table({"kind": pa.array(kinds, pa.string()), "told": pa.array(told, pa.string())})

    options = {"batched": True, "batch_size": 1000, "remove_columns": data.column_names}
    options |= {"load_from_cache_file": False, "num_proc": workers(len(data)), "desc": "Auditing"}
    found = data.with_format("arrow").map(mistakes, **options).with_format(None)
    kinds = np.array(found["kind"][:])
    wrong, strange = (np.flatnonzero(kinds == kind) for kind in ("wrong", "unknown"))
    if len(wrong):
        title = f"{len(wrong):,} of {len(data):,} rows would mis-train; nothing was trained:"
        first = found.select(wrong[:10])["told"][:]
        raise UserError(listed(title, first, total=len(wrong)))
    if len(strange):
        lines = ", ".join(found.select(strange[:5])["told"][:])
        print(
            f"! {many(len(strange), 'row')} with characters that this tokenizer does not know: the "
            f"model would learn {tokenizer.unk_token} in their place: {lines}"
        )
    loss = "every answer trained from its first token"
    if not completion_only_loss:
        loss = "every token trained"
    return (
        f"Audited {many(len(data), 'row')}, all of them: "
        f"{'one' if adds_bos(tokenizer) else 'no'} BOS, {loss}, EOS last "
        "and trained, no control token from the text."
    )


class TokenView:
    """The first rows, token by token, showing which tokens are trained.

    Those are green and bold in a notebook, and on lines of their own as text.
    """

    def __init__(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int = 3):
        self.rows = []
        for row in data.select(range(min(rows, len(data)))):
            trained = [label != -100 for label in row["labels"]]
            pairs = zip(trained, (token_text(tokenizer, i) for i in row["input_ids"]), strict=True)
            groups = itertools.groupby(pairs, key=lambda pair: pair[0])
            runs = [(on, [text for _, text in group]) for on, group in groups]
            title = f"{row['where']}: {len(trained):,} tokens, {sum(trained):,} trained"
            self.rows.append((title, runs))

    def __repr__(self) -> str:
        lines = []
        for title, runs in self.rows:
            lines.append(title)
            for on, run in runs:
                lines.append(f"  {'TRAINED' if on else 'masked '} {'|'.join(middle_out(run))}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        styles = {True: "background:#b7e4c7;color:#111;font-weight:bold", False: "opacity:.6"}
        page = []
        for title, runs in self.rows:
            spans = (
                f'<span style="{styles[on]}">{html.escape("|".join(middle_out(run)))}</span>'
                for on, run in runs
            )
            page.append(
                f"<p>{html.escape(title)}<br>"
                f'<code style="white-space:pre-wrap">{"|".join(spans)}</code></p>'
            )
        return "".join(page)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as it can be read: a space as ·, a line end as ⏎."""
    raw, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if raw[:1] in ("▁", "Ġ"):
        text = "·" + text.removeprefix(" ")
    return raw if "\ufffd" in text or not text else text.replace(" ", "·").replace("\n", "⏎")


def middle_out(run: list[str], shown: int = 80) -> list[str]:
    """A run of tokens, a long one without its middle."""
    if len(run) <= shown:
        return run
    half = shown // 2
    return [*run[:half], f" … {len(run) - shown:,} more … ", *run[-half:]]


def plot_lengths(lengths: Sequence[int], max_length: int, path: Path) -> Image:
    """A histogram of rows by length in tokens, with `max_length` marked.

    It is written to `path` as a PNG and returned to be shown.
    """
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=np.geomspace(min(lengths), max(lengths) + 1, 40), color="#4c78a8")
    axes.axvline(max_length, color="#e45756", label=f"max_length = {max_length:,}")
    axes.set(xlabel="tokens in a row", ylabel="rows", yscale="symlog")
    axes.set_xscale("log", base=2)  # short rows and a far cut-off are both seen
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
    return Image(filename=str(path), width=900)
