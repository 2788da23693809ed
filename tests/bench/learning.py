"""Is the learning real? The notebook itself, over seeds and with one thing changed, in one Markdown
table.

    python tests/bench/learning.py --seeds 1 2 3
    python tests/bench/learning.py --seeds 1 --variants 'bf16 adapter' 'whole text'

Runs the notebook as `make run` does: as it is (`recipe`), with the adapter left in bf16 (`bf16
adapter`), and with the loss over the whole text (`whole text`). Each run takes about ten minutes on
two idle cores. Validation loss is over the answers' tokens in every row of the table. A run that is
finished is not run again.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean

import nbformat

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from finetune import headless  # noqa: E402
from finetune.command_line import defaults, parse  # noqa: E402

# What each variant replaces in the notebook's cells; the text must be there, so that a table cannot
# be of nothing.
VARIANTS = {
    "recipe": {},
    "bf16 adapter": {
        "if cfg.early_stopping_patience:": "for weight in trainer.trainable().values():\n"
        "    weight.data = weight.data.bfloat16()\n"
        "if cfg.early_stopping_patience:"
    },
    "whole text": {
        "train_dataset=train_data,": (
            'train_dataset=train_data.map(lambda row: {"labels": row["input_ids"]}),'
        )
    },
}


def run(variant: str, seed: int, out: Path, settings: dict) -> dict:
    """The scores of one run of the notebook, done now unless it is finished."""
    name = f"{variant.replace(' ', '-')}-{seed}"
    done = out / name / "final_model" / "run.json"
    if not done.exists():
        notebook = headless.NOTEBOOK.read_text()
        for old, new in VARIANTS[variant].items():
            assert notebook.count(old) == 1, (old, "is not in the notebook once")
            notebook = notebook.replace(old, json.dumps(new)[1:-1])
        changed = out / f"{name}.ipynb"
        nbformat.write(nbformat.reads(notebook, as_version=4), changed)
        headless.NOTEBOOK, kept = changed, headless.NOTEBOOK
        try:
            headless.execute(settings | {"output_dir": str(out), "run_name": name, "seed": seed})
        finally:
            headless.NOTEBOOK = kept
    return json.loads(done.read_text())["results"]["after"]


def make_run_settings() -> dict:
    """What `make run` sets."""
    words = re.search(r"RUN_DEFAULTS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())[1]
    arguments = words.replace("\\\n", " ").replace("'", "").split()
    return parse(arguments, defaults())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("content/bench"))
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    lines = ["| | seeds | exact answers | F1 | stopped | validation loss |", "|---" * 6 + "|"]
    for variant in options.variants:
        after = [run(variant, seed, out, make_run_settings()) for seed in options.seeds]
        exact = ", ".join(f"{each['exact_match']:.0%}" for each in after)
        f1, stopped, loss = (
            mean(each[key] for each in after) for key in ("f1", "stopped", "validation_loss")
        )
        seeds = ", ".join(map(str, options.seeds))
        lines.append(f"| {variant} | {seeds} | {exact} | {f1:.0%} | {stopped:.0%} | {loss:.3f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
