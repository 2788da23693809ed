"""Section 4: whatever could fail later is asked now."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from finetune.backup import drive_folder
from finetune.files import checkpoints
from finetune.hub import hub_api, hub_repo_id, status_of
from finetune.machine import resolve_precision
from qlora_helpers import Settings, UserError, is_local, listed


def check_base_model(settings: Settings, token: str | None) -> tuple[str, str]:
    """Ask the Hub whether this token may download the base model."""
    name = settings.base_model
    if is_local(name):
        return "✓", f"base model {name}: nothing to download from the Hub"
    try:
        hub_api(token).auth_check(name)
    except GatedRepoError:
        return (
            "✗",
            (
                f"base model {name} is gated: accept its terms at https://huggingface.co/{name} "
                "and "
                "run this again"
            ),
        )
    except RepositoryNotFoundError:
        return (
            "✗",
            (
                f"base model {name}: no such folder here, and no such repository that this token "
                "may "
                "read"
            ),
        )
    except Exception as error:
        return (
            "?",
            (
                f"base model {name}: the Hub cannot be asked ({type(error).__name__}); an earlier "
                "download works"
            ),
        )
    return "✓", f"base model {name} can be downloaded"


def check_push(settings: Settings, token: str | None) -> tuple[str, str]:
    """Ask the Hub who this token belongs to, whether it may write, and whose the target repository
    is.
    """
    if not settings.push_to_hub:
        return "✓", "push_to_hub is off: the adapter stays here"
    if not token:
        return (
            "✗",
            (
                "push_to_hub is on but there is no token: add the secret HF_TOKEN, or set "
                "push_to_hub = False"
            ),
        )
    try:
        api = hub_api(token)
        user = api.whoami()
        return check_writing(user, repo := hub_repo_id(settings, user["name"])) or check_repo(
            settings, api, repo
        )
    except Exception as error:
        if status_of(error) in (401, 403):
            return (
                "✗",
                (
                    "the Hub refuses this token: make a new one at "
                    "https://huggingface.co/settings/tokens"
                ),
            )
        said = (
            f"the Hub answered {status_of(error)}"
            if status_of(error)
            else f"no Hub ({type(error).__name__})"
        )
        return "?", f"{said}: pushing will be tried after training"


def check_writing(user: Mapping[str, Any], repo: str) -> tuple[str, str] | None:
    """What forbids this user's token to write to `repo`, as far as `whoami` tells; None if nothing
    does.

    Fields as in https://huggingface.co/docs/hub/api: `auth.accessToken.role`, `fineGrained.scoped`,
    `orgs`.
    """
    owner, access = repo.split("/")[0], user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        return (
            "✗",
            (
                "this token can only read: make one with write access at "
                "https://huggingface.co/settings/tokens"
            ),
        )
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user["name"] and roles.get(owner, "none" if owner not in roles else None) in (
        "none",
        "read",
    ):
        text = (
            f"hub_repo = '{repo}': {user['name']} may not write to {owner}; use your own "
            "name, or leave it empty"
        )
        return "✗", text
    scopes = access.get("fineGrained", {}).get("scoped", [])
    may_write = [
        s
        for s in scopes
        if s["entity"].get("name") in (owner, repo) and "repo.write" in s["permissions"]
    ]
    if access.get("role") == "fineGrained" and not may_write:
        return (
            "!",
            (
                f"this fine-grained token does not list write access to {owner}'s repositories: "
                "pushing may fail"
            ),
        )
    return None


def check_repo(settings: Settings, api: HfApi, repo: str) -> tuple[str, str]:
    """Whether the target repository is there already, and is as private as the settings want it."""
    private = "private" if settings.hub_private else "PUBLIC"
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        return "✓", f"will push to {repo}, a new repository ({private})"
    if settings.hub_private and not found.private:
        return (
            "✗",
            (
                f"{repo} exists and is PUBLIC: choose another hub_repo, or set hub_private = False "
                "if that is meant"
            ),
        )
    now = "private" if found.private else "PUBLIC"
    return "!", f"will push to {repo}, which exists ({now}): its files are replaced"


def check_machine(settings: Settings) -> Iterator[tuple[str, str]]:
    """The GPU and its precision, and what is left of an earlier run of the same name."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        precision, _ = resolve_precision(settings.bf16)
        yield "✓", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB, computing in {precision}"
    elif is_small(settings.base_model):
        yield "✓", "no GPU, and none needed for a base model this small"
    else:
        text = (
            f"no GPU, and {settings.base_model} would need days without one. Colab: Runtime › "
            "Change runtime type "
        )
        yield "✗", text + "› T4 GPU or better. To try the notebook without: base_model = 'embedded'"
    if settings.final_model.exists():
        text = (
            f"a run named {settings.run_name} is finished already: with the same data and "
            "settings it is not trained "
        )
        yield "!", text + "again, with others its zip stays and its folder is replaced"
    elif found := checkpoints(settings.run_dir):
        text = (
            f"{settings.run_name} was begun before: its checkpoints ({found[0].name}) are "
            "looked at in section 11"
        )
        yield "!", text


