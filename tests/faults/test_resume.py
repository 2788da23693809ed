"""Killed, damaged, stopped, starved or moved to another machine: the run goes on and ends as if
nothing had happened.

Each run is the notebook's own cells in a process of its own (`child.py`); what must be equal are
the adapter's bytes and every logged loss.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import child
import moments
import pytest
import torch
import transformers
from conftest import result_of
from safetensors.torch import load_file, save_file
from sums import checksums

from finetune.backup import back_up, drive_folder
from finetune.checkpoints import last_good_checkpoint
from finetune.files import BEING_WRITTEN, checkpoints, seal, why_unusable

KILLED = -9


def run(tiny, folder, *fault, again="", **changes):
    folder.mkdir(exist_ok=True)
    return child.run(tiny(folder, **changes), folder / "log", fault, again=again)


def outputs(folder: Path) -> Path:
    return folder / "outputs" / "faults"


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """A run killed in the second step of its second epoch: one whole checkpoint, of step 2."""
    folder = tmp_path_factory.mktemp("half")
    code, shown = run(tiny, folder, "kill_at", 4)
    assert code == KILLED, shown
    assert [path.name for path in checkpoints(outputs(folder))] == ["checkpoint-2"]
    return folder


@pytest.mark.parametrize("step", [1, 4], ids=["first step", "second epoch"])
def test_killed_in_a_step(tiny, tmp_path, undisturbed, half, step):
    if step == 1:
        assert run(tiny, tmp_path, "kill_at", 1)[0] == KILLED
    else:
        shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    code, shown = run(tiny, tmp_path)
    assert code == 0, shown
    begun = (
        "Starting at step 0: there is no checkpoint."
        if step == 1
        else "Continuing from checkpoint-2."
    )
    assert begun in shown
    loaded = "As saved in checkpoint-2: adapter, optimizer, schedule, random states."
    assert (loaded in shown) == (step != 1)
    assert result_of(tmp_path) == undisturbed[0]


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 6], ids=["first epoch", "last step"]
)
def test_a_checkpoint_made_by_time_inside_an_epoch_is_continued_from(
    tiny, tmp_path, undisturbed, step
):
    code, shown = run(tiny, tmp_path, "save_often", step)
    assert code == KILLED, shown
    found = [path.name for path in checkpoints(outputs(tmp_path))]
    assert found == [f"checkpoint-{n}" for n in range(step - 1, max(0, step - 3), -1)]
    assert "Step 1: validation loss 10.599 (5 rows)" in shown
    code, shown = run(tiny, tmp_path)
    assert code == 0 and f"Continuing from checkpoint-{step - 1}." in shown, shown
    assert result_of(tmp_path) == undisturbed[0]
    whole, part = (logged(tmp_path, key) for key in ("eval_loss", "eval_part_loss"))
    assert [*part] == list(range(1, step, 2)) and part[1] == pytest.approx(whole[0], abs=0.01)
    assert [*whole] == [0, 2, 4, 6]  # they choose no epoch


def continued(tiny, folder, undisturbed) -> None:
    """Run on in `folder`, where a save of checkpoint-4 was cut short."""
    code, shown = run(tiny, folder)
    assert code == 0, shown
    assert "Continuing from checkpoint-2." in shown
    assert "checkpoint-4 is skipped and removed: its save was cut short." in shown
    assert not list(outputs(folder).glob("checkpoint-*-*"))  # it is known to be ours
    assert result_of(folder) == undisturbed[0]


@pytest.mark.slow
def test_killed_at_the_last_file_but_the_seal(tiny, tmp_path, undisturbed, half):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    code, shown = run(tiny, tmp_path, "kill_in_save", 4, "checksums.json.writing")
    assert code == KILLED, shown
    continued(tiny, tmp_path, undisturbed)


@pytest.mark.slow
def test_what_a_kill_at_each_file_of_a_save_leaves_is_no_checkpoint(
    tiny, tmp_path, undisturbed, half
):
    shutil.copytree(half, tmp_path / "run")
    code, shown = run(tiny, tmp_path / "run", "copy_in_save", 4, str(tmp_path / "left"))
    assert code == 0, shown
    left = sorted((tmp_path / "left").iterdir())
    names = [{path.name for path in folder.iterdir()} for folder in left]
    whole = [folder for folder in left if not why_unusable(folder, "checkpoint")]
    assert names[0] == {BEING_WRITTEN} and len(left) > 13
    assert all(BEING_WRITTEN in each for each in names if "checksums.json" not in each)
    assert [folder for folder in left if (folder / "checksums.json").exists()] == whole
    files = {path.name for path in (outputs(half) / "checkpoint-2").iterdir()}
    assert files - set.union(*(each for each in names if "checksums.json" not in each)) == {
        "checksums.json"
    }
    shutil.copytree(half, tmp_path / "again")
    shutil.copytree(left[len(left) // 2], outputs(tmp_path / "again") / "checkpoint-4")
    continued(tiny, tmp_path / "again", undisturbed)


@pytest.fixture
def looked_for(settings, undisturbed, tmp_path):
    """Two whole checkpoints, and what `last_good_checkpoint` says about them."""
    for path in checkpoints(outputs(undisturbed[1])):
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path


def missing(file: Path):
    file.unlink()


def truncated(file: Path):
    os.truncate(file, file.stat().st_size // 2)


def zeroed_tail(file: Path):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def garbage(file: Path):
    file.write_bytes(os.urandom(file.stat().st_size))


FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
]
FILES += ["trainer_state.json", "run.json", "checksums.json"]


@pytest.mark.parametrize("damage", [missing, truncated, zeroed_tail, garbage])
def test_damage_to_a_needed_file_is_seen_and_the_older_checkpoint_is_used(
    looked_for, damage, capsys
):
    names = sorted(path.name for path in (looked_for / "checkpoint-6").iterdir())
    assert set(FILES) < set(names)  # the others are the tokenizer's
    for name in names:
        whole = looked_for.parent / "whole"
        shutil.copytree(looked_for / "checkpoint-6", whole)
        damage(looked_for / "checkpoint-6" / name)
        needed = name in FILES
        expected = "checkpoint-4" if needed else "checkpoint-6"
        assert last_good_checkpoint(looked_for) == looked_for / expected, name
        shown, aside = capsys.readouterr().out, looked_for / "checkpoint-6-damaged"
        if not needed:
            assert shown == ""
            shutil.rmtree(looked_for / "checkpoint-6")
        elif (name, damage) == ("checksums.json", missing):
            assert "moved aside to checkpoint-6-kept: this notebook did not save it whole" in shown
            shutil.rmtree(looked_for / "checkpoint-6-kept")
        else:
            assert shown.startswith(f"checkpoint-6 is moved aside to {aside.name}: {name} is ")
            shutil.rmtree(aside)
        whole.rename(looked_for / "checkpoint-6")
    assert last_good_checkpoint(looked_for) == looked_for / "checkpoint-6"


def flipped(file: Path):
    """One byte of the optimizer's moments changes, in a way that loads."""
    state = torch.load(file, weights_only=True)
    moment = state["state"][3]["exp_avg"]
    moment.view(torch.uint8).view(-1)[5] ^= 1
    torch.save(state, file)


