"""Section 11: callbacks of a training: checkpoints sealed, faults told, speed logged."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from finetune.backup import back_up
from finetune.batches import StepSampler
from finetune.checkpoints import (
    fingerprint,
    last_good_checkpoint,
    require_finite,
    state_hashes,
)
from finetune.files import (
    BEING_WRITTEN,
    checkpoints,
    disk_is_full,
    edit_json,
    is_ours,
    seal,
    why_unusable,
)
from finetune.machine import here, processes, versions
from qlora_helpers import Settings, UserError, base_name

SAVE_SECONDS = 20 * 60  # an epoch on a T4 can take a night
ASK_STEPS = 20  # several processes agree on the time as often as this, for each time all must wait


class KeepSafe(TrainerCallback):
    """Seals and copies checkpoints, stops at a non-finite loss or gradient, stops when asked.

    Between the checkpoints at the ends of epochs it asks for one every `SAVE_SECONDS`.

    `mark` is the run's fingerprint. With fp16 a gradient may overflow now and then (the scaler
    skips that step), so there only the loss counts.
    """

    def __init__(self, settings: Settings, mark: Mapping[str, Any], trainer: Any = None):
        self.settings, self.mark, self.trainer, self.asked = settings, mark, trainer, False
        self.fp16 = trainer is not None and trainer.args.fp16
        self.pending, self.trained, self.saved = None, [], time.monotonic()

    def ask(self, *_: Any) -> None:
        """What SIGINT does: the first lets the step end, the second does not."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("Stopping after this step, with a checkpoint. Press again to stop at once, without.")

    def diverged(self, what: str, step: int) -> None:
        """Raise `UserError` about `what` is not finite, with the last good checkpoint."""
        whole = (
            path
            for path in checkpoints(self.settings.run_dir)
            if not why_unusable(path, "checkpoint")
        )
        raise UserError(
            f"Training stopped at step {step}: {what} is not finite. The last good checkpoint: "
            f"{next(whole, 'none')}\n{self.advice(step)}"
        )

    def advice(self, step: int) -> str:
        """What to do about a loss or gradient that is not finite."""
        if self.fp16 and not step:
            return (
                "This base model's numbers are too large for fp16, which ends at 65,504: no "
                "learning_rate helps. Take a GPU with native bf16 (L4, A100, H100), or another "
                "base_model."
            )
        fp16 = " (or take a GPU with native bf16: fp16 ends at 65,504)" * self.fp16
        return (
            f"Lower learning_rate (half is a good start){fp16} and run all again: "
            "with resume = 'anyway' it continues from that checkpoint, "
            "with a new run_name it begins anew."
        )

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """On a GPU the answer is read a step later: waiting for it would leave the GPU idle."""
        self.check_gradient()
        self.trained = self.trained or [p for p in model.parameters() if p.requires_grad]
        grads = [here(weight.grad) for weight in self.trained if weight.grad is not None]
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.best_model_checkpoint:  # as `finish` has written it, a name alone
            name = Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(Path(args.output_dir) / name)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
        elif (state.epoch or 0) % 1 and state.global_step < state.max_steps:  # else it is saved
            control.should_save = self.is_time(state.global_step)

    def is_time(self, step: int) -> bool:
        """Whether the last checkpoint is `SAVE_SECONDS` old; the first process says so for all."""
        late = time.monotonic() - self.saved >= SAVE_SECONDS
        if processes()[1] == 1:
            return late
        return step % ASK_STEPS == 0 and broadcast_object_list([late])[0]

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.epoch % 1:  # inside an epoch: its evaluation belongs to its end
            control.should_save = control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.saved = time.monotonic()
        self.check_gradient()
        PartialState().wait_for_everyone()  # each process has a random state to save
        require_finite(model)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        whole = self.trainer and not self.trainer.is_fsdp_enabled  # else no process has all of it
        self.finish(folder, state, state_hashes(self.trainer) if whole else {})
        self.rotate(folder, state)
        back_up(self.settings, folder)

    def finish(self, folder: Path, state: Any, hashes: Mapping[str, Any]) -> None:
        """Complete and seal a checkpoint; nothing in it names a path of this machine.

        `hashes` are those of what training goes on from (`state_hashes`).
        """
        for name in ("training_args.bin", "README.md"):  # nothing here reads them
            (folder / name).unlink(missing_ok=True)
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        edit_json(folder / "trainer_state.json", best_model_checkpoint=best)
        base = base_name(self.settings.base_model)
        edit_json(folder / "adapter_config.json", base_model_name_or_path=base)
        told = {"fingerprint": self.mark, "versions": versions(), "state": hashes}
        (folder / "run.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
        seal(folder, "checkpoint", self.settings.run_name)
        (folder / BEING_WRITTEN).unlink(missing_ok=True)

    def rotate(self, newest: Path, state: Any) -> None:
        """Keep the two newest checkpoints and the best one; older ones go, if they are ours."""
        kept = {newest.name, Path(state.best_model_checkpoint or newest).name}
        for folder in checkpoints(newest.parent)[2:]:
            if folder.name not in kept and is_ours(folder, "checkpoint"):
                shutil.rmtree(folder)


@contextlib.contextmanager
def safe_training(settings: Settings, trainer: Any) -> Iterator[None]:
    """Inside, checkpoints are sealed and copied, and what can stop training does so in plain words.

    The Stop button (SIGINT) lets the step end and saves a checkpoint; a second press stops at once.
    Raises `UserError` after the Stop button, for a non-finite loss or gradient, and for a full
    disk.
    """
    callback = KeepSafe(settings, fingerprint(settings, trainer), trainer)
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
            f"{last.name if last else 'nothing'}. "
            "Free some space, then run this cell again: it continues from there."
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


class Speed(TrainerCallback):
    """Adds `tokens_per_second` to what the trainer logs.

    Real tokens of the steps since the last log, padding left out, over the time within epochs:
    evaluation and saving come between them.
    """

    def __init__(self, sampler: StepSampler):
        self.began, self.seconds, self.tokens = 0.0, 0.0, 0
        self.sampler, self.per_epoch = sampler, len(sampler.steps(0))
        self.sizes = functools.lru_cache(2)(self.step_sizes)

    def step_sizes(self, epoch: int) -> list[int]:
        """Tokens of each step of an epoch."""
        lengths = self.sampler.lengths
        return [sum(lengths[row] for row in rows) for rows in self.sampler.steps(epoch)]

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        epoch, step = divmod(state.global_step - 1, self.per_epoch)
        self.tokens += self.sizes(epoch)[step]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
        if "loss" in logs and self.tokens:
            now = time.perf_counter()
            speed = {"tokens_per_second": self.tokens / (self.seconds + now - self.began)}
            self.began, self.seconds, self.tokens = now, 0.0, 0
            logs.update(speed)
            state.log_history[-1].update(speed)
