"""Bad nights at the Hub: every call refused, hung, cut or flaky, against a real HTTP server and the
real client.
"""

import json
import os
import shutil
import time
import types

import huggingface_hub.constants
import pytest
from hub import Hub, take_for_the_hub
from huggingface_hub.errors import HfHubHTTPError
from sums import checksums

from finetune.backup import back_up, fetch_backup
from finetune.files import NEEDED, checkpoints, is_ours, seal, why_unusable
from finetune.hub import CARD_FILES, commit_folder, ensure_repo, hub_api, status_of, with_retries
from finetune.save import push_adapter, push_card
from qlora_helpers import UserError

TOKEN = "hf_" + "s3cret" * 5
CALLS = [
    "/api/whoami",
    "/api/repos/create",
    "/api/models/ada/nights/preupload",
    "/objects/batch",
    "/lfs/",
    "/commit/",
]


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, and a huggingface_hub that talks to it, with waits made short."""
    with Hub() as server:
        take_for_the_hub(server, monkeypatch)
        monkeypatch.setattr("finetune.hub.RETRY_WAITS", (0, 0))
        monkeypatch.setattr("finetune.hub.REQUEST_SECONDS", 0.3)
        hasty = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr(
            "huggingface_hub.utils._http.time", hasty
        )  # its own waits between its own tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def saved(settings, undisturbed, tmp_path):
    """Settings of a run whose final model is saved: a copy of the undisturbed run's."""
    cfg = settings(base_model="embedded", run_name="nights", output_dir=str(tmp_path))
    shutil.copytree(undisturbed[1] / "outputs" / "faults" / "final_model", cfg.final_model)
    (cfg.final_model / "training_args.bin").write_bytes(TOKEN.encode())  # must never leave
    return cfg


def push(cfg, capsys):
    address = push_adapter(cfg, TOKEN)
    return address, capsys.readouterr().out


def test_the_push_is_private_and_sends_the_allowed_files_alone(hub, saved, capsys):
    address, shown = push(saved, capsys)
    assert address == f"{hub.url}/ada/nights"
    assert hub.private("ada/nights")
    sent = hub.files["ada/nights"]
    assert set(sent) - {".gitattributes"} == {path.name for path in saved.final_model.iterdir()} - {
        "training_args.bin"
    }
    assert (
        sent["adapter_model.safetensors"]
        == (saved.final_model / "adapter_model.safetensors").read_bytes()
    )
    assert TOKEN.encode() not in hub.sent() and TOKEN not in shown


def assert_nothing_lost(cfg, hub, shown, before, owner="ada"):
    assert checksums(cfg.final_model) == before
    assert (
        "Not pushed: " in shown
        and f"Nothing is lost: the adapter is in {cfg.final_model}. To push" in shown
    )
    assert "later, run this cell again" in shown
    assert "hf upload" not in shown
    assert TOKEN not in shown


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500])
@pytest.mark.parametrize("call", CALLS)
def test_a_refusal_of_any_call_costs_nothing_and_is_retried_as_it_deserves(
    hub, saved, capsys, call, status
):
    before = checksums(saved.final_model)
    hub.refuse[call] = (status,)
    address, shown = push(saved, capsys)
    assert address is None
    assert_nothing_lost(saved, hub, shown, before, "you" if call == "/api/whoami" else "ada")
    ours = shown.count("Trying again in 0 s.")
    tries = hub.asked(call)
    if (call, status) == (
        "/api/repos/create",
        409,
    ):  # "it is there already" is no failure, until it is not there
        assert ours == 0 and "RepositoryNotFound" in shown
    elif status in (429, 500):
        assert ours == 2 and 3 <= tries <= 3 * 6 * (3 if call == "/lfs/" else 1)
    else:
        assert ours == 0 and tries == (hub.asked("/lfs/") if call == "/lfs/" else 1)
        assert f"({status})" in shown or (status not in (401, 403) and str(status) in shown)
    if status in (401, 403):
        assert "again, after section 3 where the token is another." in shown
        assert "token (401), it is wrong, exp" in shown or "this token may not write" in shown
        assert ("HF_TOKEN" in os.environ) == (status == 403)
        assert ("refused by the test\nIf this token may not" in shown) == (status == 403)


@pytest.mark.parametrize("fault", ["hang", "reset"])
@pytest.mark.parametrize("call", ["/api/repos/create", "/lfs/", "/commit/"])
def test_a_request_that_hangs_or_is_cut_ends(hub, saved, capsys, call, fault):
    before, began = checksums(saved.final_model), time.monotonic()
    hub.refuse[call] = fault
    address, shown = push(saved, capsys)
    assert address is None and shown.count("Trying again") == 2
    assert_nothing_lost(saved, hub, shown, before)
    assert time.monotonic() - began < 3 * 6 * 3 * 0.3 + 10


@pytest.mark.parametrize("call", CALLS)
def test_a_hub_that_comes_back_gets_everything(hub, saved, capsys, call):
    hub.refuse[call] = ["reset", (503,)]
    address, shown = push(saved, capsys)
    assert address == f"{hub.url}/ada/nights", shown
    assert hub.files["ada/nights"]["adapter_model.safetensors"]


