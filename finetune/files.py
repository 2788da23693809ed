"""Folders that are written whole or not at all, their seals, and what is ours to replace."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finetune.machine import chain, short
from qlora_helpers import UserError

Record = dict[str, Any]  # what a JSON file of ours tells: run.json, a seal, a plan

SEAL = "checksums.json"
BEING_WRITTEN = ".being-written"  # stands in a folder until it is whole

# What a sealed folder of each purpose must hold: without one of these it is of no use.
NEEDED = {
    "checkpoint": (
        *("adapter_model.safetensors", "adapter_config.json", "optimizer*", "scheduler.pt"),
        *("rng_state*", "trainer_state.json", "run.json"),
    ),
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "run.json"),
    "merged": ("model*.safetensors", "config.json"),
    "base": ("model*.safetensors", "config.json", "tokenizer.json", "made_from.json"),
    "gguf": ("*.gguf",),
    "converters": ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "gguf-py/gguf/constants.py"),
    "embedded": ("model*.safetensors", "config.json", "tokenizer.json"),
}
USED = {"checkpoint": ("scaler.pt",)}  # and what decides, too, where it is there


def edit_json(path: Path, **values: object) -> None:
    """Set keys of a JSON object in a file."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(saved | values, indent=2) + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> list[str]:
    """The relative names of all files under `folder`, but for its seal."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if name not in (SEAL, f"{SEAL}.writing", BEING_WRITTEN)]


def digest(path: Path, purpose: str) -> str:
    """What a seal remembers of a file: its SHA-256, or of a whole model's weights their size."""
    if purpose in ("merged", "base", "gguf") and path.suffix in (".safetensors", ".gguf"):
        return f"{path.stat().st_size} bytes"
    return file_hash(path)


def seal(folder: Path, purpose: str, run: str = "") -> None:
    """Write `checksums.json`, last and in one go: a folder without it is not whole.

    It says what the folder is for (a key of `NEEDED`), of which run, and has a digest of every
    file. Raises `FileNotFoundError` if something is lacking that the purpose needs.
    """
    names = files_of(folder)
    lacking = [part for part in NEEDED[purpose] if not any(fnmatch(name, part) for name in names)]
    if lacking:
        raise FileNotFoundError(f"{folder} is no whole {purpose}: it lacks {', '.join(lacking)}")
    files = {name: digest(folder / name, purpose) for name in names}
    work = folder / f"{SEAL}.writing"
    text = json.dumps({"purpose": purpose, "run": run, "files": files}, indent=2)
    work.write_text(text + "\n", encoding="utf-8")
    work.replace(folder / SEAL)


def read_seal(folder: Path) -> dict[str, Any]:
    """A folder's seal: `purpose`, `run` and `files`; empty if there is none, or it is damaged.

    Releases before seals had a purpose wrote the digests alone, of checkpoints and adapters.
    """
    try:
        found = json.loads((folder / SEAL).read_bytes())
        if "files" not in found:
            kind = "checkpoint" if "trainer_state.json" in found else "adapter"
            found = {"purpose": kind, "run": "", "files": found}
        known = found["purpose"] in NEEDED and isinstance(found["files"], dict)
        return found if known else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def why_unusable(folder: Path, purpose: str) -> str:
    """Why a folder cannot serve its purpose: what lacks or differs of the files that it needs.

    Empty if it can: a line that somebody has added to its README.md harms nobody.
    """
    if not (folder / SEAL).exists():
        return "its save was cut short"
    found = read_seal(folder)
    if not found:
        return f"{SEAL} is damaged"
    if found["purpose"] != purpose:
        return f"it is no {purpose}, it is a {found['purpose']}"
    parts = NEEDED[purpose] + USED.get(purpose, ())
    wanted = [name for name in found["files"] if any(fnmatch(name, part) for part in parts)]
    gone = [part for part in NEEDED[purpose] if not any(fnmatch(name, part) for name in wanted)]
    lacking = gone + [name for name in wanted if not (folder / name).is_file()]
    changed = [
        name
        for name in wanted
        if name not in lacking and digest(folder / name, purpose) != found["files"][name]
    ]
    told = [f"{name} is missing" for name in lacking] + [f"{name} is damaged" for name in changed]
    return ", ".join(told)


def is_ours(folder: Path, purpose: str) -> bool:
    """Whether `folder` carries our seal for `purpose` and holds nothing but what was sealed."""
    files = read_seal(folder).get("files", {})
    if read_seal(folder).get("purpose") != purpose or folder.is_symlink():
        return False
    return all(
        name in files
        and not (folder / name).is_symlink()
        and digest(folder / name, purpose) == files[name]
        for name in files_of(folder)
    )


