"""Section 10: every change to a Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from finetune.answers import validation_loss
from finetune.batches import (
    Batch,
    Collator,
    StepSampler,
    own_lengths,
    row_lengths,
    split_batch,
    with_void_row,
)
from finetune.callbacks import Dropped
from finetune.checkpoints import require_same_state, stopped_early
from finetune.files import BEING_WRITTEN, why_unusable
from finetune.machine import free_cache, processes, set_random_states
from finetune.pace import Epochs, Speed
from finetune.plan import Plan
from finetune.scores import loss_told
from finetune.speed import compute_by, keep_dense, noisy
from qlora_helpers import UserError, many

PART_TOKENS = 20_000  # of held-out rows, in a timed checkpoint: some ten seconds on a T4


class PlannedTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer` for encoded rows that trains as a plan says, and spares what nobody reads.

    The loss of a micro-batch is summed over its trained tokens and divided by those of the whole
    step, so that it makes no difference how a step is cut. TRL's own `compute_loss` also gathers
    entropy and accuracy of every micro-batch, and waits for the GPU four times to do so; the
    Trainer's plain one is used. Evaluation is `validation_loss`, by tokens, where the Trainer takes
    the mean over batches, which depends on their size. NEFTune's noise goes by each row's own
    length (`noisy`). The router of a mixture of experts gets no auxiliary loss: it would depend on
    the cut.
    """

    compute_loss = Trainer.compute_loss

    def __init__(
        self,
        model: PeftModel,
        args: trl.SFTConfig,
        plan: Plan,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        **kwargs: object,
    ):
        step = plan.cut.micro_batch * plan.accumulation * processes()[1]
        self.sampler = StepSampler(row_lengths(train_dataset), step, args.seed, plan.cut)
        rows = train_dataset.select_columns(["input_ids", "labels"])
        self.parts, self.trained, self.steps, self.run = 1, list[nn.Parameter](), plan.steps, ""
        self.planned_for = plan.settings
        self.evaluating = contextlib.nullcontext  # `safe_training` gives another
        self.noise, args.neftune_noise_alpha = args.neftune_noise_alpha or 0.0, None
        weights = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model,
            for_encoded_rows(args),
            train_dataset=with_void_row(rows) if processes()[1] > 1 else rows,
            data_collator=Collator(plan.cut, processing_class.eos_token_id),
            processing_class=processing_class,
            **kwargs,
        )
        model.config.get_text_config().output_router_logits = False
        hold_in_fp32(model, weights)
        compute_by(model, plan.cut)
        self.model_accepts_loss_kwargs = True
        # Else a batch waits for the step before it.
        self.accelerator.dataloader_config.non_blocking = True
        if self.is_fsdp_enabled:  # its casts would round the adapter and the positions' frequencies
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        # First, so that TensorBoard sees the number.
        self.callback_handler.callbacks[:0] = [Epochs(self.sampler), Speed(self.sampler)]

    def _inner_training_loop(self, batch_size: int | None = None, **kwargs: object) -> TrainOutput:
        """By this plan's micro-batch: transformers 4.57 goes on by the checkpoint's."""
        try:
            done = super()._inner_training_loop(batch_size=self.args.train_batch_size, **kwargs)
        except Dropped as dropped:
            return self.save_last_step(dropped)
        if self.state.global_step < self.steps and stopped_early(self, self.state):
            print(
                f"Stopped early, after epoch {self.state.epoch:.3g} (step "
                f"{self.state.global_step:,} of {self.steps:,}): validation loss fell no further."
            )
        return done

    def save_last_step(self, dropped: Dropped) -> TrainOutput:
        """Save the state after the last whole step, unless that was done already."""
        self.model.zero_grad()
        set_random_states(dropped.randomness)
        step = self.state.global_step
        if step and why_unusable(self.checkpoint_folder(), "checkpoint"):
            self._save_checkpoint(self.model_wrapped, None)
            self.callback_handler.on_save(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(step, 0.0, {"train_runtime": 0.0})

    def checkpoint_folder(self) -> Path:
        """Where the state after the last whole step is saved."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _get_train_sampler(self, *_: object) -> StepSampler:
        return self.sampler

    def create_model_card(self, *_: object, **__: object) -> None:
        """None of TRL's in the run's folder, which would say something else about the model."""

    def floating_point_ops(self, inputs: Batch) -> float:
        """Counting walks over all modules in every micro-batch, and nothing uses it."""
        return 0.0

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Gradients of a micro-batch, in parts once memory has run out; returns its loss.

        All modules are put into training mode at first (`from_pretrained` leaves those of the base
        model in evaluation mode) and when the model has left it, not each time as the Trainer does:
        walks over all modules leave the GPU idle on short rows, 100 of 360 ms a step in a profile
        of Mistral-7B.
        """
        if not (self.trained and model.training and self.model.training):
            model.train()
            self.trained = [p for p in model.parameters() if p.requires_grad]
        parts = self.parts
        pieces = split_batch(inputs, parts) if parts > 1 else [inputs]
        return sum(self.part(model, piece, num_items_in_batch, parts) for piece in pieces)

    def evaluation_loop(
        self, dataloader: DataLoader, *_: object, metric_key_prefix: str = "eval", **__: object
    ) -> EvalLoopOutput:
        """The loss over all trained tokens of the held-out rows, whatever the plan.

        Under FSDP, where all processes pass through the model together, each takes all rows.
        """
        rows = dataloader.dataset
        with self.evaluating():
            metrics = {f"{metric_key_prefix}_loss": self.loss_of(rows)}
        return EvalLoopOutput(None, None, metrics, len(rows))

    def loss_of(self, rows: Dataset) -> float:
        """`validation_loss` of rows that all processes share."""
        ranks = 1 if self.is_fsdp_enabled else processes()[1]
        return validation_loss(self.model, rows, ranks)

    def _evaluate(self, trial: object, *args: object, **kwargs: object) -> dict[str, float]:
        """The Trainer's; at the start of a resumed run it is of the epoch that ended there."""
        metrics = super()._evaluate(trial, *args, **kwargs)
        made_up = kwargs.get("skip_scheduler") and self.state.global_step
        if made_up and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = str(self.checkpoint_folder())
        return metrics

    def log_part(self) -> None:
        """Log the validation loss of a few rows, inside an epoch: seconds; it decides nothing."""
        rows = self.eval_dataset.shuffle(self.args.seed)
        count = (np.cumsum(row_lengths(rows)) <= PART_TOKENS).sum()
        rows = rows.select(range(max(1, count)))
        loss, due = self.loss_of(rows), self.control.should_log
        self.log({"eval_part_loss": loss})
        self.control.should_log = due  # the step's own loss comes after this
        told = f"validation loss {loss_told(loss)} ({many(len(rows), 'row')})"
        print(f"Step {self.state.global_step:,}: {told}")

    def part(self, model: nn.Module, inputs: Batch, count: Tensor | None, parts: int) -> Tensor:
        """Gradients of one of `parts`; if memory runs out, they are taken back and halves come.

        The loss is divided by the trained tokens of the whole step, so halves add up to the same
        gradient, and the effective batch stays. Raises `UserError` if one row alone does not fit.
        """
        if processes()[1] > 1:  # the others would wait for ever for halves that they do not have
            return self.passes(model, inputs, count)
        before = [None if p.grad is None else p.grad.clone() for p in self.trained]
        with contextlib.suppress(torch.OutOfMemoryError):
            return self.passes(model, inputs, count)
        for parameter, grad in zip(self.trained, before, strict=True):
            parameter.grad = grad
        free_cache()
        halves = split_batch(inputs, 2)
        if len(halves) == 1:
            raise UserError(
                "Out of memory on a single row. Lower max_length, or close what else uses the GPU."
            )
        if self.parts < 2 * parts:
            self.parts = 2 * parts
            print(
                f"Memory ran out: each micro-batch now goes in {self.parts} parts; "
                "the effective batch is unchanged."
            )
        return sum(self.part(model, half, count, 2 * parts) for half in halves)

    def passes(self, model: nn.Module, inputs: Batch, count: Tensor | None) -> Tensor:
        """One forward and backward pass; returns the loss."""
        inputs = self._prepare_inputs(inputs)
        with contextlib.ExitStack() as stack:
            if self.noise:
                stack.enter_context(noisy(self.model, self.noise, own_lengths(inputs)))
            stack.enter_context(self.compute_loss_context_manager())
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        self.accelerator.backward(loss)
        return loss.detach()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        """The Trainer's, in a folder that says, until it is sealed, that it is being written."""
        if self.args.should_save:
            folder = self.checkpoint_folder()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BEING_WRITTEN).touch()
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; under FSDP the adapter alone is gathered, not the whole base model."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = {n: p.full_tensor().cpu() for n, p in self.trainable().items()}
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=weights)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # accelerate 1.15's own way waits for ever for a LoRA.
        saved = load_file(f"{resume_from_checkpoint}/adapter_model.safetensors")
        for name, weight in self.trainable().items():
            whole = saved[name.replace(".default.", ".")].to(weight.device, weight.dtype)
            weight.data.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last that is loaded of a checkpoint: it must be what was saved."""
        super()._load_rng_state(checkpoint)
        if checkpoint and not self.is_fsdp_enabled and processes()[0] == 0:
            require_same_state(self, Path(checkpoint))
        if checkpoint:
            self.follow_settings()

    def follow_settings(self) -> None:
        """Go on by today's `learning_rate`: the Trainer restores the checkpoint's."""
        schedule: LambdaLR = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        rates = [self.args.learning_rate] * len(schedule.base_lrs)
        now = [
            f(schedule.last_epoch) * rate
            for f, rate in zip(schedule.lr_lambdas, rates, strict=True)
        ]
        schedule.base_lrs, schedule._last_lr = rates, now
        for group, rate in zip(self.optimizer.param_groups, now, strict=True):
            group.update(initial_lr=self.args.learning_rate, lr=rate)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:  # else the process that follows loads it (`finished`)
            super()._load_best_model()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained weights by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def free_memory(self) -> None:
        """Give back what the optimizer and a dense copy hold; log and settings stay."""
        keep_dense(self.model, False)
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.accelerator.free_memory()
        free_cache()


def hold_in_fp32(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Give the adapter back the weights that it had, in fp32, once the trainer is built.

    TRL casts the trainable weights of a quantised model to bf16, which rounds an adapter that is
    trained on. AdamW's small updates vanish in bf16, and with fp16 compute the gradient scaler
    refuses bf16 gradients outright. On an H100 fp32 was not slower.
    """
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name]


def for_encoded_rows(args: trl.SFTConfig) -> trl.SFTConfig:
    """`args` with what `PlannedTrainer` always needs.

    It trains on one GPU, however many this process sees (Kaggle has two T4): the Trainer would copy
    the model to all of them by DataParallel, which 4-bit weights do not survive
    (`Trainer._wrap_model`).
    """
    args.max_length, args.dataset_kwargs = None, {"skip_prepare_dataset": True}
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # older, newer
        setattr(args, name, False)  # layers are recomputed one by one
    args.loss_type = "nll"  # trl's default replaces the model's forward in some versions
    args.ddp_find_unused_parameters = False  # every adapter weight takes part in every step
    args.logging_nan_inf_filter = False  # a NaN is not logged as 0
    args._n_gpu = min(1, args.n_gpu)
    return args
