"""Copies of checkpoints and of the finished adapter on Drive or on the Hub."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from finetune.files import SEAL, Record, checkpoints, is_ours, new_folder, read_seal, unused
from finetune.hub import commit_folder, ensure_repo, hub_api, hub_repo_id, with_retries
from finetune.identity import run_of
from finetune.machine import short
from qlora_helpers import Settings, UserError, locate


def drive_folder(settings: Settings) -> Path:
    """Where this run's copies are on Google Drive."""
    return locate("/content/drive/MyDrive") / "qlora_checkpoints" / settings.run_name


def purpose_of(name: str) -> str:
    """What a run's folder of this name is sealed for."""
    return "adapter" if name == "final_model" else "checkpoint"


def step_of(name: str) -> int:
    """The step of a folder that is called `checkpoint-N`; -1 for any other."""
    found = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(found[1]) if found else -1


def told_in(folder: Path) -> Record:
    """A folder's `run.json`; empty if there is none."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_readable(folder: Path) -> bool:
    """Whether `run.json` of a sealed copy is whole; Drive can keep a file without its content."""
    try:
        return (folder / SEAL).is_file() and isinstance(told_in(folder), dict)
    except ValueError:
        return False


class OnDrive:
    """A run's copies on Google Drive."""

    def __init__(self, settings: Settings):
        self.folder = drive_folder(settings)

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        """The copies that are there: checkpoints, the highest step first, and the adapter."""
        found = [*checkpoints(self.folder), self.folder / "final_model"]
        return [path.name for path in found if is_readable(path)]

    def told(self, name: str) -> Record:
        """The `run.json` of one."""
        return told_in(self.folder / name)

    def keep_apart(self) -> str:
        """Move all of them out of the way, and return where they are."""
        place = unused(self.folder / "kept")
        place.mkdir()
        for name in self.names():
            (self.folder / name).rename(place / name)
        return str(place)

    def add(self, folder: Path, gone: Iterable[str]) -> None:
        """Copy a folder there, then remove the superseded ones."""
        home = self.folder.parent.parent
        if not home.is_dir():
            raise FileNotFoundError(f"Drive is not mounted at {home}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_folder(self.folder / folder.name, purpose_of(folder.name), aside=True) as work:
            shutil.copytree(folder, work, dirs_exist_ok=True)
        for name in gone:
            if is_ours(self.folder / name, "checkpoint"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def fetch(self, name: str, run_dir: Path) -> None:
        """Copy one into a run's folder."""
        with new_folder(run_dir / name, purpose_of(name), aside=True) as work:
            shutil.copytree(self.folder / name, work, dirs_exist_ok=True)


class OnHub:
    """A run's copies in a private Hub repository of their own.

    A branch of the adapter's repository would be as public as that. A checkpoint's optimizer and
    random states are pickles of torch, without which nothing resumes: they go to this private
    repository alone, and are loaded with `weights_only`.
    """

    def __init__(self, settings: Settings, token: str | None = None):
        self.api = hub_api(token)
        self.repo = with_retries(lambda: backup_repo(settings, self.api))

    def __str__(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    def files(self) -> list[str]:
        """All files of the repository; none if it is not there.

        `snapshot_download` would take a Hub that does not answer for an empty repository.
        """
        try:
            found = with_retries(lambda: self.api.model_info(self.repo)).siblings
        except RepositoryNotFoundError:
            return []
        return [file.rfilename for file in found]

    def names(self) -> list[str]:
        """The copies that are there: checkpoints, the highest step first, and the adapter."""
        found = [name.removesuffix(f"/{SEAL}") for name in self.files() if name.endswith(SEAL)]
        known = [name for name in found if step_of(name) >= 0 or name == "final_model"]
        return sorted(known, key=step_of, reverse=True)

    def told(self, name: str) -> Record:
        """The `run.json` of one."""
        with tempfile.TemporaryDirectory() as place:
            self.download(f"{name}/run.json", Path(place))
            return told_in(Path(place) / name)

    def download(self, file: str, place: Path) -> None:
        """One file, to its name under `place`."""
        with_retries(functools.partial(self.api.hf_hub_download, self.repo, file, local_dir=place))

    def keep_apart(self) -> str:
        """Leave them in a branch of their own, and return its name."""
        branch = f"kept-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        with_retries(lambda: self.api.create_branch(self.repo, branch=branch, exist_ok=True))
        gone = [CommitOperationDelete(f"{name}/", is_folder=True) for name in self.names()]
        message = f"Keep another run's copies in {branch}"
        with_retries(lambda: self.api.create_commit(self.repo, gone, commit_message=message))
        return f"{self}, branch {branch}"

    def add(self, folder: Path, gone: Iterable[str]) -> None:
        """Add a folder and remove the superseded ones in one commit: no copy is ever half there."""
        ensure_repo(self.api, self.repo, private=True)
        removed = [f"{name}/*" for name in gone]
        commit_folder(self.api, self.repo, folder.parent, [f"{folder.name}/*"], removed or None)

    def fetch(self, name: str, run_dir: Path) -> None:
        """Download one into a run's folder."""
        with new_folder(run_dir / name, purpose_of(name), aside=True) as work:
            for file in self.files():
                if file.startswith(f"{name}/"):
                    self.download(file, work / "fetched")
            for part in (work / "fetched" / name).iterdir():
                part.rename(work / part.name)
            shutil.rmtree(work / "fetched")


def backup_repo(settings: Settings, api: HfApi) -> str:
    """The repository for copies: one of its own, always private."""
    return hub_repo_id(settings, api.whoami()["name"]) + "-checkpoints"


def copies_of(settings: Settings, token: str | None = None) -> OnDrive | OnHub:
    """The copies where `backup_to` says, which is not "none"."""
    return OnDrive(settings) if settings.backup_to == "drive" else OnHub(settings, token)


def superseded(names: Iterable[str], folder: Path) -> list[str]:
    """Copies to remove once `folder` is there too: of earlier steps that are no longer beside it.

    A later step is never removed: this machine may have begun from an older copy.
    """
    last = max([step_of(folder.name), *(step_of(path.name) for path in checkpoints(folder.parent))])
    return [n for n in names if 0 <= step_of(n) < last and not (folder.parent / n).exists()]


def back_up(settings: Settings, folder: Path) -> None:
    """Copy a checkpoint or the final model to where `backup_to` says.

    Another run's copies are kept apart first. A failure is told and costs nothing else.
    """
    if settings.backup_to == "none":
        return
    try:
        copies = copies_of(settings)
        names, mine = copies.names(), run_of(told_in(folder))
        if any(run_of(copies.told(name)) != mine for name in names):
            print(f"Another run's copies are kept in {copies.keep_apart()}")
            names = []
        copies.add(folder, superseded(names, folder))
        print(f"{folder.name} is copied to {copies}")
    except Exception as error:
        print(
            f"{folder.name} is NOT copied to {settings.backup_to} ({short(error)}). "
            f"It is safe here: {folder}"
        )


def fetch_backup(settings: Settings, here: Record | None = None) -> bool:
    """Bring those copies of this run that are newer than what is here; returns whether any were.

    `here` is the `run.json` of the newest that is here. They are checked like all others
    afterwards. Raises `UserError` if the Hub cannot say whether there are any: beginning anew could
    replace them.
    """
    if settings.backup_to == "none":
        return False
    try:
        copies = copies_of(settings)
        new = newer(settings, copies, here or {})
        for name in new:
            copies.fetch(name, settings.run_dir)
    except Exception as error:
        raise UserError(
            f"The {settings.backup_to.capitalize()} cannot be asked for this run's checkpoints "
            f"({short(error)}). Run this cell again later; or set backup_to = 'none', to go on "
            "without them."
        ) from None
    return bool(new)


def newer(settings: Settings, copies: OnDrive | OnHub, here: Record) -> list[str]:
    """The copies to fetch: what is not here, if the run is the same and is further on there."""
    names = copies.names()
    if here and names and run_of(copies.told(names[0])) != run_of(here):
        print(f"The copies in {copies} are another run's, and not used.")
        return []
    new = [name for name in names if not read_seal(settings.run_dir / name)]
    whole = [path.name for path in checkpoints(settings.run_dir) if read_seal(path)]
    last = max(map(step_of, whole), default=-1)
    further = "final_model" in new or any(step_of(name) > last for name in new)
    return new if further or not here else []


def begin_copies(settings: Settings) -> None:
    """Keep the copies that are there apart from those of a run that begins anew.

    A failure is told: `back_up` looks again.
    """
    if settings.backup_to == "none":
        return
    try:
        copies = copies_of(settings)
        if copies.names():
            print(f"The copies that were there are kept in {copies.keep_apart()}")
    except Exception as error:
        print(f"The copies elsewhere could not be looked at ({short(error)}).")


def what_is_there(settings: Settings, token: str | None) -> str:
    """What is copied already under this run's name, and its settings if they were others."""
    copies = copies_of(settings, token)
    names = copies.names()
    if not names:
        return ""
    was, now = copies.told(names[0]).get("fingerprint", {}), settings.model_dump()
    known = [name for name in now if name in was and not name.startswith("base_")]
    other = [f"{name} was {was[name]!r}" for name in known if was[name] != now[name]]
    differs = f", with other settings ({'; '.join(other[:5])})" * bool(other)
    return f"{', '.join(names)} of a run of this name{differs}"
