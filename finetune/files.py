"""Folders that are written whole or not at all, their seals and hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.machine import chain, short


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write, which takes the place of `folder` at the end, or is removed after
    an error.

    Killed in between, what was there and what is new are both whole under their other names.
    """
    work, old = (folder.with_name(folder.name + end) for end in (".writing", ".old"))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` by its relative name, but of `checksums.json` itself."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "checksums.json"
    ]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write `checksums.json`, last and in one go: a folder without it, or not like it, is not
    whole.
    """
    work = folder / "checksums.json.writing"
    work.unlink(missing_ok=True)
    work.write_text(json.dumps(checksums(folder), indent=2) + "\n")
    work.replace(folder / "checksums.json")


def why_unusable(folder: Path) -> str:
    """Why a sealed folder must not be used, by its checksums; an empty string if it is whole."""
    if not (folder / "checksums.json").exists():
        return "its save was cut short"
    try:
        written, found = json.loads((folder / "checksums.json").read_bytes()), checksums(folder)
        wrong = [name for name in written if written[name] != found.get(name)]
    except (ValueError, TypeError):
        return "checksums.json is damaged"
    return ", ".join(f"{name} is {'damaged' if name in found else 'missing'}" for name in wrong)


def zip_folder(folder: Path) -> Path | None:
    """A zip of `folder` beside it, named after the run and the time; None, and said, if the disk
    has no room.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name, work = f"{folder.parent.name}-{stamp}.zip", folder.with_name(folder.name + ".zipping")
    try:
        made = Path(shutil.make_archive(str(work), "zip", folder))
    except OSError as error:
        work.with_name(work.name + ".zip").unlink(missing_ok=True)
        print(f"No zip backup ({short(error)}). The adapter itself is saved: {folder}")
        return None
    return made.rename(folder.with_name(name))


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that the disk is full; torch and safetensors say
    it in own words.
    """
    told = ("No space left", "PytorchStreamWriter failed", "inline_container")
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or any(text in str(one) for text in told)
        for one in chain(error)
    )


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders directly in `folder`, the highest step first."""
    found = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
