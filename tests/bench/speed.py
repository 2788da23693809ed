"""How fast one card trains Mistral-7B by QLoRA: plain recipe, TRL as it comes, Unsloth if
installed, this project.

    python tests/bench/speed.py      # makes a model of Mistral-7B's shape with random weights
    python tests/bench/speed.py --memory-limit-gb 22 --data long --only plain ours
    python tests/bench/speed.py --only ours --gpus 1 2  # growth with GPUs; `--only fsdp`: spread
    python tests/bench/speed.py --targets all-linear --only unsloth-flash ours

Every way trains the same rows on the same card in one run, each in a process of its own, with the
recipe's LoRA and 16 examples a step: two epochs to warm up, one timed. Rows are 4096 tokens long,
or short (lognormal lengths, median 180, sigma 0.9, clipped to 24…4096), or as --data says
(`KINDS`). Prints real tokens a second, seconds a step, the peak memory, the loss, and the share of
what the card's arithmetic allows, with what our plan had said; writes JSON and a Markdown table.
"""

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

WAYS = {
    "plain": "plain recipe: k-bit preparation, reentrant checkpointing, paged 8-bit AdamW, batch 4",
    "trl": "TRL as it comes, batch 4",
    "unsloth": "Unsloth, its defaults, batch 4",
    "unsloth-best": "Unsloth, batch 16, no recomputation where it fits",
    "unsloth-flash": "Unsloth, the same, with FlashAttention 2",  # see flash.py
    "ours": "this project",
    "ours-frozen": "this project, each epoch in the same order",
    "fsdp": "this project, base model spread by FSDP, all layers recomputed",
}
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
}
N_LORA = {"attention": 27.3e6, "all-linear": 83.9e6}  # weights of the adapters of rank 32


def lognormal(chance: random.Random, median: int, sigma: float) -> int:
    return min(4096, max(24, round(median * math.exp(sigma * chance.gauss(0, 1)))))


# Lengths of rows by name: each makes one from a random source and its place.
KINDS = {
    "long": lambda chance, place: 4096,
    "short": lambda chance, place: lognormal(chance, 180, 0.9),
    "mixed": lambda chance, place: 4096 if place % 20 == 7 else lognormal(chance, 180, 0.4),
    "uniform": lambda chance, place: chance.randrange(100, 2000),
    "alike": lambda chance, place: chance.randrange(480, 544),
}


def lengths(kind: str) -> list[int]:
    """Lengths of the benchmark's rows: two steps of long ones, twelve of others."""
    chance = random.Random(0)
    return [KINDS[kind](chance, place) for place in range(32 if kind == "long" else 192)]


def rows(kind: str):
    """Random ids as encoded rows, every token trained."""
    import datasets

    chance = random.Random(1)
    ids = [[chance.randrange(1000, 32000) for _ in range(n)] for n in lengths(kind)]
    return datasets.Dataset.from_list([{"input_ids": i, "labels": [-100, *i[1:]]} for i in ids])


def precision():
    """What this card computes in, and its torch type: bf16, or fp16 where it has none."""
    from finetune.machine import computing_type, resolve_precision

    name, _ = resolve_precision("auto")
    return name, computing_type(name)


def nf4():
    """The recipe's quantisation."""
    import torch
    import transformers

    from finetune.machine import is_sharded

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision()[1],
        bnb_4bit_quant_storage=precision()[1] if is_sharded() else torch.uint8,
    )


def base_model(path: str):
    """The base in 4 bits on the GPU; under FSDP in main memory."""
    import transformers

    from finetune.base_model import placement, ready_to_shard

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=nf4(), dtype=precision()[1], device_map=placement()
    )
    ready_to_shard(model)
    return model


def clock():
    """A Trainer callback that keeps the time at each epoch's beginning and end, and the logged
    losses.
    """
    import torch
    import transformers

    class Clock(transformers.TrainerCallback):
        times: list = []  # noqa: RUF012
        losses: list = []  # noqa: RUF012

        def now(self, *_, **__):
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        on_epoch_begin = on_epoch_end = now

        def on_train_begin(self, *_, **__):
            torch.cuda.reset_peak_memory_stats()

        def on_log(self, args, state, control, logs=None, **__):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Clock()


def recipe(**changes):
    """Arguments of the recipe; `changes` are what a way does differently."""
    import trl

    fixed = {
        "output_dir": "content/bench",
        "num_train_epochs": 3,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "bf16": precision()[0] == "bf16",
        "fp16": precision()[0] == "fp16",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "loss_type": "nll",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "ddp_find_unused_parameters": False,
    }
    return trl.SFTConfig(**(fixed | changes))


def lora(model, targets: str = "attention"):
    """The recipe's adapter."""
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=32, lora_alpha=64, lora_dropout=0, target_modules=TARGETS[targets]
    )
    return peft.get_peft_model(model, config)