def test_a_public_repository_gets_nothing_unless_that_is_meant(hub, saved, capsys):
    hub.repos["ada/nights"] = {"name": "nights", "private": False}
    assert push(saved, capsys)[0] is None
    assert not hub.files.get("ada/nights")
    assert push(saved.model_copy(update={"hub_private": False}), capsys)[0]


def test_a_card_that_comes_later_is_pushed_alone(hub, saved, capsys):
    push_card(saved, TOKEN, None)  # its adapter was not pushed
    assert not hub.requests
    assert push_adapter(saved, TOKEN, CARD_FILES) == f"{hub.url}/ada/nights"
    assert set(hub.files["ada/nights"]) - {".gitattributes"} == set(CARD_FILES)
    hub.refuse["/commit/"] = (403,)
    assert push_adapter(saved, TOKEN, CARD_FILES) is None
    told = "run this cell again, after section 3 where the token is another."
    assert f"To push it later, {told}" in capsys.readouterr().out


def test_a_damaged_adapter_is_not_pushed(hub, saved, capsys):
    (saved.final_model / "adapter_model.safetensors").write_bytes(b"")
    address, shown = push(saved, capsys)
    assert address is None and "adapter_model.safetensors is damaged" in shown
    assert not hub.requests


def test_copies_go_to_a_private_repository_of_their_own_and_the_newest_two_stay(
    hub, saved, undisturbed, capsys
):
    cfg = saved.model_copy(update={"backup_to": "hub", "hub_private": False})
    source = checkpoints(undisturbed[1] / "outputs" / "faults")[0]
    for step in (2, 4, 6):
        shutil.copytree(source, cfg.run_dir / f"checkpoint-{step}")
        shutil.rmtree(
            cfg.run_dir / f"checkpoint-{step - 4}", ignore_errors=True
        )  # as the Trainer keeps two
        back_up(cfg, cfg.run_dir / f"checkpoint-{step}")
    assert list(hub.repos) == ["ada/nights-checkpoints"] and hub.private("ada/nights-checkpoints")
    there = {name.split("/")[0] for name in hub.files["ada/nights-checkpoints"]}
    assert there == {"checkpoint-4", "checkpoint-6"}
    assert not any("training_args" in name for name in hub.files["ada/nights-checkpoints"])
    assert capsys.readouterr().out.count("is copied to") == 3


def test_a_failed_copy_is_told_and_leaves_the_earlier_one_whole(hub, saved, undisturbed, capsys):
    cfg = saved.model_copy(update={"backup_to": "hub"})
    source = checkpoints(undisturbed[1] / "outputs" / "faults")[0]
    shutil.copytree(source, cfg.run_dir / "checkpoint-2")
    back_up(cfg, cfg.run_dir / "checkpoint-2")
    before = dict(hub.files["ada/nights-checkpoints"])
    hub.refuse["/commit/"] = (500,)
    back_up(cfg, (cfg.run_dir / "checkpoint-2").rename(cfg.run_dir / "checkpoint-4"))
    assert "checkpoint-4 is NOT copied to hub (" in capsys.readouterr().out
    assert hub.files["ada/nights-checkpoints"] == before


def test_a_hub_that_cannot_be_asked_for_copies_stops_before_they_could_be_replaced(hub, saved):
    hub.refuse["nights-checkpoints"] = (500,)
    with pytest.raises(UserError, match="cannot be asked for this run's checkpoints"):
        fetch_backup(saved.model_copy(update={"backup_to": "hub"}))


def sealed(folder, purpose, text="{}"):
    """A folder of small files, as a run makes it."""
    folder.mkdir(parents=True)
    for name in NEEDED[purpose]:
        (folder / name.replace("*", "")).write_text(text, encoding="utf-8")
    seal(folder, purpose, "nights")
    return folder


@pytest.mark.parametrize(
    ("status", "passing"),
    [(400, False), (403, False), (404, False), (408, True), (429, True), (500, True), (504, True)],
)
def test_only_what_may_pass_is_tried_again_also_where_it_is_the_cause(hub, status, passing):
    hub.refuse["/api/repos/create"] = (status,)
    api = hub_api(TOKEN)

    def create():
        api.create_repo("ada/nights")

    def create_and_wrap():
        try:
            create()
        except HfHubHTTPError as error:
            raise RuntimeError("cannot be made") from error

    for number, call in enumerate((create, create_and_wrap), 1):
        with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:
            with_retries(call)
        assert status_of(caught.value) == status
        assert hub.asked("/api/repos/create") == number * (3 if passing else 1)


PATHS = {
    "/home/eve/rows/*.jsonl": "*.jsonl",
    "~/eve/model/": "model",
    r"C:\Users\eve\model": "model",
    "D:/eve/größe": "größe",
    r"\\eve\share": "share",
    "ada/model": "ada/model",
    "and/or eve: yes": "and/or eve: yes",
    "all-linear": "all-linear",
}


