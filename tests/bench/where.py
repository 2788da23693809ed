"""Where the time of this project's training goes on a GPU, and what a change to it would be worth.

    python tests/bench/where.py            # both kinds of rows of speed.py
    python tests/bench/where.py long --try compile flash cudnn
    python tests/bench/where.py long --try selective --memory-limit-gb 15  # where layers recompute

Prints, for one epoch of `speed.py`'s rows by the plan's choice, the share of the kernels' time by
what they do, and how long the GPU has nothing to do. With `--try`, passes with and without the
change take turns, three times each: their tokens a second and peak memory. Optimizer steps are
left out of all of it.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from speed import ceiling, clock, lengths, rates, rows, trainer_for  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402

from finetune.machine import autocast  # noqa: E402
from finetune.speed import checkpointable  # noqa: E402

# A kernel is of the first kind of which its name holds a part.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "cublas", "xmma"),
    "dequantising": ("dequant", "kDequantize"),
    "norms, RoPE, SwiGLU": ("rms", "rope", "swiglu", "silu", "_liger"),
    "loss": ("softmax", "scatter", "gather", "cross_entropy"),
    "optimizer and clipping": ("multi_tensor", "adam", "norm"),
    "copies and casts": ("memcpy", "copy", "cast", "memset", "fill"),
}


def kind_of(name: str) -> str:
    found = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
    return next(found, "additions and the rest")


def passes(trainer, kind: str) -> float:
    """One epoch of forward and backward passes; tokens a second."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in trainer.get_train_dataloader():
        with autocast("bf16"):  # as accelerate does
            trainer.training_step(
                trainer.model, batch, torch.tensor(4096, device=trainer.model.device)
            )
    torch.cuda.synchronize()
    trainer.model.zero_grad(set_to_none=False)
    return sum(lengths(kind)) / (time.perf_counter() - start)


def where_time_goes(trainer, kind: str) -> str:
    """Markdown: milliseconds a step by kind of kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        passes(trainer, kind)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent, busy, last = {}, 0.0, 0.0
    for event in sorted(kernels, key=lambda e: e.time_range.start):
        end = event.time_range.end
        busy += max(0.0, end - max(last, event.time_range.start))
        last = max(last, end)
        name = kind_of(event.name)
        spent[name] = spent.get(name, 0.0) + event.time_range.elapsed_us()
    begin = min(e.time_range.start for e in kernels)
    spent["nothing to do"] = last - begin - busy
    steps, whole = len(lengths(kind)) / 16, sum(spent.values())
    lines = [f"| {kind} rows | ms a step | share |", "|---|---|---|"]
    for name, micros in sorted(spent.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {micros / 1000 / steps:.1f} | {micros / whole:.1%} |")
    names = {}
    for event in kernels:
        names[event.name] = names.get(event.name, 0.0) + event.time_range.elapsed_us()
    for name, micros in sorted(names.items(), key=lambda item: -item[1])[:14]:
        print(f"{micros / 1000 / steps:8.1f} ms  {kind_of(name):24} {name[:90]}", file=sys.stderr)
    return "\n".join(lines)


@contextlib.contextmanager
def compiled(trainer):
    """Each decoder layer through torch.compile: regional compilation."""
    layers = checkpointable(trainer.model)
    own = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward


@contextlib.contextmanager
def selective(trainer):
    """Layers that are computed twice keep the output of attention, as under TRL's `selective`."""
    kernels = [name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product")]
    kept = [getattr(torch.ops.aten, name).default for name in kernels if "backward" not in name]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    layers = checkpointable(trainer.model)
    own = [layer._gradient_checkpointing_func for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, context_fn=contexts
        )
    try:
        yield
    finally:
        for layer, function in zip(layers, own, strict=True):
            layer._gradient_checkpointing_func = function


TRIES = {
    "compile": compiled,
    "selective": selective,
    "flash": lambda _: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda _: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
}


def try_out(trainer, kind: str, change: str) -> str:
    """Tokens a second with and without a change, in turns."""
    found, peaks = {"without": [], "with": []}, {}
    with TRIES[change](trainer):
        passes(trainer, kind)  # builds what it needs
    for _ in range(3):
        for name, context in (("without", contextlib.nullcontext), ("with", TRIES[change])):
            torch.cuda.reset_peak_memory_stats()
            with context(trainer):
                found[name].append(passes(trainer, kind))
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    means = {name: statistics.mean(values) for name, values in found.items()}
    told = "; ".join(
        f"{name} {', '.join(f'{v:,.0f}' for v in vs)} at {peaks[name]:.1f} GB"
        for name, vs in found.items()
    )
    return f"{kind}, {change}: {means['with'] / means['without'] - 1:+.1%} ({told})"


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", default=["long", "short"])
    parser.add_argument("--model", default="content/model_cache/mistral-7b-random")
    parser.add_argument("--memory-limit-gb", type=float, default=0)
    parser.add_argument("--try", dest="tries", nargs="+", choices=list(TRIES), default=[])
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").exists():
        sys.path.append(str(Path(__file__).parents[1] / "gpu"))
        from mistral_7b import make_model

        make_model(Path(options.model), None)
    rate, bandwidth = rates()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.eos_token
    for kind in options.data:
        limit = options.memory_limit_gb
        trainer, notes = trainer_for("ours", options.model, rows(kind), tokenizer, limit, clock())
        passes(trainer, kind)
        speed, most = passes(trainer, kind), ceiling(kind, rate, bandwidth)
        print(
            f"\n{kind}: {speed:,.0f} tokens/s, {speed / most:.2f} of the ceiling; {notes['cut']}\n"
        )
        print(where_time_goes(trainer, kind), "\n", flush=True)
        for change in options.tries:
            try:
                print(try_out(trainer, kind, change), flush=True)
            except Exception as error:
                print(f"{kind}, {change}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        trainer.free_memory()
        del trainer


if __name__ == "__main__":
    main()
