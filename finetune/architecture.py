"""Section 4: what a base model's config says of it, before its weights are fetched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from finetune.access import Line
from finetune.base_model import cache_of, cached_where
from qlora_helpers import Settings, local_base


def check_architecture(settings: Settings, token: str | None) -> Iterator[Line]:
    """Whether this notebook can train such a model, with this `max_length` and these targets.

    Nothing is said where the config cannot be had: `check_base_model` tells why.
    """
    name = settings.base_model
    if name == "embedded":  # a Llama
        yield from check_targets(settings, LlamaConfig(num_hidden_layers=1))
        return
    try:
        config = read_config(settings, token)
    except Exception as error:
        if "trust_remote_code" in str(error):
            told = "choose a base model that transformers knows"
            yield "✗", f"{name} brings Python code of its own, which is never run here: {told}"
        elif "model type" in str(error):
            yield "✗", f"{name}: this version of transformers does not know such a model"
        return
    problem = why_untrainable(config) or why_not_4_bit(config)
    if problem:
        yield "✗", f"base_model = {name!r} {problem}"
        return
    ends = getattr(config.get_text_config(), "max_position_embeddings", None)
    if ends and ends < settings.max_length:
        told = f"if a row has more tokens, set max_length = {ends}"
        yield "!", f"the positions of {name} end at {ends:,}, before max_length: {told}"
    yield from check_targets(settings, config)


def read_config(settings: Settings, token: str | None) -> PretrainedConfig:
    """The base model's config, from folder, cache or the Hub; raises what transformers does."""
    folder = local_base(settings.base_model)
    cached = not folder and cached_where(settings) is not None
    return AutoConfig.from_pretrained(
        str(folder or settings.base_model),
        token=token,
        cache_dir=cache_of(settings),
        local_files_only=cached,  # else a Hub that cannot be reached is tried for half a minute
    )


def why_untrainable(config: PretrainedConfig) -> str:
    """Why a model of this config is no causal language model of text alone; empty if it is one."""
    kind = next(iter(config.architectures or [config.model_type]))
    if config.is_encoder_decoder:
        return f"has an encoder and a decoder ({kind}); this notebook trains decoders alone"
    parts = ("vision_config", "audio_config", "encoder_config", "thinker_config")
    if any(getattr(config, part, None) for part in parts):
        return f"also sees or hears ({kind}); choose a model of text alone"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return f"is no causal language model ({kind})"
    if kind.endswith(("ForMaskedLM", "ForPreTraining", "Classification", "QuestionAnswering")):
        return f"does not write text from left to right ({kind})"
    return ""


def why_not_4_bit(config: PretrainedConfig) -> str:
    """Why a base that is quantised already cannot be trained in 4 bits; empty if it can.

    bitsandbytes' own 4-bit weights can: they are loaded as they are.
    """
    done = getattr(config, "quantization_config", None)
    done = done if isinstance(done, dict) or done is None else done.to_dict()
    if not done or done.get("load_in_4bit"):
        return ""
    how = "bitsandbytes 8-bit" if done.get("load_in_8bit") else done.get("quant_method", "unknown")
    return f"is quantised already ({how}); choose the repository with its 16-bit weights"


def check_targets(settings: Settings, config: PretrainedConfig) -> Iterator[Line]:
    """A line if some of `target_modules` are nowhere in the model; peft adapts the others alone."""
    wanted = settings.target_modules
    if wanted == "all-linear":
        return
    found = linear_layers(config)
    absent = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in found)]
    if found and absent:
        there = sorted({path.rpartition(".")[2] for path in found} - {"lm_head"})
        told = f"{config.model_type} has no {', '.join(absent)}; its layers have {', '.join(there)}"
        yield "✗", f"target_modules = {wanted}: {told}"


def linear_layers(config: PretrainedConfig) -> list[str]:
    """The paths of the linear layers of a model of this config; none if it cannot be made."""
    model = without_weights(config)
    kinds = (nn.Linear, Conv1D)
    return [path for path, m in model.named_modules() if isinstance(m, kinds)] if model else []


def count_weights(settings: Settings, token: str | None) -> int:
    """How many weights the base model has, by its config; 0 if that cannot be told."""
    if settings.base_model == "embedded":  # no name on the Hub; its folder may not be made yet
        return 0
    try:
        model = without_weights(read_config(settings, token))
    except Exception:  # `check_architecture` and `check_base_model` tell why
        return 0
    return sum(weight.numel() for weight in model.parameters()) if model else 0


def without_weights(config: PretrainedConfig) -> nn.Module | None:
    """A model of this config whose weights take no memory; None if it cannot be made so."""
    values = config.to_dict()
    values.pop("quantization_config", None)  # None in its place would break transformers 4.57
    config = type(config).from_dict(values)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:
        return None
