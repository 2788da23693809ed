"""Copies on Drive and on the Hub: the furthest of this run is found, and nobody's is lost."""

import json
import shutil

import child
import pytest
from conftest import result_of
from hub import Hub, take_for_the_hub
from sums import checksums
from test_checkpoints import trainer_of, whole

from finetune.backup import back_up, drive_folder, superseded
from finetune.checkpoints import find_checkpoint
from finetune.files import checkpoints, why_unusable
from finetune.identity import fingerprint, hash_of_fingerprint
from finetune.lock import release
from finetune.preflight import check_backup

pytestmark = pytest.mark.slow  # copies are the same whatever the libraries
OTHERS = {"seed": 7, "training rows": "others"}


class Drive:
    """Google Drive, mounted."""

    def __init__(self, cfg):
        self.folder = drive_folder(cfg)

    def names(self):
        return {path.name for path in self.folder.glob("*")} - {"kept", "kept-2"}

    def kept(self):
        """What was kept apart: for each time, the names and the rows of that run."""
        return [told(place) for place in sorted(self.folder.glob("kept*"))]


class HubCopies:
    """The stand-in Hub's repository of copies."""

    def __init__(self, server):
        self.server, self.repo = server, "ada/faults-checkpoints"

    def names(self):
        return {n.split("/")[0] for n in self.server.files.get(self.repo, ())} - {".gitattributes"}

    def kept(self):
        found = []
        for (repo, _), files in sorted(self.server.branches.items()):
            assert repo == self.repo and self.server.private(repo)
            runs = {n.split("/")[0]: json.loads(t) for n, t in files.items() if "run.json" in n}
            found.append({name: rows_of(run) for name, run in runs.items()})
        return found


def rows_of(run):
    return run.get("fingerprint", {}).get("training rows")


def told(place):
    return {path.parent.name: rows_of(json.loads(path.read_text()))
            for path in place.glob("*/run.json")}  # fmt: skip


