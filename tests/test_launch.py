"""The notebook in two processes on the CPU (gloo), as `make launch` runs it: the same training as
in one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults import child
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm_path):
    folder = tmp_path_factory.mktemp("launch")
    child.make_model(folder / "model")
    rows = (ROOT / "data_examples" / "support_triage.jsonl").read_text().splitlines()[:40]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def launch(folder, gpus, name, command=("-m", "finetune.launch"), **environment):
    """Start 20 steps of 16 rows, the last of each epoch of 4; without dropout, which each process
    draws for itself.
    """
    settings = {
        "BASE_MODEL": folder / "model",
        "DATA": folder / "rows.jsonl",
        "OUTPUT_DIR": folder,
        "RUN_NAME": name,
    }
    settings |= {"MAX_STEPS": 20, "LORA_DROPOUT": 0.0, "LEARNING_RATE": 1e-3, "PUSH_TO_HUB": False}
    settings |= {"BF16": False}  # or a CPU that has bf16 would round by the cut
    settings |= {"SAMPLE_ROWS": 1, "MAX_NEW_TOKENS": 2} | ({"GPUS": gpus} if gpus else {})
    command = [sys.executable, *command, *(f"{k}={v}" for k, v in settings.items())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


def finish(process):
    shown, _ = process.communicate(timeout=300)
    return process.returncode, shown


def result(folder, name):
    """Training and validation losses by step, and the adapter."""
    final = folder / name / "final_model"
    log = json.loads((final / "run.json").read_text())["trainer_state"]["log_history"]
    return {e["step"]: e["loss"] for e in log if "loss" in e}, load_file(
        final / "adapter_model.safetensors"
    )


def same(found, expected):
    (losses, adapter), (wanted, weights) = found, expected
    assert len(wanted) == 20 and losses == pytest.approx(wanted, abs=1e-4)
    for name, weight in weights.items():
        assert (adapter[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.fixture(scope="module")
def one(model):
    code, shown = finish(launch(model, 1, "one"))
    assert code == 0, shown
    return result(model, "one")


def test_two_processes_train_as_one_and_one_of_them_talks(model, one):
    code, shown = finish(launch(model, 2, "two"))
    assert code == 0, shown
    assert shown.count("20 steps (3 an epoch)") == 1 and shown.count("Adapter: ") == 1
    assert "tensor(" not in shown
    same(result(model, "two"), one)


def test_when_one_process_is_killed_all_end_and_one_continues(model, one):
    process = launch(model, 2, "killed")
    until = time.monotonic() + 200
    while not list((model / "killed").glob("checkpoint-*/checksums.json")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    parts = psutil.Process(process.pid).children(recursive=True)
    next(part for part in parts if part.environ().get("RANK") == "1").kill()
    killed = time.monotonic()
    code, shown = finish(process)
    assert code != 0 and time.monotonic() - killed < 60
    assert (
        "A process ended before its time" in shown.splitlines()[-1]
        and str(model / "killed") in shown
    )
    assert not [
        part for part in parts if part.is_running() and part.status() != psutil.STATUS_ZOMBIE
    ]
    code, shown = finish(launch(model, 1, "killed"))
    assert code == 0 and "Continuing from checkpoint-" in shown, shown
    same(result(model, "killed"), one)


def test_fsdp_trains_as_one_process_does_and_the_process_that_follows_has_its_adapter(model, one):
    two = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "tests/fsdp_on_cpu.py",
    )
    for expected in ("Starting at step 0", "Continuing from checkpoint-"):
        code, shown = finish(launch(model, None, "fsdp", two))
        assert code == 0 and expected in shown and "all layers recomputed: not measured" in shown, (
            shown
        )
        last = max((model / "fsdp").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        if expected.startswith("Starting"):  # as if it had been ended before its last checkpoint
            shutil.rmtree(last)
    alone = {"QLORA_SPREAD": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    code, shown = finish(launch(model, None, "fsdp", **alone))
    assert code == 0 and "nothing is trained again" in shown, shown
    same(result(model, "fsdp"), one)


def test_more_processes_than_a_step_has_rows_for_say_how_many_work(
    settings, smollm_tokenizer, monkeypatch
):
    from finetune.plan import make_plan
    from finetune.tokens import encode_rows
    from qlora_helpers import UserError

    monkeypatch.setenv("WORLD_SIZE", "3")
    rows = encode_rows([{"prompt": "a", "completion": "b"}] * 4, smollm_tokenizer)
    with pytest.raises(
        UserError,
        match=r"3 processes cannot share the 16 rows of a step evenly\. Launch 2, or",
    ):
        make_plan(settings(), None, rows)
