"""Section 6: the rows of the data files, read, checked, without duplicates, and split."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset

from finetune.files import telling_if_full
from finetune.lock import claim, is_run
from finetune.machine import main_first
from finetune.rows import LONGEST_LINE, parse_row
from qlora_helpers import Settings, UserError, listed, locate


def is_output(file: Path) -> bool:
    """Whether a file is what a run of this notebook wrote, which a wide pattern matches too."""
    written = file.name == "answers.jsonl" and is_run(file.parent)
    return written or file.name.endswith(".rejected.jsonl")


def find_files(data_files: str) -> list[Path]:
    """The files that match `data_files` (path or glob), by name; raises `UserError` if none do."""
    found = [Path(name) for name in sorted(glob.glob(str(locate(data_files)), recursive=True))]
    files = [file for file in found if file.is_file() and not is_output(file)]
    if not files:
        raise UserError(
            f"No file matches data_files = {data_files!r} (looked in {locate(data_files)}).\n"
            'Put your JSONL there, one {"prompt": "...", "completion": "..."} a line. '
            "On Colab: the folder on the left edge, right-click 'data', Upload. "
            "Or try the examples: data_files = 'data_examples/*.jsonl'."
        )
    return files


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, from 1, at most `LONGEST_LINE` + 1 bytes of each.

    Bytes are split on newlines alone: `str.splitlines` would break rows at U+2028. A byte-order
    mark is left out.
    """
    with file.open("rb") as stream:
        for number in itertools.count(1):
            line = rest = stream.readline(LONGEST_LINE + 1)
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST_LINE)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            elif not line:
                return
            if line.strip():
                yield number, line.rstrip(b"\r\n")


class RowReader:
    """The rows of some files, one by one, and an account of the lines that cannot be used.

    Those are counted by kind and written to `rejected`. Holds one line at a time, and the first ten
    of what is wrong.
    """

    def __init__(self, files: Sequence[Path], rejected: Path):
        self.files, self.rejected = files, rejected
        self.format, self.kinds, self.first = "", Counter[str](), []
        self.digest = hashlib.sha256()
        rejected.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Yields `prompt`, `completion` and `where` (file:line)."""
        root = os.path.commonpath([file.parent for file in self.files])
        for file in self.files:
            name = file.relative_to(root).as_posix()
            for number, line in numbered_lines(file):
                where = f"{name}:{number}"
                try:
                    row = self._row(line) | {"where": where}
                except ValueError as error:
                    self._reject(where, str(error), line)
                else:
                    self.digest.update(repr(row).encode())
                    yield row

    def _row(self, line: bytes) -> dict[str, str]:
        form, prompt, completion = parse_row(line)
        self.format = self.format or form
        if form != self.format:
            raise ValueError(
                f"formats are mixed: this row is {form}, those before are {self.format}"
            )
        return {"prompt": prompt, "completion": completion}

    def _reject(self, where: str, reason: str, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        self.kinds[reason.partition(":")[0]] += 1
        if len(self.first) < 10:
            self.first.append(f"{where}: {reason}   {text[:60]}")
        entry = {"line": where, "reason": reason, "text": text}
        with self.rejected.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def report(self, on_bad_rows: str) -> None:
        """Say what was rejected; raises `UserError` unless it may be skipped.

        A mix of formats may not, whatever the setting.
        """
        if not self.kinds:
            return
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in self.kinds.most_common())
        total = self.kinds.total()
        text = f"{total:,} line(s) cannot be used ({kinds}). All are in {self.rejected}"
        if on_bad_rows == "stop" or "formats are mixed" in self.kinds:
            raise UserError(listed(f"{text}\nNothing was trained. The first ones:", self.first))
        print(listed(f"Skipped: {text}", self.first[:3]))


@main_first
def read_rows(settings: Settings) -> Dataset:
    """The rows of `data_files`, in the order of names and lines, without exact duplicates.

    A dataset with `prompt`, `completion` and `where` (file:line), kept on disk in the run's folder
    and mapped, so that memory stays bounded. Raises `UserError` that lists what is wrong by file
    and line, all at once.
    """
    claim(settings.run_dir)
    files, folder = find_files(settings.data_files), settings.run_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    reader = RowReader(files, settings.run_dir / "data.rejected.jsonl")
    writing = folder / ".rows.writing"
    with telling_if_full(folder, "Nothing was trained."):
        write_rows(reader, writing)
    reader.report(settings.on_bad_rows)
    if not reader.format:
        raise UserError(f"The files hold no rows: {', '.join(file.name for file in files)}")
    final = folder / f"rows-{reader.digest.hexdigest()[:16]}.arrow"
    rows = datasets.Dataset.from_file(str(keep_new(writing, final)))
    print(f"{len(rows):,} rows ({reader.format}) from {', '.join(file.name for file in files)}")
    rows = drop_duplicates(rows)
    for note in data_notes(rows):
        print(f"! {note}")
    return rows


def write_rows(rows: Iterable[dict[str, str]], file: Path) -> None:
    """Write rows to an Arrow file, 256 at a time."""
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "completion", "where")])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows = iter(rows)
        while batch := list(itertools.islice(rows, 256)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def keep_new(writing: Path, final: Path) -> Path:
    """Rename `writing` to `final`, and remove what was written there from other data.

    `final` has its content's hash in its name. If it is there already it stays untouched, and what
    was encoded from it is found again.
    """
    if final.exists():
        writing.unlink()
    else:
        for old in final.parent.iterdir():
            if re.fullmatch(r"(rows|cache)-[0-9a-f]{16}\w*\.arrow", old.name):
                old.unlink()
        writing.rename(final)
    return final


def row_hashes(rows: Dataset, *columns: str) -> np.ndarray:
    """A 64-bit hash of each row's texts, `[rows]`: eight bytes a row, however long the texts."""
    texts = (
        text
        for batch in rows.iter(1000)
        for text in zip(*(batch[name] for name in columns), strict=True)
    )
    return np.fromiter(map(hash, texts), np.int64, len(rows))


