"""Section 10: every change to a Trainer."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import distribute_tensor
from transformers import Trainer, TrainingArguments

from finetune.batches import StepSampler, row_lengths, split_batch, with_void_row
from finetune.files import BEING_WRITTEN
from finetune.machine import free_cache, processes
from finetune.plan import Plan
from finetune.speed import adapter_to_fp32, keep_dense, recompute_layers
from qlora_helpers import Settings, UserError


def one_gpu(args: TrainingArguments) -> TrainingArguments:
    """`args` for a process that trains on one GPU, however many it sees (Kaggle has two T4).

    The Trainer would copy the model to all of them by DataParallel, which 4-bit weights do not
    survive (`Trainer._wrap_model`).
    """
    args._n_gpu = min(1, args.n_gpu)
    return args


def follow_plan(trainer: Any, plan: Plan, settings: Settings) -> None:
    """Make a freshly built `SFTTrainer` train by the plan.

    That is: order of rows, recomputed layers, fp32 adapter, loss. TRL's own `compute_loss` also
    gathers entropy and accuracy of every micro-batch, and waits for the GPU four times to do so;
    the Trainer's plain one is used. Its loss is over the step's trained tokens, whatever the cut.
    """
    adapter_to_fp32(trainer.model)
    recompute_layers(trainer.model, plan.cut.recomputed_layers)
    keep_dense(trainer.model, plan.cut.dense)
    trainer.model.set_attn_implementation(plan.cut.attention)
    lengths = row_lengths(trainer.train_dataset)
    sampler = StepSampler(lengths, settings.effective_batch, settings.seed, plan.cut)
    if sampler.processes > 1:
        trainer.train_dataset = with_void_row(trainer.train_dataset)
    # FSDP's own casts would round the adapter's weights and the positions' frequencies.
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        trainer.save_model = functools.partial(save_gathered, trainer)
        trainer._load_from_checkpoint = functools.partial(load_gathered, trainer)
        trainer._load_best_model = lambda: None  # the process that follows loads it (`finished`)
    trainer._get_train_sampler = lambda *_: sampler
    trainer.model_accepts_loss_kwargs = True
    trainer.compute_loss = types.MethodType(Trainer.compute_loss, trainer)
    trainer.prediction_step = types.MethodType(Trainer.prediction_step, trainer)
    # TRL's own README.md would say something else about the model, in the user's run folder.
    trainer.create_model_card = lambda *_, **__: None
    trainer._save_checkpoint = functools.partial(save_marked, trainer, trainer._save_checkpoint)
    survive_out_of_memory(trainer)
    # Else a batch waits for the step before it.
    trainer.accelerator.dataloader_config.non_blocking = True
    trim_steps(trainer)


def save_marked(trainer: Any, save: Callable, *args: Any, **kwargs: Any) -> None:
    """Save a checkpoint in a folder that says, until it is sealed, that it is being written."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEING_WRITTEN).touch()
    save(*args, **kwargs)


def save_gathered(trainer: Any, output_dir: str, _internal_call: bool = False) -> None:
    """Save the adapter that FSDP has taken apart.

    The Trainer would gather the whole base model to do that.
    """
    weights = {
        name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    weights = {name: weight.full_tensor().cpu() for name, weight in weights.items()}
    if trainer.args.should_save:
        trainer.model.save_pretrained(output_dir, state_dict=weights)


def load_gathered(trainer: Any, folder: str, model: Any = None) -> None:
    """Load what `save_gathered` saved, each process its part.

    accelerate 1.15's own way waits for ever for a LoRA.
    """
    saved = load_file(f"{folder}/adapter_model.safetensors")
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            whole = saved[name.replace(".default.", ".")].to(weight.device, weight.dtype)
            weight.data.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))


def trim_steps(trainer: Any) -> None:
    """Spare each step its walks over all of the model's modules.

    On short rows they leave the GPU idle. To set the training mode, to clear and to clip gradients
    and to count FLOP, the Trainer visits every module, frozen ones too: 100 of 360 ms a step in a
    profile of Mistral-7B. The trained weights are enough; nothing uses the FLOP.
    """
    step, trainer.floating_point_ops = trainer.training_step, lambda inputs: 0.0

    def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        # `model` is what the Trainer has made of it by now: DDP's, for one.
        if "zero_grad" not in vars(model):
            trim(trainer, model)
        return step(model, *args, **kwargs)

    trainer.training_step = training_step


def trim(trainer: Any, model: Any) -> None:
    """`trim_steps` for the model that is trained, once the Trainer has wrapped it."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def set_mode(mode: bool = True) -> Any:  # an evaluation sets the mode of `trainer.model` alone
        same = model.training == trainer.model.training == mode
        return model if same else type(model).train(model, mode)

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        trainer.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(trained, max_norm, norm_type)

    model.zero_grad = lambda set_to_none=True: [setattr(p, "grad", None) for p in trained]
    model.train = set_mode
    if not trainer.is_fsdp_enabled:
        trainer.accelerator.clip_grad_norm_ = clip


def survive_out_of_memory(trainer: Any) -> None:
    """If memory runs out in a micro-batch, take its gradients back and do it again in halves.

    All later ones go in halves too. The loss is normalised by the trained tokens of the whole step,
    so halves add up to the same gradient: the micro-batch is halved, the accumulation doubled, and
    the effective batch stays. Raises `UserError` if one row alone does not fit.
    """
    # The other processes would wait for ever for the halves that they do not have.
    if processes()[1] > 1:
        return
    step, pieces = trainer.training_step, [1]
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def part(model: Any, inputs: Mapping[str, Any], count: Any, cut: int) -> Any:
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        with contextlib.suppress(torch.OutOfMemoryError):
            return step(model, inputs, count)
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        free_cache()
        halves = split_batch(inputs, 2)
        if len(halves) == 1:
            raise UserError(
                "Out of memory on a single row. Lower max_length, or close what else uses the GPU."
            )
        if pieces[0] < 2 * cut:
            pieces[0] = 2 * cut
            print(
                f"Memory ran out: each micro-batch now goes in {pieces[0]} parts; "
                "the effective batch is unchanged."
            )
        return sum(part(model, half, count, 2 * cut) for half in halves)

    def whole(model: Any, inputs: Mapping[str, Any], count: Any = None) -> Any:
        return sum(part(model, piece, count, pieces[0]) for piece in split_batch(inputs, pieces[0]))

    trainer.training_step = whole


def free_optimizer(trainer: Any) -> None:
    """Give back the memory of a trainer's optimizer; what it logged and its settings stay."""
    for holder in (trainer, trainer.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    trainer.accelerator.free_memory()
    free_cache()
