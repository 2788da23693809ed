"""Section 3: where the token comes from. Colab and Kaggle are stood in for by modules with their
exceptions.
"""

import getpass
import os
import sys
import types

import huggingface_hub
import pytest

from finetune.hub import sign_in

TOKEN = "hf_" + "x" * 30


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No token anywhere, and nobody at the keyboard."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: (_ for _ in ()).throw(EOFError))


@pytest.fixture
def colab(monkeypatch):
    """Colab's `userdata`, whose `get` does what it is told."""
    userdata = types.ModuleType("google.colab.userdata")
    for name in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        setattr(userdata, name, type(name, (Exception,), {}))
    package = types.ModuleType("google.colab")
    package.userdata = userdata
    for name, module in {"google.colab": package, "google.colab.userdata": userdata}.items():
        monkeypatch.setitem(sys.modules, name, module)

    def answer(outcome):
        def get(name):
            assert name == "HF_TOKEN"
            if isinstance(outcome, str) and not outcome.startswith("hf_"):
                raise getattr(userdata, outcome)
            return outcome

        userdata.get = get

    return answer


def test_the_environment_comes_first(monkeypatch, colab, capsys):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    colab("hf_other")
    assert sign_in() == TOKEN
    assert "the environment" in capsys.readouterr().out


def test_colab_secret_reaches_the_libraries_and_is_not_printed(colab, capsys):
    colab(TOKEN)
    assert sign_in() == TOKEN
    assert os.environ["HF_TOKEN"] == TOKEN
    shown = capsys.readouterr()
    assert "Colab's secrets" in shown.out
    assert TOKEN not in shown.out + shown.err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("SecretNotFoundError", "Colab has no secret HF_TOKEN"),
        ("NotebookAccessError", "switch 'Notebook access' on"),
        ("TimeoutException", "run this cell again"),
    ],
)
def test_each_of_colabs_refusals_is_told_and_survived(colab, capsys, error, told):
    colab(error)
    assert sign_in() is None
    assert told in capsys.readouterr().out


def test_kaggles_secret(monkeypatch):
    client = types.SimpleNamespace(get_secret=lambda name: TOKEN if name == "HF_TOKEN" else None)
    module = types.SimpleNamespace(UserSecretsClient=lambda: client)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    assert sign_in() == TOKEN


def test_a_hidden_prompt_is_the_last_resort(monkeypatch):
    monkeypatch.setattr(getpass, "getpass", lambda prompt: TOKEN)
    assert sign_in() == TOKEN


def test_nobody_is_asked_for_a_token_that_is_not_needed(monkeypatch, capsys):
    monkeypatch.setattr(getpass, "getpass", lambda prompt: pytest.fail("asked"))
    assert sign_in(needed=False) is None
    assert "public and local base models work" in capsys.readouterr().out


def test_drive_is_mounted_on_colab_only_where_copies_go_there(
    colab, monkeypatch, notebook, settings
):
    colab(TOKEN)
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setattr(sys.modules["google.colab"], "drive", drive, raising=False)
    cell = next(
        "".join(c["source"]) for c in notebook["cells"] if "sign_in(" in "".join(c["source"])
    )
    for backup_to in ("none", "hub", "drive"):
        exec(cell, {"cfg": settings(backup_to=backup_to)})
    assert mounted == ["/content/drive"]
