"""Which base to merge into, and what a merge of Mistral-7B's shape takes.

    python tests/bench/merge.py loss content/model_outputs/triage/final_model
    python tests/bench/merge.py memory [--layers 32]  # Mistral-7B's shape

`loss` prints the validation loss over `data_examples` of the adapter on NF4, merged into the
dequantised NF4 weights, and merged into the 16-bit weights. `memory` writes a merged model and
prints the process's peak memory and the disk.
"""

import argparse
import resource
import shutil
import sys
import time
from pathlib import Path

import peft
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from finetune.answers import validation_loss  # noqa: E402
from finetune.base_model import mend_cpu_gradients, write_config  # noqa: E402
from finetune.command_line import defaults  # noqa: E402
from finetune.data import read_rows, split_rows  # noqa: E402
from finetune.machine import device  # noqa: E402
from finetune.merge import merged_weights, write_shards  # noqa: E402
from finetune.tokens import encode_rows  # noqa: E402
from qlora_helpers import Settings  # noqa: E402


def nf4(base: str, dtype: torch.dtype):
    """The base in NF4 as the notebook loads it."""
    options = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=dtype, device_map={"": device()}
    )
    mend_cpu_gradients(model)
    return model


def losses(adapter: Path, work: Path) -> None:
    """Print the three validation losses."""
    base = peft.PeftConfig.from_pretrained(adapter).base_model_name_or_path
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    settings = {"data_files": str(ROOT / "data_examples" / "*.jsonl"), "output_dir": str(work)}
    cfg = Settings(**defaults() | settings)
    _, rows = split_rows(read_rows(cfg), cfg.validation_fraction)
    examples = encode_rows(rows, tokenizer)
    model = peft.PeftModel.from_pretrained(nf4(base, torch.float32), adapter)
    with model.disable_adapter():
        print(f"base in NF4          {validation_loss(model, examples):.4f}", flush=True)
    print(f"adapter on NF4       {validation_loss(model, examples):.4f}", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        write_shards(merged_weights(model), work, dtype, 2 * 2**30)
        write_config(model, work, dtype)
        merged = load(work, dtype=torch.float32)
        print(
            f"merged into NF4      {validation_loss(merged, examples):.4f} ({dtype})",
            flush=True,
        )
    whole = peft.PeftModel.from_pretrained(
        load(base, dtype=torch.float32), adapter
    ).merge_and_unload()
    print(f"merged into 16 bits  {validation_loss(whole, examples):.4f}", flush=True)


def memory(layers: int, work: Path) -> None:
    """Merge weights in the shape of Mistral-7B, made in NF4 one by one, and print what it took."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from mistral import mistral_config
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = mistral_config()
    config.num_hidden_layers = layers
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = replace_with_bnb_linear(
        model, modules_to_not_convert=["lm_head"], quantization_config=quantization
    )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.full(
                parameter.shape, 0.02, dtype=torch.bfloat16
            )  # the values do not matter here
            if isinstance(module, Linear4bit):
                new = Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                setattr(module, name, new.to(device()))
            else:
                setattr(module, name, torch.nn.Parameter(weight.to(device()), requires_grad=False))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=32, target_modules=targets)
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.time()
    write_shards(merged_weights(model), work, torch.bfloat16, 2 * 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = sum(file.stat().st_size for file in work.iterdir())
    print(
        f"{layers} layers on {device()}: main memory {before:.1f} GiB before, {peak:.1f} "
        "GiB at the peak;"
    )
    print(
        f"{size / 1e9:.1f} GB in {len(list(work.glob('*.safetensors')))} files, "
        f"{time.time() - start:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loss", "memory"])
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("content/bench-merge"))
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    if options.what == "loss":
        losses(options.adapter, options.work)
    else:
        memory(options.layers, options.work)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