def test_what_is_loaded_is_compared_with_what_was_in_memory_at_the_save(tiny, tmp_path, half):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    last = outputs(tmp_path) / "checkpoint-2"
    flipped(last / "optimizer.pt")
    seal(last, "checkpoint", "faults")  # as if it had been written so
    code, shown = run(tiny, tmp_path)
    assert code == 2, shown
    assert "checkpoint-2 is not loaded as it was saved: optimizer differ. Nothing was" in shown
    told = json.loads((outputs(tmp_path) / "resumed.json").read_text())
    assert told["checkpoint"] == "checkpoint-2"
    equal = {name: told["loaded"][name] == told["saved"][name] for name in told["saved"]}
    assert equal == {
        "adapter": True,
        "optimizer": False,
        "schedule": True,
        "random states": True,
    }
    assert not (outputs(tmp_path) / "final_model").exists()


def test_a_damaged_optimizer_does_not_change_the_result(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(outputs(tmp_path) / "final_model")
    zeroed_tail(outputs(tmp_path) / "checkpoint-6" / "optimizer.pt")
    code, shown = run(tiny, tmp_path)
    assert code == 0, shown
    assert "checkpoint-6 is moved aside to checkpoint-6-damaged: optimizer.pt is damaged" in shown
    assert "Continuing from checkpoint-4." in shown
    assert result_of(tmp_path) == undisturbed[0]


@pytest.mark.parametrize(
    "kept", ["final_model", pytest.param("checkpoint-6", marks=pytest.mark.slow)]
)
def test_a_finished_run_is_not_trained_again(tiny, tmp_path, undisturbed, kept):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    for path in [*checkpoints(outputs(tmp_path)), outputs(tmp_path) / "final_model"]:
        if path.name != kept:
            shutil.rmtree(path)
    code, shown = run(tiny, tmp_path, "kill_at", 1)
    assert code == 0, shown
    assert (
        f"its adapter is loaded from {outputs(tmp_path) / kept}: nothing is trained again" in shown
    )
    assert result_of(tmp_path) == undisturbed[0]
    assert (outputs(tmp_path) / "curves.png").exists()


@pytest.mark.slow
def test_changed_settings_stop_with_a_choice_and_anyway_goes_on(tiny, tmp_path, half):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    before = checksums(outputs(tmp_path) / "checkpoint-2")
    code, shown = run(tiny, tmp_path, learning_rate=1e-3, lora_dropout=0.0)
    assert code == 2
    assert "unfinished run with other data or settings:" in shown
    assert "learning_rate was 0.003, is 0.001" in shown and "lora_dropout was 0.05, is 0.0" in shown
    assert (
        "Either choose a new run_name" in shown
        and "resume = 'anyway'" in shown
        and "Traceback" not in shown
    )
    assert checksums(outputs(tmp_path) / "checkpoint-2") == before
    code, shown = run(tiny, tmp_path, learning_rate=1e-3, resume="anyway")
    assert code == 0 and "Continuing from checkpoint-2 with changed data or settings." in shown


def logged(folder, key="learning_rate"):
    """A number of the log by step."""
    run = json.loads((outputs(folder) / "final_model" / "run.json").read_text())
    return {e["step"]: e[key] for e in run["trainer_state"]["log_history"] if key in e}


def test_after_a_nan_half_the_learning_rate_takes_effect_at_once(tiny, tmp_path, undisturbed):
    code, shown = run(tiny, tmp_path, "nan_at", 4)
    assert code == 2 and "Lower learning_rate (half is a good start)" in shown, shown
    code, shown = run(tiny, tmp_path, learning_rate=1.5e-3, resume="anyway")
    assert code == 0 and "Continuing from checkpoint-2 with changed" in shown, shown
    rates, before = logged(tmp_path), logged(undisturbed[1])
    assert len(rates) == 6 and rates[1] == before[1] and rates[2] == before[2]
    for step in (3, 4, 5, 6):
        assert rates[step] == pytest.approx(before[step] / 2) and (step == 6 or rates[step] > 0)
    told = json.loads((outputs(tmp_path) / "final_model" / "run.json").read_text())
    assert told["settings"]["learning_rate"] == 1.5e-3


@pytest.mark.slow
def test_a_base_folder_with_other_weights_is_noticed(tiny, tmp_path):
    shutil.copytree(tiny(tmp_path)["base_model"], tmp_path / "base")
    code, shown = run(tiny, tmp_path, "kill_at", 4, base_model=str(tmp_path / "base"))
    assert code == KILLED, shown
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name] * 1.5
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    code, shown = run(tiny, tmp_path, base_model=str(tmp_path / "base"))
    assert code == 2 and "the weights in the base model's folder are others" in shown, shown
    code, shown = run(tiny, tmp_path, base_model=str(tmp_path / "base"), resume="anyway")
    assert code == 2 and "does not fit (the weights in the base model's folder are others)" in shown


