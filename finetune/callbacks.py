"""Section 11: training callbacks: they seal checkpoints, report faults, and stop when asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune.backup import back_up
from finetune.checkpoints import (
    SAVE_SECONDS,
    last_good_checkpoint,
    replace_lost_best,
    require_finite,
    restore_patience,
    state_hashes,
)
from finetune.files import (
    BEING_WRITTEN,
    Record,
    checkpoints,
    disk_is_full,
    edit_json,
    is_ours,
    seal,
    why_unusable,
)
from finetune.identity import fingerprint
from finetune.machine import (
    RandomStates,
    duration,
    local_shard,
    peak_memory,
    processes,
    random_states,
    versions,
)
from qlora_helpers import Settings, UserError, base_name

SAVE_SHARE = 0.05  # of the time, at most, goes into saves and copies inside an epoch
SIGNALS = {signal.SIGINT, signal.SIGTERM}
ONE_PRESS = 2  # seconds in which a launcher passes on a signal that this process has already


class Dropped(BaseException):
    """A step, or an evaluation, is given up: training goes back to the end of the last step.

    `randomness` are the random states of that moment.
    """

    def __init__(self, randomness: RandomStates):
        super().__init__("the unfinished step is dropped")
        self.randomness = randomness


class KeepSafe(TrainerCallback):
    """Seals and copies checkpoints, stops at a non-finite loss or gradient, stops when asked.

    Between the checkpoints at the ends of epochs it asks for one every `SAVE_SECONDS`.

    `mark` is the run's fingerprint. With fp16 a gradient may overflow now and then (the scaler
    skips that step), so there only the loss counts.
    """

    def __init__(self, settings: Settings, mark: Record, trainer: Trainer | None = None):
        self.settings, self.mark, self.trainer = settings, mark, trainer
        self.fp16 = trainer is not None and trainer.args.fp16
        self.pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.trained, self.saved, self.cost = list[Tensor](), time.monotonic(), 0.0
        self.asked, self.since, self.stopped, self.droppable = 0, 0.0, False, False
        self.randomness: RandomStates = ()
        self.group: ProcessGroup | None = None

    def ask(self, number: int, *_: object) -> None:
        """What SIGINT and SIGTERM do: what is unfinished is dropped, and the state before saved.

        A second SIGINT stops at once. One process of several waits for the end of the step, as all
        must stop at the same.
        """
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self.since > ONE_PRESS:
                raise KeyboardInterrupt
            return
        self.asked, self.since = number, time.monotonic()
        with contextlib.suppress(RuntimeError):  # it may come in the middle of another print
            print("Stopping, with a checkpoint. Press again to stop at once, without.", flush=True)
        self.drop_if_asked()

    def drop_if_asked(self) -> None:
        """Raise `Dropped` where a stop was asked for and there is something that can be dropped."""
        if self.asked and self.droppable and processes()[1] == 1:
            self.droppable, self.stopped = False, True
            raise Dropped(self.randomness)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it is an evaluation: a stop drops it, and the resumed run makes up for it."""
        self.droppable, self.randomness = True, random_states()
        self.drop_if_asked()
        yield
        self.droppable = False

    def diverged(self, what: str, step: int) -> None:
        """Raise `UserError` about `what` is not finite, with the last good checkpoint."""
        found = checkpoints(self.settings.run_dir)
        whole = next((path for path in found if not why_unusable(path, "checkpoint")), None)
        raise UserError(
            f"Training stopped at step {step}: {what} is not finite. The last good checkpoint: "
            f"{whole or 'none'}\n{self.advice(step, whole)}"
        )

    def advice(self, step: int, whole: Path | None) -> str:
        """What to do about a loss or gradient that is not finite; `whole` is a good checkpoint."""
        if self.fp16 and not step:
            return (
                "This base model's numbers are too large for fp16, which ends at 65,504: no "
                "learning_rate helps. Take a GPU with native bf16 (L4, A100, H100), or another "
                "base_model."
            )
        fp16 = " (or take a GPU with native bf16: fp16 ends at 65,504)" * self.fp16
        if not step:
            return (
                "Nothing was trained yet, so no learning_rate helps: the base model (or "
                "base_adapter) computes it so. Choose another."
            )
        lower = f"Lower learning_rate (half is a good start){fp16} and run all again"
        if not whole:
            return f"{lower}."
        return (
            f"{lower}: with resume = 'anyway' it continues from that checkpoint, with a new "
            "run_name it begins anew."
        )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: object,
    ) -> None:
        """On a GPU the answer is read a step later: waiting for it would leave the GPU idle."""
        self.droppable = False
        self.check_gradient()
        self.trained = self.trained or [p for p in model.parameters() if p.requires_grad]
        grads = [local_shard(weight.grad) for weight in self.trained if weight.grad is not None]
        if args.fp16:
            return
        finite, ready = torch.nn.utils.get_total_norm(grads).isfinite(), None
        if finite.is_cuda:
            finite, ready = finite.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self.pending = (state.global_step + 1, finite, ready)
        if ready is None:
            self.check_gradient()

    def check_gradient(self, *_: object, **__: object) -> None:
        """Stop if the last gradient that was looked at is not finite."""
        if self.pending:
            (step, finite, ready), self.pending = self.pending, None
            if ready is not None:
                ready.synchronize()
            if not finite:
                self.diverged("the gradient", step)

    on_train_end = check_gradient

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        self.check_gradient()
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                self.diverged(f"{name} ({logs[name]})", state.global_step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.best_model_checkpoint:  # as `finish` has written it, a name alone
            name = Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(Path(args.output_dir) / name)
            replace_lost_best(state)
        restore_patience(self.trainer, state)
        self.randomness = random_states()
        if processes()[1] > 1:  # of CPUs, so that no GPU waits
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=6))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.global_step:  # before the first step training begins anew
            self.randomness = random_states()
        self.droppable = True
        self.drop_if_asked()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        inside = (state.epoch or 0) % 1 and state.global_step < state.max_steps  # else it is saved
        asked, late = self.any_of(bool(self.asked), bool(inside) and self.is_late())
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True
        elif late and self.trainer:
            self.trainer.log_part()
            control.should_save = True

    def is_late(self) -> bool:
        """Whether a checkpoint is due between the ends of epochs."""
        wait = max(SAVE_SECONDS, self.cost / SAVE_SHARE)
        return time.monotonic() - self.saved >= wait

    def any_of(self, *told: bool) -> list[bool]:
        """What this process finds so, or any of those that train with it."""
        if self.group is None:
            return [*told]
        found = torch.tensor(told, dtype=torch.uint8)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self.group)
        return found.bool().tolist()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self.stopped:  # it is saved already, and evaluated by the run that goes on
            control.should_save = control.should_evaluate = False

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: object,
    ) -> None:
        began = time.monotonic()
        self.check_gradient()
        PartialState().wait_for_everyone()  # each process has a random state to save
        require_finite(model)
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            whole = self.trainer and not self.trainer.is_fsdp_enabled  # else no process has it all
            self.finish(folder, state, state_hashes(self.trainer) if whole else {})
            self.rotate(folder, state)
            back_up(self.settings, folder)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def finish(self, folder: Path, state: TrainerState, hashes: Mapping[str, str]) -> None:
        """Complete and seal a checkpoint; nothing in it names a path of this machine.

        `hashes` are those of what training goes on from (`state_hashes`).
        """
        for name in ("training_args.bin", "README.md"):  # nothing here reads them
            (folder / name).unlink(missing_ok=True)
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        edit_json(folder / "trainer_state.json", best_model_checkpoint=best)
        base = base_name(self.settings.base_model)
        edit_json(folder / "adapter_config.json", base_model_name_or_path=base)
        told = {"run": getattr(self.trainer, "run", ""), "fingerprint": self.mark}
        told |= {"versions": versions(), "state": hashes}
        (folder / "run.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
        seal(folder, "checkpoint", self.settings.run_name)
        (folder / BEING_WRITTEN).unlink(missing_ok=True)

    def rotate(self, newest: Path, state: TrainerState) -> None:
        """Keep the two newest checkpoints and the best one; older ones go, if they are ours."""
        kept = {newest.name, Path(state.best_model_checkpoint or newest).name}
        for folder in checkpoints(newest.parent)[2:]:
            if folder.name not in kept and is_ours(folder, "checkpoint"):
                shutil.rmtree(folder)


@contextlib.contextmanager
def safe_training(settings: Settings, trainer: Trainer) -> Iterator[None]:
    """Inside, checkpoints are sealed and copied, and what can stop training does so in plain words.

    The Stop button (SIGINT) and SIGTERM drop the unfinished step and save the state before it; a
    second press stops at once. After SIGTERM the process ends as it would have. Raises `UserError`
    after the Stop button, for a non-finite loss or gradient, and for a full disk. Prints how long
    training took, and the most memory.
    """
    callback = KeepSafe(settings, fingerprint(settings, trainer), trainer)
    trainer.add_callback(callback)
    start = time.monotonic()
    trainer.evaluating = callback.evaluating
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, callback.ask) for number in SIGNALS} if main else {}
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        last = last_good_checkpoint(settings.run_dir)
        then = "this cell again: it continues from there" if last else "from section 7 on"
        raise UserError(
            f"The disk is full: {settings.run_dir} could not be written to. Saved before: "
            f"{last.name if last else 'nothing'}. Free some space, then run {then}."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(callback)
        trainer.evaluating = contextlib.nullcontext
    raise_if_stopped(callback, trainer.state)
    if callback.trained:
        print(f"{duration(time.monotonic() - start)}, peak memory {peak_memory():.1f} GB")


def raise_if_stopped(callback: KeepSafe, state: TrainerState) -> None:
    """Raise `UserError` if training was asked to stop; after SIGTERM end the process as it would.

    Several launched processes are ended by their launcher.
    """
    alone = processes()[1] == 1
    if not (callback.stopped or (callback.asked and alone)):
        return
    told = "Stopped before the end of the first step: there is nothing to save yet."
    if state.global_step:
        told = f"Stopped at step {state.global_step:,} of {state.max_steps:,}, and saved."
    if callback.asked == signal.SIGTERM and alone:
        print(f"{told} This process is being ended.", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    never = callback.settings.resume == "never"
    first = "Set resume = 'auto' in section 2 and run it. " if never else ""
    raise UserError(f"{told} {first}Run this cell again to continue.")
