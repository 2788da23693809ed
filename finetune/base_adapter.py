"""Section 8: training continues from an existing adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.base_model import called
from finetune.data import prompt_keys
from finetune.files import file_hash
from finetune.hub import with_retries
from finetune.machine import local_shard, main_first, short
from qlora_helpers import Settings, UserError, local_base

WEIGHTS = "adapter_model.safetensors"
HELD_OUT = "held_out.json"
FILES = ["adapter_config.json", WEIGHTS, HELD_OUT]
# The settings that an adapter brings along, as they are called here and in its config.
BROUGHT = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora",
    "target_modules": "target_modules",
}  # fmt: skip
# What else a config may say without making another kind of adapter of it.
HARMLESS = {
    *BROUGHT.values(), "lora_dropout", "base_model_name_or_path", "inference_mode", "revision",
    "task_type", "auto_mapping", "peft_version", "runtime_config",
}  # fmt: skip


def adapter_folder(settings: Settings) -> Path | None:
    """The folder of `base_adapter`, fetched from the Hub where it is an id; None without one.

    A finished run's own folder stands for the adapter in it. Raises `UserError` if there is none
    that can be had, or if this run would replace it.
    """
    if not settings.base_adapter:
        return None
    folder = local_base(settings.base_adapter)
    if folder is None:
        folder = fetched(settings.base_adapter)
    if not (folder / FILES[0]).is_file() and (folder / "final_model").is_dir():
        folder = folder / "final_model"
    if settings.run_dir.resolve() in folder.resolve().parents:
        raise UserError(
            f"base_adapter = {settings.base_adapter!r} is in the folder of this very run, which "
            "would replace it: choose a new run_name."
        )
    lacking = [name for name in FILES[:2] if not (folder / name).is_file()]
    if lacking:
        told = (
            f"base_adapter = {settings.base_adapter!r}: {folder} has no {' and no '.join(lacking)}"
        )
        raise UserError(f"{told}. It must be a finished run's folder.")
    return folder


@functools.lru_cache(4)
def fetched(name: str) -> Path:
    """An adapter of the Hub, in the ordinary cache; raises `UserError` if it cannot be had."""
    try:
        found = with_retries(functools.partial(snapshot_download, name, allow_patterns=FILES))
    except Exception as error:
        raise UserError(
            f"base_adapter = {name!r} is no folder here, and cannot be had from the Hub "
            f"({short(error)})."
        ) from None
    return Path(found)


def adapter_hash(settings: Settings) -> str | None:
    """SHA-256 of the weights that training begins with; None without `base_adapter`."""
    folder = adapter_folder(settings)
    return file_hash(folder / WEIGHTS) if folder else None


def as_in_base_adapter(settings: Settings) -> Settings:
    """Settings whose LoRA is that of `base_adapter`, if there is one, and say so.

    Raises `UserError` for a kind of adapter that this notebook does not train.
    """
    folder = adapter_folder(settings)
    if folder is None:
        return settings
    config = adapter_config(folder)
    found = {name: getattr(config, theirs) for name, theirs in BROUGHT.items()}
    if not isinstance(found["target_modules"], str):
        found["target_modules"] = sorted(found["target_modules"])
    changed = {n: v for n, v in found.items() if v != in_order(getattr(settings, n))}
    told = ", ".join(f"{name} = {value!r}" for name, value in changed.items())
    print(f"Training goes on from {settings.base_adapter}" + f", with its {told}" * bool(changed))
    theirs = Path(config.base_model_name_or_path or "?").name
    if theirs != Path(called(settings.base_model)).name:
        print(f"! It was trained on {theirs}, and base_model is {settings.base_model}.")
    return settings.model_copy(update=changed)


def in_order(value: object) -> object:
    """A list of names in the order in which lists are compared; anything else as it is."""
    return sorted(value) if isinstance(value, list) else value


def adapter_config(folder: Path) -> peft.LoraConfig:
    """An adapter's config; raises `UserError` if it is no plain LoRA, or cannot be read."""
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):  # its header, which tells how long the file must be
                pass
    except Exception as error:
        raise UserError(f"base_adapter: {folder} cannot be read ({short(error)}).") from None
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"base_adapter: {folder} is no LoRA, but {config.peft_type}.")
    plain, own = (dataclasses.asdict(each) for each in (peft.LoraConfig(), config))
    other = [n for n in own if n not in HARMLESS and own[n] and own[n] != plain.get(n)]
    if other:
        raise UserError(
            f"base_adapter: {folder} uses {', '.join(other)}, which this notebook does not train."
        )
    return config


