"""What the examples' held-out rows are worth without training: the commonest answer, and the base
model told the rules.

    python tests/bench/baseline.py content/model_outputs/triage

The rows are those of a finished run's `answers.jsonl`. The base is asked in its own chat template,
greedy, once with the rules alone and once with five answered rows besides (those that the run
trained on, one a category).
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

from finetune.base_model import base_model_path  # noqa: E402
from qlora_helpers import Settings  # noqa: E402

RULES = """You sort messages to a shop's support desk. Answer with one line and nothing else:
category; priority; product; next step
Categories, their priority and their next step:
how-to: low; send the guide
defect: high; send a replacement
delivery: normal; trace the parcel
account: high; reset the access
billing: normal; check the charge
Products: router, kettle, lamp, camera, scooter, headphones. The tone does not matter."""


def answer(model, tokenizer, talk: list[dict]) -> str:
    """The first line of the base model's greedy answer."""
    inputs = tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=32)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip().partition("\n")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    cfg = Settings(**json.loads((options.run / "final_model" / "run.json").read_text())["settings"])
    lines = (options.run / "answers.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    held = {row["prompt"] for row in asked}
    file = ROOT / "data_examples" / "support_triage.jsonl"
    every = [json.loads(line) for line in file.read_text().splitlines()]
    trained = [row for row in every if row["prompt"] not in held]
    commonest = Counter(row["completion"] for row in trained).most_common(1)[0][0]
    by_category = {row["completion"].partition(";")[0]: row for row in reversed(trained)}
    shots = [
        {"role": role, "content": row[key]}
        for row in by_category.values()
        for role, key in (("user", "prompt"), ("assistant", "completion"))
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model_path(cfg))
    model = transformers.AutoModelForCausalLM.from_pretrained(base_model_path(cfg), dtype="auto")
    system = [{"role": "system", "content": RULES}]
    ways = {
        "the commonest answer": lambda _: commonest,
        "the base model, told the rules": lambda p: answer(
            model, tokenizer, [*system, {"role": "user", "content": p}]
        ),
        "the base model, told the rules and five rows": lambda p: answer(
            model, tokenizer, [*system, *shots, {"role": "user", "content": p}]
        ),
    }
    print(f"| {len(asked)} held-out rows | exact answers |\n|---|---|")
    for name, way in ways.items():
        right = sum(way(row["prompt"]) == row["reference"] for row in asked)
        print(f"| {name} | {right} ({right / len(asked):.0%}) |", flush=True)


if __name__ == "__main__":
    main()
