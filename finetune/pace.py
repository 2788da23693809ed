"""Section 10: callbacks that know where training is: the epoch, and tokens a second."""

from __future__ import annotations

import functools
import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.batches import StepSampler


class Epochs(TrainerCallback):
    """Tells the sampler which epoch begins.

    accelerate 1.15 does not where several processes go on inside an epoch: it skips the batches
    before in a sampler around theirs (`DataLoaderShard.set_epoch`), so that they would be the first
    epoch's.
    """

    def __init__(self, sampler: StepSampler):
        self.sampler, self.per_epoch = sampler, len(sampler.steps(0))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.sampler.set_epoch(state.global_step // self.per_epoch)


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

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, *_: object, **__: object) -> None:
        self.seconds += time.perf_counter() - self.began

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *_: object, **__: object
    ) -> None:
        epoch, step = divmod(state.global_step - 1, self.per_epoch)
        self.tokens += self.sizes(epoch)[step]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        if "loss" in logs and self.tokens:
            now = time.perf_counter()
            speed = {"tokens_per_second": self.tokens / (self.seconds + now - self.began)}
            self.began, self.seconds, self.tokens = now, 0.0, 0
            logs.update(speed)
            state.log_history[-1].update(speed)
