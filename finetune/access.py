"""Section 4: what the Hub lets this token do: read the base model, write to a repository."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from finetune.base_model import cached_gb, cached_where
from finetune.files import Record
from finetune.hub import MERGED_FILES, PUSHED_FILES, hub_api, hub_repo_id, status_of
from finetune.machine import short
from qlora_helpers import EMBEDDED, NAME, Settings, first_of, is_local, local_base

TOKENS = "https://huggingface.co/settings/tokens"
TOO_LONG = "the Hub takes no name like {repo}, which may have 96 characters: shorten run_name"
Line = tuple[str, str]  # ✓, ✗, ! or ?, and what is said


def check_base_model(settings: Settings, token: str | None) -> Line:
    """Whether the base model is here, or may be downloaded with this token."""
    name = settings.base_model
    if name == "embedded":
        return "✓", "base model embedded: nothing to download from the Hub"
    if url := re.match(r"https?://[^/]+/([^/]+/[^/?#]+)", name):
        return "✗", f"base_model = {name!r} is an address; the Hub's id is {url[1]!r}"
    if folder := local_base(name):
        return check_base_folder(name, folder)
    if not re.fullmatch(f"({NAME}/)?{NAME}", name) or name.endswith(".git"):
        return "✗", f"base_model = {name!r} is no folder here, and cannot be the id of a model"
    if cached_where(settings):
        return "✓", f"base model {name} is in the cache here: nothing to download"
    return ask_for_base_model(name, token)


def check_base_folder(name: str, folder: Path) -> Line:
    """Whether a local base model's folder has what it takes to be loaded."""
    told = f"base_model = {name!r}"
    if not folder.is_dir():
        return "✗", f"{told}: there is no folder {folder}"
    hides = "" if name.startswith(("/", ".", "~")) else " It also hides the Hub's model of that id."
    wanted = {"config.json": "config.json", "*.safetensors": "weights", "tokenizer*": "tokenizer"}
    lacking = [what for part, what in wanted.items() if not any(folder.glob(part))]
    if "weights" in lacking and (any(folder.glob("*.bin")) or any(folder.glob("*.gguf"))):
        lacking.remove("weights")
    if lacking:
        return "✗", f"{told}: the folder {folder} has no {', no '.join(lacking)}.{hides}"
    if why := why_unreadable(folder):
        return "✗", f"{told}: {why}"
    return "✓", f"base model {name}: nothing to download from the Hub"


def why_unreadable(folder: Path) -> str:
    """Which file of a model's folder is missing or damaged; empty if none is.

    Of weights the header alone is read, which tells how long the file must be.
    """
    try:
        for name in ("config.json", "model.safetensors.index.json"):
            if (file := folder / name).exists():
                named = json.loads(file.read_text(encoding="utf-8")).get("weight_map", {})
                if lacking := sorted({*named.values()} - {path.name for path in folder.iterdir()}):
                    return f"{folder} lacks {first_of(lacking)}, which {name} names"
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        return f"{file} cannot be read ({short(error)}); fetch it again"
    return ""


def ask_for_base_model(name: str, token: str | None) -> Line:
    """Ask the Hub whether this token may download the base model."""
    try:
        hub_api(token).auth_check(name)
    except GatedRepoError:
        told = f"accept its terms at https://huggingface.co/{name} and run this again"
        return "✗", f"base model {name} is gated: {told}" + ", with a token" * (not token)
    except RepositoryNotFoundError:
        told = "no such repository that this token may read" if token else "no such public one"
        return "✗", f"base model {name}: no such folder here, and {told}"
    except Exception as error:
        if line := refused(error, f"may not read {name}"):
            return line
        told = f"the Hub cannot be asked ({type(error).__name__}) and no copy is here"
        return "?", f"base model {name}: {told}; downloading it will be tried"
    return "✓", f"base model {name} can be downloaded"


def refused(error: Exception, what: str) -> Line | None:
    """The line for a Hub that does not know the token (401), or forbids it `what` (403)."""
    if status_of(error) == 401:
        told = "it is wrong, expired or deleted"
        return "✗", f"the Hub does not accept this token (401), {told}: make a new one at {TOKENS}"
    if status_of(error) == 403:
        return "✗", f"this token {what} (403): give it that right, or make another, at {TOKENS}"
    return None


def check_push(settings: Settings, token: str | None) -> Line:
    """Whose token this is, whether it may write, and whose the target repository is."""
    if not settings.push_to_hub:
        return "✓", "push_to_hub is off: the adapter stays here"
    if not token:
        return "!", "push_to_hub is on, but there is no token: the adapter will stay here"
    return check_target(settings, token)


def check_merged(settings: Settings, token: str | None, size: float) -> Iterator[Line]:
    """Where the merged model, of `size` GB, is pushed to, if it is."""
    if settings.merge != "push":
        return
    if not token:
        yield "!", "merge is 'push', but there is no token: the merged model will stay here"
        return
    mark, text = check_target(settings, token, "-merged")
    yield mark, f"the merged model, {size:.1f} GB: {text}"


def check_target(settings: Settings, token: str, end: str = "") -> Line:
    """Whether this token may write to the repository of this run, with `end` behind its name."""
    try:
        api = hub_api(token)
        user = api.whoami()
        repo = hub_repo_id(settings, user["name"]) + end
        return check_writing(user, repo) or check_repo(settings, api, repo, bool(end))
    except HFValidationError:
        return "✗", TOO_LONG.format(repo=repo)
    except Exception as error:
        if line := refused(error, "may not write to the Hub"):
            return line
        status = status_of(error)
        said = f"the Hub answered {status}" if status else f"no Hub ({type(error).__name__})"
        return "?", f"{said}: pushing will be tried after training"


