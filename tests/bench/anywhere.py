"""One row of figures for the card at hand, in ten minutes: this project, TRL as it comes, and
Unsloth where it is installed.

    pip install -r requirements.txt liger-kernel
    python tests/bench/anywhere.py            # a minute a way, on short rows
    python tests/bench/anywhere.py --data long --seconds 60

Trains a model of Mistral-7B's shape with random weights by the recipe: 16 rows a step, r 32 on the
attention's four projections. Its 4-bit weights are made layer by layer on the GPU and written to
4 GB on disk, so that 12 GB of main memory are enough. Each way runs in a process of its own: two
steps to warm up, then steps for so many seconds. Prints one row of Markdown: card, versions, real
tokens a second and peak memory of each way, and which share of the card's own measured matrix rate
and bandwidth ours is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import speed  # noqa: E402

WAYS = ("ours", "trl", "unsloth-best")
MODEL = Path("content/model_cache/mistral-7b-random-4bit")


def make_model(folder: Path) -> None:
    """Write a 4-bit model of Mistral-7B's shape, a layer at a time, and a tokenizer."""
    import bitsandbytes
    import torch
    from mistral import mistral_config
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, MistralForCausalLM

    config, files = mistral_config(), {}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MistralForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    parts: dict[str, dict] = {}
    for name, shape in shapes.items():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        if "norm" in name:
            weight = torch.ones_like(weight)
        held = {name: weight}
        if part != "rest" and weight.ndim == 2:
            four, state = bitsandbytes.functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            told = state.as_dict(packed=True)
            held = {name: four} | {f"{name}.{key}": value for key, value in told.items()}
        parts.setdefault(part, {}).update({key: value.cpu() for key, value in held.items()})
        done = [key for key in parts if key not in (part, "rest")]
        for key in done:
            files |= write(parts.pop(key), folder / f"model-{key}.safetensors", save_file)
    for key in list(parts):
        files |= write(parts.pop(key), folder / f"model-{key}.safetensors", save_file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.architectures, config.dtype = ["MistralForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of as many invented words: rows are ids here, but every way wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words_only, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write(weights: dict, file: Path, save) -> dict[str, str]:
    """Save some weights; returns which file each is in."""
    save(weights, file, {"format": "pt"})
    return dict.fromkeys(weights, file.name)


def stopwatch(seconds: float, warm: int = 2):
    """A Trainer callback that stops so many seconds after the warm-up; counts the steps in them."""
    import torch
    import transformers

    class Stopwatch(transformers.TrainerCallback):
        begun, ended, steps = 0.0, 0.0, 0

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == warm:
                self.begun = now
                torch.cuda.reset_peak_memory_stats()
            elif state.global_step > warm:
                self.ended, self.steps = now, state.global_step - warm
                control.should_training_stop = now - self.begun >= seconds

    return Stopwatch()


def measure(way: str, kind: str, seconds: float) -> dict:
    """Train one way; real tokens a second by the rows' mean length, and the peak."""
    if way.startswith("unsloth"):
        import unsloth  # noqa: F401  it wants to be imported first
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    data, watch = speed.rows(kind), stopwatch(seconds)
    usual = speed.recipe

    def recipe(**changes):
        fixed = {"num_train_epochs": 1000, "logging_strategy": "no"}
        return usual(**fixed | {"lr_scheduler_type": "constant"} | changes)

    speed.recipe = recipe
    trainer, _ = speed.trainer_for(way, str(MODEL), data, tokenizer, 0, watch)
    trainer.train()
    sizes = speed.lengths(kind)
    tokens = 16 * sum(sizes) / len(sizes) * watch.steps
    return {
        "tokens_per_second": tokens / (watch.ended - watch.begun),
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
        "steps": watch.steps,
    }


def in_a_process(way: str, options) -> dict:
    """`measure` in a process of its own; its failure is a result too."""
    command = [sys.executable, __file__, "--one", way, "--data", options.data]
    command += ["--seconds", str(options.seconds)]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    quiet["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or ["failed"])[-1]
    return {"error": "out of memory" if "OutOfMemory" in done.stderr else last[:60]}


def cell(found: dict) -> str:
    """Tokens a second and peak of one way, or why there are none."""
    if "error" in found:
        missing = "No module named 'unsloth'" in found["error"]
        return "not installed" if missing else found["error"]
    return f"{found['tokens_per_second']:,.0f} ({found['peak_gb']:.1f} GB)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(speed.KINDS), default="short")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.data, options.seconds)), flush=True)
        return
    import torch

    from finetune.machine import free_cache, versions

    if not MODEL.exists():
        part = MODEL.with_name(f"{MODEL.name}.part")  # whole, or not at all
        shutil.rmtree(part, ignore_errors=True)
        print(f"Making the model in {MODEL} …", file=sys.stderr, flush=True)
        make_model(part)
        part.rename(MODEL)
    rate, bandwidth = speed.rates()
    card, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / 2**30
    free_cache()
    results = {}
    for way in WAYS:
        print(f"{way}: about two minutes …", file=sys.stderr, flush=True)
        results[way] = in_a_process(way, options)
        print(f"{way}: {cell(results[way])}", file=sys.stderr, flush=True)
    best = speed.ceiling(options.data, rate, bandwidth)
    share = results["ours"].get("tokens_per_second", 0) / best
    stack = versions()
    names = ("torch", "transformers", "trl", "liger-kernel")
    told = ", ".join(f"{name} {stack.get(name, 'missing')}" for name in names)
    print("| card | rows | this project | TRL | Unsloth | of the ceiling | versions |")
    print("|---|---|---|---|---|---|---|")
    row = [f"{card}, {memory:.0f} GB", options.data, *map(cell, results.values())]
    print(f"| {' | '.join(row)} | {share:.2f} of {best:,.0f} | {told} |")


if __name__ == "__main__":
    main()