@pytest.fixture(params=["drive", "hub"])
def copied(request, settings, tmp_path, monkeypatch):
    """Settings of a run with copies, and where these are."""
    monkeypatch.chdir(tmp_path)
    cfg = settings(output_dir=str(tmp_path / "out"), run_name="faults", backup_to=request.param)
    with Hub() as server:
        take_for_the_hub(server, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
        (tmp_path / "content" / "drive" / "MyDrive").mkdir(parents=True)
        yield cfg, Drive(cfg) if request.param == "drive" else HubCopies(server)
    release()


def copy_of(cfg, name, mark, **more):
    """A checkpoint or adapter of a run, here and copied."""
    purpose = "adapter" if name == "final_model" else "checkpoint"
    folder = whole(cfg.run_dir / name, purpose, fingerprint=mark, **more)
    back_up(cfg, folder)
    return folder


def test_another_runs_copies_are_kept_apart_whole_and_once(copied, capsys):
    cfg, there = copied
    for name in ("checkpoint-9", "checkpoint-10", "final_model"):
        copy_of(cfg, name, OTHERS)
    shutil.rmtree(cfg.run_dir)  # a new machine, and a second project of the same name
    mine = fingerprint(cfg, trainer_of())
    copy_of(cfg, "checkpoint-2", mine)
    assert there.names() == {"checkpoint-2"}
    shown = capsys.readouterr().out
    assert shown.count("Another run's copies are kept in ") == 1
    copy_of(cfg, "checkpoint-4", mine)
    copy_of(cfg, "final_model", mine)
    assert there.names() == {"checkpoint-2", "checkpoint-4", "final_model"}
    kept = dict.fromkeys(("checkpoint-9", "checkpoint-10", "final_model"), "others")
    assert there.kept() == [kept]
    assert "kept" not in capsys.readouterr().out


def test_a_copy_of_a_later_step_stays(copied):
    cfg, there = copied
    for step in (8, 10):
        copy_of(cfg, f"checkpoint-{step}", OTHERS)
    shutil.rmtree(cfg.run_dir)
    for step in (2, 3):
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
        copy_of(cfg, f"checkpoint-{step}", OTHERS)
    assert there.names() == {"checkpoint-3", "checkpoint-8", "checkpoint-10"}  # not 2
    shutil.rmtree(cfg.run_dir)
    copy_of(cfg, "checkpoint-9", OTHERS)
    assert there.names() == {"checkpoint-9", "checkpoint-10"}
    assert superseded(["checkpoint-8", "final_model"], cfg.final_model) == ["checkpoint-8"]


@pytest.mark.parametrize("here", [None, 2, 12])
def test_the_furthest_of_here_and_there_is_gone_on_from(copied, here, capsys):
    cfg, _ = copied
    trainer = trainer_of()
    mine = fingerprint(cfg, trainer)
    for step in (9, 10):
        copy_of(cfg, f"checkpoint-{step}", mine)
    shutil.rmtree(cfg.run_dir)
    if here:
        whole(cfg.run_dir / f"checkpoint-{here}", "checkpoint", fingerprint=mine)
    last = max(10, here or 0)
    assert find_checkpoint(cfg, trainer) == str(cfg.run_dir / f"checkpoint-{last}")
    assert not why_unusable(cfg.run_dir / f"checkpoint-{last}", "checkpoint")
    fetched = {9, 10} if here != 12 else set()
    assert {int(p.name[11:]) for p in checkpoints(cfg.run_dir)} == fetched | ({here} - {None})
    assert "another run" not in capsys.readouterr().out


def test_a_finished_copy_ends_an_unfinished_run_here(copied):
    cfg, _ = copied
    trainer = trainer_of()
    mine = fingerprint(cfg, trainer)
    copy_of(cfg, "final_model", mine)
    shutil.rmtree(cfg.run_dir)
    whole(cfg.run_dir / "checkpoint-2", "checkpoint", fingerprint=mine)
    assert find_checkpoint(cfg, trainer) == str(cfg.final_model)


def test_another_runs_later_copies_are_not_gone_on_from(copied, capsys):
    cfg, there = copied
    trainer = trainer_of()
    copy_of(cfg, "checkpoint-9", OTHERS)
    shutil.rmtree(cfg.run_dir)
    here = whole(cfg.run_dir / "checkpoint-2", "checkpoint", fingerprint=fingerprint(cfg, trainer))
    assert find_checkpoint(cfg, trainer) == str(here)
    assert "are another run's, and not used" in capsys.readouterr().out
    assert [p.name for p in checkpoints(cfg.run_dir)] == ["checkpoint-2"]
    assert there.names() == {"checkpoint-9"} and not there.kept()


def test_a_run_goes_on_as_the_same_run_though_its_settings_have_changed(copied):
    cfg, there = copied
    trainer = trainer_of()
    mine = fingerprint(cfg, trainer)
    copy_of(cfg, "checkpoint-9", mine, run=hash_of_fingerprint(mine))
    changed = cfg.model_copy(update={"learning_rate": 3e-5, "resume": "anyway"})
    find_checkpoint(changed, trainer)
    copy_of(changed, "checkpoint-10", fingerprint(changed, trainer), run=trainer.run)
    assert there.names() == {"checkpoint-9", "checkpoint-10"} and not there.kept()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_that_begins_anew_keeps_what_was_there_apart(copied, resume):
    cfg, there = copied
    cfg = cfg.model_copy(update={"resume": resume})
    mark = fingerprint(cfg, trainer_of()) if resume == "never" else OTHERS
    copy_of(cfg, "checkpoint-9", mark)
    copy_of(cfg, "final_model", mark)
    if resume == "auto":  # a finished run of other rows gives way, on a new machine, too
        mark = fingerprint(cfg, trainer_of()) | {"training rows": "others"}
        shutil.rmtree(cfg.run_dir)
        for name in ("checkpoint-9", "final_model"):
            copy_of(cfg, name, mark)
        shutil.rmtree(cfg.run_dir)
    assert find_checkpoint(cfg, trainer_of()) is None
    assert there.names() == set() and len(there.kept()) == 1 + (resume == "auto")
    assert set(there.kept()[-1]) == {"checkpoint-9", "final_model"}


def test_preflight_says_what_is_there_and_with_which_settings(copied):
    cfg = copied[0].model_copy(update={"base_model": "./models/mine"})
    assert [mark for mark, _ in check_backup(cfg, "hf_x")] == ["✓"]
    mark = fingerprint(cfg, trainer_of()) | {"learning_rate": 0.5}
    copy_of(cfg, "checkpoint-9", mark)
    copy_of(cfg, "final_model", mark)
    (_, first), (mark, told) = check_backup(cfg, "hf_x")
    assert mark == "!" and "copied to" in first
    assert "stand checkpoint-9, final_model of a run of this name" in told
    assert "with other settings (learning_rate was 0.5)" in told and "epochs" not in told


@pytest.mark.slow
def test_a_second_project_and_a_stale_machine_lose_nobodys_work(tiny, tmp_path, undisturbed):
    (tmp_path / "content" / "drive" / "MyDrive").mkdir(parents=True)
    copies = tmp_path / "content" / "drive" / "MyDrive" / "qlora_checkpoints" / "faults"
    settings = tiny(tmp_path, backup_to="drive")
    code, shown = child.run(settings, tmp_path / "log", ("kill_at", 3))
    assert code == -9, shown
    shutil.copytree(tmp_path / "outputs", tmp_path / "stale")  # at step 2
    code, shown = child.run(settings, tmp_path / "log", ("kill_at", 6))
    assert code == -9, shown
    shutil.rmtree(tmp_path / "outputs")
    shutil.copytree(tmp_path / "stale", tmp_path / "outputs")
    code, shown = child.run(settings, tmp_path / "log")
    assert code == 0 and "Continuing from checkpoint-4." in shown, shown
    assert result_of(tmp_path) == undisturbed[0]
    assert not list(copies.glob("kept*"))
    first = checksums(copies / "final_model")
    shutil.rmtree(tmp_path / "outputs")  # a second project, on a new machine
    rows = [json.dumps({"prompt": f"{n}?", "completion": "yes"}) for n in range(9)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    code, shown = child.run(
        settings | {"data_files": str(tmp_path / "other.jsonl")}, tmp_path / "log"
    )
    assert code == 0 and "Starting at step 0: the finished faults had other data" in shown, shown
    assert checksums(copies / "kept" / "final_model") == first
    assert checksums(copies / "final_model") != first


def table_of(folder, run):
    path = folder / "outputs" / run / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_run_trains_on_from_the_firsts_adapter(tiny, tmp_path, undisturbed):
    """On the first run's rows and more; "before" is then what was "after"."""
    first = undisturbed[1] / "outputs" / "faults"
    rows = [json.dumps({"prompt": f"{n} and {n}", "completion": f"{2 * n}"}) for n in range(30)]
    (tmp_path / "more.jsonl").write_text("\n".join(rows))
    settings = tiny(
        tmp_path, run_name="on", base_adapter=str(first / "final_model"), epochs=1, lora_r=8,
        data_files=str(tmp_path / "more.jsonl"), validation_fraction=0.05, sample_rows=50,
    )  # fmt: skip
    code, shown = child.run(settings, tmp_path / "log", ("kill_at", 3))
    assert code == -9 and "Training goes on from" in shown and "its lora_r = 32" in shown, shown
    code, shown = child.run(settings, tmp_path / "log")
    assert code == 0 and "Starting at step 0" in shown, shown
    held = json.loads((first / "held_out.json").read_text())
    mine = json.loads((tmp_path / "outputs" / "on" / "held_out.json").read_text())
    assert set(held) <= set(mine) and len(held) > 2
    final = tmp_path / "outputs" / "on" / "final_model"
    assert json.loads((final / "held_out.json").read_text()) == mine
    before = {row["prompt"]: row["before"] for row in table_of(tmp_path, "on")}
    asked = {row["prompt"]: row["after"] for row in table_of(undisturbed[1], "faults")}
    assert len(asked) == 2 and asked.items() <= before.items()
    run = json.loads((final / "run.json").read_text())
    assert run["settings"]["lora_r"] == 32 and run["base_adapter"].endswith("final_model")
    card = (final / "README.md").read_text()
    assert 'Training went on from the adapter faults, which is what "before" means' in card
    assert "r 32," in card
    shutil.rmtree(final.parent / "checkpoint-6", ignore_errors=True)
    code, shown = child.run(settings, tmp_path / "log")
    assert code == 0 and "nothing is trained again" in shown, shown
