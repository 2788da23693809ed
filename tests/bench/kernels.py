"""What the project's own kernels, FlashAttention 4 and QuACK gain on this GPU over torch's own.

    python tests/bench/kernels.py --tokens 7040 --width 4096 --rank 32

Prints microseconds, replayed from CUDA graphs, for dropout with LoRA's small product (forward, gradient of A, gradient
of x; the error is against torch in fp32 with the same elements kept), for attention over short rows end to end, and for
an MLP with its activation inside the matrix products.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import qlora_helpers as qlora

ROWS = [1888, 1567, 1336, 440, 349, 296, 233, 193, 133, 113, 105, 101, 78, 66, 55, 45]  # of the speed benchmark
DROPOUT = 0.05


def microseconds(work) -> float:
    from triton.testing import do_bench_cudagraph

    return 1000 * do_bench_cudagraph(work)


def kept_elements(bits, width: int):
    """The bits of `project_dropped` as [tokens, width] of 0 and 1."""
    parts = bits.view(len(bits), -1, 1, qlora.KERNEL_COLUMNS)
    return torch.cat([(parts >> bit) & 1 for bit in range(8)], 2).view(len(bits), -1)[:, :width]


def dropout(tokens: int, width: int, rank: int, device: str, timed) -> None:
    made = [torch.randn(shape, device=device) for shape in ((tokens, width), (rank, width), (tokens, rank))]
    x, A, g = (tensor.to(torch.bfloat16 if device == "cuda" else torch.float32) for tensor in made)
    low, bits = qlora.project_dropped(x, A, 1.0, DROPOUT)
    mask = kept_elements(bits, width)
    dropped = x.float() * mask / (1 - DROPOUT)
    ours = [low, qlora.project_back(x, g, bits, 1.0, DROPOUT), qlora.add_dropped(x.clone(), g, A, bits, 1.0, DROPOUT)]
    change = g.float() @ A.float() * mask / (1 - DROPOUT)
    exact = [dropped @ A.float().t(), g.float().t() @ dropped, x.float() + change]
    mask, buffer = mask.bool(), x.clone()
    undrop = torch.ops.aten.native_dropout_backward
    works = {
        "forward": (
            lambda: torch.native_dropout(x, DROPOUT, True)[0] @ A.t(),
            lambda: qlora.project_dropped(x, A, 1.0, DROPOUT),
        ),
        "gradient of A": (
            lambda: g.t() @ undrop(x, mask, 1 / (1 - DROPOUT)),
            lambda: qlora.project_back(x, g, bits, 1.0, DROPOUT),
        ),
        "gradient of x": (
            lambda: buffer.addcmul_(g @ A, mask, value=1 / (1 - DROPOUT)),
            lambda: qlora.add_dropped(buffer, g, A, bits, 1.0, DROPOUT),
        ),
    }
    for (name, (torchs, own)), found, wanted in zip(works.items(), ours, exact, strict=True):
        error = (found - wanted).norm() / wanted.norm()
        print(f"{name}: torch {timed(torchs):.1f} µs, kernel {timed(own):.1f} µs, error {error:.1e}")
        assert error < 1e-2


def attention() -> None:
    cu = torch.tensor([0, *torch.tensor(ROWS).cumsum(0)], dtype=torch.int32, device="cuda")
    q, k, v, g = (torch.randn(sum(ROWS), n, 128, device="cuda").bfloat16() for n in (32, 8, 8, 32))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    ways = [qlora.torch_varlen]
    if qlora.has_flash_attention_4(32, 8, 128, torch.bfloat16):
        ways.append(qlora.flash_attention_4)

    def both(attend):
        return torch.autograd.grad(attend(*inputs, cu, max(ROWS), 128**-0.5), inputs, g)

    for attend in ways:
        print(f"attention forward and backward, {attend.__name__}: {microseconds(lambda w=attend: both(w)):.0f} µs")


def mlp(tokens: int, width: int) -> None:
    """A dense SwiGLU MLP forward and backward, 3.5 times as wide inside."""
    x, both, down, grad = (
        torch.randn(shape, device="cuda").bfloat16() / 64
        for shape in ((tokens, width), (7 * width, width), (width, 7 * width // 2), (tokens, width))
    )
    gate, up = both[::2].contiguous(), both[1::2].contiguous()
    x.requires_grad_()
    ways = {"torch": lambda: (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()}
    if qlora.has_gated_products(torch.bfloat16):
        ways["QuACK"] = lambda: qlora.GatedMLP.apply(x, both, down)
    if find_spec("liger_kernel"):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        ways["Liger"] = lambda: LigerSiLUMulFunction.apply(x @ gate.t(), x @ up.t()) @ down.t()
    for name, way in ways.items():
        print(
            f"MLP forward and backward, {name}: {microseconds(lambda w=way: torch.autograd.grad(w(), x, grad)):.0f} µs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 7040), ("width", 4096), ("rank", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    dropout(options.tokens, options.width, options.rank, "cuda", microseconds)
    attention()
    mlp(options.tokens, options.width)


if __name__ == "__main__":
    main()
