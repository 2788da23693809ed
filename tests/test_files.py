"""Folders that are written whole, sealed, found and moved aside."""

import json
import os

import pytest

from finetune.files import (
    NEEDED,
    checkpoints,
    edit_json,
    is_free,
    move_aside,
    new_folder,
    read_seal,
    seal,
    unused,
    why_unusable,
)
from finetune.hub import with_retries


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
    folder.mkdir(exist_ok=True)
    for name in (part.replace("*", "") for part in NEEDED[purpose]):
        (folder / name).write_text(name * 9)


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
    for name in (part.replace("*", "") for part in NEEDED[purpose]):
        whole = (folder / name).read_bytes()
        if not (purpose == "merged" and name.endswith(".safetensors")):  # of these the size counts
            (folder / name).write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
            assert name in why_unusable(folder, purpose)
        (folder / name).write_bytes(whole[:-1])
        assert name in why_unusable(folder, purpose)
        (folder / name).unlink()
        assert name in why_unusable(folder, purpose)
        with pytest.raises(FileNotFoundError, match=f"no whole {purpose}: it lacks {name[:5]}"):
            seal(folder, purpose, "run")
        (folder / name).write_bytes(whole)
    assert not why_unusable(folder, purpose)


def test_a_folder_that_is_written_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "final"
    with pytest.raises(RuntimeError), new_folder(folder, "adapter") as work:
        (work / "a").write_text("half")
        assert not folder.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with new_folder(folder, "adapter") as work:
            fill(work, "adapter")
            (work / "a").write_text(text)
            assert not folder.exists() or (folder / "a").read_text() == "one"
            seal(work, "adapter")
        assert (folder / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_is_moved_aside_keeps_its_content_under_a_name_that_was_free(tmp_path, capsys):
    for number in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text(str(number))
        move_aside(tmp_path / "run", "somebody else's")
        assert "somebody else's" in capsys.readouterr().out
    found = sorted((path / "mine").read_text() for path in tmp_path.iterdir())
    assert found == ["0", "1", "2"] and not (tmp_path / "run").exists()
    assert is_free(tmp_path / "run") and not is_free(next(tmp_path.iterdir()))
    assert not unused(next(tmp_path.iterdir())).exists()


def test_an_edit_changes_the_named_keys_alone(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1, "é": "ü", "b": None}), encoding="utf-8")
    edit_json(path, a=2, c=[3])
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 2, "é": "ü", "b": None, "c": [3]}


def test_a_folder_without_a_seal_or_with_a_broken_one_has_none(tmp_path):
    assert not read_seal(tmp_path)
    (tmp_path / "checksums.json").write_text("{ broken")
    assert not read_seal(tmp_path) and why_unusable(tmp_path, "adapter")


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