def check_copies(settings: Settings, token: str | None) -> Line:
    """Whether checkpoints can be copied to a private repository on the Hub."""
    if not token:
        return "✗", "backup_to = 'hub' needs the secret HF_TOKEN; or set 'drive' or 'none'"
    try:
        api = hub_api(token)
        user = api.whoami()
        repo = hub_repo_id(settings, user["name"]) + "-checkpoints"
        return check_writing(user, repo) or check_private(api, repo)
    except HFValidationError:
        return "✗", TOO_LONG.format(repo=repo)
    except Exception as error:
        line = refused(error, "may not write to the Hub, which backup_to = 'hub' needs")
        return line or ("?", f"no Hub ({type(error).__name__}): copying checkpoints will be tried")


def check_private(api: HfApi, repo: str) -> Line:
    """Whether the repository for checkpoints is private, or will be."""
    try:
        if not api.model_info(repo).private:
            told = "make it private in its settings on the Hub, or choose another hub_repo"
            return "✗", f"{repo}, to which checkpoints are copied, exists and is PUBLIC: {told}"
    except RepositoryNotFoundError:
        pass
    return "✓", f"checkpoints are copied to the private repository {repo}"


def check_writing(user: Record, repo: str) -> Line | None:
    """What forbids this user's token to write to `repo`, as far as `whoami` tells; else None.

    Fields as in https://huggingface.co/docs/hub/api: `auth.accessToken.role`, `fineGrained.scoped`,
    `orgs`.
    """
    owner, access = repo.split("/")[0], user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        return "✗", f"this token can only read: make one with write access at {TOKENS}"
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    role = roles.get(owner) if owner in roles else "none"
    if owner != user["name"] and role in ("none", "read"):
        told = "use your own name, or leave it empty"
        return "✗", f"hub_repo = '{repo}': {user['name']} may not write to {owner}; {told}"
    scopes = access.get("fineGrained", {}).get("scoped", [])
    write = [s for s in scopes if {"repo.write", "repo.content.write"} & {*s["permissions"]}]
    if access.get("role") != "fineGrained":
        return None
    if not write:
        return "✗", f"this fine-grained token may read but not write: change it at {TOKENS}"
    if not any(s["entity"].get("name") in (owner, repo) for s in write):
        told = f"write access to {owner}'s repositories"
        return "!", f"this fine-grained token does not list {told}: pushing may fail"
    return None


def check_repo(settings: Settings, api: HfApi, repo: str, whole: bool) -> Line:
    """Whether the target repository is there, as private as wanted, and what else is in it.

    `whole` is whether a whole model is pushed to it, not an adapter.
    """
    private = "private" if settings.hub_private else "PUBLIC"
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        return "✓", f"will push to {repo}, a new repository ({private})"
    if settings.hub_private and not found.private:
        told = "choose another hub_repo, or set hub_private = False if that is meant"
        return "✗", f"{repo} exists and is PUBLIC: {told}"
    now = "private" if found.private else "PUBLIC"
    names = [file.rfilename for file in found.siblings or []]
    if others := other_files(names, PUSHED_FILES + MERGED_FILES * whole):
        what = "a README.md and a model" if whole else "a README.md and an adapter"
        told = f"{what} there are replaced, beside other files that stay: {others}"
        return "!", f"will push to {repo}, which exists ({now}): {told}"
    return "!", f"will push to {repo}, which exists ({now}): its files are replaced"


def other_files(names: Iterable[str], pushed: Sequence[str]) -> str:
    """Those of a repository's files that a push of `pushed` does not replace; empty if none."""
    others = [n for n in names if not any(fnmatch(n, part) for part in pushed)]
    return first_of(sorted(set(others) - {".gitattributes"}), 5)


def base_model_gb(settings: Settings, token: str | None) -> tuple[float, float, str]:
    """The base model's weights in GB, those still to be downloaded, and where that is from."""
    name = settings.base_model
    if folder := local_base(name):
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
        return sum(path.stat().st_size for path in files) / 1e9, 0.0, "on disk"
    if name == "embedded":
        made = (settings.cache_dir / EMBEDDED / "config.json").exists()
        return 0.3, 0.0 if made else 0.3, "from a package"
    if cached_where(settings):
        return cached_gb(settings), 0.0, "in the cache"
    try:
        files = hub_api(token).model_info(name, files_metadata=True).siblings
        safe, whole = r"model.*\.safetensors", r"(model|pytorch_model).*\.(safetensors|bin)"
        sizes = [
            [f.size or 0 for f in files if re.fullmatch(kind, f.rfilename)]
            for kind in (safe, whole)
        ]
        size = sum(sizes[0] or sizes[1]) / 1e9
        return size, max(0.0, size - cached_gb(settings)), "as the Hub says"
    except Exception:
        told = "taking it for a 7B model, because the Hub cannot be asked"
        return 14.5, max(0.0, 14.5 - cached_gb(settings)), told


@functools.lru_cache(4)
def base_license(base_model: str) -> str | None:
    """The licence that the Hub names for a base model; None where it is not known."""
    if is_local(base_model):
        return "apache-2.0" if base_model == "embedded" else None
    try:
        card = hub_api().model_info(base_model).card_data
        return card.license if card and isinstance(card.license, str) else None
    except Exception:
        return None
