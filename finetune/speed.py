"""Section 8: all that replaces forwards, classes or hooks: compared first, reverted by `undo`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput, ModelOutput

from finetune.arithmetic import (
    FrozenHeadLoss,
    LoraMatmul,
    dense_weight,
    varlen_attention,
    varlen_mask,
)
from finetune.base_model import linear_4bit
from finetune.batches import Cut
from finetune.compare import (
    Comparison,
    body,
    perturbed_adapter,
    state_preserved,
    tolerance,
)
from finetune.machine import free_cache, is_spread, progress, short

ABSENT = object()


class Change:
    """Notes what the code inside a `with` replaces on a LoRA model, so that it can be put back.

    Looked at are the attributes of all modules, of their configurations, and of the file that
    defines the model's class, in which Liger replaces functions.
    """

    def __init__(self, model: PeftModel):
        modules = [*model.modules()]
        held = [getattr(module, "config", None) for module in modules]
        configs = {id(c): c for c in held if isinstance(c, PretrainedConfig)}
        source = sys.modules[type(model.get_base_model()).__module__]
        self.holders = [*modules, *configs.values(), source]
        self.replaced: dict[tuple[int, str], tuple[Any, Any]] = {}

    def __enter__(self) -> Change:
        # Copies of one level: it is attributes that are replaced, not what they hold.
        self.before = [dict(vars(holder)) for holder in self.holders]
        return self

    def __exit__(self, *_: object) -> None:
        for holder, before in zip(self.holders, self.before, strict=True):
            for name in before.keys() | vars(holder).keys():
                old = before.get(name, ABSENT)
                # train() and eval() set `training` on every module, which replaces nothing.
                if name != "training" and vars(holder).get(name, ABSENT) is not old:
                    self.replaced[id(holder), name] = (holder, old)
        del self.before

    def keep(self, model: PeftModel) -> None:
        """Leave it in place, to be found by `undo(model)`."""
        # The first change counts: what a second one replaces is ours already.
        for key, found in self.replaced.items():
            vars(model).setdefault("_replaced", {}).setdefault(key, found)

    def undo(self) -> None:
        """Put back what was there."""
        for (_, name), (holder, old) in self.replaced.items():
            if old is ABSENT:
                vars(holder).pop(name, None)
            else:
                vars(holder)[name] = old


@contextlib.contextmanager
def reversibly(model: PeftModel) -> Iterator[None]:
    """What the code inside replaces stays until `undo(model)`."""
    with Change(model) as change:
        yield
    change.keep(model)


@contextlib.contextmanager
def taken_back(model: PeftModel) -> Iterator[None]:
    """What the code inside replaces is put back at its end, however that comes."""
    change = Change(model)
    try:
        with change:
            yield
    finally:
        change.undo()
        free_cache()


def undo(model: PeftModel) -> None:
    """Leave `model` as PEFT made it: without what this room replaced, and accelerate's autocast."""
    keep_dense(model, False)
    change = Change(model)
    change.replaced = vars(model).pop("_replaced", {})
    change.undo()
    # accelerate has written the first two, if there was a trainer.
    for name in ("forward", "_original_forward", "_own_attention"):
        vars(model).pop(name, None)


