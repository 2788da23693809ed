"""Section 10: real passes, timed, on the model and the rows at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from finetune.answers import evaluating
from finetune.base_model import linear_4bit
from finetune.batches import Collator, Cut, StepSampler, steps_of, with_void_row
from finetune.machine import (
    autocast,
    free_cache,
    memory_in_use,
    memory_limit,
    peak_memory,
    processes,
    resolve_precision,
    same_randomness,
)
from finetune.speed import (
    checkpointable,
    flat_attention,
    keep_dense,
    padded_attention,
    recompute_layers,
)
from qlora_helpers import Settings, UserError


@dataclasses.dataclass
class Trial:
    """One cut and what was measured of it: `seconds` an epoch, `peak` GiB, or why it cannot be."""

    cut: Cut
    seconds: float = math.inf
    peak: float = math.nan
    note: str = ""

    def row(self, tokens: int, step: int, chosen: bool) -> dict[str, Any]:
        """A line of the plan's table; `tokens` of an epoch, `step` rows."""
        ranks = processes()[1]
        return {
            "rows at once": " × ".join(
                map(str, [self.cut.micro_batch, math.ceil(step / self.cut.micro_batch / ranks)])
            )
            + f" × {ranks} GPUs" * (ranks > 1),
            "layout": self.cut.layout,
            "layers recomputed": self.cut.recomputed_layers,
            "base weights": "dense" if self.cut.dense else "4-bit",
            "peak GB": None if self.note else round(self.peak, 1),
            "tokens/s": None if self.note else round(tokens / self.seconds),
            "minutes an epoch": None if self.note else round(self.seconds / 60, 2),
            "": "← chosen" if chosen else self.note,
            "chosen": chosen,
        }


