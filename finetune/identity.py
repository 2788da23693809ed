"""Section 11: what makes two runs the same: settings, tokens, base model, start."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer

from finetune.base_adapter import BROUGHT, adapter_hash, in_order
from finetune.base_model import weight_files
from finetune.data import SPLIT
from finetune.files import Record
from finetune.machine import processes
from finetune.tokens import ENCODER
from qlora_helpers import Settings, UserError, base_name, listed, local_base

# Settings that do not change what is trained: where things are, what happens afterwards, and how a
# step is cut.
NOT_TRAINING = {
    *("run_name", "data_files", "validation_fraction", "max_length", "on_bad_rows", "too_long"),
    *("batch_size", "gradient_accumulation", "gradient_checkpointing", "memory_limit_gb", "bf16"),
    *("sample_rows", "max_new_tokens", "report_to", "push_to_hub", "hub_repo", "hub_private"),
    *("resume", "backup_to", "merge", "export", "model_cache", "output_dir", "merged_dir"),
}
# Settings that are first looked at when the model is trained: nothing made before goes by them.
LATER = {
    *("sample_rows", "max_new_tokens", "push_to_hub", "hub_repo", "hub_private", "resume"),
    *("backup_to", "merge", "export", "merged_dir"),
}
# What releases after the first have added, and what it was before.
ADDED = {
    "base_adapter": "",
    "adapter_weights": None,
    "encoder": 1,
    "split": 1,
    "prompt_format": "question-answer",
}
RELEASE = {"encoder": "how rows become tokens", "split": "how rows are held out"}
HASHES = {
    "training rows": "the training rows",
    "base_weights": "the weights in the base model's folder",
    "adapter_weights": "the weights of base_adapter",
}
LENGTH = ("epochs", "max_steps")
SHAPE = ("base_model", "base_weights", "lora_r", "target_modules", "use_dora")
BLOCKS, BLOCK = 256, 2**14  # of a file of weights: 4 MB, in parts of 16 kB from end to end


def fingerprint(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    """What two runs must share for one to continue the other.

    That is: the settings that matter, hashes of the tokens and of what training begins with, and
    how this release writes and splits rows.
    """
    told = {
        name: value for name, value in settings.model_dump().items() if name not in NOT_TRAINING
    }
    for name in ("base_model", "base_adapter"):
        told[name] = base_name(told[name]) if told[name] else ""
    rows = trainer.train_dataset
    real = len(rows) - (processes()[1] > 1)  # without `with_void_row`'s
    return told | {
        "effective_batch": settings.effective_batch,
        "base_revision": getattr(trainer.model.config, "_commit_hash", None),
        "base_weights": base_weights(settings),
        "adapter_weights": adapter_hash(settings),
        "encoder": ENCODER,
        "split": SPLIT,
        "training rows": tokens_hash(rows.select(range(real))),
    }


def tokens_hash(data: Dataset) -> str:
    """SHA-256 of the rows' tokens and labels, in their order."""
    sha = hashlib.sha256()
    for batch in data.with_format("arrow").iter(batch_size=1000):
        for column in (batch["input_ids"].combine_chunks(), batch["labels"].combine_chunks()):
            sha.update(column.value_lengths().to_numpy().astype("int64").tobytes())
            sha.update(column.flatten().to_numpy().astype("int64").tobytes())
    return sha.hexdigest()


def base_weights(settings: Settings) -> str | None:
    """A hash of a local base model's weights; a Hub's model has a revision, and None here."""
    folder = local_base(settings.base_model)
    if not folder or not folder.is_dir():
        return None
    files = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)]
    return sampled_hash(tuple(files))


@functools.lru_cache(4)
def sampled_hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files (path, bytes, time), of each by its size and `BLOCKS` parts at most."""
    sha = hashlib.sha256()
    for path, size, _ in files:
        sha.update(f"{path.name} {size}".encode())
        count = min(BLOCKS, -(-size // BLOCK))
        with path.open("rb") as file:
            for number in range(count):
                file.seek(max(0, size - BLOCK) * number // max(1, count - 1))
                sha.update(file.read(BLOCK))
    return sha.hexdigest()


def run_of(told: Record) -> str:
    """Which run a checkpoint or adapter is of, by its `run.json`: a hash of how that run began.

    Older ones don't say it: of their settings and rows then.
    """
    return told.get("run") or hash_of_fingerprint(told.get("fingerprint"))


def hash_of_fingerprint(mark: Record | None) -> str:
    """A short hash of a fingerprint."""
    return hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:16]


def as_told_now(was: Record, now: Record) -> Record:
    """An older fingerprint, with what newer releases say besides as it was then.

    Empty if there was none. How rows are written and split does not matter where the same
    tokens come of it.
    """
    if not was:
        return {}
    told = {"base_weights": now["base_weights"], **ADDED, **was}
    layers = [in_order(each.get("target_modules")) for each in (was, now)]
    if layers[0] == layers[1]:  # whatever their order
        told["target_modules"] = now.get("target_modules")
    same = was.get("training rows") == now["training rows"]
    return told | {name: now[name] for name in RELEASE if same}


def changes(was: Record, now: Record) -> list[str]:
    """What differs between two fingerprints, in words."""
    names = [name for name in now | was if now.get(name) != was.get(name)]
    return [
        f"{HASHES[name]} are others"
        if name in HASHES
        else f"{name} was {was.get(name)!r}, is {now.get(name)!r}"
        for name in names
    ]


def require_as_planned(settings: Settings, planned: Settings | None) -> Settings:
    """`settings`, with what `base_adapter` brought: section 2, run again, does not know of it.

    Raises `UserError` if model and rows in memory were made by other settings (`planned`): what
    would be trained, saved or written then had neither the one nor the other.
    """
    if planned and settings.base_adapter and settings.base_adapter == planned.base_adapter:
        brought = {name: getattr(planned, name) for name in BROUGHT}
        settings = settings.model_copy(update=brought)
    was, now = (each.model_dump(exclude=LATER) for each in (planned or settings, settings))
    if since := changes(was, now):
        title = "Settings have changed since sections 5 to 10 were run:"
        raise UserError(
            listed(title, since) + "\nRun all again, so that they take effect; or put them back "
            "and run section 2, to go on with the model that is here."
        )
    return settings


def other_release(was: Record, now: Record) -> list[str]:
    """What makes a run one of a release that trains otherwise, in words; empty if nothing does."""
    told = [f"{what} ({name} {was[name]}, now {now[name]})" for name, what in RELEASE.items()
            if was.get(name) != now.get(name)]  # fmt: skip
    return told + [f"the setting {name}" for name in sorted(was.keys() ^ now.keys())]


def trains_on(was: Record, now: Record) -> bool:
    """Whether two runs differ in their length alone, and the second may be the longer."""
    same = all(was.get(name) == now.get(name) for name in now | was if name not in LENGTH)
    steps = [told["max_steps"] for told in (was, now) if told["max_steps"] > 0]
    if len(steps) == 1:  # of one the epochs count, so that it is not known here
        return same
    return same and (steps[1] > steps[0] if steps else now["epochs"] > was["epochs"])


def require_same_shape(was: Record, now: Record, folder: Path) -> None:
    """Raise `UserError` if a checkpoint's adapter has another shape, or another base model."""
    one, other = ({name: told.get(name) for name in SHAPE} for told in (was, now))
    if changed := changes(one, other):
        raise UserError(
            f"The adapter in {folder} does not fit ({'; '.join(changed)}), so that training cannot "
            "go on from it. Put the old values back, or choose a new run_name."
        )
