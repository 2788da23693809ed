"""The thin helper under `finetune_mistral.ipynb`: checked settings, paths, prompts as text.

Imports neither torch nor the rooms in `finetune/`, which stand behind the notebook's cells.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field
from pydantic_core import ErrorDetails


class UserError(Exception):
    """A mistake in the settings or the data, told in plain words and shown without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows in place of a traceback."""
        return [f"\033[1;31m{self}\033[0m"]


def listed(title: str, problems: Sequence[str], shown: int = 10, total: int | None = None) -> str:
    """`title`, then the first `shown` problems a line each, then how many more there are.

    `total` is how many there are, where `problems` has the first alone.
    """
    rest = (len(problems) if total is None else total) - shown
    more = [f"… and {rest:,} more"] if rest > 0 else []
    return "\n  • ".join([title, *problems[:shown], *more])


def first_of(names: Sequence[str], shown: int = 10) -> str:
    """The first `shown` names with commas between them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def many(count: float, what: str) -> str:
    """A number and what it counts: "1 row", "1,000 rows", "2.5 epochs"."""
    number = f"{int(count):,}" if count == int(count) else f"{count:g}"
    return f"{number} {what}" + ("" if count == 1 else "s")


def on_colab() -> bool:
    """Whether this kernel is Colab's (its own package is loaded before the first cell runs)."""
    return "google.colab" in sys.modules


def on_kaggle() -> bool:
    """Whether this kernel is Kaggle's."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def content_root() -> Path:
    """Where `/content` is: itself on Colab, `/kaggle/working` on Kaggle, else `content/` here."""
    if on_colab():
        return Path("/content")
    return Path("/kaggle/working") if on_kaggle() else Path.cwd() / "content"


def locate(path: str) -> Path:
    """`path` made absolute, a leading `/content` moved to `content_root()`."""
    inside = re.fullmatch(r"/content(?:/(.*))?", path)
    if inside:
        return content_root() / (inside[1] or "").lstrip("/")
    at_home = path == "~" or path.startswith("~/")
    return (Path(path).expanduser() if at_home else Path(path)).absolute()


# One plain name, as the Hub wants it: it holds no '/', no '..' and cannot leave its folder.
NAME = r"[A-Za-z0-9](?:(?:_+|[.-])?[A-Za-z0-9])*"
NAME_IN_WORDS = (
    "letters, digits and single '-', '.' or '_' between them, 96 at most, no blanks, not ending in "
    "'.git'"
)


# pydantic's kinds of error, and what a setting should be, in words that need no Python.
WANTED = {
    "float_type": "a number, as 0.5 or 2e-4 (no quotes)",
    "int_type": "a whole number, as 4 (no quotes)",
    "bool_type": "True or False (no quotes)",
    "string_type": "a text in quotes",
    "list_type": "a list, as ['a', 'b']",
    "string_too_short": "a text that is not empty",
    "too_short": "a list that is not empty",
}


def in_words(name: str, error: ErrorDetails) -> str:
    """What pydantic found wrong with a setting; a name's pattern in words."""
    if name == "export" and error["type"] == "list_type":
        return "it is a list, as ['gguf']"
    if error["type"] in WANTED:
        return f"input should be {WANTED[error['type']]}"
    if error["type"] not in ("string_pattern_mismatch", "string_too_long", "value_error"):
        return error["msg"].lower()
    if name == "export":
        return "each of them is 'base', 'gguf', or 'gguf:' with f16, bf16, f32 or q8_0"
    owner = "owner/name or a name alone: " if name == "hub_repo" else ""
    return f"it names a folder and a repository, so it may have {owner}{NAME_IN_WORDS}"


def either(told: Sequence[str]) -> str:
    """What is wrong with a setting by each of its types, as one sentence, nothing twice."""
    return " or ".join(dict.fromkeys(told)).replace(" or input should be ", " or ")