@pytest.mark.slow
def test_a_finished_run_is_trained_on_for_more_epochs_when_asked(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path / "on")
    sums = checksums(outputs(tmp_path / "on") / "final_model")
    code, shown = run(tiny, tmp_path / "on", epochs=5)
    assert code == 2 and "faults is finished (epochs was 3.0, is 5.0). To train it on, set" in shown
    assert checksums(outputs(tmp_path / "on") / "final_model") == sums
    code, shown = run(tiny, tmp_path / "on", epochs=5, resume="anyway")
    assert code == 0 and "Continuing from checkpoint-6 with changed data" in shown, shown
    code, fresh = run(tiny, tmp_path / "fresh", epochs=5)
    assert code == 0, fresh
    rates, stretched = logged(tmp_path / "on"), logged(tmp_path / "fresh")
    assert len(stretched) == 10 and {s: rates[s] for s in (7, 8, 9, 10)} == {
        s: stretched[s] for s in (7, 8, 9, 10)
    }
    assert [*logged(tmp_path / "on", "eval_loss")] == [0, 2, 4, 6, 8, 10]
    code, shown = run(tiny, tmp_path / "on", epochs=5)
    assert code == 0 and "nothing is trained again" in shown, shown


def test_a_checkpoint_of_another_shape_is_one_sentence(tiny, tmp_path, half):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    changes = {"lora_r": 8, "target_modules": ["q_proj"]}
    code, shown = run(tiny, tmp_path, resume="anyway", **changes)
    assert code == 2 and "Traceback" not in shown
    assert "does not fit (lora_r was 32, is 8; target_modules was ['q_proj', 'k_proj'," in shown


