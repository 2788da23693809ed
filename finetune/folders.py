"""Section 4: where things may be written, and whether there is room on each disk."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.files import is_free, is_ours, read_seal
from finetune.lock import is_written
from finetune.machine import short
from finetune.sources import HUB, files_of_name
from qlora_helpers import Settings, UserError, local_base, locate, on_colab, on_kaggle

DRIVE = "/content/drive"
KAGGLE_GB = 20.9  # (19.5 GiB) what Kaggle keeps of /kaggle/working, however much its disk has


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(part for part in (path, *path.parents) if part.exists())


def folder_settings(settings: Settings) -> dict[str, Path]:
    """The settings that name a folder to write into, with their resolved paths."""
    names = ["output_dir", "model_cache"] + ["merged_dir"] * settings.merges
    return {name: locate(getattr(settings, name)).resolve() for name in names}


def on_drive(path: Path) -> bool:
    """Whether `path` is on Google Drive, mounted or not."""
    return locate(DRIVE) in path.parents


def needs_drive(settings: Settings) -> bool:
    """Whether anything that the settings name, to read or to write, is on Google Drive."""
    read = [place for place in settings.data_places if isinstance(place, Path)]
    read += [local_base(name) or Path() for name in (settings.base_model, settings.base_adapter)]
    named = [*folder_settings(settings).values(), *read]
    return settings.backup_to == "drive" or any(map(on_drive, named))


def mount_drive(settings: Settings) -> None:
    """Mount Google Drive on Colab where the settings name it."""
    if needs_drive(settings) and on_colab():
        from google.colab import drive

        drive.mount(DRIVE)


def check_folders(settings: Settings) -> Iterator[tuple[str, str]]:
    """A ✗ for each setting whose folder cannot be written, or holds what must not be replaced."""
    for name, folder in folder_settings(settings).items():
        told = f"{name} = {getattr(settings, name)!r}"
        if on_drive(folder) and not (locate(DRIVE) / "MyDrive").is_dir():
            yield (
                "✗",
                f"{told} is on Google Drive, which is not mounted: run section 3 and allow it",
            )
        elif why := why_unwritable(locate(getattr(settings, name))):
            yield "✗", f"{told}: {why}"
    above = why_unwritable(locate(settings.output_dir))
    if (why := why_unwritable(settings.run_dir)) and not above:
        yield "✗", f"run_name = {settings.run_name!r}: {why}"
    base, run = local_base(settings.base_model), settings.run_dir.resolve()
    if base and base.resolve() in (run, *run.parents):
        yield "✗", f"output_dir / run_name is {run}, which is in the base model's folder"
    if settings.merges and (why := why_no_merge(settings)):
        yield "✗", why


def why_unwritable(folder: Path) -> str:
    """Why nothing can be written to `folder`, or made where it is to be; empty if it can."""
    try:
        for part in (folder, *folder.parents):
            if part.is_symlink() and not part.exists():
                return f"{part} leads to {part.readlink()}, which is not there (a disk away?)"
        place = existing(folder)
        if not place.is_dir():
            return f"{place} is a file, not a folder"
        return "" if os.access(place, os.W_OK) else f"{place} cannot be written to"
    except OSError as error:
        return short(error)


def why_no_merge(settings: Settings) -> str:
    """Why the merged model must not be written to `merged_dir`; empty if it may.

    The folder must be free or hold this run's earlier merge, and must neither hold nor lie in
    anything that is read or written otherwise.
    """
    folder = locate(settings.merged_dir).resolve()
    told = f"merged_dir = {settings.merged_dir!r} ({folder})"
    outer, inner = kept_folders(settings)
    for name, other in (outer | inner).items():
        if folder == other or folder in other.parents:
            return f"{told} is or holds {name}: choose a folder of its own"
    for name, other in inner.items():
        if other in folder.parents:
            return f"{told} is inside {name}: choose a folder of its own"
    run = settings.run_dir.resolve()
    part = folder.relative_to(run).parts[0] if run in folder.parents else ""
    if is_written(part):
        return f"{told} is where the run itself writes: choose a folder of its own"
    found = read_seal(folder)
    if found.get("purpose") == "merged" and found["run"] not in ("", settings.run_name):
        return f"{told} holds the merged model of the run {found['run']}: choose another folder"
    if not is_free(folder) and not is_ours(folder, "merged"):
        return f"{told} holds files that this notebook did not write: choose an empty folder"
    return ""


def kept_folders(settings: Settings) -> tuple[dict[str, Path], dict[str, Path]]:
    """Folders that a merge may not replace, and those that it may not lie in, by their names."""
    here = [name for name in settings.data_names if not name.startswith(HUB)]
    data = {file.resolve().parent for name in here for file in files_of_name(name)}
    outer = {
        "the working folder": Path.cwd(),
        "your home folder": Path.home(),
        "the content folder": locate("/content"),
        "output_dir": locate(settings.output_dir),
        "the run's folder": settings.run_dir,
        "model_cache": settings.cache_dir,
    } | dict(zip(("the folder of data_files", "another folder of data_files"), data, strict=False))
    base = local_base(settings.base_model)
    inner = {"the base model's folder": base} if base else {}
    outer, inner = ({n: p.resolve() for n, p in kind.items()} for kind in (outer, inner))
    return outer, inner


def require_mergeable(settings: Settings) -> None:
    """Raise `UserError` if the merged model must not be written to `merged_dir`."""
    if why := why_no_merge(settings):
        raise UserError(why)


def free_gb(folder: Path) -> float:
    """GB that can still be written to `folder`'s disk."""
    free = shutil.disk_usage(existing(folder)).free / 1e9
    working = Path("/kaggle/working")
    if on_kaggle() and working in (folder, *folder.parents):
        used = sum(path.lstat().st_size for path in working.rglob("*") if path.is_file()) / 1e9
        free = min(free, KAGGLE_GB - used)
    return free


def check_disks(needs: Mapping[str, tuple[Path, float]]) -> Iterator[tuple[str, str]]:
    """A line a disk: what is free, and the GB that each of `needs` (folder, GB) will take."""
    disks: dict[int, dict[str, tuple[Path, float]]] = defaultdict(dict)
    for name, (folder, size) in needs.items():
        disks[existing(folder).stat().st_dev][name] = folder, size
    for parts in disks.values():
        need, free = (
            sum(size for _, size in parts.values()),
            min(free_gb(f) for f, _ in parts.values()),
        )
        told = ", ".join(f"{name} {size:.1f}" for name, (_, size) in parts.items())
        place = next(iter(parts.values()))[0]
        text = f"{free:,.1f} GB free for {place}, about {need:.1f} GB needed ({told})"
        if free > need:
            yield "✓", text
        else:
            elsewhere = "; on Kaggle, /tmp has more: model_cache = '/tmp/model_cache'" * on_kaggle()
            yield "✗", f"{text}: free some, or change the folders in section 2{elsewhere}"
