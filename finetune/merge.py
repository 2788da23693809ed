"""Section 15: base and adapter as one model, checked before it is kept."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import bitsandbytes.functional
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from finetune.answers import generate_answers, trained_logits
from finetune.base_model import write_config
from finetune.files import new_folder, seal, telling_if_full
from finetune.folders import require_mergeable
from finetune.machine import free_cache, progress
from finetune.save import write_for_others
from finetune.tokens import encode_example
from qlora_helpers import Settings, UserError, locate


def merged_weights(
    model: PreTrainedModel, adapter: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of base and adapter in one, under the base model's names, one at a time.

    Without `adapter` those of the base alone. They are on the model's device. 4-bit weights are
    dequantised: the adapter was trained against these, not against the weights that they were made
    from. On the embedded model, validation loss was 0.053 with the adapter, 0.053 merged so, and
    0.243 merged into the 16-bit weights (`tests/bench/merge.py`). Tied weights come once.
    """
    base = model.get_base_model()
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        if hasattr(parameter, "quant_state"):
            weight = bitsandbytes.functional.dequantize_4bit(weight, parameter.quant_state)
        if adapter and name.endswith(".base_layer.weight"):
            weight = with_delta(
                base.get_submodule(name.removesuffix(".base_layer.weight")), weight.float()
            )
        yield name.replace(".base_layer", ""), weight


def with_delta(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """A layer's base weight with its adapter added by peft (DoRA and rsLoRA too) in fp32."""
    with torch.no_grad():
        if variant := layer.lora_variant.get("default"):
            return variant.merge_safe(layer, "default", weight)
        return weight + layer.get_delta_weight("default").to(weight.device, torch.float32)


def write_shards(
    weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype, shard: int
) -> None:
    """Write weights in `dtype` as safetensors of about `shard` bytes each, with their index.

    Holds one at a time.
    """
    files, waiting, size = list[list[str]](), dict[str, torch.Tensor](), 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(files)}.part", {"format": "pt"})
        files.append(list(waiting))
        waiting.clear()

    for name, weight in progress(weights, "Writing weights", " weights"):
        if (
            waiting
            and sum(w.nbytes for w in waiting.values()) + weight.numel() * dtype.itemsize > shard
        ):
            flush()
        waiting[name] = weight.to("cpu", dtype).contiguous()
        size += waiting[name].nbytes
    flush()
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)
    index = {weight: name for name, held in zip(names, files, strict=True) for weight in held}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


# A merge may differ by this share of what training changed, or by what rounding to 16 bits does to
# logits. Half of alpha differs by 0.5, the embedded model's merge in bf16 by 0.009.
MERGE_LIMIT, MERGE_NOISE = 0.2, 0.1


def check_merge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: Sequence[dict],
    max_new_tokens: int,
) -> bool:
    """Whether the merged model in `folder` says over `rows` what `model` (adapter on base) says.

    Prints the figures. Logits at the trained positions, each less its mean, are compared by root
    mean square: merged against adapter, and adapter against base for scale. Greedy answers are
    told, not judged: in 16 bits a near tie may go the other way. What does not fit on the GPU is
    offloaded.
    """
    examples = [
        encode_example(tokenizer, row["prompt"], row["completion"], row.get("turns"))
        for row in rows
    ]

    def logits(asked: PreTrainedModel) -> torch.Tensor:
        found = torch.cat([each.cpu() for each, _ in trained_logits(asked, examples)])
        return found - found.mean(dim=-1, keepdim=True)

    tuned, texts = logits(model), generate_answers(model, tokenizer, rows, max_new_tokens)
    with model.disable_adapter():
        effect = (tuned - logits(model)).square().mean().sqrt().item()
    free_cache()
    with tempfile.TemporaryDirectory() as offload:
        whole = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="auto", offload_folder=offload
        )
        merged, answers = logits(whole), generate_answers(whole, tokenizer, rows, max_new_tokens)
    difference = (merged - tuned).square().mean().sqrt().item()
    print(
        f"Merged against adapter: logits differ by {difference:.4f}; "
        f"training changed them by {effect:.4f}. "
        f"Same likeliest token {(merged.argmax(-1) == tuned.argmax(-1)).float().mean():.1%}, "
        f"same answer {sum(a == b for a, b in zip(answers, texts, strict=True))} of {len(texts)}."
    )
    return difference <= max(MERGE_LIMIT * effect, MERGE_NOISE)


def merge_adapter(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    card: str,
) -> Path:
    """Write adapter and base as one model to `merged_dir`; keep it if it agrees on `rows`.

    It is made from `model` (adapter on the 4-bit base) as it is in memory, in its compute type;
    main memory holds one shard of 2 GB. Raises `UserError` if the check fails.
    """
    require_mergeable(settings)
    folder = locate(settings.merged_dir)
    left = f"The adapter is safe: {settings.final_model}."
    with telling_if_full(folder, left), new_folder(folder, "merged") as work:
        write_shards(merged_weights(model), work, model.dtype, 2 * 2**30)
        write_config(model, work, model.dtype)
        write_for_others(work, tokenizer)
        (work / "README.md").write_text(card, encoding="utf-8")
        shutil.copy(settings.final_model / "run.json", work)
        if not check_merge(model, tokenizer, work, rows, settings.max_new_tokens):
            raise UserError(
                "The merge is not what was trained; it is deleted. "
                f"The adapter: {settings.final_model}"
            )
        seal(work, "merged", settings.run_name)
    return folder
