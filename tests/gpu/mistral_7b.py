"""The notebook itself, headless, on a model of Mistral-7B-v0.3's exact shape with random weights:
needs a GPU of 16 GB.

    python tests/gpu/mistral_7b.py --data 'data_examples/*.jsonl' --steps 5

Makes the model once (14.5 GB of disk, the real v0.3 tokenizer), runs the notebook with its default
settings, and prints what its cells print: peak memory and time a step among it. The executed
notebook stays in the folder --out.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mistral import mistral_config, mistral_tokenizer  # noqa: E402


def make_model(folder: Path, tokenizer: Path | None) -> None:
    """Save a randomly initialised Mistral-7B in bf16, with the tokenizer, as a local folder."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            mistral_config(), dtype=torch.bfloat16
        )
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")
    model.save_pretrained(folder)
    source = (
        transformers.AutoTokenizer.from_pretrained(tokenizer) if tokenizer else mistral_tokenizer()
    )
    source.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("content/model_cache/mistral-7b-random"))
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder; without it, built from mistral-common's file"
    )
    parser.add_argument("--data", default="data_examples/*.jsonl")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("content/mistral_7b"))
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a setting, as JSON",
    )
    options = parser.parse_args()
    from finetune.headless import execute  # it needs the notebook's packages, make_model does not

    if not (options.model / "config.json").exists():
        make_model(options.model, options.tokenizer)
        torch.cuda.empty_cache()
    settings = {
        "base_model": str(options.model.absolute()),
        "data_files": options.data,
        "run_name": "mistral-7b-random",
        "max_steps": options.steps,
        "push_to_hub": False,
    } | {name: json.loads(value) for name, value in options.set}
    execute(settings, options.out)


if __name__ == "__main__":
    main()
