"""Nothing that is the user's is deleted or replaced: folders that settings really name."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import child
import pytest
import torch
from conftest import result_of
from sums import checksums
from tiny import tiny_base, tiny_tuned

from finetune import lock
from finetune.backup import back_up, fetch_backup
from finetune.callbacks import KeepSafe
from finetune.checkpoints import begin, last_good_checkpoint
from finetune.files import (
    BEING_WRITTEN,
    NEEDED,
    checkpoints,
    is_ours,
    new_folder,
    read_seal,
    seal,
    why_unusable,
)
from finetune.folders import check_disks, check_folders, why_no_merge
from finetune.lock import claim, release, require_unused
from finetune.merge import merge_adapter
from finetune.preflight import check_room
from finetune.save import save_adapter
from qlora_helpers import UserError

pytestmark = pytest.mark.slow  # folders are the same whatever the libraries
ROWS = [{"prompt": "A", "completion": "b"}, {"prompt": "C", "completion": "d"}]


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder, a home, and some of a user's files in each."""
    for name in ("work", "home", "work/content", "work/mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text(f"{name}: years of work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_tokenizer):
    return tiny_base(tmp_path_factory.mktemp("base"), mistral_tokenizer)


@pytest.fixture(scope="module")
def tuned(base):
    return tiny_tuned(base)