def load_base_adapter(model: peft.PeftModel, settings: Settings) -> None:
    """Give the adapter in memory the weights of `base_adapter`; does nothing without one.

    Raises `UserError` if they do not fit this base model.
    """
    if starts := start_of(settings):
        mine = {
            name: weight.shape for name, weight in peft.get_peft_model_state_dict(model).items()
        }
        theirs = {name: weight.shape for name, weight in starts.items()}
        if wrong := sorted(n for n in mine | theirs if mine.get(n) != theirs.get(n)):
            raise UserError(
                f"base_adapter = {settings.base_adapter!r} does not fit this base model: "
                f"{len(wrong)} of its {len(theirs)} matrices differ ({wrong[0]}, …)."
            )
        peft.set_peft_model_state_dict(model, starts)


def start_of(settings: Settings) -> dict[str, torch.Tensor]:
    """The weights that training begins with; empty without `base_adapter`."""
    folder = adapter_folder(settings)
    return load_file(folder / WEIGHTS) if folder else {}


def is_untrained(model: torch.nn.Module, settings: Settings) -> bool:
    """Whether the adapter in memory is as training begins with it."""
    starts = start_of(settings)
    if starts:
        found = peft.get_peft_model_state_dict(model).items()
        return all(
            torch.equal(local_shard(w).cpu().to(starts[n].dtype), starts[n]) for n, w in found
        )
    ends = (local_shard(weight) for name, weight in model.named_parameters() if "lora_B" in name)
    return not any(weight.any() for weight in ends)


@contextlib.contextmanager
def before_training(model: peft.PeftModel, settings: Settings) -> Iterator[None]:
    """Within it the model is what training begins with: base model, or base and `base_adapter`."""
    starts = start_of(settings)
    if not starts:
        with model.disable_adapter():
            yield
        return
    trained = {
        name: weight.detach().clone()
        for name, weight in peft.get_peft_model_state_dict(model).items()
    }
    peft.set_peft_model_state_dict(model, starts)
    try:
        yield
    finally:
        peft.set_peft_model_state_dict(model, trained)


def held_out_before(settings: Settings) -> frozenset[str]:
    """Hashes of the prompts that an earlier run held out, which this one continues.

    That is the run of `base_adapter`, and with resume = 'anyway' the run of this name.
    """
    folder = adapter_folder(settings)
    places = [folder / HELD_OUT] if folder else []
    if settings.resume == "anyway":
        places.append(settings.run_dir / HELD_OUT)
    try:
        read = (json.loads(path.read_text(encoding="utf-8")) for path in places if path.is_file())
        return frozenset(text for found in read for text in found)
    except ValueError as error:
        named = " or ".join(map(str, places))
        raise UserError(
            f"{named} is damaged ({short(error)}), so that it is not known which rows were held "
            "out before. Take it from a copy of that run; or delete it, and rows are drawn anew."
        ) from None


@main_first
def record_held_out(held: Dataset, settings: Settings, trained: Dataset | None = None) -> None:
    """Write the hashes of the held-out prompts into the run's folder, to go with its adapter.

    Where rows were split one by one, not those of questions that are `trained`, too: such rows are
    drawn again by themselves.
    Texts stay here: a hash (48 bits of SHA-256) tells a prompt that one has, and no other.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    keys = {*prompt_keys(held)} - {*(prompt_keys(trained) if trained else ())}
    text = json.dumps(sorted(keys)) + "\n"
    writing = settings.run_dir / f"{HELD_OUT}.part"  # whole or not at all
    writing.write_text(text, encoding="utf-8")
    writing.replace(settings.run_dir / HELD_OUT)
