"""Section 10: how this run does a step, measured once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel

from finetune.batches import Cut, row_lengths, steps_of
from finetune.checkpoints import SAVE_SECONDS
from finetune.files import Record
from finetune.identity import require_as_planned
from finetune.machine import (
    duration,
    is_spread,
    memory_limit,
    processes,
    resolve_precision,
    versions,
)
from finetune.speed import checkpointable, own_attention
from finetune.trials import Trials
from qlora_helpers import Settings, UserError, base_name, listed, many, on_colab, on_kaggle


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What one run will do.

    `steps` are optimizer steps, `peak` GiB, `seconds` of the whole run, `table` for people.
    """

    cut: Cut
    accumulation: int
    steps_per_epoch: int  # the last one may be smaller
    steps: int
    warmup_steps: int
    logging_steps: int
    tokens_per_second: float
    seconds: float
    peak: float
    why: str
    table: list[dict[str, Any]]
    settings: Settings | None = dataclasses.field(default=None, repr=False)  # planned for

    def __str__(self) -> str:
        few = {0: "no warm-up", 1: "warm-up over the first one"}
        warmup = few.get(self.warmup_steps, f"warm-up over the first {self.warmup_steps:,}")
        text = (
            f"{many(self.steps, 'step')} ({self.steps_per_epoch:,} an epoch), {warmup}\n"
            f"Each step: {many(self.cut.micro_batch, 'row')} × "
            f"{self.accumulation}, {self.cut.layout}; {self.why}"
        )
        # A plan of a spread model was not measured: it has no time and no speed to tell.
        if not self.table:
            return text
        speed = f"{self.tokens_per_second:,.0f} tokens/s"
        return f"{text}\nAbout {duration(self.seconds)} at {speed}, peak {self.peak:.1f} GB"

    def require_same(self, settings: Settings) -> Settings:
        """`settings` for this model; raises `UserError` if this was planned for others."""
        return require_as_planned(settings, self.settings)

    # For print(plan), and where a page cannot show HTML.
    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.table:
            return f"<pre>{self}</pre>"
        from finetune.report import plan_table  # it needs Jupyter, which a script has no use for

        return f"<pre>{self}</pre>{plan_table(self.table)}"


