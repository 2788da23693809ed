"""Section 11: find, check and continue from what was saved."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from finetune.backup import begin_copies, fetch_backup, step_of, told_in
from finetune.base_adapter import is_untrained
from finetune.files import (
    BEING_WRITTEN,
    SEAL,
    checkpoints,
    move_aside,
    read_seal,
    remove,
    unused,
    why_unusable,
)
from finetune.identity import (
    as_told_now,
    changes,
    fingerprint,
    hash_of_fingerprint,
    other_release,
    require_as_planned,
    require_same_shape,
    run_of,
    trains_on,
)
from finetune.lock import claim
from finetune.machine import local_shard, main_first, processes
from qlora_helpers import Settings, UserError, listed

SAVE_SECONDS = 20 * 60  # between two checkpoints: an epoch on a T4 can take a night


def last_good_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint; those that are not whole are moved aside, with the reason.

    What a killed save has left is removed: it says of itself that it is being written. Whatever
    else has a checkpoint's name may be somebody else's.
    """
    for folder in checkpoints(run_dir):
        if (folder / BEING_WRITTEN).is_file() and not (folder / SEAL).exists():
            print(f"{folder.name} is skipped and removed: its save was cut short.")
            shutil.rmtree(folder)
        elif not read_seal(folder) and not (folder / SEAL).exists():
            move_aside(folder, "this notebook did not save it whole")
        elif why := why_unusable(folder, "checkpoint"):
            move_aside(folder, why, "damaged")
    return next(iter(checkpoints(run_dir)), None)


def remembered(folder: Path, purpose: str) -> dict[str, Any]:
    """`run.json` of a whole checkpoint or adapter; empty if the folder is not whole."""
    return {} if why_unusable(folder, purpose) else told_in(folder)


def replace_lost_best(state: TrainerState) -> None:
    """If the best epoch's checkpoint is gone, take the best of those that are left, and say so.

    Epochs without a checkpoint are marked `lost` in the log: they cannot be kept any more.
    """
    best = Path(str(state.best_model_checkpoint))
    if best.is_dir():
        return
    left = {step_of(folder.name): folder for folder in checkpoints(best.parent)}
    measured = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"]]
    for entry in measured:
        entry["lost"] = entry["step"] not in left
    kept = min((e for e in measured if not e["lost"]), key=lambda e: e["eval_loss"], default=None)
    state.best_metric = kept["eval_loss"] if kept else None
    state.best_model_checkpoint = str(left[kept["step"]]) if kept else None
    state.best_global_step = kept["step"] if kept else None
    now = f"the best of those left is {left[kept['step']].name}" if kept else "none is left"
    print(f"! {best.name}, of the epoch with the lowest validation loss, is gone; {now}.")


@main_first
def find_checkpoint(settings: Settings, trainer: Trainer) -> str | None:
    """The folder for `trainer.train(resume_from_checkpoint=…)` to continue from, or None to begin.

    Prints what it decided and why. The finished run itself comes back as `final_model`. Copies in
    `backup_to` are fetched if they are further than what is here. Raises `UserError` if data or
    settings changed under an unfinished run, or if another release finished it.
    """
    settings = require_as_planned(settings, trainer.planned_for)
    claim(settings.run_dir)
    now, final = fingerprint(settings, trainer), settings.final_model
    trainer.run = hash_of_fingerprint(now)
    last = last_good_checkpoint(settings.run_dir)
    if settings.resume == "never":
        begin(settings, trainer.model, "resume = 'never'")
        return None
    done = remembered(final, "adapter")
    if fetch_backup(settings, told_in(last) if last else done):
        done, last = remembered(final, "adapter"), last_good_checkpoint(settings.run_dir)
    finished_as = as_told_now(done.get("fingerprint", {}), now)
    if finished_as == now:
        trainer.run = run_of(done)
        return str(final)
    if finished_as and (other := other_release(finished_as, now)):
        raise UserError(
            f"{settings.run_name} is finished, by another release of this notebook: since then "
            f"{', and '.join(other)} changed. It is not trained again. Choose a new run_name; the "
            f"adapter stays in {final}"
        )
    if last is None:
        begin(settings, trainer.model, "there is no checkpoint")
        return None
    was = as_told_now(told_in(last)["fingerprint"], now)
    if was != now and settings.resume != "anyway":
        changed = changes(was, now)
        if was == finished_as and not trains_on(was, now):
            why = f"the finished {settings.run_name} had other data or settings"
            begin(settings, trainer.model, f"{why} ({'; '.join(changed)})")
            return None
        raise UserError(how_to_go_on(settings, last, changed, was == finished_as))
    require_same_shape(was, now, last)
    trainer.run = run_of(told_in(last))
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    trainer.args.eval_on_start = lacks_evaluation(state)  # else its result is in the log already
    print(f"Continuing from {last.name}{' with changed data or settings' * (was != now)}.")
    return str(last)


