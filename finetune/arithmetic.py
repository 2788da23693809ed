"""The same results with fewer, larger kernels: LoRA, the loss of a frozen head, attention."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from inspect import signature
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class LoraMatmul(torch.autograd.Function):
    """`x Wᵀ + b + scale · x Aᵀ Bᵀ` and its gradients for x, A and B.

    That is PEFT's LoRA of a frozen 4-bit layer, without dropout. `x` is [..., in], `A` [r, in], `B`
    [out, r]. PEFT does it in nine kernels forward and clones the result; this takes four and adds
    in place.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, A: Tensor, B: Tensor, layer: Linear4bit, scale: float
    ) -> Tensor:
        """`layer` holds W and b."""
        flat, A, B = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)  # flat [n, in]
        low = (flat @ A.t()).mul_(scale)  # [n, r]
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        out = torch.nn.functional.linear(flat, dense_weight(layer), bias).addmm_(low, B.t())
        ctx.save_for_backward(flat, low, A, B)
        ctx.layer, ctx.scale = layer, scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        """Gradients of x, A and B; the layer is frozen."""
        flat, low, A, B = ctx.saved_tensors
        g, g_x = grad.reshape(-1, grad.shape[-1]), None  # g [n, out]
        g_low = (g @ B).mul_(ctx.scale)  # [n, r]
        g_B = g.t() @ low  # [out, r]; `low` carries the scale already
        if ctx.needs_input_grad[0]:
            g_x = (g @ dense_weight(ctx.layer)).addmm_(g_low, A).view(*grad.shape[:-1], -1)
        return g_x, g_low.t() @ flat, g_B, None, None


class FrozenHeadLoss(torch.autograd.Function):
    """Sum over tokens of the cross-entropy (nats) of a frozen head's logits at `targets`.

    `hidden` is [tokens, hidden size], `targets` [tokens], the head's `weight` [vocabulary, hidden
    size], its `bias` often None. The gradient is made in the forward pass, so that only a piece's
    logits ever stand in memory and none is computed twice (the idea of Liger's,
    https://arxiv.org/abs/2410.10989, which waits for the GPU).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logits_at_once: int = 2**26,
    ) -> Tensor:
        """The sum, in fp32."""
        chunk = max(1, min(2048, logits_at_once // len(weight)))
        total, grads = hidden.new_zeros((), dtype=torch.float32), []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            target = t[:, None]  # [chunk, 1]
            logits = log_probs = grad_logits = None  # free the last chunk before the next is made
            logits = torch.nn.functional.linear(h, weight, bias)  # [chunk, vocabulary]
            log_probs = torch.log_softmax(logits, 1, dtype=torch.float32)
            target_log_probs = log_probs.gather(1, target)  # [chunk, 1]
            total -= target_log_probs.sum()
            if ctx.needs_input_grad[0]:
                # d loss / d logits is softmax minus one-hot; expm1 keeps p - 1 exact for p near 1.
                at_target = target_log_probs.expm1().to(logits.dtype)
                grad_logits = torch.softmax(logits, 1, dtype=logits.dtype)
                grad_logits.scatter_(1, target, at_target)
                grads.append((grad_logits.to(weight.dtype) @ weight).to(h.dtype))  # [chunk, hidden]
        ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        """The gradient of `hidden`; scaled in fp32, since 1 / tokens would be rounded to bf16."""
        (saved,) = ctx.saved_tensors
        return saved.float().mul_(grad).to(saved.dtype), None, None, None, None


def dense_weight(layer: Linear4bit) -> Tensor:
    """The layer's weight, [out, in], in its computing type.

    It is the copy that `keep_dense` keeps, or else is dequantised now.
    """
    if (kept := getattr(layer, "dense", None)) is not None:
        return kept
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over rows laid end to end, none seeing another, by torch's own kernel.

    That needs torch 2.10 and Ampere, or newer ones (see `has_varlen`).

    `query` is [1, heads, tokens, head size]; `cu_seq_lens_q` [rows + 1] and `max_length_q` come
    from `Collator`. Without them (generating, scoring) it is `sdpa`.
    """
    if "cu_seq_lens_q" not in kwargs:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # squeeze(0) and not [0], whose gradient is copied.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    options = varlen_options(kwargs.get("sliding_window"))
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=kwargs.get("scaling"), **options)
    return out.unsqueeze(0), None


@functools.cache
def varlen_options(window: int | None = None) -> dict[str, Any]:
    """How torch's kernel is told to be causal, to see `window` tokens, to take fewer key heads.

    `window` is how many it may see at most, None for all. 2.10 has `is_causal` and no windows,
    later releases `window_size` (how far back, how far ahead), still later ones want to be asked
    for fewer heads (`enable_gqa`).
    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    back = {"window_size": ((window or 0) - 1, 0)}  # -1: without a limit
    causal = {"is_causal": True} if "is_causal" in known else back
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def varlen_mask(
    *args: object, attention_mask: Tensor | None = None, **kwargs: object
) -> Tensor | None:
    """The mask that `varlen_attention` needs: none for rows end to end, `sdpa`'s with padding."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def has_varlen() -> bool:
    """Whether this torch and this GPU have the variable-length attention kernel."""
    newest = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return newest and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
