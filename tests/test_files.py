"""Folders that are written whole, sealed, found and moved aside."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from finetune import files
from finetune.files import (
    NEEDED,
    SEAL,
    checkpoints,
    edit_json,
    is_free,
    is_ours,
    link_or_copy,
    move_aside,
    new_folder,
    read_seal,
    remove,
    seal,
    telling_if_full,
    unused,
    why_unusable,
    zip_folder,
)
from finetune.hub import with_retries
from qlora_helpers import UserError


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-10", "checkpoint-2"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9, 1e9 - len(name)))  # time says something else
    for name in ("checkpoint-", "checkpoint-best-11", "checkpoint-11.old", "xcheckpoint-12"):
        (tmp_path / name).mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["checkpoint-100", "checkpoint-10", "checkpoint-9", "checkpoint-2"]


def fill(folder, purpose):
    """What a folder of that purpose needs, each file with a text of its own."""
    for name in plain_names(purpose):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name * 9)


def plain_names(purpose):
    """A name for each pattern of files that a folder of this purpose needs."""
    return [re.sub(r"^\*", "a", part).replace("*", "") for part in NEEDED[purpose]]


@pytest.mark.parametrize("purpose", NEEDED)
def test_a_sealed_folder_is_good_for_its_purpose_alone_and_only_whole(tmp_path, purpose):
    folder = tmp_path / "folder"
    fill(folder, purpose)
    (folder / "notes.txt").write_text("besides")
    assert why_unusable(folder, purpose)
    seal(folder, purpose, "run")
    assert not why_unusable(folder, purpose)
    others = {"adapter", "checkpoint", "merged", "embedded"} - {purpose}
    assert all(why_unusable(folder, other) for other in others)
    for name, part in zip(plain_names(purpose), NEEDED[purpose], strict=True):
        whole = (folder / name).read_bytes()
        large = purpose in ("merged", "base", "gguf") and name.endswith((".safetensors", ".gguf"))
        if not large:  # of these the size counts
            (folder / name).write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
            assert name in why_unusable(folder, purpose)
        (folder / name).write_bytes(whole[:-1])
        assert name in why_unusable(folder, purpose)
        (folder / name).unlink()
        assert name in why_unusable(folder, purpose)
        with pytest.raises(FileNotFoundError, match=f"{purpose}: it lacks {re.escape(part)}"):
            seal(folder, purpose, "run")
        (folder / name).write_bytes(whole)
    assert not why_unusable(folder, purpose)


def test_a_folder_that_is_written_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "final"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), new_folder(folder, "adapter") as work:
            (work / "a").write_text("half")
            assert not folder.exists()
            raise error
        assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with new_folder(folder, "adapter") as work:
            fill(work, "adapter")
            (work / "a").write_text(text)
            assert not folder.exists() or (folder / "a").read_text() == "one"
            seal(work, "adapter")
        assert (folder / "a").read_text() == text
        assert {path.name for path in folder.iterdir()} == {*read_seal(folder)["files"], SEAL}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("was", ["nothing", "empty", "ours"])
def test_what_comes_into_a_folder_while_its_new_one_is_written_is_kept(tmp_path, capsys, was):
    folder = tmp_path / "final"
    if was != "nothing":
        folder.mkdir()
    if was == "ours":
        fill(folder, "adapter")
        seal(folder, "adapter")
    with new_folder(folder, "adapter") as work:
        fill(work, "adapter")
        seal(work, "adapter")
        folder.mkdir(exist_ok=True)
        (folder / "thesis.doc").write_text("years")
    assert is_ours(folder, "adapter")
    assert (tmp_path / "final-kept" / "thesis.doc").read_text() == "years"
    assert "final is moved aside to final-kept" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"final", "final-kept"}


# What no folder of its purpose can do without, as the libraries name it.
USELESS_WITHOUT = {
    "adapter": ["adapter_model.safetensors", "adapter_config.json", "run.json"],
    "merged": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "embedded": ["model.safetensors", "config.json", "tokenizer.json"],
    "checkpoint": ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt"],
    "base": ["model.safetensors", "config.json", "tokenizer.json", "made_from.json"],
    "gguf": ["merged-f16.gguf"],
    "converters": ["convert_hf_to_gguf.py", "convert_lora_to_gguf.py"],
}
USELESS_WITHOUT["merged"] += ["config.json"]
USELESS_WITHOUT["checkpoint"] += ["scheduler.pt", "rng_state.pth", "trainer_state.json", "run.json"]


@pytest.mark.parametrize("purpose", NEEDED)
def test_a_folder_is_of_no_use_without_any_one_of_these(tmp_path, purpose):
    for name in [*USELESS_WITHOUT[purpose], "README.md"]:
        (tmp_path / name).write_text(name)
    if purpose == "converters":
        (tmp_path / "gguf-py" / "gguf").mkdir(parents=True)
        (tmp_path / "gguf-py" / "gguf" / "constants.py").touch()
    seal(tmp_path, purpose)
    assert why_unusable(tmp_path, purpose) == ""
    for name in USELESS_WITHOUT[purpose]:
        (tmp_path / name).rename(tmp_path / "away")
        assert why_unusable(tmp_path, purpose).split(", ")[-1] == f"{name} is missing"
        (tmp_path / "away").rename(tmp_path / name)
    (tmp_path / "README.md").unlink()
    assert why_unusable(tmp_path, purpose) == ""


def test_what_is_moved_aside_keeps_its_content_under_a_name_that_was_free(tmp_path, capsys):
    for number in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text(str(number))
        move_aside(tmp_path / "run", "somebody else's")
        assert "somebody else's" in capsys.readouterr().out
    found = sorted((path / "mine").read_text() for path in tmp_path.iterdir())
    assert found == ["0", "1", "2"] and not (tmp_path / "run").exists()
    assert is_free(tmp_path / "run") and not is_free(next(tmp_path.iterdir()))
    assert not is_free(next(tmp_path.iterdir()) / "mine")  # a file
    assert not unused(next(tmp_path.iterdir())).exists()


def test_an_edit_changes_the_named_keys_alone(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1, "é": "ü", "b": None}), encoding="utf-8")
    edit_json(path, a=2, c=[3])
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 2, "é": "ü", "b": None, "c": [3]}


NO_SEALS = ["{ broken", "", "null", "5", "[1]", '"text"', '{"files": {}}']
NO_SEALS += ['{"purpose": "adapter", "files": []}', '{"purpose": ["adapter"], "files": {}}']
NO_SEALS += ['{"purpose": "poem", "files": {}}', "\udcff"]


@pytest.mark.parametrize("text", NO_SEALS)
def test_a_folder_without_a_seal_or_with_a_broken_one_has_none(tmp_path, text):
    assert not read_seal(tmp_path)
    assert why_unusable(tmp_path, "adapter") == "its save was cut short"
    (tmp_path / SEAL).write_text(text, errors="surrogateescape")
    assert not read_seal(tmp_path) and not is_ours(tmp_path, "adapter")
    assert why_unusable(tmp_path, "adapter") == f"{SEAL} is damaged"


@pytest.mark.parametrize("purpose", ["adapter", "checkpoint"])
def test_the_seals_of_earlier_releases_were_digests_alone(tmp_path, purpose):
    fill(tmp_path, purpose)
    seal(tmp_path, purpose)
    digests = read_seal(tmp_path)["files"]
    (tmp_path / SEAL).write_text(json.dumps(digests))
    assert why_unusable(tmp_path, purpose) == "" and is_ours(tmp_path, purpose)
    digests.pop("adapter_config.json")  # one that was sealed without it
    (tmp_path / SEAL).write_text(json.dumps(digests))
    assert why_unusable(tmp_path, purpose) == "adapter_config.json is missing"


def test_a_checkpoint_in_fp16_needs_its_loss_scale_whole_too(tmp_path):
    """`scaler.pt`, which other checkpoints do not have."""
    folder = tmp_path / "checkpoint-2"
    fill(folder, "checkpoint")
    (folder / "scaler.pt").write_text("65536")
    seal(folder, "checkpoint")
    assert why_unusable(folder, "checkpoint") == ""
    (folder / "scaler.pt").write_text("65537")
    assert why_unusable(folder, "checkpoint") == "scaler.pt is damaged"
    (folder / "scaler.pt").unlink()
    assert why_unusable(folder, "checkpoint") == "scaler.pt is missing"


THEIRS = {
    "a file": lambda folder: (folder / "thesis.doc").write_text("years"),
    "a file in a folder": lambda folder: (folder / "sub" / "thesis.doc").write_text("years"),
    "a seal in a folder": lambda folder: (folder / "sub" / SEAL).write_text("years"),
    "a link to a file": lambda folder: (folder / "link").symlink_to(folder.parent / "theirs"),
    "a link to a folder": lambda folder: (folder / "link").symlink_to(folder.parent),
    "a link to nowhere": lambda folder: (folder / "link").symlink_to("nowhere"),
    "a link for a file of ours": lambda folder: (
        shutil.move(folder / "run.json", folder.parent / "theirs"),
        (folder / "run.json").symlink_to(folder.parent / "theirs"),
    ),
}


@pytest.mark.parametrize("what", THEIRS)
def test_whatever_is_put_into_a_folder_of_ours_stays(tmp_path, what):
    folder, theirs = tmp_path / "folder", tmp_path / "theirs"
    fill(folder, "adapter")
    seal(folder, "adapter")
    (folder / "sub").mkdir()
    theirs.write_text("elsewhere")
    assert is_ours(folder, "adapter")
    THEIRS[what](folder)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with pytest.raises(UserError, match="did not write"), new_folder(folder, "adapter"):
        pass
    remove(folder, "adapter")
    kept = tmp_path / "folder-kept"
    assert sorted(path.relative_to(kept) for path in kept.rglob("*")) == before
    assert theirs.exists() and not folder.exists()


def test_a_link_that_leads_nowhere_is_not_written_over(tmp_path):
    links = [tmp_path / name for name in ("x.writing", "run-kept", "run-kept-2")]
    for link in links:
        link.symlink_to("nowhere")
    (tmp_path / "run").write_text("mine")
    assert move_aside(tmp_path / "run", "a test").name == "run-kept-3"
    with new_folder(tmp_path / "x", "adapter") as work:
        assert work.name == "x.writing-2"
    assert all(link.is_symlink() for link in links) and (tmp_path / "x").is_dir()


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_copied_where_the_disk_cannot_give_it_a_second_name(tmp_path, monkeypatch, error):
    """FAT, another disk, Google Drive."""
    (tmp_path / "one").write_text("weights")

    def link(*_):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(os, "link", link)
    link_or_copy(str(tmp_path / "one"), str(tmp_path / "two"))
    assert (tmp_path / "two").read_text() == "weights"
    assert (tmp_path / "two").samefile(tmp_path / "one") == (error is None)


def test_what_is_written_gets_the_usual_rights_and_what_is_a_second_name_keeps_its_own(tmp_path):
    theirs, usual = tmp_path / "theirs", tmp_path / "usual"
    for file in (theirs, usual):
        file.write_text("weights")
    theirs.chmod(0o600)
    with new_folder(tmp_path / "x", "adapter") as work:
        fill(work, "adapter")
        (work / "adapter_model.safetensors").chmod(0o600)  # as safetensors leaves it
        link_or_copy(str(theirs), str(work / "base.safetensors"))
    assert theirs.stat().st_mode & 0o777 == 0o600
    written = tmp_path / "x" / "adapter_model.safetensors"
    assert written.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("moved", range(4))
def test_a_disk_of_its_own_has_a_seal_only_while_it_is_whole(tmp_path, monkeypatch, moved):
    """There the new files are moved up one by one, and the last may be reached, or not."""
    disk, work = tmp_path / "disk", tmp_path / "disk" / "disk.writing"
    fill(disk, "merged")
    (disk / "model-00002.safetensors").write_text("a shard more than the new one has")
    seal(disk, "merged")
    fill(work, "merged")
    (work / "config.json").write_text("another")
    seal(work, "merged", "new")
    replace, seen = Path.replace, []

    def cut(self, target):
        seen.append(self.name)
        if len(seen) > moved:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    if moved < 3:
        with pytest.raises(KeyboardInterrupt):
            files.fill(disk, work)
        assert why_unusable(disk, "merged") == "its save was cut short"
        return
    files.fill(disk, work)
    assert is_ours(disk, "merged") and read_seal(disk)["run"] == "new"
    assert {path.name for path in disk.iterdir()} == {"config.json", "model.safetensors", SEAL}


# -------- zips ----------------------------------------------------------------------------


def saved(run, weights):
    """An adapter with such weights, and its zip by a name that a day before gave it."""
    fill(run / "final_model", "adapter")
    (run / "final_model" / "adapter_model.safetensors").write_text(weights)
    seal(run / "final_model", "adapter")
    found = zip_folder(run / "final_model", "mine")
    return found.rename(run / f"mine-20200101-00000{len(list(run.glob('*.zip')))}.zip")


def test_each_adapter_has_one_zip_and_nothing_else_is_replaced(tmp_path):
    for name, text in (("mine-photos.zip", "no zip"), ("theirs.zip", "x"), ("mine-old.txt", "y")):
        (tmp_path / name).write_text(text)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.doc").write_text("years")
    shutil.make_archive(str(tmp_path / "mine-notes"), "zip", tmp_path / "notes")
    theirs = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    first = saved(tmp_path, "one")
    kept = first.read_bytes()
    second = saved(tmp_path, "two")
    assert first.read_bytes() == kept != second.read_bytes()
    assert zip_folder(tmp_path / "final_model", "mine") == second
    assert len(list(tmp_path.glob("mine-2*.zip"))) == 2
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    assert not list(tmp_path.glob("*.writing*"))


def test_the_zip_of_an_earlier_release_is_known_as_the_same_adapters(tmp_path):
    zipped = saved(tmp_path, "one")
    folder = tmp_path / "final_model"
    whole = (folder / SEAL).read_text()
    (folder / SEAL).write_text(json.dumps(json.loads(whole)["files"]))
    shutil.make_archive(str(zipped.with_suffix("")), "zip", folder)
    (folder / SEAL).write_text(whole)
    assert zip_folder(folder, "mine") == zipped


# -------- a full disk ---------------------------------------------------------------------

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
@pytest.mark.parametrize("wrapped", ["itself", "raised from it", "in handling it"])
def test_a_full_disk_is_told_in_words_by_whatever_error_it_comes(tmp_path, error, wrapped):
    with (
        pytest.raises(
            UserError, match=r"^The disk is full: .*/final could not .* All is safe\. Fr"
        ),
        telling_if_full(tmp_path / "final", "All is safe."),
    ):
        if wrapped == "raised from it":
            raise ValueError("saving failed") from error
        try:
            raise error
        except (OSError, RuntimeError):
            if wrapped == "itself":
                raise
            raise ValueError("saving failed")  # noqa: B904 (as libraries do)


def test_another_error_than_a_full_disk_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), telling_if_full(tmp_path, "All is safe."):
        raise PermissionError(errno.EACCES, "Permission denied")


# -------- the Hub -------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "tries"), [(1, 5), (250, 3), (700, 1)])
def test_the_hub_is_tried_again_a_few_times_and_for_ten_minutes_at_most(
    monkeypatch, seconds, tries
):
    """Each try takes so many seconds; waits of 2, 5, 15 and 30 s come between."""
    now, waits, calls = [0.0], [], []

    def sleep(wait):
        waits.append(wait)
        now[0] += wait

    clock = type("clock", (), {"monotonic": lambda: now[0], "sleep": sleep})
    monkeypatch.setattr("finetune.hub.time", clock)

    def call():
        calls.append(1)
        now[0] += seconds
        raise TimeoutError("slow")

    with pytest.raises(TimeoutError):
        with_retries(call)
    assert len(calls) == tries and waits == [2, 5, 15, 30][: tries - 1]


def test_an_error_that_does_not_pass_is_raised_at_once(monkeypatch):
    calls = []

    def call():
        calls.append(1)
        raise ValueError("yours")

    with pytest.raises(ValueError, match="yours"):
        with_retries(call)
    assert calls == [1]
