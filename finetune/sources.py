"""Section 6: the files and data sets that `data_files` names, and what kind each file is."""

from __future__ import annotations

import codecs
import glob
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
from huggingface_hub import snapshot_download

from finetune.files import read_seal
from finetune.hub import with_retries
from finetune.lock import is_run, is_written
from finetune.machine import short
from qlora_helpers import Settings, UserError, first_of, locate, on_colab

HUB = "hf:"
ABOUT = ("README", "LICENSE")  # files about the data
UPLOADS = "/content/data/*.jsonl"  # the setting as it comes: a sheet in that folder will do, too
# Files of a Hub's data set that can hold rows, or say which files are its training split.
DATA_KINDS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet", "gz", "xlsx")
TABLES = (b"PAR1", b"PK\x03\x04")  # what Parquet and Excel files begin with
NOT_DATA = {
    b"version https://git-lfs": "a Git LFS pointer, not the data: download the file itself "
    "(git lfs pull)",
    b"<!DOCTYPE html": "a web page, not data: download the raw file",
    b"<html": "a web page, not data: download the raw file",
    b"%PDF": "a PDF, not data",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
}
OLD_OFFICE = b"\xd0\xcf\x11\xe0"  # also what a password is put round
# What a zip archive is by a file in it, and what to do with it; Excel's own comes first.
ARCHIVES = {
    "xl/workbook.xml": "",
    "xl/workbook.bin": "a binary Excel file (.xlsb): save it as .xlsx or CSV",
    "content.xml": "an OpenDocument file (.ods): save it as .xlsx or CSV",
}


def find_files(settings: Settings) -> list[Path]:
    """The files that `data_files` names, each once, by name; raises `UserError` for a name of none.

    A path that is there is taken as it is, whatever `[` or `*` it has; a folder gives its files.
    """
    found = {name: files_of_name(name) for name in settings.data_names}
    if on_colab() and not all(found.values()):
        offer_upload()
        found = {name: files_of_name(name) for name in settings.data_names}
    if empty := [no_file(name) for name, files in found.items() if not files]:
        raise UserError("\n".join(empty))
    files = {file.resolve(): file for files in found.values() for file in reversed(files)}
    return sorted(files.values(), key=str)


def files_of_name(name: str) -> list[Path]:
    """The files of one name: a path, a folder, a pattern, or a Hub's data set."""
    if name.startswith(HUB):
        return hub_files(name)
    place = locate(name)
    if place.is_file():
        return [place]
    files = data_in(place) if place.is_dir() else matching(place)
    folder = place.parent if name == UPLOADS else place
    if not files and name == UPLOADS:
        files = data_in(folder)
    files = [file for file in files if file.is_file() and not is_output(file)]
    if files and folder.is_dir():
        tell_left_out(folder, files)
    return files


def tell_left_out(folder: Path, files: Sequence[Path]) -> None:
    """Say what else is in a folder: neither hidden, nor about the data, nor a run's."""
    others = [path for path in shown_in(folder) if path not in files]
    others = [path for path in others if not path.name.startswith(ABOUT) and not of_a_run(path)]
    if others:
        names = [path.name + ("/" if path.is_dir() else "") for path in others]
        print(f"! In {folder}, not read: {first_of(names)}")


def of_a_run(path: Path) -> bool:
    """Whether something in a folder is a run's, a run, or a folder of runs."""
    try:
        folders = [path, *path.iterdir()] if path.is_dir() else []
        return is_output(path) or any(map(is_run, folders))
    except PermissionError:
        return False


def data_in(folder: Path) -> list[Path]:
    """The files of a folder that can hold rows, by name; raises `UserError` for one of `datasets`.

    `save_to_disk` writes one, whose JSON files hold no rows.
    """
    for file, split in (("dataset_dict.json", "['train']"), ("state.json", "")):
        if (folder / file).is_file():
            raise UserError(
                f"{folder} was written by save_to_disk of datasets, which is not read here: run "
                f"datasets.load_from_disk('{folder}'){split}.to_json('rows.jsonl') and name that"
            )
    return [path for path in shown_in(folder) if path.suffix[1:].lower() in DATA_KINDS]