def base_model_gb(settings: Settings, token: str | None) -> tuple[float, float, str]:
    """Size of the base model's weights, how much of it is still to be downloaded (GiB), and where
    the size is from.
    """
    if is_local(settings.base_model):
        size = (
            sum(path.stat().st_size for path in Path(settings.base_model).glob("*.safetensors"))
            / 2**30
        )
        return size or 0.3, 0.3 if settings.base_model == "embedded" else 0, "on disk"
    here = settings.cache_dir / f"models--{settings.base_model.replace('/', '--')}" / "blobs"
    have = sum(path.stat().st_size for path in here.glob("*")) / 2**30
    try:
        files = hub_api(token).model_info(settings.base_model, files_metadata=True).siblings
        safe, whole = r"model.*\.safetensors", r"(model|pytorch_model).*\.(safetensors|bin)"
        sizes = [
            [f.size or 0 for f in files if re.fullmatch(kind, f.rfilename)]
            for kind in (safe, whole)
        ]
        size, source = sum(sizes[0] or sizes[1]) / 2**30, "as the Hub says"
    except Exception:
        size, source = 14.5, "taking it for a 7B model, because the Hub cannot be asked"
    return size, max(0.0, size - have), source


def check_room(settings: Settings, token: str | None) -> Iterator[tuple[str, str]]:
    """Free disk for download, three checkpoints and the merge, and main memory for the merge."""
    base, download, source = base_model_gb(settings, token)
    # A checkpoint holds the adapter in fp32 and AdamW's two moments: 0.33 GB for r = 32 beside a 7B
    # model's 14.5 GB.
    saved = 3 * (0.05 + 0.02 * base * settings.lora_r / 32)
    here = next(folder for folder in settings.run_dir.parents if folder.exists())
    need, free = download + saved + settings.merge * base, shutil.disk_usage(here).free / 2**30
    parts = (
        f"download {download:.1f}, checkpoints {saved:.1f}"
        + f", merged model {base:.1f}" * settings.merge
    )
    text = (
        f"{free:,.1f} GB of disk free, about {need:.1f} GB needed ({parts}; base model "
        f"{base:.1f}, {source})"
    )
    yield (
        ("✓", text)
        if free > need
        else ("✗", f"{text}: free some, or change the folders in section 2")
    )
    if settings.merge:
        # Written shard by shard; the check loads it whole, onto the GPU where there is one, what
        # does not fit to disk.
        held, memory = (
            4 + (0 if torch.cuda.is_available() else 1.3 * base),
            psutil.virtual_memory().total / 2**30,
        )
        text = f"{memory:.1f} GB of main memory, and the merge holds about {held:.1f} GB"
        yield (
            ("✓", text)
            if memory > held
            else ("✗", f"{text}: set merge = False, or take a machine with more")
        )


def check_backup(settings: Settings, token: str | None) -> tuple[str, str]:
    """Whether checkpoints can be copied to where `backup_to` says."""
    if settings.backup_to == "none":
        text = (
            "backup_to is 'none': if this machine goes away, so does the training ('drive' or "
            "'hub' keep copies)"
        )
        return "!", text
    if settings.backup_to == "hub":
        told = (
            "a private repository on the Hub"
            if token
            else "backup_to = 'hub' needs the secret HF_TOKEN"
        )
        return ("✓", f"checkpoints are copied to {told}") if token else ("✗", told)
    drive = drive_folder(settings).parent.parent
    if not drive.is_dir():
        return (
            "✗",
            (
                f"backup_to = 'drive', but there is no {drive}: run section 3 again and allow "
                "Drive, "
                "or set 'hub'"
            ),
        )
    return "✓", f"checkpoints are copied to {drive_folder(settings)}"


def is_small(base_model: str) -> bool:
    """Whether a CPU can train this base model: the embedded one, or a folder with under 4 GB of
    weights.
    """
    weights = [path.stat().st_size for path in Path(base_model).glob("*.safetensors")]
    return base_model == "embedded" or 0 < sum(weights) < 4 * 2**30


def preflight(settings: Settings, token: str | None) -> None:
    """Ask now for everything that could fail later: one line each, ✓ or what to do.

    Raises `UserError` if any line is ✗. A `?` is what cannot be known offline, a `!` what you may
    want to know.
    """
    lines = [
        *check_machine(settings),
        *check_room(settings, token),
        check_base_model(settings, token),
    ]
    lines += [check_backup(settings, token), check_push(settings, token)]
    print("\n".join(f"{mark} {text}" for mark, text in lines))
    if failed := [text for mark, text in lines if mark == "✗"]:
        raise UserError(listed("Before training can start:", failed))
