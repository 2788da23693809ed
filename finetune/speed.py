"""Section 8: every change to a model. No other room replaces forwards, classes or hooks."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import types
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from finetune.arithmetic import (
    FrozenHeadLoss,
    LoraMatmul,
    dense_weight,
    has_varlen,
    varlen_attention,
    varlen_mask,
    varlen_options,
)
from finetune.base_model import linear_4bit
from finetune.machine import is_sharded, is_spread


def keep_dense(model: PreTrainedModel, keep: bool) -> None:
    """Keep a dequantised copy beside all 4-bit weights (3.5 times their size), or drop it again.

    The numbers are the very ones that every pass would dequantise, so nothing changes but the time
    it takes.
    """
    for layer in linear_4bit(model):
        layer.dense = None
        layer.dense = dense_weight(layer) if keep else None


def fuse_lora(model: PreTrainedModel) -> int:
    """Train plain LoRA layers through `LoraMatmul`; return how many.

    Other 4-bit layers train from their dense copy. Only training passes change: without gradients,
    with the adapter off, or for variants (DoRA), PEFT's own code runs.
    """
    lora = [
        m
        for m in model.modules()
        if isinstance(m, LoraLinear4bit) and not getattr(m, "lora_variant", None)
    ]
    for layer in lora:
        layer.forward = functools.partial(_lora_forward, layer, layer.forward)
    inside = {id(layer.base_layer) for layer in lora}
    for layer in linear_4bit(model):
        if id(layer) not in inside and layer.bias is None:
            layer.forward = functools.partial(_frozen_forward, layer, layer.forward)
    return len(lora)


def _lora_forward(layer: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    plain = (
        layer.training
        and torch.is_grad_enabled()
        and not layer.disable_adapters
        and not layer.merged
    )
    if (
        not plain
        or len(layer.active_adapters) != 1
        or args
        or kwargs
        or layer.base_layer.bias is not None
    ):
        return original(x, *args, **kwargs)
    name, compute = layer.active_adapters[0], layer.base_layer.compute_dtype
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    with torch.autocast(x.device.type, enabled=False):  # its types are those of its arguments
        out = LoraMatmul.apply(x.to(compute), A, B, layer.base_layer, layer.scaling[name], dropout)
    return out.to(x.dtype)


def _frozen_forward(layer: Any, original: Any, x: Any) -> Any:
    return (
        original(x)
        if getattr(layer, "dense", None) is None
        else torch.nn.functional.linear(x, layer.dense)
    )


def fuse_loss(causal: PreTrainedModel) -> str:
    """Let a causal LM compute its training loss from the trained positions alone, in pieces.

    Returns what was switched on, "" if it cannot. The logits of a 4096-token row take 0.5 GB in
    fp32, and those of prompt tokens are never used. Models that scale or cap their logits keep
    their own way.
    """
    scaled = (
        "final_logit_softcapping",
        "logit_scale",
        "logits_scaling",
        "output_multiplier",
        "lm_head_multiplier",
    )
    if any(getattr(causal.config, name, None) not in (None, 1, 1.0) for name in scaled):
        return ""
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:  # 4-bit, or trained
        return ""
    original = causal.forward

    @functools.wraps(type(causal).forward)
    def forward(
        self: Any, *args: Any, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        trained = labels[:, 1:] != -100
        head = self.get_output_embeddings()
        # FSDP has it in parts.
        weight = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
        loss = FrozenHeadLoss.apply(hidden[trained], weight, head.bias, labels[:, 1:][trained])
        return CausalLMOutput(
            loss=loss / (trained.sum() if num_items_in_batch is None else num_items_in_batch)
        )

    # As a method: `generate` looks at its signature.
    causal.forward = types.MethodType(forward, causal)
    return "loss over trained tokens"


def padded_attention(model: PreTrainedModel) -> str:
    """What computes attention over padded rows: "sdpa", or "eager".

    The latter where transformers has no other for this model.
    """
    return "sdpa" if model.get_base_model()._supports_sdpa else "eager"


def flat_attention(model: PreTrainedModel) -> str:
    """What computes attention over rows end to end: "varlen", or as for padded ones.

    The latter where "varlen" is not this model's.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None)
    if (
        not has_varlen()
        or capped
        or (getattr(config, "sliding_window", None) and "is_causal" in varlen_options())
    ):
        return padded_attention(model)
    return "varlen"


def use_fast_kernels(model: PreTrainedModel) -> str:
    """Give a LoRA model the faster of equal computations that this machine has.

    Returns what was switched on. Everywhere: `LoraMatmul` and a loss over the trained tokens alone.
    On a GPU: Liger's RMSNorm, RoPE and SwiGLU.
    """
    if is_spread() and not is_sharded():
        return "nothing: this process does not train"
    causal = model.get_base_model()
    # With a cache transformers lets rows that lie end to end see each other.
    causal.config.use_cache = False
    used = [f"fused LoRA in {fuse_lora(model)} layers", fuse_loss(causal)]
    if has_varlen():
        AttentionInterface.register("varlen", varlen_attention)
        AttentionMaskInterface.register("varlen", varlen_mask)
        used.append("variable-length attention")
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            causal, fused_linear_cross_entropy=False, cross_entropy=False
        )
        used.append("Liger RMSNorm, RoPE, SwiGLU")
    return ", ".join(part for part in used if part)


def checkpointable(model: PreTrainedModel) -> list[Any]:
    """The decoder layers, each of which can be recomputed on its own."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: PreTrainedModel, count: int) -> None:
    """Gradient checkpointing (non-reentrant) of the first `count` decoder layers alone."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(checkpointable(model)):
        layer.gradient_checkpointing = number < count


def adapter_to_fp32(model: PreTrainedModel) -> None:
    """Hold the adapter's weights in fp32; call it after the trainer is built.

    TRL casts the trainable weights of a quantised model to bf16. AdamW's small updates vanish in
    bf16, and with fp16 compute the gradient scaler refuses bf16 gradients outright. On an H100 fp32
    was not slower.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