def how_to_go_on(settings: Settings, last: Path, changed: list[str], is_finished: bool) -> str:
    """What there is to choose from where a run is there, and something has changed."""
    if is_finished:
        return (
            f"{settings.run_name} is finished ({'; '.join(changed)}). To train it on, set "
            "resume = 'anyway': it continues from its last checkpoint, and the learning rate "
            "follows the longer schedule. To begin anew, choose a new run_name, or set "
            "resume = 'never'."
        )
    return (
        listed(f"{last} is of an unfinished run with other data or settings:", changed)
        + "\nEither choose a new run_name, to begin a run of its own; or put the old "
        "values back and Run all again, to continue; or set resume = 'anyway', to continue with "
        "the new ones."
    )


def begin(settings: Settings, model: PreTrainedModel, why: str) -> None:
    """Put the run's old checkpoints into one folder, in place of those that are there.

    Copies elsewhere are kept apart, too. Raises `UserError` if the adapter in memory has learned
    something already.
    """
    if not is_untrained(model, settings):
        raise UserError(
            f"This would start at step 0 ({why}), but the adapter in memory is trained already. "
            "Run from section 7 on, which loads the base model anew."
        )
    before = settings.run_dir / "checkpoints-before"
    old = checkpoints(settings.run_dir)
    for folder in checkpoints(before) if old else ():
        remove(folder, "checkpoint")
    for folder in old:
        before.mkdir(exist_ok=True)
        folder.rename(unused(before / folder.name))
    kept = f" The checkpoints that were here are in {before.name}." if old else ""
    print(f"Starting at step 0: {why}.{kept}")
    begin_copies(settings)


def finished(trainer: Trainer, folder: str | None) -> TrainOutput | None:
    """What `trainer.train` would have returned, if `folder` holds the run's last step; else None.

    The model gets the saved adapter and the trainer its log, so that all cells after training work
    as after it.
    """
    if folder is None:
        return None
    purpose = "adapter" if Path(folder).name == "final_model" else "checkpoint"
    run, path = remembered(Path(folder), purpose), Path(folder) / "trainer_state.json"
    saved = run.get("trainer_state") or json.loads(path.read_text(encoding="utf-8"))
    state = TrainerState(**saved)
    if "trainer_state" not in run:  # a checkpoint, not the finished adapter
        over = state.global_step >= trainer.steps or stopped_early(trainer, state)
        if not over or lacks_evaluation(state):
            return None
        best = Path(folder).parent / Path(state.best_model_checkpoint or folder).name
        if trainer.args.load_best_model_at_end and not why_unusable(best, "checkpoint"):
            folder = str(best)
    set_peft_model_state_dict(trainer.model, load_file(f"{folder}/adapter_model.safetensors"))
    trainer.state = state
    print(
        f"This run is finished, and its adapter is loaded from {folder}: nothing is trained again."
    )
    metrics = run.get("results", {}).get("training", {"train_runtime": 0.0})
    return TrainOutput(state.global_step, metrics.get("train_loss", 0.0), metrics)