PathName = Annotated[str, Field(min_length=1)]


class Settings(pydantic.BaseModel, frozen=True, strict=True, str_strip_whitespace=True):
    """The values of section 2, checked. Make it with `from_cell`."""

    base_model: str = Field(min_length=1)
    base_adapter: str
    run_name: str = Field(pattern=f"^{NAME}$", max_length=96)
    data_files: PathName | Annotated[list[PathName], Field(min_length=1)]
    prompt_format: Literal["question-answer", "chat"]
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
    seed: int = Field(ge=0, lt=2**32)
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
    merge: bool | Literal["push"]
    export: list[Annotated[str, Field(pattern=r"^(base|gguf(:(f16|bf16|f32|q8_0))?)$")]]
    model_cache: str = Field(min_length=1)
    output_dir: str = Field(min_length=1)
    merged_dir: str = Field(min_length=1)

    @pydantic.field_validator("run_name", "hub_repo")
    @classmethod
    def is_no_git_address(cls, name: str) -> str:
        """`name` itself; raises `ValueError` for an ending that the Hub refuses."""
        if name.endswith(".git"):
            raise ValueError
        return name

    @classmethod
    def from_cell(cls, cell: Mapping[str, object]) -> Settings:
        """Settings from the cell's variables; raises `UserError` that names every mistake."""
        try:
            settings = cls.model_validate(
                {name: cell[name] for name in cls.model_fields if name in cell}
            )
        except pydantic.ValidationError as error:
            problems: dict[str, list[str]] = {}  # a setting may be of several types
            for each in error.errors():
                name = str(each["loc"][0])
                problems.setdefault(name, []).append(in_words(name, each))
            lines = [
                f"{name} = {cell[name]!r}: {either(told)}"
                if name in cell
                else f"{name}: put its line back"
                for name, told in problems.items()
            ]
            raise UserError(listed("Please correct section 2 and run it again:", lines)) from None
        logger = settings.report_to
        if logger in ("wandb", "trackio") and importlib.util.find_spec(logger) is None:
            raise UserError(
                f"report_to = {logger!r} needs a package that is not here. Run this in a cell of "
                f"its own:\n  %pip install {logger}"
            )
        return settings

    @property
    def effective_batch(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def needs_hub(self) -> bool:
        """Whether anything is read from or written to the Hub."""
        read = [self.base_model, self.base_adapter or "embedded"]
        data = any(name.startswith("hf:") for name in self.data_names)
        written = self.push_to_hub or self.backup_to == "hub" or self.merge == "push"
        return written or data or not all(map(is_local, read))

    @property
    def gguf(self) -> str:
        """The numbers' format of the GGUF files that are wanted; empty if none is."""
        found = [name for name in self.export if name.startswith("gguf")]
        return found[-1].partition(":")[2] or "f16" if found else ""

    @property
    def merges(self) -> bool:
        """Whether a merged model is made: it is asked for, or what the GGUF is to be made of."""
        alone = "base" in self.export and not self.use_rslora and not self.use_dora
        return bool(self.merge) or (bool(self.gguf) and not alone)

    @property
    def data_names(self) -> list[str]:
        """`data_files` as a list."""
        return [self.data_files] if isinstance(self.data_files, str) else self.data_files

    @property
    def data_places(self) -> list[Path | str]:
        """Where the rows are: paths and patterns here, and the Hub's data sets by their names."""
        return [name if name.startswith("hf:") else locate(name) for name in self.data_names]

    @property
    def run_dir(self) -> Path:
        """Everything this run writes: directly inside `output_dir`, for `run_name` is a name."""
        return locate(self.output_dir) / self.run_name

    @property
    def final_model(self) -> Path:
        """The trained adapter's folder."""
        return self.run_dir / "final_model"

    @property
    def cache_dir(self) -> Path:
        """Where base models are kept."""
        return locate(self.model_cache)

    def summary(self, precision: str) -> str:
        """What follows from the cell: numbers, paths; `precision` in words."""
        length = many(self.epochs, "epoch")
        if self.max_steps > 0:
            length = many(self.max_steps, "step")
        scale = self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)
        batch = f"{self.batch_size} × {self.gradient_accumulation}"
        return "\n".join(
            [
                f"Base model       {self.base_model}",
                f"LoRA             r {self.lora_r}, alpha {self.lora_alpha} (scale {scale:g})",
                f"Effective batch  {self.effective_batch} examples a step ({batch})",
                f"Training         {length}, learning rate {self.learning_rate:g}, cosine",
                f"Precision        {precision}",
                f"Data             {', '.join(map(str, self.data_places))}",
                f"Model cache      {self.cache_dir}",
                f"Run folder       {self.run_dir}",
                f"Adapter          {self.final_model}",
            ]
        )


