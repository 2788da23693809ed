"""Section 6: what is worth a look in the rows, though they can be trained on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from qlora_helpers import many


def row_hashes(rows: Dataset, *columns: str) -> np.ndarray:
    """A 64-bit hash of each row's texts, `[rows]`: eight bytes a row, however long the texts."""
    texts = (
        text
        for batch in rows.iter(1000)
        for text in zip(*(batch[name] for name in columns), strict=True)
    )
    return np.fromiter(map(hash, texts), np.int64, len(rows))


def _holds_marker(prompt: str, completion: str) -> bool:
    text = prompt + completion
    return "###" in text and re.search("### (System|Question|Answer|End)", text) is not None


def _splits_word(prompt: str, completion: str) -> bool:
    return prompt[-1:].isalpha() and completion[0].islower()


def _repeats_prompt(prompt: str, completion: str) -> bool:
    return prompt != "" and completion.lstrip().startswith(prompt.strip())


def _starts_with_space(prompt: str, completion: str) -> bool:
    return prompt != "" and completion[0].isspace()


FOREIGN = re.compile(r"\[/?INST\]|<\|(im_start|im_end|user|assistant|system|eot_id|endoftext)\|>")


def _holds_another_format(prompt: str, completion: str) -> bool:
    return FOREIGN.search(prompt) is not None or FOREIGN.search(completion) is not None


ENDS_IN_WORD = "a prompt that may end in the middle of a word"
NOTES = {
    "another format's markers ([INST], <|im_start|>, …)": _holds_another_format,
    "a marker of the prompt format": _holds_marker,
    ENDS_IN_WORD: _splits_word,
    "a completion that begins with the whole prompt": _repeats_prompt,
    "a completion that begins with a space, which is trained as a second one": (_starts_with_space),
}
PUNCTUATION = " \n.,;:!?…\"'()[]{}`’”»*_-。，；：！？、）】」』"
LOOKED_AT = 2000  # completions that are searched for an end that most share


def shared_tail(completions: Sequence[str]) -> str:
    """The end that more than half of some completions share, from a sign or a word on.

    Another format's end marker, for example. Empty if there is none but punctuation.
    """
    texts, tail = [text.rstrip() for text in completions], ""
    for length in range(1, 41):
        found = Counter(text[-length:] for text in texts if len(text) > length).most_common(1)
        if not found or found[0][1] <= len(texts) / 2:
            break
        tail = found[0][0]
    begun = re.search(r"\s\S.*|[^\w\s].*", tail, re.S)
    tail = begun[0].strip().lstrip(".,;:!?。！？ \n") if begun else ""
    return "" if all(sign in PUNCTUATION for sign in tail) else tail


def data_notes(rows: Dataset) -> list[str]:
    """What is worth a look though it can be trained: each with its count and first lines.

    Where most completions begin in lower case, that says nothing about the ends of the prompts.
    """
    some = np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows)), dtype=int)
    tail = shared_tail(rows.select(some)["completion"][:]) if len(rows) > 3 else ""
    checks = dict(NOTES)
    if tail:
        ending = f"a completion that ends in {tail!r}, which is trained, too"
        checks[ending] = lambda prompt, completion: (
            prompt != "" and completion.rstrip().endswith(tail)
        )
    first: dict[str, list[str]] = {note: [] for note in checks}  # its first five lines
    counts, lower = Counter[str](), 0  # rows by note; completions that begin in lower case
    for batch in rows.iter(1000):
        lower += sum(text[0].islower() for text in batch["completion"])
        columns = [batch[name] for name in ("prompt", "completion", "where")]
        for prompt, completion, where in zip(*columns, strict=True):
            for note in [note for note, applies in checks.items() if applies(prompt, completion)]:
                counts[note] += 1
                if counts[note] <= 5:
                    first[note].append(where)
    if lower > len(rows) / 2:
        del first[ENDS_IN_WORD]
    found = {note: ", ".join(at) for note, at in first.items() if at}
    notes = [f"{many(counts[note], 'row')} with {note}: {at}" for note, at in found.items()]
    same = np.unique(row_hashes(rows, "completion"), return_counts=True)[1].max() / len(rows)
    if same >= 0.9 and len(rows) > 1:
        notes.append(f"{same:.0%} of the completions are the same text")
    return notes
