"""The merged model goes to a repository of its own, private, and a broken upload goes on."""

import hashlib
import json

import pytest
import torch
from mistral import mistral_config

from finetune.access import check_merged
from finetune.files import seal
from finetune.folders import folder_settings
from finetune.hub import HERE
from finetune.merge import write_shards
from finetune.preflight import check_room, preflight
from finetune.save import push_merged
from qlora_helpers import UserError

TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def cfg(settings, tmp_path):
    """A merged model of three shards."""
    cfg = settings(run_name="mine", merge="push", merged_dir=str(tmp_path / "merged"))
    folder = tmp_path / "merged"
    folder.mkdir()
    weights = {f"w{n}": torch.full((64,), float(n)) for n in range(3)}
    write_shards(iter(weights.items()), folder, torch.float32, 256)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text(f"```python\n{HERE}\n```\n")
    (folder / "run.json").write_text(json.dumps({"settings": {"output_dir": "/home/ada/out"}}))
    (folder / "mine.txt").write_text("rows of mine")
    seal(folder, "merged", "mine")
    return cfg


def put(hub):
    """The names of the contents that were sent, each time that they were."""
    return [path.removeprefix("/lfs/") for method, path, *_ in hub.requests if method == "PUT"]


def test_it_is_pushed_whole_and_private_to_a_repository_of_its_own(cfg, hub):
    assert push_merged(cfg, TOKEN) == f"{hub.url}/ada/mine-merged"
    assert hub.private("ada/mine-merged") and list(hub.repos) == ["ada/mine-merged"]
    files = hub.files["ada/mine-merged"]
    shards = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    assert shards | {"model.safetensors.index.json", "config.json", "tokenizer.json"} <= set(files)
    assert "mine.txt" not in files and b"/home/ada" not in hub.sent()
    assert b'name = "ada/mine-merged"' in files["README.md"]
    assert len(put(hub)) == len(set(put(hub))) == 3


@pytest.mark.slow
def test_an_upload_that_broke_goes_on_where_it_was(cfg, hub, tmp_path, capsys):
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    first, second, _ = (hashlib.sha256(path.read_bytes()).hexdigest() for path in shards)
    hub.refuse = {f"/lfs/{second}": (500,)}
    assert push_merged(cfg, TOKEN) is None
    out = capsys.readouterr().out
    assert f"Nothing is lost: the merged model is in {cfg.merged_dir}. Run this cell again" in out
    assert "config.json" not in hub.files["ada/mine-merged"]
    hub.refuse = {}
    assert push_merged(cfg, TOKEN) and len(hub.files["ada/mine-merged"]) >= 8
    assert put(hub).count(first) == 1


def test_a_public_repository_of_that_name_gets_nothing(cfg, hub):
    hub.repos["ada/mine-merged"] = {"private": False}
    assert push_merged(cfg, TOKEN) is None
    assert not put(hub) and not hub.files.get("ada/mine-merged")
    assert push_merged(cfg.model_copy(update={"hub_private": False}), TOKEN)


def test_without_a_token_it_stays_here(cfg, hub, capsys):
    assert push_merged(cfg, None) is None and not hub.requests
    assert f"The merged model is in {cfg.merged_dir}" in capsys.readouterr().out


def test_its_size_and_its_repository_are_told_before_training(settings, hub):
    cfg = settings(run_name="mine", merge="push", push_to_hub=False)
    told = "the merged model, 14.5 GB: will push to ada/mine-merged, a new repository (private)"
    assert list(check_merged(cfg, TOKEN, 14.5)) == [("✓", told)]
    hub.repos["ada/mine-merged"] = {"private": True}
    names = ["README.md", "config.json", "model-00001-of-00002.safetensors", "run.json"]
    hub.files["ada/mine-merged"] = dict.fromkeys([*names, "model.safetensors.index.json"], b"x")
    ((mark, text),) = check_merged(cfg, TOKEN, 14.5)
    assert mark == "!" and text.endswith("which exists (private): its files are replaced")
    hub.files["ada/mine-merged"]["pytorch_model.bin"] = b"x"
    ((_, text),) = check_merged(cfg, TOKEN, 14.5)
    assert text.endswith(
        "a README.md and a model there are replaced, beside other files that stay: "
        "pytorch_model.bin"
    )
    hub.repos["ada/mine-merged"] = {"private": False}
    ((mark, text),) = check_merged(cfg, TOKEN, 14.5)
    assert mark == "✗" and "ada/mine-merged exists and is PUBLIC" in text
    assert "there is no token" in next(check_merged(cfg, None, 14.5))[1]
    assert cfg.needs_hub and not list(check_merged(settings(merge=True), TOKEN, 14.5))


