"""The notebook in two processes on the CPU (gloo), as `make launch` runs it: the same training as
in one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import child
import psutil
import pytest
from safetensors.torch import load_file

from finetune.launch import main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm_path):
    folder = tmp_path_factory.mktemp("launch")
    child.make_model(folder / "model")
    rows = (ROOT / "data_examples" / "support_triage.jsonl").read_text().splitlines()[:40]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def settings_for(folder, name):
    """20 steps of 16 rows, the last of each epoch of 4; without dropout, which each process draws
    for itself.
    """
    return {
        "base_model": str(folder / "model"),
        "data_files": str(folder / "rows.jsonl"),
        "output_dir": str(folder),
        "run_name": name,
        "max_steps": 20,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "push_to_hub": False,
        "bf16": False,  # or a CPU that has bf16 would round by the cut
        "sample_rows": 1,
        "max_new_tokens": 2,
    }


def launch(folder, gpus, name):
    """Start them as `make launch` does."""
    words = [f"{key.upper()}={value}" for key, value in settings_for(folder, name).items()]
    command = [sys.executable, "-m", "finetune.launch", *words, f"GPUS={gpus}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


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
    """One process from start to end."""
    (model / "alone").mkdir()
    code, shown = child.run(settings_for(model, "one"), model / "alone" / "log")
    assert code == 0, shown
    return result(model, "one")


def test_when_one_process_is_killed_all_end_and_one_continues(model, one):
    """Two that are left alone: `faults/test_same.py`."""
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
    assert shown.count("20 steps (3 an epoch)") == 1 and "tensor(" not in shown  # one talks
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
    settings, folder = settings_for(model, "fsdp"), model / "sharded"
    folder.mkdir()
    for expected in ("Starting at step 0", "Continuing from checkpoint-"):
        code, shown = child.run_two(settings, folder / "log", ("under_fsdp",))
        assert code == 0 and expected in shown, shown
        last = max((model / "fsdp").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        if expected.startswith("Starting"):  # as if it had been ended before its last checkpoint
            shutil.rmtree(last)
    code, shown = child.run(settings, folder / "log", (), {"QLORA_SPREAD": "1"})
    assert code == 0 and "nothing is trained again" in shown, shown
    same(result(model, "fsdp"), one)


def test_a_process_whose_cell_fails_ends_as_failed_and_at_once(tmp_path):
    """As the launcher starts it; `LORA_R=0` is refused by the third cell."""
    command = [sys.executable, "-m", "finetune.launch", "LORA_R=0", f"OUTPUT_DIR={tmp_path}"]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "lora_r = 0: input should be" in done.stdout and "Preflight" not in done.stdout
    assert not list(tmp_path.iterdir())


STAND_IN = """
import json, os, sys
kept = {name: os.environ.get(name) for name in %r}
with open(%r, "a") as file:
    print(json.dumps([sys.argv[1:], kept]), file=file)
sys.exit(%r[len(open(%r).readlines()) - 1])
"""
TOLD = ("OMP_NUM_THREADS", "QLORA_SPREAD", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Calls `main` with a stand-in for Python that notes its arguments and ends with `codes`.

    Returns what was started: arguments, and what the environment says; and what `main` ended with.
    """
    calls = tmp_path / "calls"

    def run(*arguments, codes=(), **environment):
        calls.unlink(missing_ok=True)
        python = tmp_path / "python"
        script = STAND_IN % (TOLD, str(calls), [*codes, 0, 0], str(calls))
        python.write_text(f"#!{REAL}\n{script}")
        python.chmod(0o755)
        for name in TOLD:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        ended = ""
        try:
            main()
        except SystemExit as error:
            ended = str(error)
        return [json.loads(line) for line in calls.read_text().splitlines()], ended

    return run


REAL = sys.executable


def test_as_many_processes_are_launched_as_were_asked_for(started):
    for gpus, several in ((None, True), ("1", False), ("12", True)):
        ((words, told),), ended = started("EPOCHS=2", *[f"GPUS={gpus}"] * bool(gpus), "DATA=a=b c")
        assert words[:2] == ["-m", "accelerate.commands.launch"] and not ended
        assert words[-4:] == ["--module", "finetune.launch", "EPOCHS=2", "DATA=a=b c"]
        assert f"--num_processes={gpus or 2}" in words and ("--multi_gpu" in words) == several
        assert "--config_file" not in words and told["QLORA_SPREAD"] is None


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("GPUS=two", "GPUS=two: how many GPUs train, as a number"),
        ("GPUS=0", "GPUS=0: how many GPUs train"),
        ("FSDP=true", "FSDP=true: there is no such file; FSDP=True needs none"),
        ("EPOCHS=-1", "epochs = -1: input should be greater than 0"),
    ],
)
def test_what_cannot_be_launched_is_told_before_anything_starts(monkeypatch, word, told):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch", word])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was launched"))
    with pytest.raises(SystemExit, match=re.escape(told)):
        main()


def test_processes_share_the_cores_unless_the_user_has_said_how(started):
    cores = len(os.sched_getaffinity(0))
    for gpus in (1, 2, 64):
        ((_, told),), _ = started(f"GPUS={gpus}")
        assert told["OMP_NUM_THREADS"] == str(cores // gpus or 1)
    ((_, told),), _ = started("GPUS=1", OMP_NUM_THREADS="77")
    assert told["OMP_NUM_THREADS"] == "77"


@pytest.mark.parametrize("fsdp", ["True", "my/own.yaml"])
def test_after_fsdp_one_process_does_the_rest(started, fsdp, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "own.yaml").touch()
    ((first, told), (second, then)), ended = started(f"FSDP={fsdp}", "GPUS=4", "EPOCHS=2")
    file = first[first.index("--config_file") + 1]
    assert Path(file) == (ROOT / "finetune" / "fsdp.yaml" if fsdp == "True" else Path(fsdp))
    assert "--multi_gpu" not in first and "--num_processes=4" in first and first[-1] == "EPOCHS=2"
    assert told["QLORA_SPREAD"] is None and told["ACCELERATE_MIXED_PRECISION"] is None
    assert second == ["-m", "finetune.launch", "EPOCHS=2"] and not ended
    assert then["QLORA_SPREAD"] and then["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "Trained. Now its answers" in capsys.readouterr().out


@pytest.mark.parametrize(("codes", "calls"), [([1], 1), ([0, 1], 2)])
def test_when_a_process_fails_what_is_lost_and_what_to_do_is_said(started, tmp_path, codes, calls):
    options = ("FSDP=True", f"OUTPUT_DIR={tmp_path}", "RUN_NAME=mine")
    found, ended = started(*options, codes=codes)
    assert len(found) == calls
    assert "Nothing that was saved is lost" in ended and ended.endswith(f"in {tmp_path / 'mine'}")


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