def sealed(folder: Path, purpose: str, run: str = "faults") -> Path:
    """A folder of ours, of small files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NEEDED[purpose]:
        (folder / name.replace("*", "")).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("*", "")).write_text("{}")
    seal(folder, purpose, run)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 80 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let us mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


# -------- the merged model's folder -------------------------------------------------------

REFUSED = {
    "the working folder": (".", "is or holds the working folder"),
    "its parent": ("..", "is or holds the working folder"),
    "home": ("~", "is or holds your home folder"),
    "/content": ("/content", "is or holds the content folder"),
    "output_dir": ("/content/model_outputs", "is or holds output_dir"),
    "the run": ("/content/model_outputs/faults", "is or holds the run's folder"),
    "the adapter": ("/content/model_outputs/faults/final_model", "is where the run itself writes"),
    "its rows": ("/content/model_outputs/faults/data", "is where the run itself writes"),
    "a checkpoint": ("/content/model_outputs/faults/checkpoint-2", "is where the run itself"),
    "in its rows": ("/content/model_outputs/faults/data/merged", "is where the run itself writes"),
    "the cache": ("/content/model_cache", "is or holds model_cache"),
    "the base": ("./base", "is or holds the base model's folder"),
    "in the base": ("base/merged", "is inside the base model's folder"),
    "the data": ("./rows", "is or holds the folder of data_files"),
    "a user's folder": ("mine", "holds files that this notebook did not write"),
    "a link to it": ("link", "holds files that this notebook did not write"),
    "a link home": ("homelink", "is or holds your home folder"),
    "a file": ("thesis.txt", "thesis.txt is a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_holds_anything_else_is_refused(place, settings, base, tuned, name):
    merged_dir, words = REFUSED[name]
    shutil.copytree(base, "base")
    Path("rows").mkdir()
    Path("rows/rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    Path("link").symlink_to("mine")
    Path("homelink").symlink_to(place / "home")
    options = {"base_model": "./base", "data_files": "rows/*.jsonl", "run_name": "faults"}
    cfg = settings(merged_dir=merged_dir, merge=True, **options)
    before = checksums(place)
    told = [text for mark, text in check_folders(cfg) if mark == "✗"]
    assert any(f"merged_dir = {merged_dir!r}" in text and words in text for text in told), told
    with pytest.raises((UserError, FileExistsError, NotADirectoryError)) as caught:
        merge_adapter(cfg, tuned, None, ROWS, "card")
    assert "merged_dir" in str(caught.value)
    assert checksums(place) == before


def test_the_merge_of_another_run_is_refused_by_its_name(place, settings):
    sealed(place / "merged", "merged", run="other")
    cfg = settings(merged_dir=str(place / "merged"), merge=True, run_name="faults")
    assert "holds the merged model of the run other" in why_no_merge(cfg)
    assert not why_no_merge(settings(merged_dir=str(place / "merged"), run_name="other"))
    seal(place / "merged", "merged")  # and names no run
    assert not why_no_merge(cfg)


def test_a_folder_that_nothing_is_merged_into_does_not_matter(place, settings):
    assert list(check_folders(settings(merged_dir="mine", merge=True)))
    assert not list(check_folders(settings(merged_dir="mine", merge=False)))
    assert not list(check_folders(settings(merged_dir="/content/drive/MyDrive/m", merge=False)))


def test_an_earlier_merge_with_a_file_of_the_users_in_it_is_refused(place, settings):
    (sealed(place / "merged", "merged") / "notes.txt").write_text("mine")
    cfg = settings(merged_dir=str(place / "merged"), run_name="faults")
    assert "holds files that this notebook did not write" in why_no_merge(cfg)


def test_weights_of_another_size_are_not_our_merge(tmp_path):
    folder = sealed(tmp_path / "merged", "merged")
    assert is_ours(folder, "merged") and not why_unusable(folder, "merged")
    with (folder / "model.safetensors").open("a") as file:
        file.write("more")
    assert not is_ours(folder, "merged")
    assert why_unusable(folder, "merged") == "model.safetensors is damaged"


@pytest.mark.parametrize("kind", ["new", "empty", "link", "disk", "link to a disk"])
def test_a_free_folder_takes_one_merge_after_the_other(
    place, small_disk, settings, base, tuned, mistral_tokenizer, kind
):
    folder = small_disk if kind == "disk" else place / "merged"
    if kind in ("empty", "link"):
        (place / "there").mkdir()
    if "link" in kind:
        folder.symlink_to(place / "there" if kind == "link" else small_disk)
    elif kind == "empty":
        folder = place / "there"
    cfg = settings(base_model=base, merged_dir=str(folder), run_name="faults", merge=True)
    sealed(cfg.final_model, "adapter")
    before = checksums(place / "work" / "mine")
    inode = folder.lstat().st_ino if folder.exists() else 0
    for card in ("one", "two"):
        merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, card)
        assert (folder / "README.md").read_text() == card
        assert is_ours(folder.resolve(), "merged") and not why_no_merge(cfg)
    assert folder.is_symlink() == ("link" in kind) and checksums(place / "work" / "mine") == before
    if kind in ("disk", "link", "link to a disk"):
        assert folder.lstat().st_ino == inode
    left = [path.name for path in folder.resolve().parent.iterdir()]
    assert not [name for name in left if "writing" in name or ".old" in name]


def test_a_disk_that_fills_up_in_a_merge_is_told_in_words(
    place, small_disk, settings, base, tuned, mistral_tokenizer
):
    cfg = settings(base_model=base, merged_dir=str(small_disk / "m"), run_name="faults", merge=True)
    sealed(cfg.final_model, "adapter")
    child.fill_up(str(small_disk), 1_000_000)
    with pytest.raises(UserError, match=r"The disk is full: .*/m could not be written\. The adap"):
        merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_disk_that_is_full_of_rows_is_told_in_words(small_disk, tmp_path, settings):
    from finetune.data import read_rows

    row = json.dumps({"prompt": "a", "completion": "b" * 1000})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4000)
    cfg = settings(data_files=str(tmp_path / "*.jsonl"), output_dir=str(small_disk))
    child.fill_up(str(small_disk), 1_000_000)
    with pytest.raises(
        UserError, match=r"The disk is full: .*/data could not .* Nothing was train"
    ):
        read_rows(cfg)


# -------- folders of ours -----------------------------------------------------------------


@pytest.mark.parametrize("purpose", NEEDED)
def test_a_seal_is_refused_to_a_folder_that_lacks_what_it_needs(tmp_path, purpose):
    for name in NEEDED[purpose]:
        folder = sealed(tmp_path / purpose, purpose)
        (folder / name.replace("*", "")).unlink()
        with pytest.raises(FileNotFoundError, match="it lacks"):
            seal(folder, purpose)
        assert f"{name.replace('*', '')} is missing" in why_unusable(folder, purpose)


def test_only_a_folder_of_that_very_purpose_is_ours(tmp_path):
    folder = sealed(tmp_path / "x", "adapter")
    assert is_ours(folder, "adapter") and not is_ours(folder, "checkpoint")
    assert "it is no checkpoint" in why_unusable(folder, "checkpoint")
    (folder / "adapter_config.json").write_text('{"r": 1}')
    assert not is_ours(folder, "adapter")
    link = tmp_path / "link"
    link.symlink_to(sealed(tmp_path / "y", "adapter"))
    assert not is_ours(link, "adapter")


def test_what_stands_under_our_working_names_is_not_ours(tmp_path):
    """A user's own `x.writing` and `x.old`; and what a killed process left under such a name."""
    folder = sealed(tmp_path / "x", "adapter")
    for name in ("x.writing", "x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    (tmp_path / "x.writing-2").mkdir()
    (tmp_path / "x.writing-2" / BEING_WRITTEN).touch()
    with new_folder(folder, "adapter") as work:
        assert work.name == "x.writing-2" and [p.name for p in work.iterdir()] == [BEING_WRITTEN]
        sealed(work, "adapter")
    assert {p.name for p in tmp_path.iterdir()} == {"x", "x.writing", "x.old"}
    assert all((tmp_path / n / "mine").read_text() == n for n in ("x.writing", "x.old"))


def test_releases_that_sealed_without_a_purpose_are_read(tmp_path):
    folder = sealed(tmp_path / "checkpoint-2", "checkpoint")
    files = read_seal(folder)["files"]
    (folder / "checksums.json").write_text(json.dumps(files))
    assert why_unusable(folder, "checkpoint") == "" and last_good_checkpoint(tmp_path) == folder


def test_another_adapters_folder_is_moved_aside_and_said(tmp_path, settings, tuned, capsys):
    cfg = settings(output_dir=str(tmp_path), run_name="faults")
    cfg.final_model.mkdir(parents=True)
    (cfg.final_model / "theirs.bin").write_text("weights")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned.peft_config["default"].base_model_name_or_path)
    zips = {save_adapter(tuned, tokenizer, cfg.final_model, card, {}) for card in "ab"}
    assert (cfg.run_dir / "final_model-kept" / "theirs.bin").read_text() == "weights"
    assert "final_model is moved aside to final_model-kept" in capsys.readouterr().out
    assert len(zips) == len(list(cfg.run_dir.glob("*.zip"))) == 1  # the same adapter, saved twice
    assert (cfg.final_model / "README.md").read_text() == "a"


