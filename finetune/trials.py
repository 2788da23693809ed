"""Section 10: real passes, timed, on the model and the rows at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from finetune.arithmetic import has_varlen
from finetune.base_model import linear_4bit
from finetune.batches import (
    Batch,
    Collator,
    Cut,
    Encoded,
    StepSampler,
    row_lengths,
    steps_of,
    with_void_row,
)
from finetune.compare import (
    body,
    drops_out,
    on_device,
    relative_distance,
    rounding_noise,
    state_preserved,
    tolerance,
)
from finetune.machine import (
    autocast,
    free_cache,
    memory_in_use,
    memory_limit,
    peak_memory,
    processes,
    progress,
    resolve_precision,
)
from finetune.speed import attend_by, checkpointable, compute_by, own_attention, taken_back
from qlora_helpers import Settings, UserError


def flat_attention(model: PeftModel, data: Dataset, precision: str) -> str:
    """What computes attention over rows laid end to end: "varlen" or the model's own; "" if none.

    It is the first under which the longest row, laid behind the shortest, gets the hidden states
    that it has alone. Convolutions, and Bloom's distances, let it see the other row; the varlen
    kernel knows no sinks, no caps and no dropout. Replaces the model's attention: call it within
    `taken_back`.
    """
    lengths, own = row_lengths(data), own_attention(model)
    rows = [data[lengths.index(min(lengths))], data[lengths.index(max(lengths))]]
    alone = last_states(model, rows[1:], Cut(1, False, own), precision)
    with rounding_noise(model, rows, precision):
        noise = relative_distance(
            [alone], [last_states(model, rows[1:], Cut(1, False, own), precision)]
        )
    kernel = has_varlen() and not drops_out(model, rows[:1])
    for name in ["varlen", own] if kernel else [own]:
        with contextlib.suppress(Exception):  # a model that takes no `position_ids`
            states = last_states(model, rows, Cut(2, True, name), precision)
            if relative_distance([alone], [states]) <= tolerance(noise):
                return name
    return ""


def last_states(model: PeftModel, rows: Sequence[Encoded], cut: Cut, precision: str) -> Tensor:
    """Hidden states of the last row, [its tokens, hidden size], computed as `cut` says."""
    attend_by(model.eval(), cut.attention)
    batch = on_device(model, Collator(cut, 0)(rows))
    del batch["labels"]
    with torch.no_grad(), autocast(precision):
        states = body(model.get_base_model())(**batch).last_hidden_state
    tokens = len(rows[-1]["input_ids"])
    return (states[0, -tokens:] if cut.flat else states[-1, :tokens]).float()


@dataclasses.dataclass
class Trial:
    """One cut and what was measured of it: `seconds` an epoch, `peak` GiB, or why it cannot be."""

    cut: Cut
    seconds: float = math.inf
    peak: float = math.nan
    note: str = ""

    def row(self, tokens: int, step: int, chosen: bool) -> dict[str, Any]:
        """A line of the plan's table; `tokens` of an epoch, `step` rows."""
        ranks, fits = processes()[1], not self.note
        times = f"{self.cut.micro_batch} × {math.ceil(step / self.cut.micro_batch / ranks)}"
        return {
            "rows at once": times + f" × {ranks} GPUs" * (ranks > 1),
            "layout": self.cut.layout,
            "layers recomputed": self.cut.recomputed_layers,
            "base weights": "dense" if self.cut.dense else "4-bit",
            "peak GB": round(self.peak, 1) if fits else None,
            "tokens/s": round(tokens / self.seconds) if fits else None,
            "minutes an epoch": round(self.seconds / 60, 2) if fits else None,
            "": "← chosen" if chosen else self.note,
            "chosen": chosen,
        }