def trainer_for(way: str, path: str, data, tokenizer, limit: float, watch, targets="attention"):
    """The trainer of one way, and what its plan says."""
    import peft
    import trl

    common = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [watch]}
    if way == "plain":
        model = peft.prepare_model_for_kbit_training(
            base_model(path), gradient_checkpointing_kwargs={"use_reentrant": True}
        )
        args = recipe(
            optim="paged_adamw_8bit",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
        return trl.SFTTrainer(lora(model, targets), args, **common), {}
    if way == "trl":
        return trl.SFTTrainer(lora(base_model(path), targets), recipe(), **common), {}
    if way.startswith("unsloth"):
        return unsloth_trainer(way, path, common, targets)
    from finetune.batches import StepSampler
    from finetune.plan import make_plan
    from finetune.speed import use_fast_kernels
    from finetune.train import PlannedTrainer
    from qlora_helpers import Settings

    if way == "ours-frozen":
        StepSampler.set_epoch = lambda self, epoch: None
    cfg = Settings(**settings(path, limit))
    model = lora(base_model(path), targets)
    start = time.perf_counter()
    used = use_fast_kernels(model, data, precision()[0])
    print(f"compared in {time.perf_counter() - start:.0f} s; {used}", file=sys.stderr)
    start = time.perf_counter()
    plan = make_plan(cfg, model, data)
    planned = time.perf_counter() - start
    print(
        plan,
        f"\nplanned in {planned:.0f} s: "
        + "; ".join(f"{r['rows at once']} {r['layout']} {r['tokens/s']}" for r in plan.table),
        file=sys.stderr,
    )
    args = recipe(
        per_device_train_batch_size=plan.cut.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        optim="adamw_torch_fused",
    )
    trainer = PlannedTrainer(model, args, plan, **common)
    notes = {"cut": str(plan.cut), "planned_seconds": planned, "plan_peak": plan.peak}
    return trainer, notes | {"plan_tokens_per_second": plan.tokens_per_second}


def settings(path: str, limit: float) -> dict:
    """The notebook's defaults, for this model and memory limit."""
    from finetune.command_line import defaults

    return defaults() | {
        "base_model": path,
        "memory_limit_gb": limit,
        "resume": "never",
    }


def unsloth_trainer(way: str, path: str, common: dict, targets: str):
    """Unsloth's model and trainer; its best is a batch of 16 and recomputation only where memory
    asks for it.
    """
    import unsloth

    import trl  # isort: skip

    if way == "unsloth-flash":
        from flash import give_to_unsloth

        give_to_unsloth()

    common[
        "train_dataset"
    ]._unsloth_truncated_to = 4096  # so that it keeps its padding-free batches
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        path, max_seq_length=4096, load_in_4bit=True
    )
    best = way != "unsloth"
    skip = {"checkpoint_skip_layers": "auto"} if best else {}
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=64, lora_dropout=0, target_modules=TARGETS[targets], **skip
    )
    batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1} if best else {}
    return trl.SFTTrainer(model, recipe(optim="adamw_8bit", **batch), **common), {
        "unsloth": unsloth.__version__
    }


def measure(way: str, kind: str, path: str, limit: float, targets: str) -> dict:
    """Train three epochs one way; figures of the third."""
    if way.startswith("unsloth"):
        import unsloth  # noqa: F401  it wants to be imported first
    import accelerate
    import torch
    import transformers

    rank, ranks = (
        int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    torch.cuda.set_device(rank)
    if ranks > 1:
        accelerate.PartialState()
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.mem_get_info()[1])
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    data, watch = rows(kind), clock()
    trainer, notes = trainer_for(way, path, data, tokenizer, limit, watch, targets)
    trainer.train()
    peaks = [torch.cuda.max_memory_allocated() / 2**30]
    if ranks > 1:
        peaks = peaks * ranks
        torch.distributed.all_gather_object(peaks, peaks[0])
    steps, seconds = len(data) // 16, watch.times[-1] - watch.times[-2]
    return notes | {
        "way": way,
        "data": kind,
        "limit_gb": limit,
        "targets": targets,
        "tokens_per_second": sum(lengths(kind)) / seconds,
        "step_seconds": seconds / steps,
        "peak_gb": max(peaks),
        "peaks_gb": peaks,
        "gpus": ranks,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "reserved_gb": torch.cuda.max_memory_reserved() / 2**30,
        "loss": watch.losses[-1],
        "card": torch.cuda.get_device_name(),
    }


def rates() -> tuple[float, float]:
    """This card's 16-bit matrix rate (FLOP/s) and copy bandwidth (bytes/s, read and written),
    measured.
    """
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=precision()[1])
    b, c = torch.ones(2, 2**29, device="cuda")

    def seconds(work, n=20):
        work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    return 2 * 8192**3 / seconds(lambda: a @ a), 8 * b.numel() / seconds(lambda: b.copy_(c))