def test_early_stopping_goes_on_counting_after_a_kill(tiny, tmp_path):
    changes = {"learning_rate": 0.5, "early_stopping_patience": 2, "epochs": 8}
    code, shown = run(tiny, tmp_path / "whole", **changes)
    assert code == 0, shown
    losses = logged(tmp_path / "whole", "eval_loss")
    last = max(losses)
    best = min((s for s in losses if s), key=losses.get)
    assert last == best + 4 < 16  # two epochs of two steps after the best one
    told = f"Stopped early, after epoch {last // 2} (step {last} of 16): validation loss fell no"
    assert told in shown, shown
    assert run(tiny, tmp_path / "killed", "kill_at", last, **changes)[0] == KILLED
    code, shown = run(tiny, tmp_path / "killed", **changes)
    assert code == 0 and f"Continuing from checkpoint-{last - 2}." in shown, shown
    assert logged(tmp_path / "killed", "eval_loss") == losses


@pytest.mark.slow
def test_changed_rows_stop_and_a_finished_run_gives_way(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    rows = [json.dumps({"prompt": f"{n}?", "completion": "yes"}) for n in range(6)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    other = {"data_files": str(tmp_path / "other.jsonl"), "epochs": 1}
    shutil.move(outputs(tmp_path) / "final_model", tmp_path / "away")
    assert run(tiny, tmp_path, **other)[0] == 2
    shutil.move(tmp_path / "away", outputs(tmp_path) / "final_model")
    code, shown = run(tiny, tmp_path, **other)
    assert code == 0, shown
    assert "Starting at step 0: the finished faults had other data or settings (" in shown
    assert len(list(outputs(tmp_path).glob("*.zip"))) == 2


@pytest.mark.slow
def test_nan_stops_at_its_step_with_the_last_good_checkpoint_named(tiny, tmp_path):
    code, shown = run(tiny, tmp_path, "nan_at", 2)
    assert code == 2
    assert (
        "Training stopped at step 2: the gradient is not finite. The last good checkpoint: none"
        in shown
    )
    assert (
        not list(outputs(tmp_path).glob("checkpoint-*"))
        and not (outputs(tmp_path) / "final_model").exists()
    )
    code, shown = run(tiny, tmp_path, "nan_at", 4)
    assert (
        "Training stopped at step 4: the gradient is not finite. The last good checkpoint: "
        f"{outputs(tmp_path)}"
    ) in shown
    assert "checkpoint-2" in shown and "resume = 'anyway'" in shown


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="after an epoch", marks=pytest.mark.slow),
        pytest.param(4, id="inside one"),
        pytest.param(6, id="last", marks=pytest.mark.slow),
    ],
)
def test_the_stop_button_drops_the_step_and_the_cell_continues(tiny, tmp_path, undisturbed, step):
    code, shown = run(tiny, tmp_path, "stop_at", step, again="## 11.")
    assert code == 0, shown
    assert (
        f"UserError: Stopped at step {step - 1} of 6, and saved. Run this cell again to continue."
        in shown
    )
    assert f"Continuing from checkpoint-{step - 1}." in shown
    assert result_of(tmp_path) == undisturbed[0]


