"""Section 14: the adapter's folder, its card, and the push."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune.checkpoints import fingerprint, require_finite
from finetune.files import disk_is_full, edit_json, new_folder, seal, why_unusable, zip_folder
from finetune.hub import commit_folder, ensure_repo, hub_api, hub_repo_id, with_retries
from finetune.machine import short, versions
from finetune.plan import Plan
from finetune.tokens import chat_template
from qlora_helpers import (
    Settings,
    UserError,
)

PUSHED_FILES = [
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer*", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json", "README.md", "run.json", "checksums.json"),
]


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


def write_for_others(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what others need beside the weights: tokenizer, chat template, generation config.

    No stop strings in the generation config: `generate` refuses them
    without a tokenizer, and EOS is trained. transformers 5 names a tokenizer class that 4.57 lacks;
    both know PreTrainedTokenizerFast, which in 4.57 makes `token_type_ids`, too, that no causal
    model takes, unless its inputs are named.
    """
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
            write_for_others(work, tokenizer)
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