class Trials:
    """Measures cuts on the model at hand, from few rows at once up while that pays."""

    def __init__(self, settings: Settings, model: PeftModel, data: Dataset):
        self.settings, self.model, self.lengths = settings, model, row_lengths(data)
        self.data = with_void_row(data) if processes()[1] > 1 else data
        self.precision, _ = resolve_precision(settings.bf16)
        per_epoch, steps = steps_of(settings, len(data))
        self.epochs = math.ceil(steps / per_epoch)
        self.layers, self.gpu = len(checkpointable(model)), torch.cuda.is_available()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        moments = 8 * trained / 2**30  # AdamW's two, which come with the first step
        self.limit = memory_limit(settings.memory_limit_gb) - moments
        self.tried: list[Trial] = []

    def choose(self) -> Trial:
        """The fastest of the cuts that fit; the model is left as it was, whatever happens."""
        own = own_attention(self.model)
        with state_preserved(self.model), taken_back(self.model):
            flat = flat_attention(self.model, self.data, self.precision)
            self.deadline = time.monotonic() + (45 if self.gpu else 20)
            padding = self.padding(Cut(self.sizes()[-1], False, own))
            if flat == "varlen" or (flat and padding > 0.02):
                self.climb(Cut(size, True, flat) for size in self.sizes(1000 * self.gpu))
                if self.gpu and not self.fitting():  # fewer rows than pay, then
                    self.climb(Cut(size, True, flat) for size in self.sizes())
            if padding < 0.3 or not self.fitting():
                known = flat == "varlen" and self.fitting()
                sizes = [self.best().cut.micro_batch] if known else self.sizes()
                self.climb(Cut(size, False, own) for size in sizes)
            if self.gpu and self.fitting() and self.dense_size() < self.limit - memory_in_use():
                self.climb([dataclasses.replace(self.best().cut, dense=True)])
        if not self.fitting():
            longest = max(self.lengths)
            raise UserError(
                f"Out of memory: one row of {longest:,} tokens does not fit into "
                f"{self.limit:.1f} GB, even with every layer recomputed. Set max_length = "
                f"{longest // 2} in section 2, or use a larger GPU."
            )
        return self.best()

    def sizes(self, tokens: int = 0) -> list[int]:
        """Rows at once that divide a process's share of a step, and have `tokens` on average.

        The most rows alone if no number has so many. A CPU gains nothing from many.
        """
        share, mean = self.settings.effective_batch // processes()[1], np.mean(self.lengths)
        found = [n for n in range(1, min(share, 64 if self.gpu else 4) + 1) if share % n == 0]
        return [n for n in found if n * mean >= tokens] or found[-1:]

    def climb(self, cuts: Iterable[Cut]) -> None:
        """Measure cuts until one is slower or recomputes more than the last, or time is up."""
        last, again = math.inf, self.layers
        for cut in progress(cuts, "Trying ways to do a step", " ways"):
            if self.fitting() and time.monotonic() > self.deadline:
                return
            trial = self.measure(cut, again)
            self.tried.append(trial)
            if trial.seconds > 1.1 * last or trial.note:
                return
            last, again = trial.seconds, trial.cut.recomputed_layers

    def sampler(self, cut: Cut) -> StepSampler:
        """How the rows would go."""
        return StepSampler(self.lengths, self.settings.effective_batch, self.settings.seed, cut)

    def padding(self, cut: Cut) -> float:
        """Share of padding in the micro-batches of an epoch."""
        sampler = self.sampler(cut)
        return 1 - sum(self.lengths) / sum(map(sampler.size, sampler.micro_batches()))

    def fitting(self) -> list[Trial]:
        """The trials that ran."""
        return [trial for trial in self.tried if not trial.note]

    def best(self) -> Trial:
        """The fastest trial."""
        return min(self.fitting(), key=lambda trial: trial.seconds)

    def dense_size(self) -> float:
        """GiB that a dense copy of the 4-bit weights takes, and some room to train beside it."""
        shapes = [layer.weight.quant_state.shape for layer in linear_4bit(self.model)]
        return 2.2 * sum(map(math.prod, shapes)) / 2**30

    def measure(self, cut: Cut, most: int) -> Trial:
        """Time the longest, a typical and the shortest micro-batch of the run.

        Recomputes as few layers as memory demands; gives up where more than `most` must be.
        """
        sampler = self.sampler(cut)
        batches = sampler.micro_batches_by_size(self.epochs)
        numbers = self.recomputed(cut, batches)
        if numbers[0] > most:
            return Trial(cut, note=f"would recompute {numbers[0]} layers")
        for again in numbers:
            cut = dataclasses.replace(cut, recomputed_layers=again)
            with contextlib.suppress(torch.OutOfMemoryError):
                seconds, _, peak = self.timed(cut, batches[-1])
                if not self.gpu or peak <= self.limit:
                    found = {sampler.size(batches[-1]): seconds}
                    for rows in (batches[len(batches) // 2], batches[0]):
                        if sampler.size(rows) not in found:
                            found[sampler.size(rows)] = self.timed(cut, rows)[0]
                    return Trial(cut, self.epoch_seconds(sampler, batches, found), peak)
            free_cache()
        return Trial(cut, note="does not fit")

    def epoch_seconds(
        self, sampler: StepSampler, batches: list[list[int]], found: dict[int, float]
    ) -> float:
        """Seconds of an epoch, from those that were `found` of micro-batches by tokens."""
        known = zip(*sorted(found.items()), strict=True)
        each = np.interp([*map(sampler.size, batches)], *known).mean()
        passes = math.ceil(len(self.lengths) / sampler.cut.micro_batch) / processes()[1]
        return float(passes * each)

    def recomputed(self, cut: Cut, batches: list[list[int]]) -> list[int]:
        """Numbers of layers to recompute, fewest that should fit first, then more."""
        if not self.gpu or self.settings.gradient_checkpointing != "auto" or self.layers < 2:
            return [self.layers * (self.settings.gradient_checkpointing is True)]
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
        size = self.sampler(cut).size
        probe = next((rows for rows in batches if size(rows) > 1000), batches[-1])
        half, tokens = self.layers // 2, size(probe)
        _, _, low = self.timed(dataclasses.replace(cut, recomputed_layers=self.layers), probe)
        _, base, high = self.timed(dataclasses.replace(cut, recomputed_layers=half), probe)
        layer, rest = (high - low) / tokens / (self.layers - half), (low - base) / tokens
        kept = ((self.limit - base) / size(batches[-1]) - rest) / max(layer, 1e-9)
        return min(self.layers, max(0, self.layers - int(kept)))

    def timed(self, cut: Cut, rows: Sequence[int]) -> tuple[float, float, float]:
        """Seconds of one real forward and backward pass, GiB before it and at its peak.

        On a GPU the first pass builds kernels; the fastest of those after it counts, of up to four
        or of a second.
        """
        compute_by(self.model.train(), cut)
        batch = on_device(self.model, Collator(cut, 0)([self.data[row] for row in rows]))
        self.model.zero_grad(set_to_none=False)
        before, seconds = torch.cuda.memory_allocated() / 2**30, list[float]()  # 0 without a GPU
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        warm_ups, most = (1, 5) if self.gpu else (0, 1)
        while len(seconds) <= warm_ups or (len(seconds) < most and sum(seconds[warm_ups:]) < 1):
            seconds.append(self.pass_seconds(batch))
        return min(seconds[warm_ups:]), before, peak_memory()

    def pass_seconds(self, batch: Batch) -> float:
        """Seconds of one forward and backward pass."""
        start = time.perf_counter()
        with autocast(self.precision):
            loss = self.model(**batch, num_items_in_batch=1000).loss
        loss.backward()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def why(self, chosen: Trial) -> str:
        """The reason for the choice."""
        again = chosen.cut.recomputed_layers
        layers = f"{again} of {self.layers} layers recomputed" if again else "no layer recomputed"
        kept = ", base weights kept dense" if chosen.cut.dense else ""
        measured = f"the fastest of {len(self.fitting())} measured within {self.limit:.1f} GB"
        return f"{layers}{kept}: {measured}"
