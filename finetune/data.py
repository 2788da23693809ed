"""Section 6: the rows of the data files, read, checked, without duplicates, and split."""

from __future__ import annotations

import filecmp
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset

from finetune.fields import BadRow, Fields, checked_object, parse_json
from finetune.files import file_hash, telling_if_full
from finetune.lock import claim
from finetune.machine import main_first, progress
from finetune.notes import data_notes, row_hashes
from finetune.readers import places_of, sources
from finetune.rows import ROW_FORMATS, read_row
from finetune.sources import find_files
from finetune.talks import Turn
from qlora_helpers import Settings, UserError, first_of, listed, many, readable_turns

COLUMNS = {name: pa.string() for name in ("prompt", "completion", "turns", "key", "where")}
COLUMNS["kept"] = pa.int32()
HASHES = "sha256.json"
SHOWN, KEPT = 1000, 10_000  # characters of a bad line, and how many of those, that are written down


class RowReader:
    """The rows of some files, one by one, and an account of what cannot be used and what is not.

    Bad lines are counted by kind and written to `rejected`. Holds one line at a time, and the first
    ten of what is wrong.
    """

    def __init__(self, files: Sequence[Path], rejected: Path):
        self.files, self.rejected = files, rejected
        self.format, self.kinds, self.first = "", Counter[str](), list[str]()
        self.unused, self.left_out, self.wrong = Counter[str](), 0, list[str]()
        self.digest = hashlib.sha256()
        rejected.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        """Yields `prompt`, `completion`, `turns` and `where` (file:line)."""
        for where, found in sources(self.files, self.wrong):
            try:
                row = self._row(found) | {"where": where}
            except ValueError as error:
                self._reject(where, str(error), found)
            else:
                self.digest.update(repr(row).encode())
                yield row

    def _row(self, found: object) -> dict[str, str | None]:
        if isinstance(found, ValueError):
            raise found
        row = read_row(parse_json(found) if isinstance(found, bytes) else checked_object(found))
        self.format = self.format or row.form
        if row.form != self.format:
            raise ValueError(
                f"formats are mixed: this row is {row.form}, those before are {self.format}"
            )
        self.unused.update(row.unused)
        self.left_out += row.left_out
        return as_columns(row.turns, row.kept)

    def _reject(self, where: str, reason: str, found: object) -> None:
        text = as_shown(found).strip()[:SHOWN]
        self.kinds[reason.partition(":")[0]] += 1
        if len(self.first) < 10:
            self.first.append(f"{where}: {reason}   {text[:60]}")
        if self.kinds.total() > KEPT:
            return
        entry = {"line": where, "reason": reason, "text": text}
        with self.rejected.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def report(self, on_bad_rows: str) -> None:
        """Say what was rejected; raises `UserError` unless it may be skipped.

        A mix of formats may not, whatever the setting, nor may a file that is no data.
        """
        if self.wrong:
            these = "This file is" if len(self.wrong) == 1 else "These files are"
            files = listed(f"{these} no data. Nothing was trained.", self.wrong)
            raise UserError("\n".join([files, *self.first]))
        if not self.kinds:
            return
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in self.kinds.most_common())
        total = self.kinds.total()
        which = "All" if total <= KEPT else f"The first {KEPT:,}"
        text = f"{many(total, 'line')} cannot be used ({kinds}). {which} are in {self.rejected}"
        if any(kind.startswith("no '") for kind in self.kinds):
            text += f"\nKnown are: {', '.join(map('/'.join, ROW_FORMATS))}. "
            text += "In a sheet, rename the columns to prompt and completion."
        if on_bad_rows == "stop" or "formats are mixed" in self.kinds:
            raise UserError(listed(f"{text}\nNothing was trained. The first ones:", self.first))
        print(listed(f"Skipped: {text}", self.first[:3]))

    def told(self, count: int) -> str:
        """How many rows there are, of which format, and what of them is not used."""
        names = [f"{name!r} in {number:,}" for name, number in self.unused.most_common()]
        unused = f". Not used: {first_of(names)}" if names else ""
        left = many(self.left_out, "turn")
        after = f". Left out: {left} after a last answer" if self.left_out else ""
        files = first_of([file.name for file in self.files])
        return f"{many(count, 'row')} ({self.format}) from {files}{unused}{after}"


