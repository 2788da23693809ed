"""Section 13: what the adapter answers on the base model's 16-bit weights, as servers hold them."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import transformers
from pandas import DataFrame
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.answers import generate_answers
from finetune.base_model import base_place, cache_of, linear_4bit, placement
from finetune.fields import Fields
from finetune.files import Record
from finetune.machine import free_cache, free_memory_size, is_spread
from finetune.scores import is_right
from qlora_helpers import Settings


def why_not_measured(settings: Settings, model: PreTrainedModel) -> str:
    """Why the base model cannot be held in 16 bits beside `model` here; empty if it can."""
    if is_spread():
        return "several GPUs hold this model in parts"
    config = transformers.AutoConfig.from_pretrained(
        base_place(settings), cache_dir=cache_of(settings)
    )
    if getattr(config, "quantization_config", None):
        return "the base model has no 16-bit weights"
    layers = linear_4bit(model)
    four = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}
    weights = sum(four.get(id(p), p.numel()) for p in model.get_base_model().parameters())
    # A fifth more, for answering; on a CPU without bf16 each weight takes 32 bits.
    need, free = 1.2 * model.dtype.itemsize * weights / 2**30 + 0.5, free_memory_size()
    return "" if need < free else f"it would take {need:.1f} GB, and {free:.1f} GB are free"


def on_16_bits(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sequence[Fields],
    table: DataFrame,
) -> Record:
    """How the saved adapter answers `sample` on the base model's 16-bit weights; says it.

    It was trained against the 4-bit ones, and a server that is given base and adapter by their
    names holds the 16-bit ones. Returns `rows`, `right` and `same` (as in `table`, `compare`'s), or
    `why` it was not measured.
    """
    why = why_not_measured(settings, model) if sample else "nothing is asked"
    if why:
        return {"why": why}
    free_cache()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        base_place(settings),
        dtype=model.dtype,
        device_map=placement(),
        cache_dir=cache_of(settings),
    )
    served = peft.PeftModel.from_pretrained(plain, settings.final_model)
    answers = generate_answers(served, tokenizer, sample, settings.max_new_tokens)
    del plain, served
    free_cache()
    texts = [answer.text for answer in answers]
    right = int(is_right(table.assign(after=texts), "after").sum())
    same = sum(text == was for text, was in zip(texts, table["after"], strict=True))
    ours = int(is_right(table, "after").sum())
    found = {"rows": len(sample), "right": right, "same": same, "ours": ours}
    print(in_words(found))
    return found


def in_words(found: Record) -> str:
    """What `on_16_bits` has measured, in a sentence; empty if nothing was."""
    if "right" not in found:
        return ""
    right = f"{found['right']} of {found['rows']}"
    if found["right"] < found["ours"]:
        return (
            f"A server that holds the base model in 16 bits would get {right} right, not "
            f"{found['ours']}: serve it as the adapter's README.md says."
        )
    return f"On the base model's 16-bit weights {right} are right, too."
