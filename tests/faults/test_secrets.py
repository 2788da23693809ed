"""A planted token is found nowhere: the notebook pushes and copies to a stand-in Hub, and every
byte is read.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import child
import pytest
from conftest import result_of
from hub import Hub

from finetune.files import why_unusable

pytestmark = pytest.mark.slow  # whole runs of the notebook

TOKEN = "hf_" + "canary" * 6


@pytest.fixture(scope="module")
def told(tiny, tmp_path_factory):
    """The whole notebook, run by Jupyter with the token in its environment: its folder, the Hub,
    what it printed.
    """
    folder = tmp_path_factory.mktemp("canary")
    (folder / "home").mkdir()
    settings = tiny(folder, push_to_hub=True, backup_to="hub", epochs=1)
    command = [sys.executable, "-m", "finetune.headless"]
    command += [f"{name.upper()}={value}" for name, value in settings.items()]
    with Hub() as hub:
        environment = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HOME": str(folder / "home")}
        environment |= {"JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
        done = subprocess.run(
            command,
            env=os.environ | environment,
            cwd=child.ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, hub, done.stdout + done.stderr


def forms(token: str) -> list[bytes]:
    """The token as it might be written: plain, backwards, in base64 at each of three offsets."""
    coded = [base64.b64encode(b"x" * shift + token.encode())[4:-4] for shift in range(3)]
    return [token.encode(), token[3:].encode(), token[::-1].encode(), *coded]


def test_the_token_is_in_no_file(told):
    folder, _, shown = told
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    assert {
        "notebook.ipynb",
        "notebook.html",
        "checksums.json",
        "optimizer.pt",
        "run.json",
        "curves.png",
    } <= kinds
    assert any("tfevents" in name for name in kinds)
    found = [path for path in files for form in forms(TOKEN) if form in path.read_bytes()]
    assert not found and TOKEN not in shown
    config = subprocess.run(
        ["git", "config", "--list"], capture_output=True, text=True, cwd=child.ROOT
    ).stdout
    assert TOKEN not in config


def test_the_token_is_in_nothing_that_was_sent(told):
    _, hub, _ = told
    # A checkpoint, the adapter's copy and its push; again both, with the scores.
    assert hub.asked("/commit/") == 5
    bodies = hub.sent() + b"".join(d for files in hub.files.values() for d in files.values())
    assert not any(form in bodies for form in forms(TOKEN))
    assert not any(TOKEN in path for _, path, *_ in hub.requests)
    asked = [
        headers
        for *_, headers, _ in hub.requests
        if "Authorization" in headers or "authorization" in headers
    ]
    assert asked  # the header is the one place where it belongs


def test_nothing_that_was_sent_names_this_machine_or_holds_a_row(told):
    folder, hub, _ = told
    bodies = hub.sent() + b"".join(d for files in hub.files.values() for d in files.values())
    rows = [f"{n} and {n}" for n in (3, 7, 12)]
    for text in (*rows, str(folder), str(child.ROOT), str(Path.home()), "/tmp/"):
        assert text.encode() not in bodies, text
    name = socket.gethostname()
    assert len(name) < 5 or name == "localhost" or name.encode() not in bodies
    assert b'"base_model_name_or_path": "model"' in hub.files["ada/faults"]["adapter_config.json"]


def test_only_allowed_files_go_to_the_models_own_repository(told):
    _, hub, _ = told
    names = set(hub.files["ada/faults"])
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "README.md",
        "run.json",
    } <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert hub.private("ada/faults") and hub.private("ada/faults-checkpoints")
    copies = set(hub.files["ada/faults-checkpoints"])
    assert "checkpoint-2/optimizer.pt" in copies and not any(
        "training_args" in name for name in copies
    )
    run, card = (
        json.loads(hub.files["ada/faults"]["run.json"]),
        hub.files["ada/faults"]["README.md"].decode(),
    )
    assert {
        "fingerprint",
        "settings",
        "versions",
        "device",
        "results",
        "base_revision",
        "plan",
    } <= set(run)
    assert run["fingerprint"]["training rows"] in card and "transformers" in card


def test_the_machine_replaced_continues_from_the_hub(tiny, tmp_path, undisturbed):
    settings = tiny(tmp_path, backup_to="hub")
    with Hub() as hub:
        environment = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url}
        code, shown = child.run(settings, tmp_path / "log", ("kill_at", 6), environment)
        assert code == -9, shown
        there = {name.split("/")[0] for name in hub.files["ada/faults-checkpoints"]}
        assert there == {"checkpoint-2", "checkpoint-4"}
        shutil.rmtree(tmp_path / "outputs")
        code, shown = child.run(settings, tmp_path / "log", (), environment)
        assert code == 0, shown
        assert "Continuing from checkpoint-4." in shown
        assert result_of(tmp_path) == undisturbed[0]
        shutil.rmtree(tmp_path / "outputs")
        code, shown = child.run(settings, tmp_path / "log", ("kill_at", 1), environment)
        assert code == 0 and "nothing is trained again" in shown
    assert not why_unusable(tmp_path / "outputs" / "faults" / "final_model", "adapter")