def drop_duplicates(rows: Dataset) -> Dataset:
    """`rows` without exact repetitions of an earlier prompt and completion; prints their count."""
    _, first = np.unique(row_hashes(rows, "prompt", "completion"), return_index=True)
    if len(first) == len(rows):
        return rows
    print(f"Dropped {len(rows) - len(first):,} exact duplicates.")
    return rows.select(np.sort(first))


def _holds_marker(prompt: str, completion: str) -> bool:
    text = prompt + completion
    return "###" in text and re.search("### (Question|Answer|End)", text) is not None


def _splits_word(prompt: str, completion: str) -> bool:
    return prompt[-1].isalpha() and completion[0].islower()


def _repeats_prompt(prompt: str, completion: str) -> bool:
    return completion.lstrip().startswith(prompt.strip())


NOTES = {
    "hold a marker of the prompt format": _holds_marker,
    "may have a prompt that ends in the middle of a word": _splits_word,
    "have a completion that begins with the whole prompt": _repeats_prompt,
}


def data_notes(rows: Dataset) -> list[str]:
    """What is worth a look though it can be trained: each with its count and first lines.

    Where most completions begin in lower case, that says nothing about the ends of the prompts.
    """
    found: dict[str, list[str]] = {note: [] for note in NOTES}
    counts = Counter[str]()
    for batch in rows.iter(1000):
        counts["lower"] += sum(text[0].islower() for text in batch["completion"])
        columns = [batch[name] for name in ("prompt", "completion", "where")]
        for prompt, completion, where in zip(*columns, strict=True):
            for note in [note for note, applies in NOTES.items() if applies(prompt, completion)]:
                counts[note] += 1
                found[note] += [where] * (len(found[note]) < 5)
    habit = "middle of a word" if counts["lower"] > len(rows) / 2 else "no note"
    told = {note: ", ".join(lines) for note, lines in found.items() if lines and habit not in note}
    notes = [f"{counts[note]:,} row(s) {note}: {lines}" for note, lines in told.items()]
    same = np.unique(row_hashes(rows, "completion"), return_counts=True)[1].max() / len(rows)
    if same >= 0.9 and len(rows) > 1:
        notes.append(f"{same:.0%} of the completions are the same text")
    return notes


def places(rows: Dataset, salt: str = "") -> np.ndarray:
    """A number from 0 to 1 for each row, `[rows]`, by a hash of its prompt."""
    hashes = prompt_hashes(rows, salt)
    return np.fromiter((int(text, 16) / 16**12 for text in hashes), float, len(rows))


def prompt_hashes(rows: Dataset, salt: str = "") -> Iterator[str]:
    """The first 48 bits of each prompt's SHA-256, as hexadecimal digits."""
    prompts = (prompt for batch in rows.iter(1000) for prompt in batch["prompt"])
    return (hashlib.sha256((salt + prompt).encode()).hexdigest()[:12] for prompt in prompts)


SPLIT = 1  # raised whenever `split_rows` would hold other rows out


def split_rows(
    rows: Dataset, fraction: float, before: frozenset[str] = frozenset()
) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, chosen by a hash of the prompt.

    Adding rows never moves an old one across, and one prompt is never on both sides. At least one
    row is held out, and at least one is left to train on; raises `UserError` if there are not two
    different prompts. Prompts whose hashes an earlier run held out (`before`) are so again.
    """
    place = places(rows)
    low, high = place.min(), place.max()
    if low == high:
        raise UserError(
            "Training needs at least two rows with different prompts: "
            "one to learn from, one to test on."
        )
    held = (place == low) | ((place < fraction) & (place != high))
    if before:
        held |= np.fromiter((text in before for text in prompt_hashes(rows)), bool, len(rows))
    if held.all():
        raise UserError(
            "All of these rows were held out by the run that this one continues, so that none is "
            "left to train on: add others, or choose a new run_name without base_adapter."
        )
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


ENOUGH = 40  # held-out rows, from which on one half chooses the epoch and the other is scored
MOST = 2000  # rows that are evaluated


def share_held_out(held: Dataset, settings: Settings) -> tuple[Dataset, Dataset]:
    """Of the held-out rows those that choose the epoch, and those that are scored; says how many.

    A score over rows that have chosen flatters a little, so that they are two halves, by a hash of
    the prompt, where there are `ENOUGH` and an epoch is chosen at all; else both are all rows. At
    most `MOST` of each are taken, drawn by the seed.
    """
    chooses = settings.keep_best or settings.early_stopping_patience > 0
    first = places(held, "validation") < 0.5
    apart = chooses and len(held) >= ENOUGH and 0 < first.sum() < len(held)
    parts = [held.select(np.flatnonzero(part)) for part in (first, ~first)] if apart else [held] * 2
    validation, test = (at_most(MOST, part, settings.seed) for part in parts)
    if apart:
        told = f"{len(validation):,} choose the epoch to keep, {len(test):,} others are scored"
    else:
        few = f", and choose the epoch, too: there are fewer than {ENOUGH}" * chooses
        told = f"{len(test):,} are scored{few}"
    print(f"{len(held):,} rows are held out: {told}.")
    return validation, test


def at_most(count: int, rows: Dataset, seed: int) -> Dataset:
    """`rows`, or `count` of them, drawn by the seed, in their order."""
    if len(rows) <= count:
        return rows
    drawn = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows.select(np.sort(drawn))