def bare(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The base model alone, as it was loaded, if an adapter is on it already."""
    if not isinstance(model, PeftModel):
        return model
    undo(model)
    return model.unload()


def use_fast_kernels(model: PeftModel, data: Dataset, precision: str) -> str:
    """Give a LoRA model the faster of equal computations that this machine has; say which.

    They are a loss over the trained tokens alone, `LoraMatmul`, and on a GPU Liger's RMSNorm, RoPE
    and SwiGLU. Each is compared with the model's own on a few of the encoded rows `data`, in
    `precision` ('bf16', 'fp16', 'fp32'), and left out where they differ by more than rounding.
    """
    undo(model)
    if is_spread():
        return "nothing: spread over GPUs, the model computes in its own way"
    # A fresh adapter adds nothing (B is 0), so a wrong one would not show: noise is added first.
    kernels = {"loss": fuse_loss, "lora": fuse_lora, "liger": use_liger}
    with state_preserved(model), perturbed_adapter(model):
        compare = Comparison(model, data, precision)
        ways = progress(kernels.items(), "Comparing kernels", " kinds")
        told = [try_out(model, compare, name, fuse) for name, fuse in ways]
    return "; ".join(filter(None, told)) or "nothing"


def try_out(
    model: PeftModel,
    compare: Comparison,
    name: str,
    fuse: Callable[[PeftModel], Callable[[], str]],
) -> str:
    """Apply `fuse` to the model; keep the change if it runs and computes the same.

    `fuse` returns a function that says, after a pass, which kernel runs in how many layers, or ""
    if it replaced nothing. Returns that, or "not `name`" with the reason.
    """
    change, words, why = Change(model), "", ""
    try:
        with change:
            tell = fuse(model)
        far, words = compare.distance(), tell()
        # In this order, since a NaN is not larger than anything.
        if not far <= tolerance(compare.noise):
            why = f"{far:.2g} from the model's own, where rounding is {compare.noise:.2g}"
    except Exception as error:  # whatever a model's own code makes of what it does not know
        why = short(error)
    finally:
        if words and not why:
            change.keep(model)
        else:
            change.undo()
    return f"not {name} ({why})" if why else words


def fuse_loss(model: PeftModel) -> Callable[[], str]:
    """Let a causal LM compute its loss from the trained positions alone, in pieces.

    The logits of a 4096-token row take 0.5 GB in fp32, and those of prompt tokens are never used.
    """
    causal, ran = model.get_base_model(), set[int]()
    head, original = causal.get_output_embeddings(), causal.forward
    if type(head) is not nn.Linear or head.weight.requires_grad:  # 4-bit, or trained
        return lambda: ""

    @functools.wraps(type(causal).forward)
    def forward(
        self: PreTrainedModel,
        *args: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        if labels is None:
            return original(*args, **kwargs)
        ran.add(id(self))
        # The state at a position predicts the next token: states [rows, tokens - 1, hidden size]
        # stand beside labels [rows, tokens - 1], and of both only the trained ones go on.
        hidden = body(self)(*args, **kwargs).last_hidden_state[:, :-1]
        trained = labels[:, 1:] != -100
        head = self.get_output_embeddings()
        targets = labels[:, 1:][trained]
        loss = FrozenHeadLoss.apply(hidden[trained], head.weight, head.bias, targets)
        # The Trainer gives the trained tokens of the whole step; without it, this is a mean.
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=loss / count)

    # As a method: `generate` looks at its signature.
    causal.forward = types.MethodType(forward, causal)
    return lambda: "loss over trained tokens" if ran else ""


def fuse_lora(model: PeftModel) -> Callable[[], str]:
    """Let LoRA layers train through `LoraMatmul`.

    Without gradients, with the adapter off or merged, and with dropout, PEFT's own code runs.
    """
    layers, ran = [m for m in model.modules() if isinstance(m, LoraLinear4bit)], set[int]()
    # On the instances: PEFT's class, and other models' layers, stay as they are.
    for layer in layers:
        layer.forward = functools.partial(_lora_forward, layer, layer.forward, ran)
    return lambda: f"fused LoRA in {len(ran)} of {len(layers)} layers" if ran else ""


def _lora_forward(
    layer: LoraLinear4bit, own: Callable, ran: set[int], x: Tensor, *args: Tensor, **kwargs: object
) -> Tensor:
    off = not torch.is_grad_enabled() or layer.disable_adapters or layer.merged
    if off or len(layer.active_adapters) != 1 or args or kwargs:
        return own(x, *args, **kwargs)
    name, compute = layer.active_adapters[0], layer.base_layer.compute_dtype
    # With dropout A sees other inputs than W, so that the products cannot be shared.
    if type(layer.lora_dropout[name]) is not nn.Identity:
        return own(x)
    ran.add(id(layer))
    # x [..., in], A [r, in] and B [out, r]: out is [..., out].
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.autocast(x.device.type, enabled=False):  # its types are those of its arguments
        out = LoraMatmul.apply(x.to(compute), A, B, layer.base_layer, layer.scaling[name])
    return out.to(x.dtype)


def use_liger(model: PeftModel) -> Callable[[], str]:
    """Liger's Triton kernels for RMSNorm, RoPE and SwiGLU, where it knows the model."""
    if not torch.cuda.is_available():
        return lambda: ""
    if not importlib.util.find_spec("liger_kernel"):
        return lambda: "about a fifth slower, without Liger's kernels (pip install liger-kernel)"
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Without an instance Liger replaces the classes of all models in the process. Its losses stay
    # off: `fuse_loss` has the trained tokens alone.
    causal = model.get_base_model()
    _apply_liger_kernel_to_instance(causal, fused_linear_cross_entropy=False, cross_entropy=False)
    changed = sum(module._get_name().startswith("Liger") for module in causal.modules())
    return lambda: f"Liger's kernels in {changed} modules" if changed else ""


def keep_dense(model: PeftModel, keep: bool) -> None:
    """Compute with a dequantised copy of all 4-bit weights (3.5 times their size), or drop it.

    The numbers are the very ones that every pass would dequantise, so nothing changes but the time
    it takes.
    """
    if change := vars(model).pop("_dense", None):
        change.undo()
    if keep:
        # Not in `_replaced`: it comes and goes with a plan's trials, while the others stay.
        with Change(model) as change:
            for layer in linear_4bit(model):
                layer.dense = dense_weight(layer)
                layer.forward = functools.partial(_dense_forward, layer)
        vars(model)["_dense"] = change


def _dense_forward(layer: Linear4bit, x: Tensor) -> Tensor:
    # Casts as in bitsandbytes' own forward: to the computing type, and back to that of x.
    bias = None if layer.bias is None else layer.bias.to(layer.compute_dtype)
    return nn.functional.linear(x.to(layer.compute_dtype), layer.dense, bias).to(x.dtype)


def own_attention(model: PeftModel) -> str:
    """What computes attention as transformers loads the model: "sdpa", or "eager"."""
    return vars(model).get("_own_attention", model.config._attn_implementation)


def attend_by(model: PeftModel, name: str) -> None:
    """Compute attention by "varlen" (`varlen_attention`), or by one of transformers' own."""
    vars(model)["_own_attention"] = own_attention(model)
    # transformers finds a function of attention and its mask by one name.
    AttentionInterface.register("varlen", varlen_attention)
    AttentionMaskInterface.register("varlen", varlen_mask)
    with reversibly(model):
        model.set_attn_implementation(name)


def checkpointable(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers, each of which can be recomputed on its own."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: PeftModel, count: int) -> None:
    """Gradient checkpointing (non-reentrant) of the first `count` decoder layers alone.

    transformers' own switch also makes the embeddings' output require a gradient.
    """
    with reversibly(model):
        for number, layer in enumerate(checkpointable(model)):
            # Each layer asks these two attributes, in every forward of training.
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            layer.gradient_checkpointing = number < count


def compute_by(model: PeftModel, cut: Cut) -> None:
    """Compute as `cut` says: attention, recomputed layers, dense copy."""
    attend_by(model, cut.attention)
    recompute_layers(model, cut.recomputed_layers)
    # All layers would be dequantised anew, so only when it changes.
    if cut.dense != ("_dense" in vars(model)):
        keep_dense(model, cut.dense)


@contextlib.contextmanager
def noisy(model: PeftModel, alpha: float, lengths: Tensor) -> Iterator[None]:
    """Inside, embeddings carry NEFTune's noise: uniform within ±alpha / √(length × width).

    `lengths` has that of each token's own row (https://arxiv.org/abs/2310.05914); transformers
    takes the batch's, which gives rows laid end to end too little.
    """

    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        # output [rows, tokens, width], lengths [rows, tokens]: one bound a token.
        most = (alpha / (lengths[..., None] * output.shape[-1]).sqrt()).to(output.dtype)
        return output + (2 * torch.rand_like(output) - 1) * most

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