def make_plan(settings: Settings, model: PeftModel, data: Dataset) -> Plan:
    """Time the longest and typical micro-batches in real passes; choose the fastest cut that fits.

    The effective batch is the contract: every cut gives the same update but for rounding. Weights,
    random states and gradients are left as they were. What was measured is kept in the run's folder
    and used again, by a resumed run too, while GPU, rows and settings are the same. Raises
    `UserError` if one row does not fit with every layer recomputed, or into the base's positions.
    """
    step, lengths, ranks = settings.effective_batch, row_lengths(data), processes()[1]
    per_epoch, steps = steps_of(settings, len(lengths))
    require_even_share(step, ranks)
    require_positions(model, lengths)
    require_known(model, data)
    # The first process measures and sends what it found: each alone would choose by its own noise.
    found = None
    if is_spread():
        found = plan_unmeasured(settings, model)
    elif processes()[0] == 0:
        about = planned_for(settings, model, lengths)
        found = planned_before(settings, about) or measure_plan(settings, model, data, about)
    measured = broadcast_object_list([found])[0]
    cut, seconds = Cut(**measured["cut"]), measured["epoch_seconds"]
    run_seconds = seconds * steps / per_epoch  # a run may end within an epoch
    if told := at_risk(settings, run_seconds):
        print(told)
    return Plan(
        cut=cut,
        accumulation=step // (cut.micro_batch * ranks),
        steps_per_epoch=per_epoch,
        steps=steps,
        # A rate that rises is 0 in its first step: the only one is not to be lost.
        warmup_steps=min(math.ceil(steps * settings.warmup_ratio), steps - 1),
        # A hundred points are a curve, however long the run.
        logging_steps=max(1, steps // 100),
        tokens_per_second=sum(lengths) / seconds if seconds else 0.0,
        seconds=run_seconds,
        settings=settings,
        **{name: measured[name] for name in ("peak", "why", "table")},
    )


def require_even_share(step: int, ranks: int) -> None:
    """Raise `UserError` if `ranks` processes cannot each take as many of a step's `step` rows.

    Otherwise some would wait for ever for a micro-batch that another one does not have.
    """
    if step % ranks:
        fits = max(n for n in range(1, ranks + 1) if step % n == 0)
        raise UserError(
            f"{ranks} processes cannot share the {step} rows of a step evenly. Launch {fits}, or "
            f"set batch_size × gradient_accumulation to a multiple of {ranks}."
        )


def require_positions(model: PeftModel, lengths: Sequence[int]) -> None:
    """Raise `UserError` if a row is longer than `max_position_embeddings`.

    Past it, learned position embeddings fail with a CUDA error and rotary ones silently degrade.
    Models without positions (Mamba) have no such limit.
    """
    # Models without positions lack the name, or have None there.
    ends = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if max(lengths) > ends:
        raise UserError(
            f"Longer than the base model's positions, which end at {ends:,} tokens: "
            f"{many(sum(n > ends for n in lengths), 'row')}. Set max_length = {ends} in section 2."
        )


def require_known(model: PeftModel, data: Dataset) -> None:
    """Raise `UserError` if a row holds a token that the base model has no embedding of."""
    known, table = model.get_input_embeddings().weight.shape[0], data.with_format("arrow")
    # On Arrow's own columns, without a Python number for every token.
    largest = max(pc.max(part["input_ids"].combine_chunks().flatten()).as_py()
                  for part in table.iter(1000))  # fmt: skip
    if largest >= known:
        raise UserError(
            f"The tokenizer has tokens up to {largest:,}, and the base model embeddings of "
            f"{known:,}: they are not of the same model. Choose another base_model."
        )


def at_risk(settings: Settings, seconds: float) -> str:
    """What is lost if Colab or Kaggle takes the machine away; empty with copies, and elsewhere."""
    # A run no longer than the time between two copies would lose as much with them.
    if settings.backup_to != "none" or not (on_colab() or on_kaggle()) or seconds <= SAVE_SECONDS:
        return ""
    whose = "Colab" if on_colab() else "Kaggle"
    return (
        f"! Nothing is copied elsewhere: if {whose} takes this machine away, up to "
        f"{seconds / 60:,.0f} minutes of training are lost. With backup_to = 'drive' or 'hub' in "
        f"section 2 it would be {SAVE_SECONDS // 60}."
    )


def plan_unmeasured(settings: Settings, model: PeftModel) -> dict[str, Any]:
    """What a spread model trains by: at most `batch_size` rows at once, all layers recomputed."""
    # All processes pass through the model together, so one alone cannot try anything out.
    share = settings.effective_batch // processes()[1]
    size = max(n for n in range(1, settings.batch_size + 1) if share % n == 0)
    cut = Cut(size, False, own_attention(model), len(checkpointable(model)))
    why = "all layers recomputed: not measured, because the base model is spread over the GPUs"
    told = {"cut": dataclasses.asdict(cut), "why": why}
    return told | {"epoch_seconds": 0.0, "peak": 0.0, "table": []}


def planned_for(settings: Settings, model: PeftModel, lengths: Sequence[int]) -> dict[str, Any]:
    """All that a plan depends on; its figures are of no use where one of these has changed."""
    names = ["batch_size", "gradient_accumulation", "gradient_checkpointing", "memory_limit_gb"]
    # The seed shuffles the rows, and with them which lengths come together in a micro-batch.
    names += ["seed", "max_steps", "lora_r", "lora_dropout", "use_dora", "target_modules"]
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    size = [sum(p.numel() for p in model.parameters()), len(checkpointable(model))]
    # Lists, and no tuples: they are compared with what JSON has read back.
    which = [base_name(settings.base_model), getattr(model.config, "_commit_hash", None)]
    return {name: getattr(settings, name) for name in names} | {
        "GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB" if gpu else "none",
        "processes": processes()[1],
        # Their lengths, in order: nothing else of the rows costs time or memory.
        "rows": hashlib.sha256(repr(list(lengths)).encode()).hexdigest()[:16],
        "model": [*which, resolve_precision(settings.bf16)[0], own_attention(model), *size],
        "versions": versions(),
    }


# What has changed, where the figures that are kept of it would tell people nothing.
IN_WORDS = {
    "rows": "the rows have other lengths, or are more or fewer",
    "model": "the base model, its precision or its attention is another",
    "versions": "the libraries have other versions",
}


def planned_before(settings: Settings, about: Record) -> dict[str, Any] | None:
    """What an earlier plan of this run measured, if it was about the same and still fits.

    Says what has changed if not.
    """
    path = settings.run_dir / "plan.json"
    # "never" is a run from the very beginning, its plan included.
    if settings.resume == "never" or not path.exists():
        return None
    # Compared name by name: a newer release may know more that matters.
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        was = dict(saved["about"])
    except (ValueError, KeyError, TypeError):  # it was cut short
        return None
    changed = [
        IN_WORDS.get(name, f"{name}: {was.get(name)} then, {now} now")
        for name, now in about.items()
        if was.get(name) != now
    ]
    # The same kind of GPU may have less memory free: another notebook can be on it.
    limit = memory_limit(settings.memory_limit_gb)
    if torch.cuda.is_available() and saved["peak"] > limit:
        changed.append(f"memory: {saved['peak']:.1f} GB were used then, {limit:.1f} may be now")
    if changed:
        why = "Planned anew, because of what has changed since this run was planned:"
        print(listed(why, changed))
        return None
    print("As planned before for this run (plan.json in its folder).")
    return saved


def measure_plan(
    settings: Settings, model: PeftModel, data: Dataset, about: Record
) -> dict[str, Any]:
    """Measure, choose, and keep what was found."""
    trials = Trials(settings, model, data)
    chosen, tokens, step = trials.choose(), sum(trials.lengths), settings.effective_batch
    measured = {
        "about": about,
        "cut": dataclasses.asdict(chosen.cut),
        "epoch_seconds": chosen.seconds,
        "peak": chosen.peak,
        "why": trials.why(chosen),
        "table": [trial.row(tokens, step, trial is chosen) for trial in trials.tried],
    }
    # Kept before the first step, so that a run that is cut off continues by the same cut.
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured, indent=1) + "\n"
    (settings.run_dir / "plan.json").write_text(text, encoding="utf-8")
    return measured
