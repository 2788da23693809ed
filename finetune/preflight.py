"""Section 4: whatever could fail later is checked now."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator

import psutil
import torch

from finetune.access import (
    Line,
    base_model_gb,
    check_base_model,
    check_copies,
    check_merged,
    check_push,
)
from finetune.architecture import check_architecture, count_weights
from finetune.backup import drive_folder, what_is_there
from finetune.base_adapter import adapter_config, adapter_folder
from finetune.base_model import cache_of
from finetune.files import checkpoints
from finetune.folders import check_disks, check_folders
from finetune.hub import hub_api, status_of
from finetune.lock import claim
from finetune.machine import computing_type, is_spread, processes, resolve_precision, short
from finetune.sources import HUB, hub_name
from qlora_helpers import Settings, UserError, listed, locate

USELESS = ("the Hub does not accept this token", "this token can only read")  # what is said of one


def check_machine(settings: Settings, token: str | None, known: bool) -> Iterator[Line]:
    """The GPU and its precision, and what is left of an earlier run of the same name.

    `known` is whether the base model's config can be had.
    """
    if torch.cuda.is_available():
        yield check_gpu(settings)
    elif is_small(settings, token, known):
        yield "✓", "no GPU, and none needed for a base model this small"
    else:
        yield (
            "✗",
            f"no GPU, and {settings.base_model} would need days without one. Colab: Runtime › "
            "Change runtime type › T4 GPU or better. To try the notebook without: base_model = "
            "'embedded', learning_rate = 6e-4",
        )
    yield from check_other_gpus()
    if settings.memory_limit_gb and not torch.cuda.is_available():
        yield "✗", "memory_limit_gb is of a GPU's memory, and there is none: set it to 0"
    if settings.final_model.exists():
        yield (
            "!",
            f"a run named {settings.run_name} is finished already: with the same data and settings "
            "it is not trained again, with others its zip stays and its folder is replaced",
        )
    elif found := checkpoints(settings.run_dir):
        told = f"its checkpoints ({found[0].name}) are looked at in section 11"
        yield "!", f"{settings.run_name} was begun before: {told}"


def check_other_gpus() -> Iterator[Line]:
    """What to do where there are several GPUs: a notebook is one process, and trains on one."""
    count = torch.cuda.device_count()
    if count > 1 and processes()[1] == 1 and not is_spread():
        yield (
            "!",
            f"{count} GPUs are here, and a notebook trains on one. To train on all, in a copy of "
            f"this repository: make launch GPUS={count} with what you changed in section 2 as "
            "NAME=value. Run all afterwards finds the trained adapter and goes on from there",
        )


def check_gpu(settings: Settings) -> Line:
    """Whether this torch has kernels for this GPU: newer ones leave out a P100, for example."""
    gpu, (major, minor) = torch.cuda.get_device_properties(0), torch.cuda.get_device_capability()
    built = [re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", arch) for arch in torch.cuda.get_arch_list()]
    numbers = [(found[1], int(found[2])) for found in built if found]  # AMD's are called otherwise
    mine = 10 * major + minor
    runs = any(
        n <= mine if kind == "compute" else n // 10 == major and n <= mine for kind, n in numbers
    )
    if numbers and not runs:
        least, most = min(n for _, n in numbers), max(n for _, n in numbers)
        told = f"{gpu.name} (compute capability {major}.{minor}) is too"
        if mine > most:
            end = f"{most // 10}.{most % 10}: install a newer torch, or choose another GPU"
            return "✗", f"{told} new for this torch, whose kernels end at {end}"
        begin = f"{least // 10}.{least % 10}: choose another GPU (Kaggle: T4 × 2)"
        return "✗", f"{told} old for this torch, whose kernels begin at {begin}"
    precision, _ = resolve_precision(settings.bf16)
    return "✓", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB, computing in {precision}"


def written_gb(settings: Settings, token: str | None, known: bool) -> tuple[float, float]:
    """GB of the base model's weights in 16 bits, and in the type that a merge writes.

    They are counted, since on disk they may be in 4 bits or in 32. Where its config is not `known`,
    what is on disk is taken for 16 bits.
    """
    counted = count_weights(settings, token) if known else 0
    weights = counted or base_model_gb(settings, token)[0] * 1e9 / 2
    kind = computing_type(resolve_precision(settings.bf16)[0])
    return weights * 2 / 1e9, weights * kind.itemsize / 1e9


def check_room(settings: Settings, token: str | None, known: bool = True) -> Iterator[Line]:
    """Free disk for download, checkpoints and the merge, and main memory for the merge.

    `known` is whether the base model's config can be had.
    """
    _, download, source = base_model_gb(settings, token)
    sixteen, whole = written_gb(settings, token, known)
    # A checkpoint holds the adapter in fp32 and AdamW's two moments: 0.33 GB for r = 32 beside a 7B
    # model's 14.5 GB, three times that on all its layers. Three are kept while a fourth is written,
    # and the adapter with its zip.
    layers = 3.1 if settings.target_modules == "all-linear" else len(settings.target_modules) / 4
    saved = 4.7 * (0.05 + 0.02 * sixteen * settings.lora_r / 32 * layers)
    needs = {"checkpoints and adapter": (settings.run_dir, saved)}
    if download:
        needs[f"download of the base model, {source},"] = cache_of(settings), download
    if settings.merges:
        needs["merged model"] = locate(settings.merged_dir).resolve(), whole
    # Against 16 bits a weight: f32 has 32, q8_0 8.5 (a scale for each 32), f16 and bf16 the same.
    gguf = {"f32": 2, "q8_0": 0.53}.get(settings.gguf, 1) * sixteen if settings.gguf else 0.0
    converters = 0.1  # llama.cpp's, which both kinds of export use
    if "base" in settings.export:
        needs["dequantised base model"] = settings.cache_dir, whole + gguf + converters
    elif settings.export:
        needs["converters"] = settings.cache_dir, converters
    if settings.gguf and settings.merges:
        needs["GGUF"] = settings.run_dir, gguf
    yield from check_disks(needs)
    if settings.merges:
        yield check_merge_memory(whole)


def check_merge_memory(merged: float) -> Line:
    """Whether main memory holds what a merge of `merged` GB takes.

    The weights are written shard by shard. The check then loads the merged model whole: onto the
    GPU where there is one, with what does not fit offloaded to disk, else into main memory.
    """
    held = 4 + (0 if torch.cuda.is_available() else 1.3 * merged)
    memory = psutil.virtual_memory().total / 1e9
    text = f"{memory:.1f} GB of main memory, and the merge holds about {held:.1f} GB"
    if memory > held:
        return "✓", text
    return "✗", f"{text}: set merge = False and export = [], or take a machine with more"


def check_backup(settings: Settings, token: str | None) -> Iterator[Line]:
    """Whether checkpoints can be copied to where `backup_to` says, and what is there already."""
    if settings.backup_to == "none":
        told = "if this machine goes away, so does the training ('drive' or 'hub' keep copies)"
        yield "!", f"backup_to is 'none': {told}"
        return
    line = check_copies(settings, token) if settings.backup_to == "hub" else check_drive(settings)
    yield line
    if line[0] != "✓":
        return
    try:
        if found := what_is_there(settings, token):
            told = "if rows and settings are the same, section 11 goes on from the furthest"
            yield "!", f"there stand {found}: {told}; another run's are kept apart, never replaced"
    except Exception as error:
        yield "?", f"what is copied already could not be looked at ({short(error)})"


def check_drive(settings: Settings) -> Line:
    """Whether Google Drive is there for copies."""
    drive = drive_folder(settings).parent.parent
    if not drive.is_dir():
        told = "run section 3 again and allow Drive, or set 'hub'"
        return "✗", f"backup_to = 'drive', but there is no {drive}: {told}"
    return "✓", f"checkpoints are copied to {drive_folder(settings)}"


def check_data(settings: Settings, token: str | None) -> Iterator[Line]:
    """Whether this token may read the Hub's data sets that `data_files` names."""
    for name in settings.data_names:
        if not name.startswith(HUB):
            continue
        try:
            hub_api(token).auth_check(hub_name(name)[0], repo_type="dataset")
            yield "✓", f"data set {name} can be read"
        except Exception as error:
            known = status_of(error) in (401, 403, 404)
            told = "there is none that this token may read" if known else "the Hub cannot be asked"
            yield "✗" if known else "?", f"data_files = {name!r}: {told} ({short(error)})"