@pytest.mark.slow
def test_stopped_in_the_first_step_there_is_nothing_to_save(tiny, tmp_path, undisturbed):
    code, shown = run(tiny, tmp_path, "stop_at", 1, again="## 11.")
    assert code == 0, shown
    assert "Stopped before the end of the first step: there is nothing to save yet." in shown
    assert "Starting at step 0" in shown and result_of(tmp_path) == undisturbed[0]


@pytest.mark.slow
def test_a_step_of_a_minute_is_dropped_at_sigterm_and_the_state_before_it_saved_in_seconds(
    tiny, tmp_path, undisturbed
):
    process = child.begin(tiny(tmp_path), tmp_path / "log", ("slow_step", 4, 60))
    child.wait_for("SLEEPS", tmp_path / "log", process)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert time.monotonic() - began < 10 and process.exitcode == -signal.SIGTERM
    assert "Stopped at step 3 of 6, and saved." in (tmp_path / "log").read_text()
    code, shown = run(tiny, tmp_path)
    assert code == 0 and "Continuing from checkpoint-3." in shown, shown
    assert result_of(tmp_path) == undisturbed[0]


@pytest.mark.slow
def test_a_signal_in_the_last_save_ends_the_run_there(tiny, tmp_path, undisturbed):
    code, shown = run(tiny, tmp_path, "signal_in_save", 6, int(signal.SIGTERM))
    assert code == -signal.SIGTERM, shown
    assert "Stopped at step 6 of 6, and saved. This process is being ended." in shown
    code, shown = run(tiny, tmp_path)
    assert code == 0 and result_of(tmp_path) == undisturbed[0], shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 3], ids=["before the first step", "second", "last"])
def test_an_evaluation_is_dropped_at_sigterm_and_made_up_for(tiny, tmp_path, undisturbed, number):
    code, shown = run(tiny, tmp_path, "signal_in_evaluation", number)
    assert code == -signal.SIGTERM, shown
    assert (f"Stopped at step {2 * number} of 6, and saved." in shown) == (number > 0)
    code, shown = run(tiny, tmp_path)
    assert code == 0 and (f"Continuing from checkpoint-{2 * number}." in shown) == (number > 0)
    assert result_of(tmp_path) == undisturbed[0]
    final = json.loads((outputs(tmp_path) / "final_model" / "run.json").read_text())
    best = Path(final["trainer_state"]["best_model_checkpoint"])
    assert best == outputs(tmp_path) / "checkpoint-6"  # its evaluation is the lowest


@pytest.fixture(scope="module")
def moments_undisturbed(tiny, tmp_path_factory):
    """What the run of `moments` ends as, in one process and in two."""
    ends = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("moments")
        moments.go_on(moments.settings_in(folder, tiny), folder / "log", processes)
        ends[processes] = moments.result(folder)
    return ends


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="4.57 resumes no two CPU processes")
@pytest.mark.parametrize(
    ("number", "after", "processes"), [(signal.SIGTERM, 3.3, 2), (signal.SIGKILL, 4.6, 1)]
)
def test_interrupted_at_some_moment(tiny, tmp_path, moments_undisturbed, processes, number, after):
    moments.one(tiny, tmp_path, moments_undisturbed[processes], number, after, processes)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system with room for little, and how to fill it up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=260m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("this system does not let us mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_disk_full_in_a_save(tiny, small_disk, tmp_path, half, undisturbed):
    shutil.copytree(half / "outputs", small_disk / "outputs")
    before = checksums(outputs(small_disk) / "checkpoint-2")
    # A checkpoint's tokenizer alone has 3.5 MB.
    code, shown = child.run(
        tiny(small_disk), tmp_path / "log", ("full_at", 4, str(small_disk), 1_000_000)
    )
    assert code == 2, shown
    assert (
        f"The disk is full: {outputs(small_disk)} could not be written to. Saved before: "
        "checkpoint-2."
    ) in shown
    assert checksums(outputs(small_disk) / "checkpoint-2") == before
    assert [path.name for path in checkpoints(outputs(small_disk))] == ["checkpoint-2"]
    (small_disk / "ballast").unlink()
    code, shown = child.run(tiny(small_disk), tmp_path / "log")
    assert code == 0, shown
    assert result_of(small_disk) == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["final_model", "the zip"])
