"""Killed and stopped inside its second epoch and continued on a GPU, in NF4 and bf16: the same
losses as without.

    python tests/gpu/resume.py     # two random layers, seconds
    python tests/gpu/resume.py --model content/model_cache/mistral-7b-random  # by mistral_7b.py

Runs of the notebook's own cells on 40 rows of the examples, three steps an epoch: undisturbed;
killed in step 5 after a timed checkpoint, and continued; stopped in step 6, and continued. Prints
the largest difference of a logged loss and of the adapter, and fails if a loss differs by more than
1e-3 of its value.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import child  # noqa: E402

from finetune.batches import Cut  # noqa: E402


def result(folder: Path) -> tuple[dict, dict]:
    """Losses by step and kind, and the adapter's tensors."""
    from safetensors.torch import load_file

    final = folder / "outputs" / "faults" / "final_model"
    log = json.loads((final / "run.json").read_text())["trainer_state"]["log_history"]
    losses = {
        (e["step"], kind): e[kind] for e in log for kind in ("loss", "eval_loss") if kind in e
    }
    return losses, load_file(final / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "content" / "gpu-resume")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    model = options.model or options.out / "model"
    if not options.model:
        child.make_model(model)
    rows = (ROOT / "data_examples" / "support_triage.jsonl").read_text().splitlines()[:40]
    (options.out / "rows.jsonl").write_text("\n".join(rows))
    settings = {
        "base_model": str(model.absolute()),
        "data_files": str(options.out / "rows.jsonl"),
        "epochs": 2,
    }
    settings |= {"run_name": "faults", "push_to_hub": False, "sample_rows": 2, "max_new_tokens": 2}
    faults = {"undisturbed": None, "killed": ("save_often", 5), "stopped": ("stop_at", 6)}
    results = {}
    for name, fault in faults.items():
        folder = options.out / name
        folder.mkdir()
        settings["output_dir"] = str(folder / "outputs")
        if fault:
            code, shown = child.run(settings, folder / "log", fault)
            assert code == (-9 if name == "killed" else 2), shown
        code, shown = child.run(settings, folder / "log")
        assert code == 0, shown
        results[name] = result(folder)
        print(name, *(line for line in shown.splitlines() if "Continuing from" in line))
        print(Cut(**json.loads((folder / "outputs" / "faults" / "plan.json").read_text())["cut"]))
    expected, adapter = results.pop("undisturbed")
    for name, (losses, continued) in results.items():
        assert losses.keys() == expected.keys()
        worst = max(abs(losses[key] - expected[key]) / expected[key] for key in expected)
        apart = max(float((continued[n] - adapter[n]).norm() / adapter[n].norm()) for n in adapter)
        same = all((continued[n] == adapter[n]).all() for n in adapter)
        print(
            f"{name}: {len(expected)} losses; largest relative difference of a loss {worst:.1e}, "
            f"of an adapter matrix {apart:.1e}; adapters "
            f"{'bit-identical' if same else 'differ by rounding'}"
        )
        assert worst < 1e-3


if __name__ == "__main__":
    main()