def state_hashes(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of all that training goes on from, as it is in memory.

    That is: adapter, optimizer, schedule, fp16's scaler, and this process's random states.
    """
    moments = trainer.optimizer.state_dict()["state"]
    kind, keys, *rest = np.random.get_state()
    parts: dict[str, list[Any]] = {
        "adapter": [weight for _, weight in sorted(trainer.trainable().items())],
        "optimizer": [moments[n][name] for n in sorted(moments) for name in sorted(moments[n])],
        "schedule": [sorted(trainer.lr_scheduler.state_dict().items())],
        "random states": [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state()],
    }
    if torch.cuda.is_available():
        parts["random state of the GPU"] = [torch.cuda.get_rng_state()]
    if scaler := trainer.accelerator.scaler:
        parts["scaler"] = [sorted(scaler.state_dict().items())]
    hashes = {name: hash_of(values) for name, values in parts.items()}
    return hashes | {"processes": str(processes()[1])}


def hash_of(values: Iterable[object]) -> str:
    """SHA-256 of tensors by their bytes, and of anything else by its `repr`."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            sha.update(
                local_shard(value).detach().flatten().view(torch.uint8).cpu().numpy().tobytes()
            )
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()


def require_same_state(trainer: Trainer, checkpoint: Path) -> None:
    """Raise `UserError` if what was loaded from `checkpoint` is not what was in memory at its save.

    What is compared is kept in the run's folder, as `resumed.json`. A state that the other machine
    or number of processes did not have is left out.
    """
    was = told_in(checkpoint).get("state", {})
    now = {name: found for name, found in state_hashes(trainer).items() if name in was}
    if now.pop("processes", "") != was.get("processes", ""):
        now = {name: found for name, found in now.items() if not name.startswith("random")}
    told = {
        "checkpoint": checkpoint.name,
        "loaded": now,
        "saved": {name: was[name] for name in now},
    }
    text = json.dumps(told, indent=1) + "\n"
    (checkpoint.parent / "resumed.json").write_text(text, encoding="utf-8")
    if changed := [name for name in now if now[name] != was[name]]:
        raise UserError(
            f"{checkpoint.name} is not loaded as it was saved: {', '.join(changed)} differ. "
            f"Nothing was trained. Move {checkpoint} away, to continue from the one before it."
        )
    if now:
        print(f"As saved in {checkpoint.name}: {', '.join(now)}.")


def waited(state: TrainerState) -> int:
    """After how many evaluations without a better one a checkpoint was saved."""
    saved = state.stateful_callbacks.get("EarlyStoppingCallback") or {"attributes": {}}
    return saved["attributes"].get("early_stopping_patience_counter", 0)


def lacks_evaluation(state: TrainerState) -> bool:
    """Whether a checkpoint is of the end of an epoch that was not evaluated: a stop came before."""
    step, over = state.global_step, not (state.epoch or 0) % 1
    evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
    return step > 0 and (over or step >= state.max_steps) and step not in evaluated


def restore_patience(trainer: Trainer, state: TrainerState) -> None:
    """Restore early stopping's counter from `state`, which the Trainer forgets."""
    for callback in early_stopping(trainer):
        callback.early_stopping_patience_counter = waited(state)


def early_stopping(trainer: Trainer) -> list[EarlyStoppingCallback]:
    """The trainer's early stopping, if it has any."""
    callbacks = trainer.callback_handler.callbacks if trainer else []
    return [each for each in callbacks if isinstance(each, EarlyStoppingCallback)]


def stopped_early(trainer: Trainer, state: TrainerState) -> bool:
    """Whether validation had not become better for as many epochs as early stopping waits."""
    stops = early_stopping(trainer)
    return any(waited(state) >= each.early_stopping_patience for each in stops)


def require_finite(model: PreTrainedModel) -> None:
    """Raise `UserError` if any trained weight is NaN or infinite."""
    trained = {
        name: local_shard(weight)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    broken = [name for name, weight in trained.items() if not weight.isfinite().all()]
    if broken:
        raise UserError(
            f"The adapter is not saved: {len(broken)} of its matrices hold NaN or infinity "
            f"({broken[0]}, …)."
        )
