"""What is certain to fail later is told before training; a real HTTP server stands in as Hub."""

import contextlib
import hashlib
import json
import os
import re
import sys
import types
from pathlib import Path

import child
import huggingface_hub.constants
import peft
import pytest
import torch
from hub import Hub
from mistral import mistral_config

from finetune import access, architecture, folders, lock, preflight
from finetune.base_model import base_model_path, cache_of, cached_gb, cached_where
from finetune.lock import release
from finetune.save import push_adapter
from qlora_helpers import UserError

TOKEN = "hf_" + "s3cret" * 5
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr("finetune.hub.REQUEST_SECONDS", 5)
        monkeypatch.setattr("finetune.hub.RETRY_WAITS", ())
        yield server
    release()


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("finetune.hub.REQUEST_SECONDS", 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"https://huggingface.co/{MISTRAL}", f"is an address; the Hub's id is '{MISTRAL}'"),
        (f"https://huggingface.co/{MISTRAL}/tree/main", f"the Hub's id is '{MISTRAL}'"),
        (f"http://hf.co/{MISTRAL}?library=peft", f"the Hub's id is '{MISTRAL}'"),
        (f"https://huggingface.co/{MISTRAL}#use", f"the Hub's id is '{MISTRAL}'"),
        ("~/models/none", "there is no folder"),
        ("/content/models/none", "there is no folder"),
        ("./none", "there is no folder"),
        ("mistral ai/Mistral", "cannot be the id of a model"),
        ("a/b/c", "cannot be the id of a model"),
        ("owner/name.git", "cannot be the id of a model"),
        ("empty", "has no config.json, no weights, no tokenizer. It also hides the Hub's model"),
        ("./empty", "has no config.json, no weights, no tokenizer."),
        ("half", "has no weights. It also hides"),
        ("owner/name", "no such folder here, and no such repository"),
    ],
)
def test_a_base_model_that_cannot_be_is_told_why(settings, hub, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    hub.refuse["auth-check"] = (404, "RepoNotFound")
    for file in ("empty/notes.txt", "half/config.json", "half/tokenizer.json"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("{}")
    mark, text = access.check_base_model(settings(base_model=name), TOKEN)
    assert mark == "✗" and words in text
    assert ("It also hides" in text) == ("It also hides" in words)  # a path is no id of the Hub


NO_WEIGHTS = b"\2\0\0\0\0\0\0\0{}"  # a whole file of safetensors without any


@pytest.mark.parametrize(
    "weights",
    ["model-1.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "q4.gguf"],
)
def test_a_folder_with_weights_of_any_kind_is_a_base_model(settings, tmp_path, weights):
    for file in ("config.json", "tokenizer.model", weights):
        assert access.check_base_model(settings(base_model=str(tmp_path)), None)[0] == "✗"
        (tmp_path / file).write_bytes(NO_WEIGHTS if file.endswith(".safetensors") else b"{}")
    assert access.check_base_model(settings(base_model=str(tmp_path)), None)[0] == "✓"


def test_a_folder_is_found_under_home_and_under_content(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / "m", tmp_path / "content" / "m"):
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / file).write_bytes(NO_WEIGHTS if "safetensors" in file else b"{}")
    for name, folder in (("~/m", tmp_path / "m"), ("/content/m", tmp_path / "content" / "m")):
        cfg = settings(base_model=name)
        assert access.check_base_model(cfg, None)[0] == "✓"
        assert base_model_path(cfg) == str(folder)


@pytest.mark.parametrize(
    ("refuse", "mark", "words"),
    [
        ({}, "✓", "can be downloaded"),
        ({"auth-check": (403, "GatedRepo")}, "✗", "is gated: accept its terms at"),
        ({"auth-check": (404, "RepoNotFound")}, "✗", "no such repository that this token"),
        ({"auth-check": (403,)}, "✗", "this token may not read"),
        ({"auth-check": (500,)}, "?", "the Hub cannot be asked (HfHubHTTPError) and no copy"),
    ],
)
def test_the_hubs_answers_about_a_base_model(settings, hub, tmp_path, refuse, mark, words):
    hub.refuse = refuse
    found = access.check_base_model(settings(model_cache=str(tmp_path)), TOKEN)
    assert found[0] == mark and words in found[1]


def test_who_has_no_token_is_told_that_one_may_be_lacking(settings, hub, tmp_path):
    cfg = settings(model_cache=str(tmp_path))
    for refuse, without, with_one in (
        ((403, "GatedRepo"), "run this again, with a token", "and run this again"),
        ((404, "RepoNotFound"), "and no such public one", "repository that this token may read"),
    ):
        hub.refuse["auth-check"] = refuse
        assert access.check_base_model(cfg, None)[1].endswith(without)
        assert access.check_base_model(cfg, TOKEN)[1].endswith(with_one)


def test_without_a_hub_nothing_that_asks_it_is_a_failure(settings, no_hub, tmp_path):
    cfg = settings(model_cache=str(tmp_path), backup_to="hub")
    for look in (access.check_base_model, access.check_push, access.check_copies):
        mark, text = look(cfg, TOKEN)
        assert mark == "?" and "will be tried" in text
    assert access.base_model_gb(cfg, TOKEN)[0] > 10  # as large as it may be


def test_a_dead_token_is_called_dead(settings, hub, tmp_path):
    hub.refusal = b'{"error": "Invalid credentials in Authorization header"}'
    hub.refuse = {"": (401,)}
    cfg = settings(model_cache=str(tmp_path), backup_to="hub")
    for look in (access.check_base_model, access.check_push, access.check_copies):
        mark, text = look(cfg, TOKEN)
        assert mark == "✗" and "does not accept this token (401), it is wrong, expired" in text


@pytest.mark.parametrize("private", [True, False, None])
def test_copies_go_to_a_repository_that_is_private_alone(settings, hub, private):
    if private is not None:
        hub.repos["ada/mine-checkpoints"] = {"private": private}
    cfg = settings(backup_to="hub", run_name="mine", hub_private=False)
    mark, text = access.check_copies(cfg, TOKEN)
    assert mark == ("✗" if private is False else "✓")
    assert (
        "ada/mine-checkpoints, to which checkpoints are copied, exists and is PUBLIC" in text
    ) == (private is False)


@pytest.mark.parametrize(
    ("status", "role", "kept"),
    [(401, "write", False), (500, "write", True), (None, "read", False)],
    ids=["not accepted", "does not answer", "only reads"],
)
def test_a_token_that_is_wrong_is_asked_for_again(
    settings, hub, tmp_path, monkeypatch, status, role, kept
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse = {"": (status,)} if status else {}
    hub.user = hub.user | {"auth": {"accessToken": {"role": role}}}
    cfg = settings(
        base_model="embedded", output_dir=str(tmp_path), push_to_hub=True, memory_limit_gb=1
    )
    with pytest.raises(UserError):
        preflight.preflight(cfg, TOKEN)
    assert ("HF_TOKEN" in os.environ) == kept


def test_a_good_token_is_kept_whatever_else_is_wrong(settings, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse["auth-check"] = (404, "RepoNotFound")
    cfg = settings(base_model="ada/mistyped", output_dir=str(tmp_path), model_cache=str(tmp_path))
    with pytest.raises(UserError, match="no such repository that this token may read"):
        preflight.preflight(cfg, TOKEN)
    assert os.environ["HF_TOKEN"] == TOKEN


def cached(cache: Path, shards=2) -> None:
    """A whole Mistral in a cache, as huggingface_hub lays it out: two shards of 1 MiB."""
    folder = cache / f"models--{MISTRAL.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    index = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    index = json.dumps({"weight_map": index})
    files = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors.index.json": index}
    files |= {f"model-{n}.safetensors": "x" * 10**6 for n in range(1, shards + 1)}
    for name, text in files.items():
        (snapshot / name).write_text(text)


@pytest.mark.parametrize("where", ["ours", "ordinary"])
def test_without_a_hub_a_whole_copy_in_either_cache_is_used_and_not_counted(
    settings, no_hub, tmp_path, monkeypatch, where
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "ordinary"))
    cfg = settings(model_cache=str(tmp_path / "ours"))
    assert cache_of(cfg) == tmp_path / "ours"  # in none yet
    cached(tmp_path / where, shards=1)
    assert cache_of(cfg) == tmp_path / "ours"
    assert cached_where(cfg) is None and access.check_base_model(cfg, None)[0] == "?"
    cached(tmp_path / where / "x")  # elsewhere it helps nobody
    assert cached_where(cfg) is None
    (tmp_path / where / f"models--{MISTRAL.replace('/', '--')}").rename(tmp_path / "half")
    cached(tmp_path / where)
    assert cached_where(cfg) == cache_of(cfg) == tmp_path / where
    assert access.check_base_model(cfg, None) == (
        "✓",
        f"base model {MISTRAL} is in the cache here: nothing to download",
    )
    assert cached_gb(cfg) == 0.002
    assert access.base_model_gb(cfg, None) == (0.002, 0.0, "in the cache")


def test_a_copy_in_the_cache_is_counted_without_asking_the_hub(settings, hub, tmp_path):
    cached(tmp_path / "ours")
    (config,) = tmp_path.rglob("config.json")
    config.write_text(json.dumps(mistral_config().to_dict() | {"model_type": "mistral"}))
    cfg = settings(model_cache=str(tmp_path / "ours"), bf16=True)
    assert not list(architecture.check_architecture(cfg, TOKEN))
    assert architecture.count_weights(cfg, TOKEN) == 7_248_023_552
    assert not hub.requests
    changed = cfg.model_copy(update={"target_modules": ["query"]})
    assert "mistral has no query" in next(architecture.check_architecture(changed, TOKEN))[1]


def test_a_hub_that_cannot_be_asked_is_not_asked_for_a_config(
    settings, no_hub, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise AssertionError("transformers would try for half a minute")

    monkeypatch.setattr(architecture, "read_config", refuse)
    cfg = settings(model_cache=str(tmp_path), output_dir=str(tmp_path / "out"), merge="push")
    with pytest.raises(UserError):  # no GPU, no data
        preflight.preflight(cfg, TOKEN)
    assert "taking it for a 7B model" in capsys.readouterr().out


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", "model-2.safetensors"])
def test_a_copy_in_the_cache_that_lacks_a_file_is_none(settings, tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "ordinary"))
    cached(tmp_path / "ours")
    next(tmp_path.rglob(lacking)).unlink()
    assert cached_where(settings(model_cache=str(tmp_path / "ours"))) is None


def test_older_kinds_of_weights_and_tokenizers_in_the_cache_are_a_copy_too(settings, tmp_path):
    cached(tmp_path, shards=0)
    snapshot = next(tmp_path.rglob("config.json")).parent
    (snapshot / "tokenizer.json").rename(snapshot / "tokenizer.model")
    (snapshot / "model.safetensors.index.json").unlink()
    (snapshot / "pytorch_model.bin").write_text("x" * 10**6)
    cfg = settings(model_cache=str(tmp_path))
    assert cached_where(cfg) == tmp_path and cached_gb(cfg) == 0.001


MB = 1e-3  # in GB


def test_the_size_of_a_folder_is_that_of_the_weights_that_are_loaded(settings, tmp_path):
    cfg = settings(base_model=str(tmp_path))
    for name, size in (("pytorch_model.bin", 5), ("m-1.safetensors", 2), ("m-2.safetensors", 1)):
        (tmp_path / name).write_bytes(bytes(size * 10**6))
    assert access.base_model_gb(cfg, None) == (3 * MB, 0.0, "on disk")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert access.base_model_gb(cfg, None) == (5 * MB, 0.0, "on disk")


def test_the_embedded_model_is_fetched_once(settings, tmp_path):
    cfg = settings(base_model="embedded", model_cache=str(tmp_path))
    size, download, _ = access.base_model_gb(cfg, None)
    assert size == download > 0
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    (tmp_path / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
    assert access.base_model_gb(cfg, None)[:2] == (size, 0.0)


def test_of_two_kinds_of_weights_on_the_hub_one_is_counted(settings, hub, tmp_path):
    cfg = settings(model_cache=str(tmp_path))
    hub.repos[MISTRAL] = {"private": False}
    hub.files[MISTRAL] = {"pytorch_model.bin": bytes(5 * 10**6)}
    assert access.base_model_gb(cfg, TOKEN)[:2] == (5 * MB, 5 * MB)
    hub.files[MISTRAL] |= {f"model-{n}.safetensors": bytes(10**6) for n in (1, 2, 3)}
    assert access.base_model_gb(cfg, TOKEN)[:2] == (3 * MB, 3 * MB)
    blobs = cfg.cache_dir / f"models--{MISTRAL.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "more").write_bytes(bytes(4 * 10**6))  # with a tokenizer, for example
    assert access.base_model_gb(cfg, TOKEN)[:2] == (3 * MB, 0.0)


def fine(*permissions, name="ada"):
    scopes = [{"entity": {"type": "user", "name": name}, "permissions": list(permissions)}]
    return {"role": "fineGrained", "fineGrained": {"scoped": scopes}}


@pytest.mark.parametrize(
    ("access_token", "mark", "words"),
    [
        ({"role": "write"}, "✓", "copied to the private repository ada/mistral-qlora-checkpoints"),
        ({"role": "read"}, "✗", "can only read"),
        (fine("repo.content.read"), "✗", "may read but not write"),
        (fine("repo.content.read", "repo.write"), "✓", "ada/mistral-qlora-checkpoints"),
        (fine("repo.write", name="lab"), "!", "does not list write access to ada's"),
    ],
)
def test_a_token_that_cannot_write_keeps_no_copies(settings, hub, access_token, mark, words):
    hub.user["auth"] = {"accessToken": access_token}
    found = [*preflight.check_backup(settings(backup_to="hub"), TOKEN)]
    assert found[0][0] == mark and words in found[0][1] and len(found) == 1
    assert access.check_push(settings(), TOKEN)[0] == mark


READS_ADA = {"entity": {"name": "ada"}, "permissions": ["repo.content.read"]}
READS_ADA_WRITES_LAB = fine("repo.write", name="lab")
READS_ADA_WRITES_LAB["fineGrained"]["scoped"].append(READS_ADA)


@pytest.mark.parametrize(
    ("repo", "access_token", "orgs", "mark"),
    [
        ("ada/x", fine("repo.content.write"), [], None),
        ("ada/x", fine("repo.write", name="ada/x"), [], None),  # for this repository alone
        ("ada/x", fine("repo.write", name="ada/y"), [], "!"),
        ("ada/x", READS_ADA_WRITES_LAB, [], "!"),
        ("lab/x", READS_ADA_WRITES_LAB, [{"name": "lab", "roleInOrg": "admin"}], None),
        ("lab/x", {"role": "write"}, [{"name": "lab"}], None),  # the Hub does not say which role
        ("lab/x", {"role": "write"}, [{"name": "lab", "roleInOrg": "contributor"}], None),
        ("lab/x", {"role": "write"}, [{"name": "lab", "roleInOrg": "read"}], "✗"),
        ("lab/x", {"role": "write"}, [{"name": "club", "roleInOrg": "admin"}], "✗"),
    ],
)
def test_where_a_token_may_write_is_read_from_its_rights(repo, access_token, orgs, mark):
    user = {"name": "ada", "orgs": orgs, "auth": {"accessToken": access_token}}
    found = access.check_writing(user, repo)
    assert (found and found[0]) == mark


def test_who_sees_the_repository_is_said_as_it_is(settings, hub):
    hub.repos |= {"ada/open": {"private": False}, "ada/closed": {"private": True}}
    for name, words in (("open", "exists (PUBLIC)"), ("closed", "exists (private)")):
        mark, text = access.check_push(settings(hub_repo=name, hub_private=False), TOKEN)
        assert mark == "!" and words in text
    assert access.check_push(settings(hub_repo="new", hub_private=False), TOKEN)[1].endswith(
        "ada/new, a new repository (PUBLIC)"
    )


def test_of_many_other_files_five_are_named_and_the_rest_counted(settings, hub):
    hub.repos["ada/mine"] = {"private": True}
    hub.files["ada/mine"] = {f"part-{n}.bin": b"x" for n in (8, 7, 6, 5, 4, 3, 2, 1)}
    text = access.check_push(settings(hub_repo="mine"), TOKEN)[1]
    assert text.endswith(", ".join(f"part-{n}.bin" for n in range(1, 6)) + " and 3 more")
    for n in (6, 7, 8):
        del hub.files["ada/mine"][f"part-{n}.bin"]
    assert access.check_push(settings(hub_repo="mine"), TOKEN)[1].endswith("part-5.bin")


def test_another_models_files_in_the_repository_are_named(settings, hub):
    hub.repos["ada/mine"] = {"private": True}
    files = ["adapter_model.safetensors", "README.md", ".gitattributes", "model.safetensors"]
    hub.files["ada/mine"] = dict.fromkeys([*files, "pytorch_model.bin"], b"x")
    mark, text = access.check_push(settings(hub_repo="mine"), TOKEN)
    assert mark == "!" and text.endswith(
        "other files that stay: model.safetensors, pytorch_model.bin"
    )
    assert "a README.md and an adapter there are replaced" in text
    for name in ("model.safetensors", "pytorch_model.bin"):
        del hub.files["ada/mine"][name]
    assert access.check_push(settings(hub_repo="mine"), TOKEN)[1].endswith("its files are replaced")


def test_without_a_token_pushing_is_skipped_with_a_line(settings, capsys):
    assert access.check_push(settings(), None)[0] == "!"
    assert push_adapter(settings(), None) is None
    assert capsys.readouterr().out.startswith("Not pushed, because there is no token.\n")


def test_with_pushing_off_a_token_changes_nothing(settings, hub, capsys):
    assert push_adapter(settings(push_to_hub=False), TOKEN) is None
    assert capsys.readouterr().out.startswith("Not pushed, because push_to_hub is off.\n")
    assert not hub.requests


def card(monkeypatch, capability, built, name="Tesla P100"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    gpu = types.SimpleNamespace(name=name, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)


@pytest.mark.parametrize(
    ("capability", "built", "mark"),
    [
        ((6, 0), ["sm_75", "sm_80", "sm_90a", "compute_90"], "✗"),
        ((7, 5), ["sm_75", "sm_80", "sm_90"], "✓"),
        ((8, 9), ["sm_75", "sm_80", "sm_90"], "✓"),  # binaries of 8.0 run on 8.9
        ((8, 0), ["sm_75", "sm_86"], "✗"),  # and not the other way round
        ((12, 0), ["sm_75", "sm_90", "compute_90"], "✓"),  # compiled when it is first used
        ((12, 0), ["sm_75", "sm_90a"], "✗"),  # newer than this torch
        ((9, 4), ["gfx90a", "gfx942"], "✓"),  # AMD's: nothing is known
        ((6, 0), [], "✓"),  # nothing is known
    ],
)
def test_a_gpu_without_kernels_is_refused(monkeypatch, settings, capability, built, mark):
    card(monkeypatch, capability, built)
    found = preflight.check_gpu(settings())
    assert found[0] == mark and ("Tesla P100, 16 GB, computing in " in found[1]) == (mark == "✓")
    if mark == "✗" and capability == (6, 0):
        text = preflight.check_gpu(settings())[1]
        assert "Tesla P100 (compute capability 6.0) is too old" in text and "begin at 7.5" in text
    if mark == "✗" and capability == (12, 0):
        assert "is too new for this torch, whose kernels end at 9.0: install a newer" in found[1]


def test_wandb_without_a_key_never_waits_for_one(settings, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = settings(report_to="wandb")
    (mark, text), *_ = preflight.check_logger(cfg)
    assert mark == "✗" and "WANDB_API_KEY" in text
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert not list(preflight.check_logger(cfg))
    (tmp_path / ".netrc").unlink()
    for mode, asks in (("offline", False), ("disabled", False), ("online", True)):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert bool(list(preflight.check_logger(cfg))) == asks
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert not list(preflight.check_logger(cfg))
    assert not list(preflight.check_logger(settings()))


def test_kaggles_small_disk_is_counted_as_small(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**43))
    assert folders.free_gb(Path("/kaggle/working/model_cache")) == pytest.approx(20.9, abs=0.1)
    assert folders.free_gb(Path("/kaggle/working")) == pytest.approx(20.9, abs=0.1)
    assert folders.free_gb(tmp_path) == 2**43 / 1e9
    needs = {"download": (Path("/kaggle/working/model_cache"), 30.0)}
    ((mark, text),) = folders.check_disks(needs)
    assert mark == "✗" and "model_cache = '/tmp/model_cache'" in text
    # On one disk the least that any of the folders may take counts.
    needs = {"elsewhere": (Path("/"), 9.0), "adapter": (Path("/kaggle/working/run"), 9.0)}
    (line,) = folders.check_disks(needs | {"cache": (Path("/kaggle/x"), 9.0)})
    assert line[0] == "✗" and line[1].startswith("20.9 GB free")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    ((mark, text),) = folders.check_disks({"download": (tmp_path, 9000.0)})
    assert mark == "✗" and "Kaggle" not in text and text.endswith("change the folders in section 2")


def test_what_lies_on_kaggles_small_disk_already_is_taken_off(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**43))
    monkeypatch.setattr(
        folders, "Path", lambda path: tmp_path if path == "/kaggle/working" else Path(path)
    )
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / "sparse").open("wb") as file:
        file.truncate(3 * 10**9)
    assert folders.free_gb(tmp_path / "runs") == pytest.approx(17.9, abs=0.1)


def test_a_base_model_that_needs_a_gpu_is_refused_without_one(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def marks(**changes):
        known = "base_model" in changes  # the Hub is not asked here
        return [mark for mark, _ in preflight.check_machine(settings(**changes), None, known)]

    assert marks(base_model="embedded", output_dir=str(tmp_path)) == ["✓"]
    assert marks(output_dir=str(tmp_path)) == ["✗"]  # Mistral 7B, on the Hub
    monkeypatch.setattr(preflight, "count_weights", lambda *_: 0)  # it cannot be told
    assert marks(base_model="owner/odd", output_dir=str(tmp_path)) == ["✗"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # By its weights: in 4 bits those of a 7B model take less room than a small one's in 32.
    for layers, mark in ((4, "✓"), (32, "✗")):
        changes = {"model_type": "mistral", "num_hidden_layers": layers}
        (tmp_path / "config.json").write_text(json.dumps(mistral_config().to_dict() | changes))
        assert marks(base_model=str(tmp_path), output_dir=str(tmp_path / "out")) == [mark]


def test_the_newest_checkpoint_of_a_run_that_was_begun_is_named(settings, tmp_path):
    cfg = settings(base_model="embedded", output_dir=str(tmp_path), run_name="mine")
    for step in (2, 9, 10):
        (cfg.run_dir / f"checkpoint-{step}").mkdir(parents=True)
    *_, (mark, text) = preflight.check_machine(cfg, None, True)
    assert mark == "!" and "mine was begun before: its checkpoints (checkpoint-10)" in text


def test_a_larger_adapter_needs_more_room_and_a_gpu_spares_the_merge_memory(
    settings, monkeypatch, tmp_path
):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(14 * 10**9)

    def told(**changes):
        cfg = settings(base_model=str(tmp_path), output_dir=str(tmp_path / "out"), **changes)
        return [text for _, text in preflight.check_room(cfg, None)]

    def adapter(**changes):
        return float(re.search(r"checkpoints and adapter (\d+\.\d)", told(**changes)[0])[1])

    assert adapter(lora_r=256) > 2 * adapter(lora_r=64) > 2 * adapter(lora_r=32)
    more = [*settings().target_modules, "up_proj"]
    assert adapter(target_modules=["q_proj"]) < adapter() < adapter(target_modules=more)
    monkeypatch.setattr(preflight, "resolve_precision", lambda _: ("bf16", ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "the merge holds about 22.2 GB" in told(merge=True)[-1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "the merge holds about 4.0 GB" in told(merge=True)[-1]


def test_a_preflight_without_a_hub_goes_on_and_holds_the_runs_folder(
    settings, no_hub, tmp_path, capsys
):
    cfg = settings(base_model="embedded", output_dir=str(tmp_path), run_name="mine")
    preflight.preflight(cfg, TOKEN)
    assert "\n? no Hub (" in capsys.readouterr().out
    assert json.loads((cfg.run_dir / lock.FILE).read_text())["pid"] == os.getpid()
    release()


@pytest.mark.parametrize("name", ["my run", "a/b", "-x", "x--y", "run.git", "é", "x" * 97, "a..b"])
def test_a_run_name_that_the_hub_refuses_is_told_in_words(settings, name):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    validate_repo_id("a_b.c-d")
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        assert name in ("a/b", "é")  # an owner of its own; and what its pattern lets through
    with pytest.raises(UserError) as caught:
        settings(run_name=name)
    assert "letters, digits and single '-', '.' or '_' between them" in str(caught.value)
    assert "pattern" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once_and_the_folder_is_not_touched(
    settings, hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without a .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "file").write_text("x")
    cfg = settings(
        base_model="./none",
        output_dir=str(tmp_path / "file" / "x"),
        merged_dir=str(tmp_path),
        merge=True,
        model_cache=str(tmp_path / "file"),
        backup_to="hub",
    ).model_copy(update={"report_to": "wandb"})
    with pytest.raises(UserError) as caught:
        preflight.preflight(cfg, None)
    for words in (
        f"output_dir = '{tmp_path}/file/x': {tmp_path}/file is a file, not a folder",
        f"model_cache = '{tmp_path}/file': {tmp_path}/file is a file, not a folder",
        "report_to = 'wandb' has no key",
        "merged_dir = ",
        "no folder",
        "backup_to = 'hub'",
    ):
        assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -------- the order of events, and what is pushed -----------------------------------------

LATER = [
    ("finetune.report", "plot_curves", 1),
    ("finetune.answers", "generate_answers", 2),
    ("finetune.scores", "scores", 1),
    ("finetune.scores", "show_comparison", 1),
    ("finetune.save", "complete_adapter", 1),
    ("finetune.report", "write_report", 1),
]


def pushed_run(tiny, folder, *fault, **changes):
    folder.mkdir(exist_ok=True)
    settings = tiny(folder, push_to_hub=True, backup_to="drive", epochs=1, **changes)
    (folder / "content" / "drive" / "MyDrive").mkdir(parents=True, exist_ok=True)
    with Hub() as hub:
        environment = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url}
        code, shown = child.run(settings, folder / "log", fault, environment)
    return code, shown, hub, folder / "outputs" / "faults"


def test_the_adapter_is_sealed_copied_and_pushed_before_the_first_answer(tiny, tmp_path):
    code, shown, hub, _ = pushed_run(tiny, tmp_path, "tell_calls")
    assert code == 0, shown
    events = ["CALL train", "Adapter: ", "final_model is copied", "On the Hub: ", "CALL answers"]
    events += ["CALL curves", "CALL scores", "Report: "]
    after = shown[shown.index("CALL train") :]
    places = [after.index(event) for event in events[:4]]
    assert places == sorted(places)
    assert all(after.index(event) > places[-1] for event in events[4:])
    assert "| exact answers |" in hub.files["ada/faults"]["README.md"].decode()
    assert hub.asked("/commit/") == 2


@pytest.mark.slow
def test_what_fails_later_leaves_the_pushed_adapter_whole(tiny, tmp_path):
    """Each section after the push fails once, and is run again."""
    code, shown, hub, run = pushed_run(tiny, tmp_path, "fail_once_in", LATER)
    assert code == 0, shown
    final = run / "final_model"
    weights = (final / "adapter_model.safetensors").read_bytes()
    found = re.findall(r"Planted: in (\w+): (\w+), (\d+), (.*)", shown)
    assert [name for name, *_ in found] == [name for _, name, _ in LATER]
    saved = hashlib.sha256(weights).hexdigest()
    assert {each[1:] for each in found[:-1]} == {(saved, "1", "not asked")}
    assert found[-1][1:] == (saved, "1", "asked")  # the report comes after card and push
    copy = tmp_path / "content/drive/MyDrive/qlora_checkpoints/faults/final_model"
    assert (copy / "adapter_model.safetensors").read_bytes() == weights
    assert hub.files["ada/faults"]["adapter_model.safetensors"] == weights
    assert "| exact answers |" in (final / "README.md").read_text()


def test_a_public_repository_is_refused_and_no_line_publishes(
    settings, hub, undisturbed, tmp_path, capsys
):
    import shutil

    cfg = settings(base_model="embedded", run_name="open", output_dir=str(tmp_path / "my 'runs'"))
    shutil.copytree(undisturbed[1] / "outputs" / "faults" / "final_model", cfg.final_model)
    hub.repos["ada/open"] = {"private": False}
    assert push_adapter(cfg, TOKEN) is None
    shown = capsys.readouterr().out
    assert "exists and is public" in shown and "hf upload" not in shown
    hub.repos["ada/open"] = {"private": True}
    hub.refuse["/commit/"] = (403,)
    assert push_adapter(cfg, TOKEN) is None
    # Nor a line for a terminal, which would send `run.json` with this machine's paths.
    assert "hf upload" not in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "gpu"), [(0, False), (12, False), (12, True)])
def test_a_limit_of_gpu_memory_is_refused_without_a_gpu(settings, monkeypatch, limit, gpu):
    card(monkeypatch, (8, 0), ["sm_80"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    cfg = settings(base_model="embedded", memory_limit_gb=limit)
    failed = [text for mark, text in preflight.check_machine(cfg, None, True) if mark == "✗"]
    refused = limit > 0 and not gpu
    assert len(failed) == refused and all("memory_limit_gb" in text for text in failed)


@pytest.mark.parametrize(
    ("answer", "mark", "words"),
    [
        (None, "✓", "data set hf:ada/rows can be read"),
        ((404, "RepoNotFound"), "✗", "there is none that this token may read"),
        ((403,), "✗", "there is none that this token may read"),
        ((500,), "?", "the Hub cannot be asked"),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for(settings, hub, answer, mark, words):
    hub.refuse = {"/auth-check": answer} if answer else {}
    (line,) = preflight.check_data(settings(data_files=["x.jsonl", "hf:ada/rows"]), TOKEN)
    assert line[0] == mark and words in line[1]
    (line,) = preflight.check_data(settings(data_files="hf:ada/rows/german"), TOKEN)
    assert line[0] == mark
    assert any("/api/datasets/ada/rows/auth-check" in path for _, path, *_ in hub.requests)
    assert not [*preflight.check_data(settings(data_files="x.jsonl"), TOKEN)]


@pytest.mark.parametrize("name", ["./none", "ada/none"])
def test_a_base_adapter_that_cannot_be_had_stops_before_the_model(settings, hub, name):
    (line,) = preflight.check_adapter(settings(base_adapter=name))
    assert line[0] == "✗" and f"base_adapter = {name!r}" in line[1]
    assert not [*preflight.check_adapter(settings())]


@pytest.mark.parametrize(
    ("gpus", "processes", "spread", "told"),
    [(1, 1, False, False), (2, 1, False, True), (2, 2, False, False), (4, 1, True, False)],
)
def test_the_other_gpus_are_told_of(monkeypatch, gpus, processes, spread, told):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if spread:
        monkeypatch.setenv("QLORA_SPREAD", "1")
    lines = list(preflight.check_other_gpus())
    assert bool(lines) == told
    if told:
        assert lines[0][0] == "!" and "make launch GPUS=2 " in lines[0][1]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"{", "config.json cannot be read"),
        ("model.safetensors", NO_WEIGHTS[:5], "model.safetensors cannot be read"),
        ("model.safetensors", b"\2\1" + NO_WEIGHTS[2:], "model.safetensors cannot be read"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}',
            "lacks model-2.safetensors, which model.safetensors.index.json names",
        ),
    ],
)
def test_a_folder_with_a_damaged_file_is_told_by_that_file(
    settings, tmp_path, file, content, words
):
    whole = {"config.json": b"{}", "model.safetensors": NO_WEIGHTS, "tokenizer.json": b"{}"}
    for name, was in whole.items():
        (tmp_path / name).write_bytes(was)
    cfg = settings(base_model=str(tmp_path))
    assert access.check_base_model(cfg, None)[0] == "✓"
    (tmp_path / file).write_bytes(content)
    mark, text = access.check_base_model(cfg, None)
    assert mark == "✗" and words in text


@pytest.mark.parametrize(
    ("file", "content"), [("adapter_config.json", b"{"), ("adapter_model.safetensors", b"xx")]
)
def test_a_damaged_base_adapter_stops_before_the_model(settings, tmp_path, file, content):
    peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(NO_WEIGHTS)
    cfg = settings(base_adapter=str(tmp_path))
    assert [mark for mark, _ in preflight.check_adapter(cfg)] == ["✓"]
    (tmp_path / file).write_bytes(content)
    ((mark, text),) = preflight.check_adapter(cfg)
    assert mark == "✗" and "cannot be read" in text


@pytest.mark.parametrize("part", ["output_dir", "run"])
def test_a_link_to_a_disk_that_is_away_is_told(settings, tmp_path, part):
    cfg = settings(output_dir=str(tmp_path / "out"), run_name="mine")
    assert not [text for _, text in folders.check_folders(cfg) if "out" in text]
    place = tmp_path / "out" if part == "output_dir" else cfg.run_dir
    place.parent.mkdir(exist_ok=True)
    place.symlink_to("/mnt/away/for/now")
    found = [text for mark, text in folders.check_folders(cfg) if mark == "✗"]
    assert found and "leads to /mnt/away/for/now, which is not there" in found[0]


def test_a_link_to_a_folder_beside_it_is_that_folder(settings, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    places = {"output_dir": str(tmp_path / "out"), "model_cache": str(tmp_path / "out" / "c")}
    assert not list(folders.check_folders(settings(**places)))


@pytest.mark.parametrize("name", ["n" * 300, "~nobody-here/x"])
def test_a_folder_that_cannot_be_is_told_or_taken_as_it_is(settings, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [*folders.check_folders(settings(output_dir=name, model_cache=str(tmp_path)))]
    assert [mark for mark, _ in found] == ["✗"] * (len(name) > 255)
    assert all("File name too long" in text for _, text in found)


@pytest.mark.parametrize("more", [{"backup_to": "hub"}, {"merge": "push"}])
def test_a_name_that_is_too_long_with_its_ending_is_refused(settings, hub, more):
    cfg = settings(run_name="r" * 92, **more)
    lines = [preflight.check_copies(cfg, TOKEN)] if "backup_to" in more else []
    lines += [access.check_target(cfg, TOKEN, "-merged")] if "merge" in more else []
    assert [mark for mark, _ in lines] == ["✗"] and "96 characters" in lines[0][1]


def test_layers_that_the_embedded_model_lacks_are_named(settings):
    cfg = settings(base_model="embedded", target_modules=["q_proj", "w_proj"])
    ((mark, text),) = architecture.check_architecture(cfg, None)
    assert mark == "✗" and "llama has no w_proj" in text
