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
    assert sign_in() == os.environ["HF_TOKEN"] == TOKEN
    assert "the environment" in capsys.readouterr().out


@pytest.mark.parametrize(
    "odd", ["hf_SECRET\nhf_more", "hf_“SECRET”", "hf_SECRET more", "hf_SECRET\0"]
)
def test_a_token_that_no_request_can_carry_is_told_and_not_printed(monkeypatch, colab, capsys, odd):
    if "\0" not in odd:
        monkeypatch.setenv("HF_TOKEN", odd)
    colab(odd)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: TOKEN)
    assert sign_in() == os.environ["HF_TOKEN"] == TOKEN
    out = capsys.readouterr().out
    assert "copy it anew" in out and "SECRET" not in out


def test_a_secret_that_was_replaced_is_read_again_and_a_typed_token_stays(
    monkeypatch, colab, capsys
):
    colab("hf_old")
    assert sign_in() == "hf_old"
    colab("hf_new")
    assert sign_in() == os.environ["HF_TOKEN"] == "hf_new"
    assert capsys.readouterr().out.count("Colab's secrets") == 2
    colab("SecretNotFoundError")
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "hf_typed")
    assert sign_in() == "hf_typed"
    monkeypatch.setattr(getpass, "getpass", lambda prompt: pytest.fail("asked again"))
    assert sign_in() == "hf_typed"


def test_this_notebooks_secret_goes_before_a_token_stored_once(monkeypatch, colab, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stored")
    colab(None)
    assert sign_in() == os.environ["HF_TOKEN"] == "hf_stored"
    assert "an earlier sign-in" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", "")
    colab(f"{TOKEN}\n")
    assert sign_in() == os.environ["HF_TOKEN"] == TOKEN


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
    assert sign_in(needed=False) is None
    assert told not in capsys.readouterr().out  # nobody needs it


@pytest.fixture
def kaggle(monkeypatch):
    """Kaggle's client, whose one secret is what it is told."""

    def answer(secrets):
        client = types.SimpleNamespace(get_secret=secrets.__getitem__)
        module = types.SimpleNamespace(UserSecretsClient=lambda: client)
        monkeypatch.setitem(sys.modules, "kaggle_secrets", module)

    return answer


def test_kaggles_secret(kaggle, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stored")
    kaggle({"HF_TOKEN": TOKEN})
    assert sign_in() == TOKEN


def test_a_secret_that_kaggle_does_not_give_is_told_and_survived(kaggle, capsys):
    kaggle({})
    assert sign_in() is None
    assert "Kaggle has no secret HF_TOKEN (KeyError): Add-ons" in capsys.readouterr().out


@pytest.mark.parametrize("error", [EOFError, NotImplementedError])
def test_where_nobody_can_be_asked_the_notebook_goes_on(monkeypatch, error):
    monkeypatch.setattr(getpass, "getpass", lambda prompt: (_ for _ in ()).throw(error))
    assert sign_in() is None


def test_a_hidden_prompt_is_the_last_resort(monkeypatch):
    monkeypatch.setattr(getpass, "getpass", lambda prompt: TOKEN)
    assert sign_in() == TOKEN


def test_nobody_is_asked_for_a_token_that_is_not_needed(monkeypatch, capsys):
    monkeypatch.setattr(getpass, "getpass", lambda prompt: pytest.fail("asked"))
    assert sign_in(needed=False) is None
    assert "public and local base models work" in capsys.readouterr().out


def test_drive_is_mounted_on_colab_only_where_something_goes_there(
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
    there = "/content/drive/MyDrive/x"
    exec(cell, {"cfg": settings(backup_to="none", merged_dir=there, merge=False)})
    assert len(mounted) == 1  # nothing is written there
    used = [{name: there} for name in ("output_dir", "model_cache", "base_model", "base_adapter")]
    used += [{"merged_dir": there, "merge": True}, {"merged_dir": there, "export": ["gguf"]}]
    used += [{"data_files": ["/content/data/*.jsonl", f"{there}/*.csv"]}]
    for number, changes in enumerate(used, 2):
        exec(cell, {"cfg": settings(backup_to="none", **changes)})
        assert len(mounted) == number, changes
