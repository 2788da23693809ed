"""Is the learning real? The notebook itself, over seeds and with one thing changed, in one Markdown table.

    python tests/bench/learning.py --seeds 1 2 3 --out content/bench

Runs the notebook on the embedded model and `data_examples` as it is (`recipe`), with the adapter left in bf16
(`bf16 adapter`) and with the loss over the whole text (`whole text`). Each run takes about ten minutes on two idle
cores. Validation loss is over the answers' tokens in every row of the table. A run that is finished is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import nbformat

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import run_notebook  # noqa: E402

# What each variant replaces in the notebook's cells; the text must be there, so that a table cannot be of nothing.
VARIANTS = {
    "recipe": {},
    "bf16 adapter": {"qlora.adapter_to_fp32(model)": "pass"},
    "whole text": {
        "model, args, train_dataset=train_data,": "model,\n    args,\n"
        '    train_dataset=train_data.map(lambda row: {"labels": row["input_ids"]}),'
    },
}
SETTINGS = {
    "base_model": "embedded",
    "data_files": str(ROOT / "data_examples" / "*.jsonl"),
    "model_cache": str(ROOT / "content" / "model_cache"),
    "learning_rate": 4e-4,
    "max_new_tokens": 64,
    "push_to_hub": False,
    "merge": True,
}
# The adapter by nothing but transformers and peft, that is, on the base in full precision: how many answers are equal?
PLAIN = """
import json, sys
sys.modules |= dict.fromkeys(["bitsandbytes", "trl", "datasets", "pandas", "qlora_helpers"])
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
folder, equal = sys.argv[1], 0
model = AutoPeftModelForCausalLM.from_pretrained(folder + "/final_model", dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(folder + "/final_model")
rows = [json.loads(line) for line in open(folder + "/answers.jsonl")]
for row in rows:
    chat = [{"role": "user", "content": row["prompt"]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    answer = tokenizer.decode(new, skip_special_tokens=True).strip().removesuffix("### End").rstrip()
    equal += answer == row["after"]
print(equal / len(rows))
"""


def run(variant: str, seed: int, out: Path, more: dict) -> dict:
    """One run of the notebook, or its `run.json` where it is finished."""
    name = f"{variant.replace(' ', '-')}-{seed}"
    done = out / name / "run.json"
    if not done.exists():
        notebook = run_notebook.NOTEBOOK.read_text()
        for old, new in VARIANTS[variant].items():
            old, new = (json.dumps(text)[1:-1] for text in (old, new))
            assert notebook.count(old) == 1, (old, "is not in the notebook once")
            notebook = notebook.replace(old, new)
        changed = out / f"{name}.ipynb"
        nbformat.write(nbformat.reads(notebook, as_version=4), changed)
        run_notebook.NOTEBOOK, kept = changed, run_notebook.NOTEBOOK
        folders = {"output_dir": str(out), "merged_dir": str(out / name / "merged"), "run_name": name, "seed": seed}
        try:
            run_notebook.execute(SETTINGS | folders | more)
        finally:
            run_notebook.NOTEBOOK = kept
    return json.loads(done.read_text())


def reproduced(folder: Path) -> float:
    """Share of the after-answers that the adapter gives on the base in full precision, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", PLAIN, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("content/bench"))
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="as JSON")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    more = {name: json.loads(value) for name, value in options.set}
    lines = [
        "| | seeds | exact answers | F1 | stopped | validation loss | same without bitsandbytes |",
        "|---" * 7 + "|",
    ]
    for variant in options.variants:
        after = [run(variant, seed, out, more)["results"]["after"] for seed in options.seeds]
        same = [reproduced(out / f"{variant.replace(' ', '-')}-{seed}") for seed in options.seeds]
        exact = ", ".join(f"{each['exact_match']:.0%}" for each in after)
        means = [mean(each[key] for each in after) for key in ("f1", "stopped", "validation_loss")]
        cells = [
            variant,
            len(after),
            exact,
            f"{means[0]:.0%}",
            f"{means[1]:.0%}",
            f"{means[2]:.3f}",
            f"{mean(same):.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (out / "learning.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