def ceiling(kind: str, rate: float, bandwidth: float, targets: str = "attention") -> float:
    """Tokens/s that the arithmetic allows without recomputation: matrix products, and dequantising
    twice a step.

    Per token `4 N + 6 N_lora + 3.5 A + 6 head` FLOP, with N = 6.979e9, N_lora by `N_LORA`, head =
    134e6 and `A = 2 layers hidden (Σl² / Σl)`; 2.52 bytes × N for each dequantising pass.
    """
    sizes = lengths(kind)
    attention = 2 * 32 * 4096 * sum(n * n for n in sizes) / sum(sizes)
    flop = 4 * 6.979e9 + 6 * N_LORA[targets] + 3.5 * attention + 6 * 134e6
    tokens = 16 * sum(sizes) / len(sizes)
    return 1 / (flop / rate + 2 * 2.52 * 6.979e9 / bandwidth / tokens)


def table(results: list[dict], ceilings: dict[str, float]) -> str:
    """Markdown."""
    lines = [
        "| rows | way | tokens/s | s a step | peak GB | of the ceiling | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        limit = f", {r['limit_gb']:g} GB" if r["limit_gb"] else ""
        limit += f", {r['gpus']} GPUs" if r["gpus"] > 1 else ""
        limit += ", all-linear" if r["targets"] == "all-linear" else ""
        head = f"| {r['data']}{limit} | {WAYS[r['way']]} "
        if "error" in r:
            lines.append(head + f"| {r['error']} | | | | |")
            continue
        share = r["tokens_per_second"] / ceilings[r["data"]] / r["gpus"]
        if r.get("plan_peak"):
            head += (
                f"(planned {r['plan_tokens_per_second']:,.0f} tokens/s, {r['plan_peak']:.1f} GB) "
            )
        lines.append(
            head
            + f"| {r['tokens_per_second']:,.0f} | {r['step_seconds']:.2f} | {r['peak_gb']:.1f} | "
            f"{share:.2f} "
            f"| {r['loss']:.4f} |"
        )
    return "\n".join(lines)


def in_a_process(way: str, kind: str, gpus: int, options) -> dict:
    """`measure` in processes of their own, one a GPU; their failure is a result too."""
    command = [sys.executable]
    if gpus > 1:
        config = (
            ["--config_file", str(ROOT / "finetune" / "fsdp.yaml")]
            if way == "fsdp"
            else ["--multi_gpu"]
        )
        command += [
            "-m",
            "accelerate.commands.launch",
            *config,
            f"--num_processes={gpus}",
            "--num_machines=1",
        ]
        command += ["--mixed_precision=no", "--dynamo_backend=no"]
    command += [__file__, "--one", way, kind, "--model", options.model]
    command += ["--memory-limit-gb", str(options.memory_limit_gb), "--targets", options.targets]
    environment = dict(os.environ)
    if gpus == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    if way.startswith("unsloth") and options.unsloth_path:
        environment["PYTHONPATH"] = options.unsloth_path
    threads = str(
        max(1, len(os.sched_getaffinity(0)) // gpus)
    )  # a launcher would set one: 4-bit takes long so
    environment |= {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }  # it waits long for a network that is not there
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    print(
        done.stderr[-6000:] if way.startswith(("ours", "fsdp")) or not lines else "",
        file=sys.stderr,
    )
    if lines:
        return json.loads(lines[-1])
    reason = (
        "out of memory"
        if "OutOfMemory" in done.stderr
        else (done.stderr.strip().splitlines() or ["failed"])[-1][:80]
    )
    return {
        "way": way,
        "data": kind,
        "limit_gb": options.memory_limit_gb,
        "gpus": gpus,
        "targets": options.targets,
        "error": reason,
    }


def main() -> None:
    """Measure what was asked for, print the table, write `content/bench/speed.json`."""
    from finetune.machine import free_cache

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="content/model_cache/mistral-7b-random", help="a folder; made if missing"
    )
    parser.add_argument("--memory-limit-gb", type=float, default=0)
    parser.add_argument("--data", nargs="+", choices=list(KINDS), default=["long", "short"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(WAYS),
        default=[way for way in WAYS if way not in ("fsdp", "ours-frozen")],
    )
    parser.add_argument("--out", type=Path, default=Path("content/bench/speed.json"))
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--unsloth-path", help="a folder of packages for Unsloth alone, which wants other versions"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(*options.one, options.model, options.memory_limit_gb, options.targets)
        print(json.dumps(found) if os.environ.get("RANK", "0") == "0" else "", flush=True)
        return
    if not (Path(options.model) / "config.json").exists():
        from mistral_7b import make_model

        make_model(Path(options.model), None)
    rate, bandwidth = rates()
    free_cache()  # for the processes that follow
    ceilings = {kind: ceiling(kind, rate, bandwidth, options.targets) for kind in KINDS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for kind, way, gpus in itertools.product(options.data, options.only, options.gpus):
        results.append(in_a_process(way, kind, gpus, options))
        found = {"rate": rate, "bandwidth": bandwidth, "ceilings": ceilings, "results": results}
        options.out.write_text(json.dumps(found, indent=2))
        print(table(results[-1:], ceilings).splitlines()[-1], flush=True)
    print(f"{rate / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s; ceilings {ceilings}\n")
    print(table(results, ceilings))


if __name__ == "__main__":
    main()