def as_shown(found: object) -> str:
    """A line, a table's cells or an object as text."""
    if isinstance(found, bytes):
        return found.decode("utf-8", "replace")
    return found.cells if isinstance(found, BadRow) else repr(found)


def as_columns(turns: Sequence[Turn], kept: int = 0) -> dict[str, Any]:
    """A row's turns as `prompt` and `completion`, for people; a whole text has no prompt.

    `turns` is their JSON where there are more than a question and its answer; `kept` is `Row`'s.
    `key` is a hash of the first question, which rows of one conversation share.
    """
    *asked, last = turns
    prompt = readable_turns([turn[:2] for turn in asked]) if asked else ""
    plain = [turn.role for turn in turns] in (["text"], ["user", "assistant"])
    written = None if plain else json.dumps(turns, ensure_ascii=False)
    first = next((turn.text for turn in turns if turn.role in ("user", "text")), prompt)
    told = {"prompt": prompt, "completion": last.text, "turns": written, "kept": kept}
    return told | {"key": hash_of(first)}


def hash_of(text: str, salt: str = "") -> str:
    """48 bits of a text's SHA-256, whatever blanks are around it, as hexadecimal digits."""
    return hashlib.sha256((salt + text.strip()).encode()).hexdigest()[:12]


@main_first
def read_rows(settings: Settings) -> Dataset:
    """The rows of `data_files`, in the order of names and lines, without exact duplicates.

    A dataset with `as_columns`' columns and `where` (file:line, or file:row n), kept on disk in the
    run's folder and mapped, so that memory stays bounded. Raises `UserError` that lists what is
    wrong by file and line, all at once.
    """
    claim(settings.run_dir)
    files, folder = find_files(settings), settings.run_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    reader = RowReader(files, settings.run_dir / "data.rejected.jsonl")
    writing = folder / ".rows.writing"
    with telling_if_full(folder, "Nothing was trained."):
        write_rows(reader, writing)
    reader.report(settings.on_bad_rows)
    if not reader.format:
        names = first_of([file.name for file in files])
        told = "All rows were skipped, none is left" if reader.kinds else "The files hold no rows"
        raise UserError(f"{told}: {names}")
    keep_hashes(files, folder / HASHES)
    final = folder / f"rows-{reader.digest.hexdigest()[:16]}.arrow"
    rows = datasets.Dataset.from_file(str(keep_new(writing, final)))
    print(reader.told(len(rows)))
    rows = drop_duplicates(rows)
    for note in data_notes(rows):
        print(f"! {note}")
    return rows


def keep_hashes(files: Sequence[Path], kept: Path) -> None:
    """Write down the SHA-256 of each file, for the report: by then it may be gone or another."""
    hashes = {name: file_hash(file) for file, name in places_of(files).items()}
    kept.write_text(json.dumps(hashes), encoding="utf-8")


def data_hashes(settings: Settings) -> dict[str, str]:
    """The SHA-256 of each file that `read_rows` has read for this run."""
    kept = settings.run_dir / "data" / HASHES
    return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}


