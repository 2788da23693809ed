"""Copies of checkpoints and of the finished adapter on Drive or on the Hub."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from finetune.files import SEAL, checkpoints, is_ours, new_folder
from finetune.hub import commit_folder, ensure_repo, hub_api, hub_repo_id, with_retries
from finetune.machine import short
from qlora_helpers import Settings, UserError, locate


def drive_folder(settings: Settings) -> Path:
    """Where this run's copies are on Google Drive."""
    return locate("/content/drive/MyDrive") / "qlora_checkpoints" / settings.run_name


def superseded(names: Iterable[str], folder: Path) -> list[str]:
    """Copies to remove once `folder` is there too: of checkpoints no longer beside it."""
    return [
        n for n in names if re.fullmatch(r"checkpoint-\d+", n) and not (folder.parent / n).exists()
    ]


def back_up(settings: Settings, folder: Path) -> None:
    """Copy a checkpoint or the final model to where `backup_to` says.

    A failure is told and costs nothing else.
    """
    if settings.backup_to == "none":
        return
    try:
        where = (
            copy_to_drive(settings, folder)
            if settings.backup_to == "drive"
            else copy_to_hub(settings, folder)
        )
        print(f"{folder.name} is copied to {where}")
    except Exception as error:
        print(
            f"{folder.name} is NOT copied to {settings.backup_to} ({short(error)}). "
            f"It is safe here: {folder}"
        )


def copy_to_drive(settings: Settings, folder: Path) -> Path:
    """Copy to the run's folder on Drive; returns that."""
    drive = drive_folder(settings)
    if not drive.parent.parent.is_dir():
        raise FileNotFoundError(f"Drive is not mounted at {drive.parent.parent}")
    drive.mkdir(parents=True, exist_ok=True)
    with new_folder(drive / folder.name, purpose_of(folder.name), aside=True) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
    for name in superseded([path.name for path in checkpoints(drive)], folder):
        if is_ours(drive / name, "checkpoint"):
            shutil.rmtree(drive / name, ignore_errors=True)
    return drive


def purpose_of(name: str) -> str:
    """What a run's folder of this name is sealed for."""
    return "adapter" if name == "final_model" else "checkpoint"


def backup_repo(settings: Settings, api: HfApi) -> str:
    """The repository for copies: one of its own, always private.

    A branch of the adapter's repository would be as public as that.
    """
    return hub_repo_id(settings, api.whoami()["name"]) + "-checkpoints"


def copy_to_hub(settings: Settings, folder: Path) -> str:
    """Add the folder and remove the superseded ones in one commit: no copy is ever half there.

    Returns the repository. A checkpoint's optimizer and random states are pickles of torch, without
    which nothing resumes: they go to this private repository alone, and are loaded with
    `weights_only`.
    """
    api = hub_api()
    repo = with_retries(lambda: backup_repo(settings, api))
    ensure_repo(api, repo, private=True)
    names = with_retries(lambda: api.list_repo_files(repo))
    there = {name.split("/")[0] for name in names if name.endswith(f"/{SEAL}")}
    gone = [f"{name}/*" for name in superseded(there, folder)]
    commit_folder(api, repo, folder.parent, [f"{folder.name}/*"], gone or None)
    return f"{api.endpoint}/{repo}"


def fetch_backup(settings: Settings) -> None:
    """Bring the copies of this run back to a machine that has none.

    They are checked like all others afterwards. Raises `UserError` if the Hub cannot say whether
    there are any: beginning anew could replace them.
    """
    if settings.backup_to == "drive":
        copies = drive_folder(settings)
        for folder in [*checkpoints(copies), *copies.glob("final_model")]:
            place, purpose = settings.run_dir / folder.name, purpose_of(folder.name)
            with new_folder(place, purpose, aside=True) as work:
                shutil.copytree(folder, work, dirs_exist_ok=True)
    if settings.backup_to != "hub":
        return
    api = hub_api()
    try:
        repo = with_retries(lambda: backup_repo(settings, api))
        names = [file.rfilename for file in with_retries(lambda: api.model_info(repo)).siblings]
        # `snapshot_download` would take a Hub that does not answer for an empty repository.
        for name in names:
            if re.match(r"checkpoint-\d+/|final_model/", name):
                with_retries(
                    functools.partial(api.hf_hub_download, repo, name, local_dir=settings.run_dir)
                )
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise UserError(
            f"The Hub cannot be asked for this run's checkpoints ({short(error)}). "
            "Run this cell again later; or set backup_to = 'none', to begin without them."
        ) from None
