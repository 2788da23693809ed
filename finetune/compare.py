"""Section 8: whether a model computes the same as before something in it was replaced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.batches import Batch, Collator, Cut, Encoded, row_lengths
from finetune.machine import autocast, computing_type, same_randomness


@contextlib.contextmanager
def state_preserved(model: PeftModel) -> Iterator[None]:
    """Passes inside change no random state and no module's mode, and leave no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with same_randomness():
            yield
    finally:
        model.zero_grad(set_to_none=True)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def perturbed_adapter(model: PeftModel) -> Iterator[None]:
    """Inside, the adapter is not the zero that it begins as, which would hide mistakes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for weight in trained:
            weight.add_(torch.randn_like(weight), alpha=0.01)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(trained, before, strict=True):
                weight.copy_(old)


@contextlib.contextmanager
def rounding_noise(model: PeftModel, rows: Sequence[Encoded], precision: str) -> Iterator[None]:
    """Inside, the embeddings of the rows' tokens are off by as much as a rounding is at most.

    What that does to a result tells how far apart two equal computations may end.
    """
    weight = model.get_input_embeddings().weight.data
    ids = sorted({token for row in rows for token in row["input_ids"]})
    before = weight[ids].clone()
    weight[ids] *= 1 + torch.randn_like(before) * torch.finfo(computing_type(precision)).eps
    try:
        yield
    finally:
        weight[ids] = before


class Comparison:
    """A LoRA model's own loss and gradients on three short rows, and how far rounding goes."""

    def __init__(self, model: PeftModel, data: Dataset, precision: str):
        self.model, self.precision = model.eval(), precision
        lengths = row_lengths(data)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        chosen = sorted({order[0], order[len(order) // 4], order[len(order) // 2]})
        self.rows = [{n: data[row][n][-256:] for n in ("input_ids", "labels")} for row in chosen]
        self.own = self.gradients()
        with rounding_noise(model, self.rows, precision):
            self.noise = self.distance()

    def distance(self) -> float:
        """The `relative_distance` of the gradients as computed now from the model's own."""
        return relative_distance(self.own, self.gradients())

    def gradients(self) -> list[Tensor | None]:
        """The loss of the rows, padded, and its gradient for each trained weight."""
        self.model.zero_grad(set_to_none=True)
        batch = on_device(self.model, Collator(Cut(len(self.rows), False, ""), 0)(self.rows))
        with autocast(self.precision):
            loss = self.model(**batch, num_items_in_batch=1).loss  # a sum, large enough for fp16
        loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [loss.detach(), *(None if p.grad is None else p.grad.clone() for p in trained)]


def relative_distance(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """Root mean square of the tensors' relative distances; infinite where one of two is absent."""
    pairs = [*zip(one, other, strict=True)]
    if any((a is None) != (b is None) for a, b in pairs):
        return math.inf
    far = [(a - b).norm() / a.norm().clamp(min=1e-30) for a, b in pairs if a is not None]
    return torch.stack(far).square().mean().sqrt().item()


def on_device(model: nn.Module, batch: Batch) -> Batch:
    """A micro-batch with its tensors where the model is."""
    device = next(model.parameters()).device
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}


def tolerance(noise: float) -> float:
    """The largest distance of two equivalent computations, given `noise`, that of one rounding."""
    return 1.5 * noise + 1e-4


def body(causal: PreTrainedModel) -> PreTrainedModel:
    """A causal LM without its head."""
    return causal.model if causal.base_model is causal else causal.base_model


def drops_out(model: PeftModel, rows: Sequence[Encoded]) -> bool:
    """Whether the base model, in training, computes the same row differently each time."""
    batch = on_device(model, Collator(Cut(1, False, ""), 0)(rows))
    del batch["labels"]
    model.train()
    with torch.no_grad(), model.disable_adapter(), autocast("fp32"):
        one, other = (body(model.get_base_model())(**batch)[0].float() for _ in range(2))
    model.eval()
    return relative_distance([one], [other]) > 0.01