def write_rows(rows: Iterable[Fields], file: Path) -> None:
    """Write rows to an Arrow file, 256 at a time."""
    schema = pa.schema(COLUMNS)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows = iter(progress(rows, "Reading", " rows"))
        while batch := list(itertools.islice(rows, 256)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def keep_new(writing: Path, final: Path) -> Path:
    """Rename `writing` to `final`, and remove what was written there from other data.

    `final` has its content's hash in its name. If it is there already, and whole, it stays
    untouched, and what was encoded from it is found again.
    """
    if final.exists() and filecmp.cmp(writing, final, shallow=False):
        writing.unlink()
    else:
        for old in final.parent.iterdir():
            if re.fullmatch(r"(rows|cache)-[0-9a-f]{16}\w*\.arrow", old.name):
                old.unlink()
        writing.replace(final)
    return final


def drop_duplicates(rows: Dataset) -> Dataset:
    """`rows` without exact repetitions of an earlier one; prints their count."""
    _, first = np.unique(row_hashes(rows, "prompt", "completion", "turns"), return_index=True)
    if len(first) == len(rows):
        return rows
    print(f"Dropped {many(len(rows) - len(first), 'exact duplicate')}.")
    return rows.select(np.sort(first))


def places(keys: Sequence[str]) -> np.ndarray:
    """A number from 0 to 1 for each key, `[rows]`."""
    return np.fromiter((int(key, 16) / 16**12 for key in keys), float, len(keys))


def prompt_keys(rows: Dataset) -> list[str]:
    """A hash of each row's first question, `[rows]`, whatever blanks are around it."""
    if "key" in rows.column_names:
        return rows["key"][:]
    return [hash_of(prompt) for prompt in rows["prompt"][:]]


SPLIT = 2  # raised whenever `split_rows` would hold other rows out


def split_rows(
    rows: Dataset, fraction: float, before: frozenset[str] = frozenset()
) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, chosen by a hash of the first question.

    Adding rows moves no old one across, and one question is never on both sides; at most twice the
    fraction is held out, whatever questions repeat, and at least one row. Where one question has
    so many rows that too few others are left to hold out, rows are split one by one, and that is
    said. Questions that an earlier run held out (`before`, hashes) are so again. Raises `UserError`
    if nothing is left to train on.
    """
    keys = prompt_keys(rows)
    held, most = held_by(keys, fraction, before), max(Counter(keys).values(), default=0)
    heavy = most > 2 * fraction * len(rows) and held.sum() < fraction * len(rows) / 2
    if len(rows) > 1 and (heavy or not held.any()):
        print(f"! {most:,} rows ask the same: rows are held out one by one, not by what they ask.")
        pairs = zip(keys, rows["prompt"][:], rows["completion"][:], strict=True)
        held = held_by([hash_of("\n".join(pair)) for pair in pairs], fraction)
    if held.all() or not held.any():
        told = "one to learn from, one to test on"
        if before:
            told = "all of these were held out by the run that this one continues: add others"
        raise UserError(f"Training needs at least two rows: {told}.")
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def held_by(
    keys: Sequence[str], fraction: float, before: frozenset[str] = frozenset()
) -> np.ndarray:
    """Which rows are held out by their keys, `[rows]`; none if no key has few enough rows.

    Those of the lowest places are, up to `fraction`, as long as they are at most twice that share
    together; the next one if there is none.
    """
    names, row, counts = np.unique(np.array(keys), return_inverse=True, return_counts=True)
    place, most = places(names), max(1, 2 * fraction * len(keys))
    held = np.isin(names, list(before))
    for number in np.argsort(place):
        total = counts[held].sum()
        if place[number] >= fraction and total:
            break
        held[number] |= total + counts[number] <= min(most, len(keys) - 1)
    return held[row]


ENOUGH = 40  # held-out rows, from which on one half chooses the epoch and the other is scored
MOST = 2000  # rows that are evaluated


def share_held_out(held: Dataset, settings: Settings) -> tuple[Dataset, Dataset]:
    """Of the held-out rows those that choose the epoch, and those that are scored; says how many.

    A score over rows that have chosen flatters a little, so that they are two halves, by a hash of
    the prompt, where there are `ENOUGH` and an epoch is chosen at all; else both are all rows. At
    most `MOST` of each are taken, drawn by the seed.
    """
    chooses = settings.keep_best or settings.early_stopping_patience > 0
    first = places([hash_of(key, "validation") for key in prompt_keys(held)]) < 0.5
    apart = chooses and len(held) >= ENOUGH and 0 < first.sum() < len(held)
    parts = [held.select(np.flatnonzero(part)) for part in (first, ~first)] if apart else [held] * 2
    validation, test = (at_most(MOST, part, settings.seed) for part in parts)
    if apart:
        told = f"{len(validation):,} choose the epoch to keep, {len(test):,} others are scored"
    else:
        told = f"{len(test):,} are scored"
        if chooses:
            few = f", being fewer than {ENOUGH}" if len(held) < ENOUGH else ""
            told = f"{len(test):,} both choose the epoch and are scored{few}"
        if len(held) == 1:
            told = f"it {'both chooses the epoch and ' * chooses}is scored, and says little"
    print(f"{many(len(held), 'row')} held out: {told}.")
    return validation, test


def at_most(count: int, rows: Dataset, seed: int) -> Dataset:
    """`rows`, or `count` of them, drawn by the seed, in their order."""
    if len(rows) <= count:
        return rows
    drawn = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows.select(np.sort(drawn))
