"""Sections 11 and 14: the adapter's folder, and the push."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from finetune.access import base_license, refused
from finetune.base_adapter import HELD_OUT
from finetune.base_model import called
from finetune.checkpoints import require_finite
from finetune.files import (
    SEAL,
    Record,
    edit_json,
    file_hash,
    files_of,
    link_or_copy,
    new_folder,
    read_seal,
    seal,
    telling_if_full,
    why_unusable,
    zip_folder,
)
from finetune.hub import (
    CARD_FILES,
    MERGED_FILES,
    PUSHED_FILES,
    commit_folder,
    ensure_repo,
    hub_api,
    hub_repo_id,
    status_of,
    with_retries,
)
from finetune.identity import fingerprint
from finetune.lock import claim
from finetune.machine import chain, progress, short, versions
from finetune.plan import Plan
from finetune.template import chat_template
from finetune.tokens import as_chat
from qlora_helpers import Settings, UserError, locate


def manifest(settings: Settings, trainer: Trainer, plan: Plan, result: Record) -> dict[str, Any]:
    """What is needed to say later what this adapter is: settings, data, plan, scores, versions.

    `fingerprint` tells a later run whether this one is the same, and `trainer_state` has its log.
    Raises `UserError` if section 2 has been edited since the model in memory was made.
    """
    settings = plan.require_same(settings)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": trainer.run,
        "base_model": settings.base_model,
        "base_revision": getattr(trainer.model.config, "_commit_hash", None),
        "base_license": base_license(settings.base_model),
        "base_adapter": settings.base_adapter,
        "fingerprint": fingerprint(settings, trainer),
        "roles": roles_of(trainer.train_dataset),
        "settings": settings.model_dump(),
        "plan": {
            name: each for name, each in dataclasses.asdict(plan).items() if name != "settings"
        },
        "results": result,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "trainer_state": dataclasses.asdict(trainer.state),
    }


def roles_of(data: Dataset) -> list[str]:
    """Whose turns the first training row has, but for its last answer; none of a whole text."""
    if "prompt" not in data.column_names or not data[0]["prompt"]:
        return []
    return [turn["role"] for turn in as_chat(data[0])]


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer so that transformers 4.57 and 5 load it, with its SentencePiece file.

    transformers 5 names a tokenizer class that 4.57 lacks; both know PreTrainedTokenizerFast, which
    in 4.57 makes `token_type_ids`, too, that no causal model takes, unless its inputs are named.
    And it writes `extra_special_tokens` as a list, which 4.57 takes under an older name alone.
    """
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    changed: dict[str, Any] = {}
    if saved["tokenizer_class"] in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        changed["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(extra := saved.get("extra_special_tokens"), list):
        changed |= {"additional_special_tokens": extra, "extra_special_tokens": {}}
    edit_json(folder / "tokenizer_config.json", **changed)
    own = getattr(tokenizer, "sentencepiece_file", None)
    if own and Path(own).is_file():
        shutil.copyfile(own, folder / "tokenizer.model")


def write_for_others(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what others need beside the weights: tokenizer, chat template, generation config.

    No stop strings in the generation config: `generate` refuses them without a tokenizer, and EOS
    is trained.
    """
    tokenizer.chat_template = chat_template(tokenizer)
    save_tokenizer(folder, tokenizer)
    write_generation_config(folder, tokenizer)


def write_generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write that answers are greedy, whatever else the base model's authors recommend."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, do_sample=False
    ).save_pretrained(folder)


def save_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    run: Record,
) -> Path | None:
    """Write adapter, tokenizer, card and manifest to `folder`; return a zip backup beside it.

    Everything is written under another name first and renamed at the end: `folder` is never
    half-written. An earlier run's folder is replaced, and its zip, which has the time in its name,
    stays; the same adapter again changes nothing; what is not ours is moved aside. Raises
    `UserError`, with the earlier folder as it was, if a weight is not finite or the disk is full;
    without room for the zip alone, returns None.
    """
    require_finite(model)
    claim(folder.parent)
    left = "The trained adapter is in memory and in the last checkpoint."
    with (
        telling_if_full(folder, f"Nothing that was there is harmed. {left}"),
        contextlib.suppress(SavedAlready),
        new_folder(folder, "adapter", aside=True) as work,
    ):
        model.save_pretrained(work)
        base = called(run["base_model"]) if "base_model" in run else None
        where = {"base_model_name_or_path": base, "revision": run.get("base_revision")}
        edit_json(work / "adapter_config.json", **where)
        write_for_others(work, tokenizer)
        write_texts(work, card, run)
        if (folder.parent / HELD_OUT).is_file():
            shutil.copy2(folder.parent / HELD_OUT, work)
        if is_same(work, folder):
            raise SavedAlready
        seal(work, "adapter", folder.parent.name)
    backup = zip_folder(folder, folder.parent.name)
    print(f"Adapter: {folder}\nBackup:  {backup}")
    return backup


class SavedAlready(Exception):
    """The adapter that was to be saved is in its folder."""


def is_same(work: Path, folder: Path) -> bool:
    """Whether `folder` is whole and holds the same adapter of the same run as `work`."""
    if why_unusable(folder, "adapter"):
        return False
    runs = [json.loads((each / "run.json").read_text(encoding="utf-8")) for each in (work, folder)]
    name = "adapter_model.safetensors"
    same = file_hash(work / name) == read_seal(folder)["files"][name]
    return same and runs[0].get("fingerprint") == runs[1].get("fingerprint")


def write_texts(folder: Path, card: str, run: Record) -> None:
    """Write the card and the manifest."""
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def complete_adapter(folder: Path, card: str, run: Record) -> None:
    """Give a saved adapter another card and manifest: those that know how it answers."""
    with (
        telling_if_full(folder, "The adapter in it is whole."),
        new_folder(folder, "adapter", aside=True) as work,
    ):
        shutil.copytree(folder, work, dirs_exist_ok=True, copy_function=link_or_copy)
        for name in ("README.md", "run.json", SEAL):
            (work / name).unlink(missing_ok=True)  # these are written anew, not through a link
        write_texts(work, card, run)
        seal(work, "adapter", folder.parent.name)
    zip_folder(folder, folder.parent.name)


def push_adapter(
    settings: Settings, token: str | None, files: Sequence[str] = PUSHED_FILES
) -> str | None:
    """Upload the saved adapter to its repository, private unless set otherwise; say where it is.

    Only `files` go, and only if the adapter is whole; your rows never do. A failure costs nothing
    that was trained: it is told with what to do, and None is returned in place of the address.
    """
    folder = settings.final_model
    if not settings.push_to_hub or not token:
        why = "there is no token" if settings.push_to_hub else "push_to_hub is off"
        print(f"Not pushed, because {why}.")
        return None
    try:
        if why := why_unusable(folder, "adapter"):
            raise UserError(f"{folder} is not whole ({why}): run the cell that saves it again")
        api = hub_api(token)
        repo = hub_repo_id(settings, with_retries(api.whoami)["name"])
        ensure_repo(api, repo, settings.hub_private)
        commit_folder(api, repo, folder, list(files))
    except Exception as error:
        why, again = why_not_pushed(error)
        print(
            f"Not pushed: {why}\nNothing is lost: the adapter is in {folder}. To push it later, "
            f"run this cell again{again}."
        )
        return None
    print(f"On the Hub: {api.endpoint}/{repo}")
    return f"{api.endpoint}/{repo}"


def why_not_pushed(error: Exception) -> tuple[str, str]:
    """Why a push failed, in plain words where the token may be why, and what to run before it.

    A token that the Hub does not know is taken out of the environment, so that section 3 asks.
    """
    fault = refused(error, "may not write to that repository")
    if not fault:
        return short(error), ""
    if status_of(error) == 401:
        os.environ.pop("HF_TOKEN", None)
    again = ", after section 3 where the token is another"
    said = next((s for e in chain(error) if (s := getattr(e, "server_message", None))), "")
    if status_of(error) == 403 and said:  # or there is no room for more that is private
        return f"{said.splitlines()[0]}\nIf {fault[1]}", again
    return fault[1], again


def push_card(settings: Settings, token: str | None, address: str | None) -> None:
    """Upload the card and the manifest anew, where the adapter has been pushed (`address`)."""
    if address:
        push_adapter(settings, token, CARD_FILES)


def push_merged(settings: Settings, token: str | None) -> str | None:
    """Upload the merged model to a repository of its own, `…-merged`; say where it is.

    Private unless set otherwise. A commit a file: the Hub asks for no content that it has already,
    so that a broken upload goes on when this is run again. A failure is told, and costs nothing.
    """
    folder = locate(settings.merged_dir)
    if not token:
        print(f"Not pushed, because there is no token. The merged model is in {folder}")
        return None
    try:
        api = hub_api(token)
        repo = f"{hub_repo_id(settings, with_retries(api.whoami)['name'])}-merged"
        ensure_repo(api, repo, settings.hub_private)
        weights, *others = MERGED_FILES
        files = [name for name in files_of(folder) if fnmatch(name, weights)]
        for name in progress(files, "Uploading", " files"):
            commit_folder(api, repo, folder, [name])
        commit_folder(api, repo, folder, [*PUSHED_FILES, *others])
    except Exception as error:
        why, again = why_not_pushed(error)
        told = f"Not pushed: {why}\nNothing is lost: the merged model is in {folder}."
        print(f"{told} Run this cell again{again}: what is on the Hub already is not sent again.")
        return None
    print(f"Merged, on the Hub: {api.endpoint}/{repo}")
    return f"{api.endpoint}/{repo}"