def test_what_is_sent_names_no_path_and_its_seal_fits_it(hub, tmp_path):
    """Of an absolute path, of whatever system and however deep, the last part stays."""
    told = {"words": list(PATHS), "deep": [{"path": path} for path in PATHS], "rate": 1e-4}
    text = json.dumps(told, ensure_ascii=False)
    folder = sealed(tmp_path / "checkpoint-12", "checkpoint", text)
    before, api = checksums(folder), hub_api(TOKEN)
    ensure_repo(api, "ada/nights", private=True)
    commit_folder(api, "ada/nights", tmp_path, ["checkpoint-12/*"])
    sent = hub.files["ada/nights"]
    assert {n.partition("/")[2] for n in sent} - {".gitattributes", ""} == set(before)
    for name in ("run.json", "adapter_config.json", "trainer_state.json"):
        found = json.loads(sent[f"checkpoint-12/{name}"])
        assert found["words"] == [one["path"] for one in found["deep"]] == list(PATHS.values())
        assert found["rate"] == 1e-4
    there = tmp_path / "there"
    there.mkdir()
    for name in before:
        (there / name).write_bytes(sent[f"checkpoint-12/{name}"])
    assert is_ours(there, "checkpoint") and not why_unusable(there, "checkpoint")
    assert checksums(folder) == before


def test_a_push_leaves_the_clients_settings_as_they_were(hub, tmp_path, monkeypatch):
    sealed(tmp_path / "checkpoint-2", "checkpoint")
    api = hub_api(TOKEN)
    ensure_repo(api, "ada/nights", private=True)
    for usual in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", usual)
        commit_folder(api, "ada/nights", tmp_path, ["checkpoint-2/*"])
        assert huggingface_hub.constants.HF_HUB_DISABLE_XET is usual
        hub.refuse["/commit/"] = (403,)
        with pytest.raises(HfHubHTTPError):
            commit_folder(api, "ada/nights", tmp_path, ["checkpoint-2/*"])
        assert huggingface_hub.constants.HF_HUB_DISABLE_XET is usual
        hub.refuse.clear()


@pytest.fixture
def copied(settings, tmp_path):
    return settings(backup_to="hub", run_name="nights", output_dir=str(tmp_path / "out"))


def test_a_new_machine_gets_every_copy_and_only_those(hub, copied):
    """Of a run whose repository holds other things, too, which stay and are not fetched."""
    fetch_backup(copied)  # nothing was ever copied
    assert not copied.run_dir.exists() and not hub.repos
    back_up(copied, sealed(copied.run_dir / "checkpoint-9", "checkpoint"))
    theirs = {"checkpoint-3/notes.txt", "old/checksums.json", "README.md"}
    hub.files["ada/nights-checkpoints"] |= dict.fromkeys(theirs, b"{}")
    back_up(copied, sealed(copied.final_model, "adapter"))
    shutil.rmtree(copied.run_dir)  # a new machine, which goes on and has no adapter yet
    fetch_backup(copied)
    names = {path.name for path in copied.run_dir.iterdir()}
    assert names == {"checkpoint-9", "final_model"}  # the third is no whole one
    assert not why_unusable(copied.run_dir / "checkpoint-9", "checkpoint")
    assert not why_unusable(copied.final_model, "adapter")
    shutil.rmtree(copied.run_dir)
    back_up(copied, sealed(copied.run_dir / "checkpoint-10", "checkpoint"))
    there = hub.files["ada/nights-checkpoints"]
    assert theirs < set(there)
    assert {name.split("/")[0] for name in set(there) - theirs} - {".gitattributes"} == {
        "checkpoint-10",
        "final_model",
    }


def test_a_fetched_copy_moves_what_is_not_ours_aside(hub, copied):
    back_up(copied, sealed(copied.final_model, "adapter"))
    weights = (copied.final_model / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(copied.run_dir)
    copied.final_model.mkdir(parents=True)
    (copied.final_model / "README.md").write_text("my own")
    fetch_backup(copied)
    assert (copied.final_model / "adapter_model.safetensors").read_bytes() == weights
    kept = [path for path in copied.run_dir.rglob("README.md") if path.read_text() == "my own"]
    assert len(kept) == 1 and kept[0].parent != copied.final_model
    assert {path.name for path in copied.final_model.iterdir()} == {
        name.removeprefix("final_model/")
        for name in hub.files["ada/nights-checkpoints"]
        if name.startswith("final_model/")
    }


def test_a_hub_that_comes_back_keeps_and_gives_copies(hub, copied, capsys):
    calls = ("/api/whoami", "/api/models/ada/nights-checkpoints/tree", "/resolve/")
    back_up(copied, sealed(copied.run_dir / "checkpoint-9", "checkpoint"))
    hub.refuse = {call: [(503,), "reset"] for call in calls}
    back_up(copied, sealed(copied.run_dir / "checkpoint-10", "checkpoint"))
    assert capsys.readouterr().out.count("is copied to") == 2
    shutil.rmtree(copied.run_dir)
    hub.refuse = {call: ["reset", (503,)] for call in calls}
    fetch_backup(copied)
    assert len(checkpoints(copied.run_dir)) == 2