def test_disk_full_at_the_end(tiny, small_disk, tmp_path, undisturbed, where):
    shutil.copytree(undisturbed[1] / "outputs", small_disk / "outputs")
    final = outputs(small_disk) / "final_model"
    before, size = checksums(final), sum(path.stat().st_size for path in final.iterdir())
    if where == "the zip":
        shutil.rmtree(final)
    leave = 1_000_000 if where == "final_model" else size + 300_000
    code, shown = child.run(
        tiny(small_disk), tmp_path / "log", ("full_at_the_end", str(small_disk), leave)
    )
    if where == "final_model":
        assert code == 2, shown
        assert (
            f"The disk is full: {final} could not be written. Nothing that was there is harmed"
            in shown
        )
        assert checksums(final) == before
    else:
        assert code == 0, shown
        assert "No zip backup (OSError: [Errno 28] No space left on device" in shown
    assert not why_unusable(final, "adapter")
    assert {path.name for path in final.parent.iterdir() if "writing" in path.name} == set()
    (small_disk / "ballast").unlink()
    code, shown = child.run(tiny(small_disk), tmp_path / "log")
    assert code == 0, shown
    assert result_of(small_disk) == undisturbed[0]


def test_disk_full_at_the_copy(settings, small_disk, tmp_path, undisturbed, monkeypatch, capsys):
    monkeypatch.setattr("finetune.backup.locate", lambda path: small_disk / "MyDrive")
    (small_disk / "MyDrive").mkdir()
    cfg = settings(backup_to="drive", run_name="faults")
    first, second = reversed(checkpoints(outputs(undisturbed[1])))
    back_up(cfg, first)
    before = checksums(drive_folder(cfg) / first.name)
    child.fill_up(small_disk, 1_000_000)
    back_up(cfg, second)
    assert (
        f"{second.name} is NOT copied to drive (" in (shown := capsys.readouterr().out)
        and "No space left" in shown
    )
    assert checksums(drive_folder(cfg) / first.name) == before
    assert [path.name for path in checkpoints(drive_folder(cfg))] == [first.name]
    (small_disk / "ballast").unlink()
    back_up(cfg, second)
    assert not why_unusable(drive_folder(cfg) / second.name, "checkpoint")


@pytest.mark.slow
def test_the_machine_replaced_continues_from_drive(tiny, tmp_path, undisturbed):
    home = (
        tmp_path / "content" / "drive" / "MyDrive"
    )  # outside Colab /content is a folder of the working directory
    home.mkdir(parents=True)
    settings = tiny(tmp_path, backup_to="drive")
    code, shown = child.run(settings, tmp_path / "log", ("kill_at", 6))
    assert code == KILLED, shown
    copies = home / "qlora_checkpoints" / "faults"
    assert {path.name for path in copies.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    shutil.rmtree(tmp_path / "outputs")
    code, shown = child.run(settings, tmp_path / "log")
    assert code == 0, shown
    assert "Continuing from checkpoint-4." in shown
    assert result_of(tmp_path) == undisturbed[0]
    assert {path.name for path in copies.iterdir()} == {
        "checkpoint-4",
        "checkpoint-6",
        "final_model",
    }
    shutil.rmtree(tmp_path / "outputs")
    code, shown = child.run(settings, tmp_path / "log", ("kill_at", 1))
    assert code == 0 and "nothing is trained again" in shown


@pytest.mark.slow
def test_headless_saves_at_sigterm_before_it_ends(tiny, tmp_path):
    settings = tiny(tmp_path, epochs=400, run_name="headless")
    words = [f"{name.upper()}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "finetune.headless", *words]
    options = {"cwd": child.ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, **options)
    shown = ""
    for line in process.stdout:
        shown += line
        if re.match(r"\[ *[3-9]\d*/", line):  # the progress bar
            process.send_signal(signal.SIGTERM)
            break
    shown += process.communicate(timeout=60)[0]
    run_dir = Path(settings["output_dir"]) / "headless"
    assert process.returncode == 1 and "run this again, and it continues from the last" in shown
    assert "Stopping, with a checkpoint." in (run_dir / "notebook.html").read_text(), shown
    assert not why_unusable(checkpoints(run_dir)[0], "checkpoint")