def local_base(base_model: str) -> Path | None:
    """The folder that `base_model` names, there or not; None for the embedded model or a Hub id."""
    if base_model == "embedded":
        return None
    path = base_model.startswith(("/", "./", "../", "~")) or base_model in (".", "..")
    return locate(base_model) if path or Path(base_model).exists() else None


def is_local(base_model: str) -> bool:
    """Whether a base model needs no Hub: the embedded one, or a folder."""
    return base_model == "embedded" or local_base(base_model) is not None


EMBEDDED = "SmolLM2-135M-Instruct"  # the embedded model, as a folder


def base_name(base_model: str) -> str:
    """What a base model is called elsewhere: its Hub id, or its folder's name without the path.

    A name that says nothing, as `1` or a commit's, has its parents' before it: `7b-instruct-1`.
    """
    folder = local_base(base_model)
    if not folder:
        return base_model
    names = [part for part in reversed(folder.resolve().parts[1:]) if part != "snapshots"]
    telling = (n for n, name in enumerate(names) if not re.fullmatch(r"\d+|[0-9a-f]{40}", name))
    return "-".join(reversed(names[: next(telling, 0) + 1]))


# The prompt ends at the colon and the completion starts with the space. If the prompt ended in the
# space, that space would be a token of its own, and the answer's first word would be tokenized
# differently than in the whole text.
SYSTEM_TEMPLATE = "### System: {system}\n\n"
QUESTION_TEMPLATE = "### Question: {prompt}\n\n"
ANSWER_START = "### Answer:"
PROMPT_TEMPLATE = QUESTION_TEMPLATE + ANSWER_START
COMPLETION_TEMPLATE = " {completion}\n\n### End"
END_MARKER = "### End"


def format_prompt(prompt: str) -> str:
    """The text that the model is asked with."""
    return PROMPT_TEMPLATE.format(prompt=prompt)


def format_answer(completion: str) -> str:
    """The text that is generated, but for EOS, which the encoder adds."""
    return COMPLETION_TEMPLATE.format(completion=completion)


def format_turns(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A conversation of (role, text) turns as (prompt text, answer text) pairs, one per answer.

    EOS ends each piece, and nothing stands between it and the next. Turns after the last answer
    give a piece whose answer is empty: what the model is asked with.
    """
    pieces, before = [], ""
    for role, text in turns:
        if role == "assistant":
            pieces.append((before + ANSWER_START, format_answer(text)))
            before = ""
        elif role == "system":
            before += SYSTEM_TEMPLATE.format(system=text)
        else:
            before += QUESTION_TEMPLATE.format(prompt=text)
    return [*pieces, (before + ANSWER_START, "")] if before else pieces


def readable_turns(turns: Sequence[tuple[str, str]]) -> str:
    """Turns (role, text) for people: a lone user turn as it stands, more with their roles."""
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def clean_answer(text: str, end: str = END_MARKER) -> str:
    """A generated text without the end marker and the space around it."""
    return text.strip().removesuffix(end).rstrip()