def check_adapter(settings: Settings) -> Iterator[Line]:
    """Whether training can go on from `base_adapter`, if one is given."""
    try:
        if folder := adapter_folder(settings):
            adapter_config(folder)
            yield "✓", f"training goes on from {settings.base_adapter}"
    except UserError as error:
        yield "✗", str(error)


def check_logger(settings: Settings) -> Iterator[Line]:
    """A ✗ for a logger that would stop and ask for its key in the middle of *Run all*."""
    if settings.report_to != "wandb" or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    try:
        known = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        known = None
    if not (known or os.environ.get("WANDB_API_KEY")):
        told = "put it into WANDB_API_KEY before section 2, or set report_to = 'tensorboard'"
        yield "✗", f"report_to = 'wandb' has no key here: {told}"


def is_small(settings: Settings, token: str | None, known: bool) -> bool:
    """Whether a CPU can train this base model: the embedded one, or one of few weights."""
    if settings.base_model == "embedded":
        return True
    return known and 0 < count_weights(settings, token) < 2e9  # as many as take 4 GB in 16 bits


def preflight(settings: Settings, token: str | None) -> None:
    """Ask now for everything that could fail later: one line each, ✓ or what to do.

    Raises `UserError` if any line is ✗, or if another process has this run's folder, which is held
    from here on. A `?` is what cannot be known offline, a `!` what you may want to know.
    """
    base = check_base_model(settings, token)
    known = base[0] == "✓"
    lines = [*check_folders(settings), *check_machine(settings, token, known)]
    if not any(mark == "✗" for mark, _ in lines):
        claim(settings.run_dir)
    lines += [*check_room(settings, token, known), base]
    if known:
        lines += check_architecture(settings, token)
    lines += [*check_data(settings, token), *check_adapter(settings)]
    lines += [*check_backup(settings, token)]
    size = written_gb(settings, token, known)[1] if settings.merge == "push" else 0.0
    merged = check_merged(settings, token, size)
    lines += [check_push(settings, token), *merged, *check_logger(settings)]
    print("\n".join(f"{mark} {text}" for mark, text in lines))
    if failed := [text for mark, text in lines if mark == "✗"]:
        if any(text.startswith(USELESS) for text in failed):
            os.environ.pop("HF_TOKEN", None)  # so that section 3 asks for another
        raise UserError(listed("Before training can start:", failed))
