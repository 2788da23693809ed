"""Bad nights at the Hub: every call refused, hung, cut or flaky, against a real HTTP server and the
real client.
"""

import shutil
import time
import types

import huggingface_hub.constants
import pytest
from hub import Hub
from sums import checksums

from finetune.backup import back_up, fetch_backup
from finetune.files import checkpoints
from finetune.save import push_adapter
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
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
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
    assert "--private" not in shown and ("hf upload" in shown) <= (f"hf upload {owner}/" in shown)
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
        assert str(status) in shown or "Invalid user token" in shown


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
