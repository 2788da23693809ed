"""What the fault tests share: rows, a tiny model, and the run that nothing interrupts."""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["OMP_NUM_THREADS"] = "1"

import child

ROWS = [
    json.dumps({"prompt": f"{n} and {n}", "completion": f"{2 * n}"}) for n in range(13)
]  # 8 of them to train on


def shared_model(folder: Path) -> Path:
    """The tiny model and the rows, made in a folder by a process of their own."""
    (folder / "rows.jsonl").write_text("\n".join(ROWS))
    maker = child.fork_server().Process(target=child.make_model, args=(folder / "model",))
    maker.start()
    maker.join()
    return folder


def settings_of(shared: Path):
    """Makes settings of a run of 3 epochs and 6 steps that takes a few seconds, in a folder."""

    def make(folder: Path, **changes):
        return {
            "base_model": str(shared / "model"),
            "data_files": str(shared / "rows.jsonl"),
            "output_dir": str(folder / "outputs"),
            "model_cache": str(shared / "cache"),
            "run_name": "faults",
            "learning_rate": 3e-3,
            "lora_dropout": 0.05,  # so that a resumed run must also find its random state again
            "epochs": 3,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "validation_fraction": 0.2,
            "max_new_tokens": 2,
            "sample_rows": 2,
            "push_to_hub": False,
        } | changes

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Makes settings of a run of a few seconds, in a folder of its own (`settings_of`)."""
    return settings_of(shared_model(tmp_path_factory.mktemp("tiny")))


def result_of(folder: Path) -> SimpleNamespace:
    """What must be equal: the adapter's bytes, and every logged loss by step."""
    final = folder / "outputs" / "faults" / "final_model"
    log = json.loads((final / "run.json").read_text())["trainer_state"]["log_history"]
    losses = [
        (e["step"], k, e[k]) for e in log for k in ("loss", "eval_loss", "grad_norm") if k in e
    ]
    return SimpleNamespace(
        adapter=hashlib.sha256((final / "adapter_model.safetensors").read_bytes()).hexdigest(),
        losses=losses,
    )


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory):
    """The result of the run that nothing interrupts, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, shown = child.run(tiny(folder), folder / "log")
    assert code == 0, shown
    return result_of(folder), folder, shown