def save_config(folder, **more):
    """Of Mistral-7B."""
    config = mistral_config().to_dict() | {"model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config | more))


def room(cfg, monkeypatch):
    """What preflight counts on disks, GB by its name, and its other lines."""
    found = {}

    def remember(needs):
        found.update({name: round(size, 1) for name, (_, size) in needs.items()})
        return iter(())

    monkeypatch.setattr("finetune.preflight.check_disks", remember)
    return found, [text for _, text in check_room(cfg, None)]


@pytest.mark.parametrize("stored", [4.1, 14.5, 29.0], ids=["4 bits", "16 bits", "32 bits"])
@pytest.mark.parametrize(("bf16", "written"), [(True, 14.5), (False, 29.0)])
def test_what_a_merge_writes_goes_by_its_weights_and_not_by_their_size_on_disk(
    settings, tmp_path, monkeypatch, stored, bf16, written
):
    """On a CPU `bf16 = False` computes in 32 bits."""
    four = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    save_config(tmp_path, **four if stored < 5 else {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(stored * 10**9))
    asked = {"export": ["base", "gguf:q8_0"], "merge": "push"}
    cfg = settings(base_model=str(tmp_path), bf16=bf16, **asked)
    found, (memory,) = room(cfg, monkeypatch)
    assert found == {
        "checkpoints and adapter": 1.6,  # four of them, and the adapter with its zip
        "merged model": written,
        "dequantised base model": round(written + 0.53 * 14.5 + 0.1, 1),
        "GGUF": 7.7,
    }
    if not torch.cuda.is_available():
        assert f"the merge holds about {22.8 if bf16 else 41.7} GB" in memory


def test_of_the_embedded_model_the_hub_is_asked_nothing(settings, hub, monkeypatch):
    found, _ = room(settings(base_model="embedded", bf16=True, merge=True), monkeypatch)
    assert found["merged model"] == 0.3 and not hub.requests


@pytest.mark.parametrize(("bf16", "size"), [(True, 14.5), (False, 29.0)])
def test_the_size_that_is_pushed_is_the_one_that_is_written(
    settings, tmp_path, hub, capsys, bf16, size
):
    (base := tmp_path / "base").mkdir()
    save_config(base)
    for name in ("model.safetensors", "tokenizer.json"):
        (base / name).write_bytes(b"\2\0\0\0\0\0\0\0{}")  # a file of no weights
    asked = {"merge": "push", "push_to_hub": False, "bf16": bf16, "output_dir": str(tmp_path)}
    with pytest.raises(UserError):  # there are no rows
        preflight(settings(base_model=str(base), run_name="mine", **asked), TOKEN)
    assert f"the merged model, {size} GB: will push to ada/mine-merged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"export": ["base"]}, {"dequantised base model": 1.1}),
        ({"export": ["gguf"]}, {"converters": 0.1, "merged model": 1.0, "GGUF": 1.0}),
        ({"export": ["base", "gguf:q8_0"]}, {"dequantised base model": 1.6}),
        (
            {"export": ["base", "gguf:f32"], "merge": True},
            {"dequantised base model": 3.1, "merged model": 1.0, "GGUF": 2.0},
        ),
    ],
)
def test_room_for_what_is_exported_is_counted(settings, tmp_path, changes, told, monkeypatch):
    weights = tmp_path / "base" / "model.safetensors"
    weights.parent.mkdir()
    with weights.open("wb") as file:
        file.truncate(10**9)
    cfg = settings(base_model=str(weights.parent), bf16=True, **changes)
    found, _ = room(cfg, monkeypatch)
    found.pop("checkpoints and adapter")
    assert found == told
    assert ("merged_dir" in folder_settings(cfg)) == ("merged model" in told)
