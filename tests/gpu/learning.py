"""Does the fast path learn what a CPU learns? The embedded model through the notebook's own cells.

    python tests/gpu/learning.py
    python tests/gpu/learning.py --only fp16

In bf16 and in forced fp16, by the plan's choice and by two forced cuts, over seeds 42, 1 and 2.
Prints a line a run; fails if the mean of three seeds leaves the spread of the same seeds on a CPU
(`make run SEED=…`), or an answer does not stop.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (2, 1)]
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import child  # noqa: E402

from finetune.command_line import SMALL  # noqa: E402

CPU = {"exact_match": (0.784, 0.892), "validation_loss": (0.0518, 0.0651)}
CUTS = {"as planned": ("as_measured",), "4 padded": ("cut_as", 4, False)}
CUTS |= {"16 end to end": ("cut_as", 16, True)}
SEEDS = (42, 1, 2)


def scores(folder: Path, seed: int, bf16: bool, fault: tuple) -> dict:
    """The scores after training of one run, and its plan."""
    settings = SMALL | {"base_model": "embedded", "run_name": "faults", "push_to_hub": False}
    settings |= {"data_files": str(child.ROOT / "data_examples" / "*.jsonl"), "seed": seed}
    settings |= {"model_cache": str(child.ROOT / "content" / "model_cache"), "bf16": bf16}
    code, shown = child.run(settings | {"output_dir": str(folder)}, folder / "log", fault)
    assert code == 0, shown
    run = json.loads((folder / "faults" / "final_model" / "run.json").read_text())
    assert (f"Precision        {'bf16' if bf16 else 'fp16'}") in shown
    return run["results"]["after"] | {"cut": run["plan"]["cut"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of what is to be run")
    only, failed = parser.parse_args().only, []
    for bf16, (name, fault) in itertools.product((True, False), CUTS.items()):
        title = f"{'bf16' if bf16 else 'fp16'}, {name}"
        if only not in title:
            continue
        with tempfile.TemporaryDirectory() as made:
            found = []
            for seed in SEEDS:
                folder = Path(made) / str(seed)
                folder.mkdir()
                found.append(scores(folder, seed, bf16, fault))
        told = [f"{100 * run['exact_match']:.1f} % {run['validation_loss']:.4f}" for run in found]
        means = {key: mean(run[key] for run in found) for key in CPU}
        print(f"{title}: {', '.join(told)}; mean {means}; {found[0]['cut']}", flush=True)
        inside = all(low <= means[key] <= high for key, (low, high) in CPU.items())
        if not inside or any(run["stopped"] < 1 for run in found):
            failed.append(title)
    assert not failed, failed


if __name__ == "__main__":
    main()