def is_free(folder: Path) -> bool:
    """Whether nothing is at `folder`, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def unused(path: Path) -> Path:
    """`path`, or with the first number behind its name at which nothing is."""
    names = (path.with_name(f"{path.name}-{n}" if n > 1 else path.name) for n in itertools.count(1))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def move_aside(path: Path, why: str, end: str = "kept") -> Path:
    """Rename what is not ours, or of no use, out of the way, and say so; returns where it is."""
    there = path.rename(unused(path.with_name(f"{path.name}-{end}")))
    print(f"{path.name} is moved aside to {there.name}: {why}.")
    return there


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, which takes no room; copy it where that cannot be done."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove(folder: Path, purpose: str) -> None:
    """Delete a folder that is ours and holds nothing else; move any other aside."""
    if is_ours(folder, purpose):
        shutil.rmtree(folder)
    elif folder.exists():
        move_aside(folder, "it holds files that this notebook did not write")


def scratch(folder: Path) -> Path:
    """A new empty folder to write in, beside `folder`; what a killed process left there goes."""
    for number in itertools.count(1):
        work = folder.with_name(f"{folder.name}.writing" + f"-{number}" * (number > 1))
        if (work / BEING_WRITTEN).is_file():
            shutil.rmtree(work)
        if not work.exists() and not work.is_symlink():
            work.mkdir(parents=True)
            (work / BEING_WRITTEN).touch()
            return work
    raise AssertionError


@contextlib.contextmanager
def new_folder(folder: Path, purpose: str, aside: bool = False) -> Iterator[Path]:
    """An empty folder to write, which takes the place of `folder` at the end; seal it before.

    What is there already is replaced only if it is ours for that `purpose`; else it is moved aside,
    or, without `aside`, refused by a `UserError`. After an error everything is as it was. Killed in
    between, what was there and what is new are both whole, under their other names.
    """
    folder = folder.resolve()  # a link's place, not the link
    if not aside and not is_free(folder) and not is_ours(folder, purpose):
        raise UserError(f"{folder} holds files that this notebook did not write: choose another.")
    apart = folder.is_dir() and folder.stat().st_dev != folder.parent.stat().st_dev
    work = scratch(folder / folder.name if apart else folder)  # on the same disk in any case
    try:
        yield work
        readable(work)
        (work / BEING_WRITTEN).unlink()
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if apart:
        fill(folder, work)
    else:
        put_in_place(work, folder, purpose)


def put_in_place(work: Path, folder: Path, purpose: str) -> None:
    """Rename `work` to `folder`; what is there is replaced if it is ours, else moved aside."""
    old = None
    if is_free(folder):
        if folder.exists():
            folder.rmdir()
    elif is_ours(folder, purpose):
        old = folder.rename(unused(folder.with_name(f"{folder.name}.old")))
    else:
        move_aside(folder, "it holds files that this notebook did not write")
    work.rename(folder)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def readable(work: Path) -> None:
    """Give every file the rights that a new file has here: safetensors lets its owner alone read.

    A server that runs as somebody else could not load the weights.
    """
    rights = (work / BEING_WRITTEN).stat().st_mode
    for name in files_of(work):
        if not (work / name).is_symlink() and (work / name).stat().st_nlink == 1:
            (work / name).chmod(rights)


def fill(folder: Path, work: Path) -> None:
    """Move what is in `work` up into `folder`, a disk of its own that holds nothing but ours."""
    for name in [SEAL, *read_seal(folder).get("files", {})]:  # the seal first: it is whole no more
        (folder / name).unlink(missing_ok=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == SEAL):
        path.replace(folder / path.name)
    work.rmdir()


def zip_folder(folder: Path, run: str) -> Path | None:
    """A zip of a sealed adapter beside its folder, named after the run and the time.

    An earlier zip of the same adapter is replaced. None, and said, if the disk has no room.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    place = zip_of(folder, run) or unused(folder.with_name(f"{run}-{stamp}.zip"))
    work = scratch(folder.with_name(f"{folder.name}.zip"))
    try:
        Path(shutil.make_archive(str(work / "adapter"), "zip", folder)).replace(place)
    except (OSError, ValueError) as error:  # zip knows no date before 1980
        print(f"No zip backup ({short(error)}). The adapter itself is saved: {folder}")
        return None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def zip_of(folder: Path, run: str) -> Path | None:
    """The zip beside a sealed adapter's folder that holds this adapter; None if there is none."""
    weights = read_seal(folder).get("files", {}).get("adapter_model.safetensors")
    found = sorted(folder.parent.glob(f"{run}-*.zip"))
    return next((path for path in found if weights and zipped_adapter(path) == weights), None)


def zipped_adapter(path: Path) -> str | None:
    """The digest of the adapter in a zip of ours; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read(SEAL))
        return found.get("files", found).get("adapter_model.safetensors")
    except (OSError, KeyError, ValueError, AttributeError, zipfile.BadZipFile):
        return None


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that the disk is full.

    torch and safetensors say it in words of their own.
    """
    told = ("No space left", "PytorchStreamWriter failed", "inline_container")
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or any(text in str(one) for text in told)
        for one in chain(error)
    )


@contextlib.contextmanager
def telling_if_full(folder: Path, left: str) -> Iterator[None]:
    """Within it a full disk is a `UserError` that says what is `left`, and what to do."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise UserError(
            f"The disk is full: {folder} could not be written. {left} Free some space and run this "
            "cell again."
        ) from None


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders directly in `folder`, the highest step first."""
    named = folder.glob("checkpoint-*")
    found = [p for p in named if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