# -------- the run's folder ----------------------------------------------------------------


def run(tiny, folder, *fault, **changes):
    folder.mkdir(exist_ok=True)
    return child.run(tiny(folder, **changes), folder / "log", fault)


def outputs(folder: Path) -> Path:
    return folder / "outputs" / "faults"


def test_folders_of_others_in_the_run_are_kept_and_the_run_is_the_same(tiny, tmp_path, undisturbed):
    theirs = ["checkpoint-500", "checkpoint-2-keep", "checkpoint-2", "final_model", "checkpoint-x"]
    theirs += ["checkpoint-best-2", "checkpoint--3"]
    for name in theirs:
        (outputs(tmp_path) / name).mkdir(parents=True)
        (outputs(tmp_path) / name / "weights.bin").write_text(name)
    code, shown = run(tiny, tmp_path)
    assert code == 0, shown
    assert result_of(tmp_path) == undisturbed[0]
    kept = sorted(path.parent.name for path in outputs(tmp_path).rglob("weights.bin"))
    moved = ["checkpoint-2-kept", "checkpoint-500-kept", "final_model-kept"]
    assert kept == sorted([*moved, *theirs[-2:], "checkpoint-2-keep", "checkpoint-x"])
    assert all(f"{name.removesuffix('-kept')} is moved aside to {name}" in shown for name in moved)
    assert {path.name for path in checkpoints(outputs(tmp_path))} >= {"checkpoint-6"}


def test_the_two_newest_by_number_and_the_best_are_kept(tiny, tmp_path):
    """Six epochs of two steps: 8, 10 and 12, whatever their time stamps and alphabet say."""
    (outputs(tmp_path) / "checkpoint-2-keep").mkdir(parents=True)
    code, shown = run(tiny, tmp_path, "back_in_time", epochs=6)
    assert code == 0, shown
    names = {path.name for path in outputs(tmp_path).glob("checkpoint*")}
    log = json.loads((outputs(tmp_path) / "final_model" / "run.json").read_text())["trainer_state"]
    losses = {e["step"]: e["eval_loss"] for e in log["log_history"] if e.get("eval_loss")}
    best = min((n for n in losses if n), key=losses.__getitem__)
    newest = {"checkpoint-10", "checkpoint-12", f"checkpoint-{best}"}
    assert names == newest | {"checkpoint-2-keep"}


def test_the_best_checkpoint_outlives_newer_ones(settings, tmp_path):
    for step in (4, 8, 9, 10, 11):
        sealed(tmp_path / f"checkpoint-{step}", "checkpoint")
    (tmp_path / "checkpoint-8" / "notes.txt").write_text("the user's")
    state = types.SimpleNamespace(best_model_checkpoint=str(tmp_path / "checkpoint-4"))
    KeepSafe(settings(), {}).rotate(tmp_path / "checkpoint-11", state)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"checkpoint-{step}" for step in (4, 8, 10, 11)}


