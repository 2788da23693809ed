"""FlashAttention 2 as its package offers it, over torch's own copy of the kernel.

Unsloth prefers the package `flash_attn`, which has to be built for each torch. torch carries the
same kernel (`aten::_flash_attention_forward`), so `speed.py` can give it to Unsloth where the
package is not installed.
"""

import itertools
import math

import torch


def flash_attn_varlen_func(
    q, k, v, cu_q, cu_k, longest_q, longest_k, dropout_p=0.0, softmax_scale=None, causal=False, **_
):
    """Rows laid end to end: `q` is [tokens, heads, head size], `cu_q` [rows + 1] their ends."""
    return torch.ops.aten._flash_attention_forward(
        *(q, k, v, cu_q, cu_k, longest_q, longest_k),
        *(dropout_p, causal, False),  # False: no mask for debugging
        scale=softmax_scale or 1 / math.sqrt(q.shape[-1]),
    )[0]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
    """Rows of one length: `q` is [rows, length, heads, head size]."""
    lengths = q.shape[1], k.shape[1]
    return flash_attn_varlen_func(
        *(q, k, v, None, None, *lengths), dropout_p, softmax_scale, causal
    )


def give_to_unsloth() -> None:
    """Let Unsloth's models attend by these, once they are seen to compute what torch's own does."""
    from unsloth.utils import attention_dispatch

    q, k, v = (torch.randn(1, 96, n, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
    cu = torch.tensor([0, 40, 96], dtype=torch.int32, device="cuda")
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    for ends, ours in (
        ([0, 96], flash_attn_func(q, k, v, causal=True)[0]),
        ([0, 40, 96], flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 56, 56, causal=True)),
    ):
        for start, end in itertools.pairwise(ends):
            cut = [t[:, :, start:end] for t in heads]
            own = torch.nn.functional.scaled_dot_product_attention(
                *cut, is_causal=True, enable_gqa=True
            )
            assert torch.allclose(ours[start:end], own[0].transpose(0, 1), atol=2e-2)
    attention_dispatch.HAS_FLASH_ATTENTION = True
    attention_dispatch.flash_attn_func = flash_attn_func
    attention_dispatch.flash_attn_varlen_func = flash_attn_varlen_func