class Trials:
    """Measures cuts on the model at hand, from one row up while that pays, within a time budget."""

    def __init__(self, settings: Settings, model: Any, examples: Any, lengths: Sequence[int]):
        self.settings, self.model, self.lengths, self.real_lengths = (
            settings,
            model,
            lengths,
            lengths,
        )
        self.examples = examples
        if processes()[1] > 1:
            self.lengths, self.examples = [*lengths, min(lengths)], with_void_row(examples)
        per_epoch, steps = steps_of(settings, len(lengths))
        self.precision, _ = resolve_precision(settings.bf16)
        self.epochs = math.ceil(steps / per_epoch)
        self.layers, self.gpu = len(checkpointable(model)), torch.cuda.is_available()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # AdamW's two moments come later.
        self.limit = memory_limit(settings.memory_limit_gb) - 8 * trained / 2**30
        self.tried: list[Trial] = []

    def choose(self) -> Trial:
        """The fastest of the cuts that fit."""
        attention = flat_attention(self.model)
        with untouched(self.model):
            padding = self.padding(self.sizes()[-1])
            varlen, padded = attention == "varlen", padded_attention(self.model)
            # This also compiles the attention.
            apart = (varlen or padding > 0.02) and self.keeps_rows_apart(attention)
            self.deadline = time.monotonic() + (45 if self.gpu else 20)
            if apart:
                self.climb(
                    [
                        Cut(n, True, attention)
                        for n in (self.sizes(1000) if varlen else self.sizes()[1:])
                    ]
                )
                self.climb(
                    [Cut(n, True, attention) for n in self.sizes() if varlen and not self.fitting()]
                )
            if padding < 0.3 or not self.fitting():
                sizes = [self.best().cut.micro_batch] if varlen and self.fitting() else self.sizes()
                self.climb([Cut(size, False, padded) for size in sizes])
            if self.gpu and self.fitting() and self.dense_size() < self.limit - memory_in_use():
                self.climb([dataclasses.replace(self.best().cut, dense=True)])
            keep_dense(self.model, False)
        if not self.fitting():
            longest = max(self.lengths)
            raise UserError(
                f"Out of memory: one row of {longest:,} tokens does not fit into "
                f"{self.limit:.1f} GB, even with every layer recomputed. Set max_length = "
                f"{longest // 2} in the hyperparameter cell, or use a larger GPU."
            )
        return self.best()

    def keeps_rows_apart(self, attention: str) -> bool:
        """Whether what a row before says changes nothing in a row after it, laid end to end.

        transformers masks that for most models, not for Bloom; nor can a mask keep
        convolutions apart.
        """
        first, last = (
            self.examples[row]
            for row in sorted(range(len(self.lengths)), key=self.lengths.__getitem__)[:2]
        )
        other, logits = {"input_ids": first["input_ids"][::-1], "labels": first["labels"]}, []
        self.model.set_attn_implementation(attention)
        with evaluating(self.model), autocast(self.precision):
            for rows in ([first, last], [first, last], [other, last]):
                batch = Collator(Cut(2, True, attention), 0)(rows)
                batch = {
                    k: v.to(self.model.device) if hasattr(v, "to") else v for k, v in batch.items()
                }
                found = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
                logits.append(found[-len(last["input_ids"]) :].float())
        whole, noise, change = (
            t.norm().item() for t in (logits[0], logits[1] - logits[0], logits[2] - logits[1])
        )
        # A GPU may compute the same thing differently each time.
        return change <= 3 * noise + 1e-4 * whole

    def sizes(self, tokens: int = 0) -> list[int]:
        """Rows at once that divide the effective batch, with `tokens` or more.

        A CPU gains nothing from many.
        """
        step, mean = (
            self.settings.effective_batch // processes()[1],
            sum(self.lengths) / len(self.lengths),
        )
        found = [n for n in range(1, min(step, 64 if self.gpu else 4) + 1) if step % n == 0]
        return [n for n in found if n * mean >= tokens] or found[-1:]

    def climb(self, cuts: Iterable[Cut]) -> None:
        """Measure cuts until one is slower or recomputes more than the last, or time is up."""
        last, again = math.inf, self.layers
        for cut in cuts:
            if self.fitting() and time.monotonic() > self.deadline:
                return
            trial = self.measure(cut, again)
            self.tried.append(trial)
            if trial.seconds > 1.02 * last or trial.note:
                return
            last, again = trial.seconds, trial.cut.recomputed_layers

    def padding(self, size: int) -> float:
        """Share of padding in padded micro-batches of `size` rows."""
        cut = Cut(size, False, "sdpa")
        batches = StepSampler(
            self.real_lengths, self.settings.effective_batch, self.settings.seed, cut
        ).micro_batches()
        return 1 - sum(self.lengths) / sum(self.tokens(cut, rows) for rows in batches)

    def fitting(self) -> list[Trial]:
        """The trials that ran."""
        return [trial for trial in self.tried if trial.seconds < math.inf]

    def best(self) -> Trial:
        """The fastest trial."""
        return min(self.fitting(), key=lambda trial: trial.seconds)

    def dense_size(self) -> float:
        """GiB that a dense copy of the 4-bit weights takes, and some room to train beside it."""
        shapes = [layer.weight.quant_state.shape for layer in linear_4bit(self.model)]
        return 2.2 * sum(math.prod(shape) for shape in shapes) / 2**30

    def measure(self, cut: Cut, most: int) -> Trial:
        """Time the longest and two typical micro-batches of `cut`.

        Recomputes as few layers as memory demands; gives up where more than `most` must be.
        """
        sampler = StepSampler(
            self.real_lengths, self.settings.effective_batch, self.settings.seed, cut
        )
        batches = sampler.run(self.epochs)
        keep_dense(self.model, cut.dense)
        numbers = self.recomputed(cut, batches)
        if numbers[0] > most:
            return Trial(cut, note=f"would recompute {numbers[0]} layers")
        for again in numbers:
            cut = dataclasses.replace(cut, recomputed_layers=again)
            with contextlib.suppress(torch.OutOfMemoryError):
                seconds, _, peak = self.timed(cut, batches[-1])
                if not self.gpu or peak <= self.limit:
                    found = {self.tokens(cut, batches[-1]): seconds}
                    for rows in (batches[len(batches) // 2], batches[0]):
                        if (tokens := self.tokens(cut, rows)) not in found:
                            found[tokens] = self.timed(cut, rows)[0]
                    return Trial(cut, self.epoch_seconds(cut, batches, found), peak)
            free_cache()
        return Trial(cut, note="does not fit")

    def recomputed(self, cut: Cut, batches: list[list[int]]) -> list[int]:
        """Numbers of layers to recompute, fewest that should fit first, then more."""
        if not self.gpu or self.settings.gradient_checkpointing != "auto":
            return [self.layers if self.settings.gradient_checkpointing is True else 0]
        try:
            first = self.layers_to_recompute(cut, batches)
        except torch.OutOfMemoryError:
            first = self.layers
        return [*range(first, self.layers, max(1, self.layers // 8)), self.layers]

    def layers_to_recompute(self, cut: Cut, batches: list[list[int]]) -> int:
        """The fewest layers to recompute for the longest micro-batch.

        From two passes over a smaller one: with `t` tokens and `r` of `L` layers recomputed, the
        peak is about `base + t · (rest + (L - r) · layer)`.
        """
        probe = next((rows for rows in batches if self.tokens(cut, rows) > 1000), batches[-1])
        half, tokens, worst = (
            self.layers // 2,
            self.tokens(cut, probe),
            self.tokens(cut, batches[-1]),
        )
        _, base, low = self.timed(dataclasses.replace(cut, recomputed_layers=self.layers), probe)
        _, base, high = self.timed(dataclasses.replace(cut, recomputed_layers=half), probe)
        layer, rest = (high - low) / tokens / (self.layers - half), (low - base) / tokens
        kept = ((self.limit - base) / worst - rest) / layer
        return min(self.layers, max(0, self.layers - int(kept)))

    def tokens(self, cut: Cut, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch computes, padding included."""
        return cut.size([self.lengths[row] for row in rows])

    def timed(self, cut: Cut, rows: Sequence[int]) -> tuple[float, float, float]:
        """Seconds of one real forward and backward pass, GiB before it and at its peak.

        On a GPU the second of two passes counts.
        """
        recompute_layers(self.model, cut.recomputed_layers)
        self.model.set_attn_implementation(cut.attention)
        self.model.train()
        batch = Collator(cut, 0)([self.examples[row] for row in rows])
        batch = {
            name: v.to(self.model.device) if hasattr(v, "to") else v for name, v in batch.items()
        }
        self.model.zero_grad(set_to_none=False)
        before, seconds = torch.cuda.memory_allocated() / 2**30, 0.0  # 0 without a GPU
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2 if self.gpu else 1):  # the first builds kernels
            start = time.perf_counter()
            backward_pass(self.model, {**batch, "num_items_in_batch": 1000}, self.precision)
            if self.gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return seconds, before, peak_memory()

    def epoch_seconds(
        self, cut: Cut, batches: list[list[int]], measured: Mapping[int, float]
    ) -> float:
        """Seconds of an epoch, interpolating `measured` (seconds by tokens) per micro-batch."""
        sizes = [self.tokens(cut, rows) for rows in batches]
        passes = math.ceil(len(self.real_lengths) / cut.micro_batch) / processes()[1]
        each = np.interp(sizes, *zip(*sorted(measured.items()), strict=True)).mean()
        return float(passes * each)

    def why(self, chosen: Trial) -> str:
        """The reason for the choice."""
        again = chosen.cut.recomputed_layers
        layers = f"{again} of {self.layers} layers recomputed" if again else "no layer recomputed"
        kept = ", base weights kept dense" if chosen.cut.dense else ""
        return (
            f"{layers}{kept}: the fastest of {len(self.fitting())} "
            f"measured within {self.limit:.1f} GB"
        )


@contextlib.contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Leaves random states, gradients and the mode of `model` as they were."""
    mode = model.training
    with same_randomness():
        yield
    model.zero_grad(set_to_none=True)
    model.train(mode)
    free_cache()


def backward_pass(model: PreTrainedModel, inputs: Mapping[str, Any], precision: str) -> Any:
    """Add the gradients of a micro-batch's loss to the trained weights'; return the loss."""
    with autocast(precision):
        loss = model(**inputs).loss
    loss.backward()
    return loss.detach()