def test_a_line_in_a_readme_damages_nothing(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    for folder in (outputs(tmp_path) / "final_model", *checkpoints(outputs(tmp_path))):
        with (folder / "README.md").open("a") as file:
            file.write("my notes\n")
    before = checksums(outputs(tmp_path) / "final_model")
    code, shown = run(tiny, tmp_path, "kill_at", 1)
    assert code == 0 and "nothing is trained again" in shown, shown
    assert "damaged" not in shown
    notes = [p for p in outputs(tmp_path).rglob("README.md") if p.read_text().endswith("notes\n")]
    assert any(checksums(path.parent) == before for path in notes)


def test_begun_anew_the_old_checkpoints_stand_in_one_folder(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    old = {path.name: checksums(path) for path in checkpoints(outputs(tmp_path))}
    before = outputs(tmp_path) / "checkpoints-before"
    for _ in range(2):
        code, shown = run(tiny, tmp_path, resume="never")
        assert code == 0, shown
        assert "The checkpoints that were here are in checkpoints-before." in shown
        assert {p.name for p in before.iterdir()} == set(old)
    assert not list(outputs(tmp_path).glob("checkpoints-before-*"))
    assert result_of(tmp_path) == undisturbed[0]


@pytest.fixture
def anew(settings, tmp_path):
    """Settings of a run whose folder is `tmp_path`."""
    return settings(output_dir=str(tmp_path.parent), run_name=tmp_path.name)


def test_what_somebody_put_among_the_old_checkpoints_is_kept(tmp_path, tuned, monkeypatch, anew):
    sealed(tmp_path / "checkpoint-2", "checkpoint")
    theirs = tmp_path / "checkpoints-before" / "checkpoint-2"
    theirs.mkdir(parents=True)
    (theirs / "mine").write_text("x")
    monkeypatch.setattr("finetune.base_adapter.local_shard", lambda weight: weight * 0)
    begin(anew, tuned, "a test")
    assert (tmp_path / "checkpoints-before" / "checkpoint-2-kept" / "mine").read_text() == "x"
    assert (tmp_path / "checkpoints-before" / "checkpoint-2" / "optimizer").exists()


def test_the_old_checkpoints_stay_until_newer_ones_take_their_place(tmp_path, anew, capsys):
    model = torch.nn.ParameterDict({"lora_B": torch.zeros(2), "lora_A": torch.ones(2)})
    before = tmp_path / "checkpoints-before"
    for steps in ((8, 10), (), (9,)):
        for step in steps:
            sealed(tmp_path / f"checkpoint-{step}", "checkpoint")
        begin(anew, model, "a test")
        shown = capsys.readouterr().out
        assert ("The checkpoints that were here are in" in shown) == bool(steps)
        names = {path.name for path in before.iterdir()}
        assert names == {f"checkpoint-{step}" for step in steps or (8, 10)}


def test_an_adapter_that_has_learned_is_not_begun_anew(tmp_path, anew):
    sealed(tmp_path / "checkpoint-2", "checkpoint")
    model = torch.nn.ParameterDict({"q_lora_B": torch.zeros(2), "v_lora_B": torch.ones(2)})
    with pytest.raises(UserError, match=r"step 0 \(a test\), but the adapter in memory is tr"):
        begin(anew, model, "a test")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_killed_after_its_seal_is_whole(tmp_path, capsys):
    """The mark of a folder that is being written goes last: it may stand beside a seal."""
    for step in (9, 10):
        (sealed(tmp_path / f"checkpoint-{step}", "checkpoint") / BEING_WRITTEN).touch()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert capsys.readouterr().out == "" and len(checkpoints(tmp_path)) == 2


def test_the_trainers_own_card_is_not_left_in_the_run(undisturbed):
    folder = outputs(undisturbed[1])
    assert not [path for path in folder.rglob("README.md") if path.parent.name != "final_model"]
    assert "faults" in (folder / "final_model" / "README.md").read_text()


def test_a_folder_with_files_of_the_same_names_is_refused(tiny, tmp_path):
    outputs(tmp_path).mkdir(parents=True)
    (outputs(tmp_path) / "report.html").write_text("my own report")
    before = checksums(outputs(tmp_path))
    code, shown = run(tiny, tmp_path)
    assert code == 2 and "output_dir / run_name is" in shown and "report.html" in shown
    assert checksums(outputs(tmp_path)) == before


def test_all_that_a_run_leaves_is_known_as_a_runs_files(undisturbed):
    """A folder in which one of these names stands is asked whose it is before it is written to."""
    left = {path.name for path in outputs(undisturbed[1]).iterdir()} - {lock.FILE, "final_model"}
    left = {name for name in left if not name.startswith("checkpoint-")}
    left -= {path.name for path in outputs(undisturbed[1]).glob("faults-*.zip")}
    assert {"answers.jsonl", "curves.png", "plan.json", "report.html"} <= left <= lock.WRITTEN


@pytest.mark.parametrize("name", sorted(lock.WRITTEN))
def test_a_file_of_any_name_that_a_run_writes_is_asked_about(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-2").mkdir()  # without a seal, like any other's
    for ask in (claim, require_unused):
        with pytest.raises(UserError, match=rf"did not write \({name}\)\. Choose another run_name"):
            ask(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "checkpoint-2"}


@pytest.mark.parametrize("kept", [".in-use", "checkpoint-12", "final_model"])
def test_a_run_is_known_by_any_one_thing_that_is_left_of_it(tmp_path, kept):
    """As where only some of its files were copied to another machine."""
    (tmp_path / "report.html").write_text("ours")
    if kept == ".in-use":
        (tmp_path / kept).touch()
    else:
        sealed(tmp_path / kept, "adapter" if kept == "final_model" else "checkpoint")
    require_unused(tmp_path)
    claim(tmp_path)


def test_a_run_in_the_base_models_folder_is_refused(place, settings, base):
    shutil.copytree(base, "models/faults")
    for output_dir, run_name in (("models", "faults"), ("models/faults/out", "x")):
        cfg = settings(base_model="models/faults", output_dir=output_dir, run_name=run_name)
        told = [text for mark, text in check_folders(cfg) if mark == "✗"]
        assert len(told) == 1 and "output_dir / run_name is" in told[0]
    assert not list(check_folders(settings(base_model="models/faults", output_dir="models")))


def test_answers_of_a_run_are_no_data(settings, tmp_path):
    from finetune.sources import find_files

    (tmp_path / "run").mkdir()
    claim(tmp_path / "run")
    for name in ("run/answers.jsonl", "run/data.rejected.jsonl", "rows.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text("{}")
    found = find_files(settings(data_files=str(tmp_path / "**" / "*.jsonl")))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["answers.jsonl", "rows.jsonl"]


def test_other_files_in_the_data_folder_stay(settings, tmp_path):
    from finetune.data import read_rows

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    cfg = settings(data_files=str(tmp_path / "*.jsonl"), output_dir=str(tmp_path / "out"))
    read_rows(cfg)
    for name in ("rows.txt", "cache-mine.arrow", "tmp.txt", "writing"):
        (cfg.run_dir / "data" / name).write_text("mine")
    encoded = {f"cache-{'0a' * 8}{end}.arrow" for end in ("", "_00001_of_00002")}
    for name in encoded:  # what was made of the rows that are now replaced
        (cfg.run_dir / "data" / name).write_text("ours")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "c", "completion": "d"}')
    read_rows(cfg)
    names = {path.name for path in (cfg.run_dir / "data").iterdir()}
    assert {"rows.txt", "cache-mine.arrow", "tmp.txt", "writing"} <= names
    assert not names & encoded
    assert len([name for name in names if name.startswith("rows-")]) == 1


# -------- copies on Drive -----------------------------------------------------------------


@pytest.fixture
def drive(place):
    """Google Drive, mounted in the working folder's `content`, and settings that copy to it."""
    folder = place / "work" / "content" / "drive" / "MyDrive"
    folder.mkdir(parents=True)
    return folder / "qlora_checkpoints" / "faults"


@pytest.fixture
def copied(settings):
    return settings(backup_to="drive", run_name="faults", base_model="embedded")


def test_copies_on_drive_follow_the_run_and_spare_what_is_not_ours(copied, drive, capsys):
    for name in ("checkpoint-3", "checkpoint-10"):
        (drive / name).mkdir(parents=True)
        (drive / name / "mine").write_text(name)
    for step in (8, 9, 10, 11):
        sealed(copied.run_dir / f"checkpoint-{step}", "checkpoint")
        shutil.rmtree(copied.run_dir / f"checkpoint-{step - 2}", ignore_errors=True)
        back_up(copied, copied.run_dir / f"checkpoint-{step}")
        if step == 8:
            (drive / "checkpoint-8" / "notes.txt").write_text("the user's")
    for answer in ("{}", '{"better": 1}'):
        shutil.rmtree(copied.final_model, ignore_errors=True)
        sealed(copied.final_model, "adapter")
        (copied.final_model / "run.json").write_text(answer)
        seal(copied.final_model, "adapter", "faults")
        back_up(copied, copied.final_model)
    assert capsys.readouterr().out.count(f"is copied to {drive}") == 6
    copies = {"checkpoint-10", "checkpoint-11", "final_model"}
    theirs = {"checkpoint-3", "checkpoint-8", "checkpoint-10-kept"}
    assert {p.name for p in drive.iterdir()} == copies | theirs
    for name in copies:
        assert checksums(drive / name) == checksums(copied.run_dir / name)
    assert (drive / "checkpoint-10-kept" / "mine").read_text() == "checkpoint-10"


def test_a_copy_whose_run_json_is_damaged_stops_no_other(copied, drive, capsys):
    back_up(copied, sealed(copied.run_dir / "checkpoint-9", "checkpoint"))
    shutil.copytree(drive / "checkpoint-9", drive / "checkpoint-4")
    (drive / "checkpoint-4" / "run.json").write_text("")
    back_up(copied, sealed(copied.run_dir / "checkpoint-10", "checkpoint"))
    assert capsys.readouterr().out.count("is copied to") == 2
    shutil.rmtree(copied.run_dir)
    assert fetch_backup(copied)
    found = [path.name for path in checkpoints(copied.run_dir)]
    assert found == ["checkpoint-10", "checkpoint-9"]


def test_a_run_folder_that_was_deleted_is_claimed_anew(tmp_path):
    folder = tmp_path / "run"
    claim(folder)
    held = lock.HELD[folder]
    claim(folder)
    assert lock.HELD[folder] is held
    shutil.rmtree(folder)
    claim(folder)
    assert (folder / ".in-use").read_text() and lock.HELD[folder] is not held
    release()


def test_a_copy_that_fails_costs_no_earlier_one(copied, drive, capsys):
    back_up(copied, sealed(copied.run_dir / "checkpoint-9", "checkpoint"))
    (copied.run_dir / "checkpoint-9").rename(copied.run_dir / "checkpoint-10")
    (copied.run_dir / "checkpoint-10" / "unreadable").symlink_to("nowhere")
    back_up(copied, copied.run_dir / "checkpoint-10")
    assert "checkpoint-10 is NOT copied to drive (" in capsys.readouterr().out
    assert [path.name for path in drive.iterdir()] == ["checkpoint-9"]
    assert not why_unusable(drive / "checkpoint-9", "checkpoint")


def test_nothing_is_written_to_a_drive_that_is_not_mounted(copied, place, capsys):
    folder = sealed(copied.run_dir / "checkpoint-2", "checkpoint")
    for there in ("content", "content/drive"):
        (place / "work" / there).mkdir(exist_ok=True)
        back_up(copied, folder)
        shown = capsys.readouterr().out
        assert "checkpoint-2 is NOT copied to drive (" in shown and "not mounted" in shown
        assert f"It is safe here: {folder}" in shown
    assert not list((place / "work" / "content" / "drive").iterdir())


def test_a_new_machine_gets_every_copy_and_loses_nothing_of_its_own(copied, drive):
    parts = {"checkpoint-9": "checkpoint", "checkpoint-10": "checkpoint", "final_model": "adapter"}
    for name, purpose in parts.items():
        sealed(drive / name, purpose)
    (copied.run_dir / "checkpoint-10").mkdir(parents=True)
    (copied.run_dir / "checkpoint-10" / "mine").write_text("x")
    fetch_backup(copied.model_copy(update={"backup_to": "none"}))
    assert [path.name for path in copied.run_dir.iterdir()] == ["checkpoint-10"]
    fetch_backup(copied)
    assert {p.name for p in copied.run_dir.iterdir()} == {*parts, "checkpoint-10-kept"}
    for name, purpose in parts.items():
        assert not why_unusable(copied.run_dir / name, purpose)
    assert (copied.run_dir / "checkpoint-10-kept" / "mine").read_text() == "x"


# -------- two processes -------------------------------------------------------------------

HOLD = """
import sys, time; from pathlib import Path
from finetune.lock import claim
claim(Path(sys.argv[1])); print("held", flush=True); time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a run's folder."""
    command = [sys.executable, "-c", HOLD, str(outputs(tmp_path))]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": child.ROOT}
    process = subprocess.Popen(command, **options)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_a_second_notebook_on_a_run_says_so_and_touches_nothing(tiny, tmp_path, holder):
    before = checksums(outputs(tmp_path))
    code, shown = run(tiny, tmp_path)
    assert code == 2 and f"is in use by another notebook: process {holder.pid} on " in shown
    with pytest.raises(UserError, match="in use by another notebook"):
        require_unused(outputs(tmp_path))
    assert checksums(outputs(tmp_path)) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    require_unused(outputs(tmp_path))
    claim(outputs(tmp_path))  # a dead process holds nothing


@pytest.mark.parametrize("beat", ["", '{"host": "here", "pid": 7, "time": 0}'])
def test_a_lock_that_is_held_counts_however_old_its_heartbeat_is(tmp_path, holder, beat):
    """As that of a process that was stopped, and goes on later."""
    (outputs(tmp_path) / lock.FILE).write_text(beat)
    with pytest.raises(UserError, match="in use by another notebook"):
        claim(outputs(tmp_path))


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["no such module", "no such file system"])
def without_locks(request, monkeypatch):
    """Windows, which has no `fcntl`, and Google Drive's file system, which refuses."""
    if request.param == "no such module":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", no_locks)


def test_no_adapter_is_saved_into_a_run_that_another_notebook_holds(tmp_path, holder, tuned):
    with pytest.raises(UserError, match="in use by another notebook"):
        save_adapter(tuned, None, outputs(tmp_path) / "final_model", "", {})


def test_where_there_are_no_locks_a_living_process_is_seen(tmp_path, holder, without_locks):
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        claim(outputs(tmp_path))
    holder.kill()
    holder.wait()
    claim(outputs(tmp_path))


def in_use(folder: Path, **told) -> None:
    """A heartbeat that was heard just now: this machine's unless told otherwise."""
    now = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    (folder / lock.FILE).write_text(json.dumps(now | told))


def test_where_there_are_no_locks_a_restarted_kernel_of_the_same_number_goes_on(
    tmp_path, without_locks
):
    in_use(tmp_path)
    claim(tmp_path)


def test_where_there_are_locks_a_living_process_that_has_none_holds_nothing(tmp_path):
    in_use(tmp_path, pid=os.getppid())
    claim(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}"])
def test_a_heartbeat_that_was_cut_short_holds_nothing(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    claim(tmp_path)
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()


def test_a_holder_may_miss_a_beat_or_two():
    assert 0 < 3 * lock.BEAT < lock.STALE


def test_a_process_holds_one_run_and_may_ask_about_it_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, first, second):
        claim(folder)
        require_unused(folder)
        assert json.loads((folder / lock.FILE).read_text())["pid"] == os.getpid()
    assert (first / lock.FILE).read_text() == ""
    command = [sys.executable, "-c", HOLD.replace("100", "0"), str(first)]
    done = subprocess.run(command, cwd=child.ROOT, capture_output=True, text=True)
    assert done.stdout == "held\n", done.stderr


def test_of_several_processes_the_first_holds_the_run(tmp_path, holder, monkeypatch):
    before = checksums(outputs(tmp_path))
    monkeypatch.setenv("RANK", "1")
    claim(outputs(tmp_path))
    claim(tmp_path / "new")
    assert checksums(outputs(tmp_path)) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("ago", "held"),
    [(5, True), (lock.STALE - 5, True), (lock.STALE + 5, 0), (-5, True), (-3600, 0)],
)
def test_another_machine_is_seen_by_its_heartbeat(tmp_path, ago, held):
    told = {"host": "another-machine", "pid": 7, "time": time.time() - ago}
    (tmp_path / lock.FILE).write_text(json.dumps(told))
    if not held:
        claim(tmp_path)
        return
    ago = max(0, ago)  # of a clock that is ahead
    seen = f"process 7 on another-machine, seen ({ago}|{ago + 1}) s ago"
    with pytest.raises(UserError, match=seen):
        claim(tmp_path)
    assert json.loads((tmp_path / lock.FILE).read_text()) == told


def test_the_heart_beats_until_the_folder_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    claim(tmp_path)
    first = json.loads((tmp_path / lock.FILE).read_text())
    time.sleep(0.3)
    assert json.loads((tmp_path / lock.FILE).read_text())["time"] > first["time"]
    assert first["pid"] == os.getpid()
    release()
    assert (tmp_path / lock.FILE).read_text() == ""


def test_the_heart_goes_on_after_a_beat_that_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    claim(tmp_path)
    held, left = lock.HELD[tmp_path], [OSError(5, "Drive is away"), OSError(28, "full")]
    beat = held.beat

    def failing():
        if left:
            raise left.pop()
        beat()

    monkeypatch.setattr(held, "beat", failing)
    first = json.loads((tmp_path / lock.FILE).read_text())
    until = time.monotonic() + 30
    while json.loads((tmp_path / lock.FILE).read_text() or "{}").get("time") == first["time"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    release()


@pytest.mark.parametrize(
    "told", ['{"host": "another", "pid": 7, "time": null}', '{"host": "another", "pid": 7}', "[]"]
)
def test_a_heartbeat_that_tells_no_time_holds_nothing(tmp_path, told):
    (tmp_path / lock.FILE).write_text(told)
    claim(tmp_path)
    release()


def test_a_run_whose_folder_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match=r"output_dir / run_name is .*mine, a file: choose"):
        claim(tmp_path / "mine")


# -------- disks ---------------------------------------------------------------------------


def test_each_folder_is_counted_on_its_own_disk(tmp_path, small_disk):
    needs = {"small": (small_disk / "a" / "b", 0.001), "large": (tmp_path / "c", 0.001)}
    lines = list(check_disks(needs))
    assert [mark for mark, _ in lines] == ["✓", "✓"]
    needs["more"] = small_disk / "m", 0.1
    (mark, text), (other, _) = check_disks(needs)
    assert (mark, other) == ("✗", "✓") and "small 0.0, more 0.1" in text and str(small_disk) in text


def test_what_is_downloaded_and_merged_is_counted_where_it_goes(tmp_path, small_disk, settings):
    (tmp_path / "out").mkdir()
    for name, part in (("model_cache", "download of the base"), ("merged_dir", "merged model")):
        places = {"model_cache": str(tmp_path / "c"), "merged_dir": str(tmp_path / "m")}
        cfg = settings(
            base_model="embedded",
            output_dir=str(tmp_path / "out"),
            merge=True,
            **places | {name: str(small_disk / "x")},
        )
        lines = [text for mark, text in check_room(cfg, None) if "GB free for" in text]
        assert len(lines) == 2
        assert [str(small_disk) in text for text in lines] == [part in text for text in lines]


def test_a_disk_that_only_lets_itself_be_read_is_refused(small_disk, settings):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    told = list(check_folders(settings(output_dir=str(small_disk / "runs"))))
    words = f"output_dir = '{small_disk}/runs': {small_disk} cannot be written to"
    assert told == [("✗", words)]


def test_a_folder_below_a_drive_that_is_not_mounted_is_refused(place, settings):
    cfg = settings(output_dir="/content/drive/MyDrive/runs")
    (place / "work" / "content" / "drive").mkdir()  # the empty folder that it is mounted at
    told = [text for mark, text in check_folders(cfg) if mark == "✗"]
    assert "output_dir = '/content/drive/MyDrive/runs' is on Google Drive, which is not" in told[0]
    (place / "work" / "content" / "drive" / "MyDrive").mkdir()
    assert not list(check_folders(cfg))


LOCALE = """
import json, locale, sys; from pathlib import Path
import torch
from finetune.data import read_rows
from finetune.command_line import defaults
from finetune.card import model_card
from qlora_helpers import Settings
assert locale.getpreferredencoding(False) == "ANSI_X3.4-1968", locale.getpreferredencoding(False)
folder = Path(sys.argv[1])
changes = {"data_files": str(folder / "*.jsonl"), "output_dir": str(folder), "on_bad_rows": "skip"}
cfg = Settings(**defaults() | changes)
rows = read_rows(cfg)
assert rows[0]["prompt"] == "Gr\\u00fc\\u00dfe \\U0001f642"
from finetune.save import write_texts
write_texts(folder, "\\u2026 \\U0001f642", {"name": "\\u00fc"})
"""


def test_files_are_utf8_whatever_the_locale(tmp_path):
    row = {"prompt": "Grüße 🙂", "completion": "日本"}
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\nkaputt …\n", encoding="utf-8"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONIOENCODING"] = "utf-8"  # what is shown is a notebook's affair
    command = [sys.executable, "-c", LOCALE, str(tmp_path)]
    options = {"env": os.environ | environment, "cwd": child.ROOT, "capture_output": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "… 🙂"


# -------- a fuzz of folders ---------------------------------------------------------------


@pytest.mark.slow
def test_in_random_arrangements_nothing_of_the_users_is_lost(tmp_path, defaults):
    """The first of `python tests/faults/folders.py`."""
    import folders as fuzz

    model = fuzz.Model(tmp_path)
    results = [fuzz.case(number, model, defaults) for number in range(18)]
    assert not [text for result in results for text in result.wrong]
    assert sum(result.merged for result in results) >= 5
    assert sum(bool(result.refusals) for result in results) >= 4