def shown_in(folder: Path) -> list[Path]:
    """What is in a folder, by name, without what is hidden and Excel's locks."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not path.name.startswith((".", "~$"))]


def matching(pattern: Path) -> list[Path]:
    """What a pattern matches, by name; `**` does not follow links, which may lead round."""
    parts = pattern.parts
    first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    base, rest = Path(*parts[:first]), parts[first:]
    try:
        found = [*base.glob(str(Path(*rest)))] if rest else []
    except ValueError:  # '**' within a name, which Python 3.11 refuses
        found = []
    hidden = any(part.startswith(".") for part in rest)
    return sorted(
        path
        for path in found
        if hidden or not any(p.startswith(".") for p in path.relative_to(base).parts)
    )


def is_output(file: Path) -> bool:
    """Whether a file is what this notebook wrote, which a wide pattern matches too."""
    return file.name.endswith(".rejected.jsonl") or any(
        read_seal(folder) or (is_written(file.relative_to(folder).parts[0]) and is_run(folder))
        for folder in file.parents
    )


def no_file(name: str) -> str:
    """What to say of a name that names no file: what there is instead."""
    place = locate(name)
    folder = next(part for part in (place, *place.parents) if part.is_dir())
    shown = first_of([p.name + ("/" if p.is_dir() else "") for p in sorted(folder.iterdir())])
    other = [f"To read {file.name}: data_files = '{file}'. " for file in data_in(folder)[:1]]
    return (
        f"No file matches data_files = {name!r} (looked in {place}).\n"
        f"In {folder} there is: {shown or 'nothing'}.\n"
        f"{''.join(other)}"
        'Put your JSONL there, one {"prompt": "...", "completion": "..."} a line, or a sheet with '
        "these two columns. On Colab: the folder on the left edge, right-click 'data', Upload. "
        "Or try the examples: data_files = 'data_examples/*.jsonl'."
    )


def offer_upload() -> None:
    """Let somebody on Colab choose files, which go to /content/data."""
    from google.colab import files

    folder = locate("/content/data")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Nothing matches data_files yet: choose your file or files, which go to {folder}.")
    for name, content in files.upload().items():
        (folder / Path(name).name).write_bytes(content)


def hub_name(name: str) -> tuple[str, str]:
    """The data set and the part of it that `hf:owner/name/part` names; the part may be empty."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    own, _, part = rest.partition("/")
    return f"{owner}/{own}" if own else owner, part


def hub_files(name: str) -> list[Path]:
    """The files of the training split of a Hub's data set, as `datasets` tells them.

    Raises `UserError` if it cannot be had, or has several parts of which none is named.
    """
    repo, part = hub_name(name)
    try:
        kinds = [f"*.{kind}" for kind in DATA_KINDS]
        fetch = {"repo_type": "dataset", "allow_patterns": [*kinds, "README.md"]}
        folder = with_retries(lambda: snapshot_download(repo, **fetch))
        parts = datasets.get_dataset_config_names(folder)
        which = part or datasets.get_dataset_default_config_name(folder)
        known = which in parts
        found = datasets.load_dataset_builder(folder, which).config.data_files if known else {}
    except Exception as error:
        raise UserError(
            f"data_files = '{name}': the Hub's data set cannot be had ({short(error)}). "
            "Is the name right, and may your token read it?"
        ) from None
    if not known:
        told = "\n".join(f"  data_files = '{HUB}{repo}/{each}'" for each in parts)
        raise UserError(f"data_files = '{name}': name one of its parts:\n{told}")
    if "train" not in found:
        raise UserError(f"data_files = '{name}' has no split 'train', only {list(found)}")
    return [Path(file) for file in found["train"]]


def other_archive(stream: BinaryIO) -> str:
    """What a zip archive is that is no .xlsx, and what to do; empty for one that may be."""
    try:
        names = zipfile.ZipFile(stream).namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return ""
    known = next((told for name, told in ARCHIVES.items() if name in names), None)
    return "a zip archive: unpack it" if known is None else known


def why_old_office(data: bytes) -> str:
    """What a file of Excel is that is not read: behind a password, or an old one."""
    if "EncryptedPackage".encode("utf-16-le") in data:
        return "protected by a password: open it in Excel, remove the password and save it"
    return "an old Excel file: save it as .xlsx"


def utf16_codec(head: bytes) -> str:
    """The codec of a UTF-16 file that begins with `head`; empty if it is not UTF-16.

    Without a byte-order mark: in the first character, an ASCII one, the high byte is zero.
    """
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    if head[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if len(head) > 1 and head[:1] == b"\0" else ""


def separator_of(head: str) -> tuple[bool, str]:
    """Whether the first line says the separator ("sep=;", as for Excel), and the separator.

    Else it is what stands most often in the heading, outside quotes.
    """
    if said := re.match(r'"?sep=([^\s"]|\t)"?\r?\n', head, re.IGNORECASE):
        return True, said[1]
    lines = re.sub('"[^"]*"', lambda cell: "text" * (cell[0] != '""'), head).split("\n")
    heading = next((line for line in lines if line.strip(" ,;|\t\r")), lines[0])
    return False, max(",;\t|", key=heading.count)
