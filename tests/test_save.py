"""Sections 4 and 14: asked early, saved here first, then pushed to a real HTTP server that stands
in for the Hub.
"""

import ast
import dataclasses
import json
import os
import shutil
import types
import zipfile

import datasets
import pytest
import torch
import transformers
import yaml
from hub import Hub
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from sums import checksums

from finetune.access import base_model_gb, check_base_model, check_push
from finetune.batches import Cut
from finetune.card import model_card
from finetune.files import read_seal, why_unusable
from finetune.machine import computing_type, resolve_precision
from finetune.plan import Plan
from finetune.preflight import check_room, preflight
from finetune.save import complete_adapter, manifest, roles_of, save_adapter
from finetune.tokens import encode_example, encode_prompt
from qlora_helpers import UserError

TOKEN = "hf_" + "s3cret" * 5
RESULT = {"rows": 2} | {
    when: {"exact_match": 0.0, "stopped": 1.0, "validation_loss": 2.0}
    for when in ("before", "after")
}
PLAN = Plan(Cut(2, False, "sdpa"), 1, 1, 5, 1, 1, 100.0, 9.0, 1.0, "as set", [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, settings, smollm_path, smollm_tokenizer):
    """A trained adapter (its weights set by hand) saved the notebook's way: settings, model,
    backup.
    """
    import peft

    root = tmp_path_factory.mktemp("outputs")
    cfg = settings(base_model="embedded", run_name="save-test", output_dir=str(root))
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    data = datasets.Dataset.from_list([encode_example(smollm_tokenizer, "Hello", "Hi")])
    trainer = types.SimpleNamespace(
        model=model, train_dataset=data, state=transformers.TrainerState(global_step=5), run="a1"
    )
    run = manifest(cfg, trainer, PLAN, RESULT)
    backup = save_adapter(model, smollm_tokenizer, cfg.final_model, model_card(cfg, run), run)
    return cfg, model, backup


def test_what_is_saved_answers_as_what_was_trained(saved, smollm_path, smollm_tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg, model, _ = saved
    ids = torch.tensor([encode_prompt(smollm_tokenizer, "Hello")])
    base = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.allclose(base(ids).logits, model(ids).logits, atol=1e-2)
        loaded = PeftModel.from_pretrained(base, cfg.final_model)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    chat = [{"role": "user", "content": "Hello"}]
    tokenizer = AutoTokenizer.from_pretrained(cfg.final_model)
    assert (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        == ids[0].tolist()
    )


def test_the_seal_covers_every_file_that_is_saved(saved, tmp_path):
    """Also after the card and the manifest were written anew."""
    folder = shutil.copytree(saved[0].final_model, tmp_path / "run" / "final_model")
    for card in (None, "# Another card"):
        if card:
            run = json.loads((folder / "run.json").read_text())
            complete_adapter(folder, card, run | {"results": {"after": {"exact_match": 0.5}}})
            assert (folder / "README.md").read_text() == card
            assert json.loads((folder / "run.json").read_text())["results"]["after"]
        names = {path.name for path in folder.iterdir()} - {"checksums.json"}
        assert {"run.json", "README.md", "adapter_model.safetensors"} <= names
        assert set(read_seal(folder)["files"]) == names
        assert not why_unusable(folder, "adapter")


def test_the_zip_has_the_card_and_the_scores_that_come_after_the_answers(saved, tmp_path):
    folder = shutil.copytree(saved[0].final_model, tmp_path / "run" / "final_model")
    for card in ("# One", "# Another"):
        complete_adapter(folder, card, {"results": {"after": card}})
        (place,) = folder.parent.glob("*.zip")
        assert place.name.startswith("run-") and read_seal(folder)["run"] == "run"
        with zipfile.ZipFile(place) as archive:
            assert archive.read("README.md").decode() == card
            assert json.loads(archive.read("run.json"))["results"]["after"] == card


def test_a_card_that_cannot_be_written_leaves_the_adapter_as_it_was(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved[0].final_model, tmp_path / "run" / "final_model")
    before = checksums(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.save.seal", full)
    with pytest.raises(UserError, match=r"The disk is full: .* The adapter in it is whole\."):
        complete_adapter(folder, "# Another card", {"results": {}})
    assert checksums(folder) == before and not why_unusable(folder, "adapter")
    assert [path.name for path in folder.parent.iterdir()] == ["final_model"]


def test_other_weights_or_another_runs_are_saved_though_the_rest_is_the_same(
    saved, smollm_tokenizer, tmp_path
):
    _, model, _ = saved
    folder = tmp_path / "run" / "final_model"
    weight = next(p for p in model.parameters() if p.requires_grad)
    kept = weight.detach().clone()

    def save(card, seed):
        run = {"fingerprint": {"seed": seed}, "created": card}
        save_adapter(model, smollm_tokenizer, folder, card, run)
        return (folder / "README.md").read_text()

    assert [save("one", 1), save("the same", 1)] == ["one", "one"]
    assert save("another run", 2) == "another run"
    with torch.no_grad():
        weight.add_(1.0)
    assert save("other weights", 2) == "other weights"
    with torch.no_grad():
        weight.copy_(kept)


RUN = {
    "results": {"training": {"train_loss": 1.0}},
    "base_revision": "c0ffee",
    "device": "a GPU",
    "versions": {"torch": "2.13", "peft": "0.19"},
    "fingerprint": {"training rows": "f00d"},
}


def header(card):
    """What the Hub reads of a card."""
    return yaml.safe_load(card.split("---\n")[1])


def code(card):
    """The calls in the card's Python, with those of their arguments that are constants."""
    calls = {}
    for node in ast.walk(ast.parse(card.split("```python\n")[1].split("```")[0])):
        if isinstance(node, ast.Call):
            constants = [word for word in node.keywords if isinstance(word.value, ast.Constant)]
            calls[ast.unparse(node.func)] = {word.arg: word.value.value for word in constants}
    return calls


@pytest.mark.parametrize(
    ("base_model", "name", "told"),
    [
        ("owner/base-7b", "owner/base-7b", "owner/base-7b"),
        ("/home/me/private/mine", "mine", None),
        ("embedded", "SmolLM2-135M-Instruct (embedded)", None),
    ],
)
def test_the_card_names_the_base_model_but_no_folder(settings, base_model, name, told):
    cfg = settings(base_model=base_model, run_name="my-run")
    for merged, library in ((False, "peft"), (True, "transformers")):
        card = model_card(cfg, RUN, merged)
        assert header(card).get("base_model") == told and header(card)["library_name"] == library
        what = "{} with a LoRA adapter merged into it" if merged else "A LoRA adapter for {}"
        assert f"\n{what.format(name)}, revision c0ffee, trained with 4-bit NF4" in card
        assert "/home/me" not in card and "\n# my-run\n" in card
    assert f"{name}, trained with" in model_card(cfg, RUN | {"base_revision": None})


def test_the_card_says_how_it_was_trained_and_how_it_did(settings):
    cfg = settings(lora_r=8, lora_alpha=24, batch_size=3, gradient_accumulation=5, seed=7)
    cfg = cfg.model_copy(update={"learning_rate": 1.5e-4})
    card = model_card(cfg, RUN)
    assert "r 8, alpha 24, learning rate 0.00015,\n15 examples a step, seed 7." in card
    assert "`f00d`" in card and "Made with torch 2.13, peft 0.19." in card
    assert "It has not been asked the held-out rows yet." in card
    scores = {"before": {"exact_match": 0.25}, "after": {"exact_match": 0.75}, "rows": 12}
    table = [line.split("|") for line in model_card(cfg, RUN | {"results": scores}).splitlines()]
    table = [[cell.strip() for cell in line[1:-1]] for line in table if len(line) > 2]
    assert table[0] == ["on 12 held-out rows", "before", "after"]
    assert [row[1:] for row in table[2:]] == [["25%", "75%"]]


def test_the_cards_lines_load_the_adapter_on_the_base_as_it_was_quantised(settings):
    cfg = settings(base_model="embedded", bf16=False, max_new_tokens=33)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    dtype = str(computing_type(resolve_precision(False)[0])).removeprefix("torch.")
    asked = code(model_card(cfg, RUN))
    assert asked["BitsAndBytesConfig"] == nf4 | {"bnb_4bit_compute_dtype": dtype}
    assert asked["AutoModelForCausalLM.from_pretrained"]["dtype"] == dtype
    merged = code(model_card(cfg, RUN, merged=True))
    assert "BitsAndBytesConfig" not in merged
    assert merged["AutoModelForCausalLM.from_pretrained"]["dtype"] == "auto"
    for calls in (asked, merged):
        assert calls["model.generate"] == {"max_new_tokens": 33}


def test_the_backup_holds_the_folder(saved):
    cfg, _, backup = saved
    assert backup.name.startswith("save-test-") and read_seal(cfg.final_model)["run"] == "save-test"
    with zipfile.ZipFile(backup) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == {path.name for path in cfg.final_model.iterdir()}
        assert archive.testzip() is None


def test_the_manifest_says_what_the_adapter_is(saved):
    cfg = saved[0]
    run = json.loads((cfg.final_model / "run.json").read_text())
    assert run["settings"]["lora_r"] == 32 and run["settings"]["run_name"] == "save-test"
    assert run["versions"]["torch"] == torch.__version__
    assert run["base_revision"] is None  # a folder has none
    assert run["results"] == RESULT and run["plan"] == {
        n: v for n, v in dataclasses.asdict(PLAN).items() if n != "settings"
    }


def test_nothing_is_saved_as_the_run_that_section_2_was_edited_to(saved):
    """Its fingerprint would tell that run that it is finished, and a card what was not trained."""
    cfg, model, _ = saved
    data = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    options = {"train_dataset": data, "state": transformers.TrainerState(), "run": "a1"}
    trainer, plan = (
        types.SimpleNamespace(model=model, **options),
        dataclasses.replace(PLAN, settings=cfg),
    )
    for change in ({"learning_rate": 0.5}, {"run_name": "other"}, {"data_files": "others.jsonl"}):
        with pytest.raises(UserError, match=f"changed since[^•]*• {next(iter(change))} was "):
            manifest(cfg.model_copy(update=change), trainer, plan, RESULT)
    asked = cfg.model_copy(update={"max_new_tokens": 9, "sample_rows": 2, "merge": True})
    assert manifest(asked, trainer, plan, RESULT)["settings"]["max_new_tokens"] == 9


TALK = [["system", "s", True], ["user", "q", True], ["assistant", "a", True]]


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "q", "completion": "a"}, ["user"]),
        ({"prompt": "q", "completion": "a", "turns": json.dumps(TALK)}, ["system", "user"]),
        ({"prompt": "", "completion": "a whole text"}, []),
        ({"input_ids": [1, 2]}, []),
    ],
)
def test_the_manifest_says_whose_turns_a_row_has(row, roles):
    assert roles_of(datasets.Dataset.from_list([row])) == roles


def test_the_manifest_has_the_revision_of_a_base_from_the_hub(saved, monkeypatch):
    cfg, model, _ = saved
    monkeypatch.setattr(model.config, "_commit_hash", "c0ffee", raising=False)
    data = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    options = {"train_dataset": data, "state": transformers.TrainerState(), "run": "a1"}
    run = manifest(cfg, types.SimpleNamespace(model=model, **options), PLAN, RESULT)
    assert run["base_revision"] == run["fingerprint"]["base_revision"] == "c0ffee"


def test_a_save_that_dies_leaves_the_earlier_adapter_whole(saved, smollm_tokenizer, monkeypatch):
    cfg, model, _ = saved
    before = load_file(cfg.final_model / "adapter_model.safetensors")
    monkeypatch.setattr(
        type(smollm_tokenizer),
        "save_pretrained",
        lambda *_: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, smollm_tokenizer, cfg.final_model, "", {})
    after = load_file(cfg.final_model / "adapter_model.safetensors")
    assert before.keys() == after.keys() and (cfg.final_model / "run.json").exists()


@pytest.fixture
def at(monkeypatch):
    """Makes a stand-in the Hub that this process asks."""

    def ask(hub: Hub) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr("finetune.hub.RETRY_WAITS", ())

    return ask


def test_a_weight_that_is_not_finite_is_not_saved(saved, smollm_tokenizer):
    cfg, model, _ = saved
    weight, before = (
        next(p for p in model.parameters() if p.requires_grad),
        checksums(cfg.final_model),
    )
    kept = weight.data[0, 0].clone()
    weight.data[0, 0] = float("inf")
    with pytest.raises(
        UserError, match="The adapter is not saved: 1 of its matrices hold NaN or infinity"
    ):
        save_adapter(model, smollm_tokenizer, cfg.final_model, "", {})
    weight.data[0, 0] = kept
    assert checksums(cfg.final_model) == before


FINE = {"role": "fineGrained", "fineGrained": {"scoped": []}}
SCOPED = {
    "entity": {"type": "user", "name": "ada"},
    "permissions": ["repo.content.read", "repo.write"],
}
WRITES = {"role": "fineGrained", "fineGrained": {"scoped": [SCOPED]}}


@pytest.mark.parametrize(
    ("user", "target", "refuse", "line"),
    [
        ({}, "", {}, "('✓', 'will push to ada/mistral-qlora, a new repository (private)')"),
        (
            {},
            "ada/mine",
            {},
            "('!', 'will push to ada/mine, which exists (private): its files are replaced')",
        ),
        ({}, "ada/open", {}, "('✗', 'ada/open exists and is PUBLIC: choose another hub_repo"),
        ({}, "lab/x", {}, "('✗', \"hub_repo = 'lab/x': ada may not write to lab"),
        (
            {"orgs": [{"name": "lab", "roleInOrg": "read"}]},
            "lab/x",
            {},
            "('✗', \"hub_repo = 'lab/x': ada may not",
        ),
        (
            {"orgs": [{"name": "lab", "roleInOrg": "write"}]},
            "lab/x",
            {},
            "('✓', 'will push to lab/x, a new",
        ),
        ({"auth": {"accessToken": {"role": "read"}}}, "", {}, "('✗', 'this token can only read"),
        (
            {"auth": {"accessToken": FINE}},
            "",
            {},
            "('✗', 'this fine-grained token may read but not write",
        ),
        ({"auth": {"accessToken": WRITES}}, "", {}, "('✓', 'will push to ada/mistral-qlora"),
        ({}, "", {"whoami": (401,)}, "('✗', 'the Hub does not accept this token (401)"),
        (
            {},
            "",
            {"whoami": (503,)},
            "('?', 'the Hub answered 503: pushing will be tried after training",
        ),
    ],
)
def test_token_and_target_are_tried_before_training(settings, at, user, target, refuse, line):
    with Hub(user=user) as hub:
        hub.repos |= {"ada/mine": {"private": True}, "ada/open": {"private": False}}
        hub.refuse = refuse
        at(hub)
        assert line in str(check_push(settings(hub_repo=target), TOKEN))


@pytest.mark.parametrize(
    ("refuse", "line"),
    [
        ({}, "can be downloaded"),
        ({"auth-check": (404, "RepoNotFound")}, "no such repository"),
        ({"auth-check": (403, "GatedRepo")}, "is gated: accept its terms"),
        ({"auth-check": (500,)}, "the Hub cannot be asked"),
    ],
)
def test_the_base_model_is_asked_for_before_it_is_downloaded(settings, at, refuse, line):
    with Hub() as hub:
        hub.refuse = refuse
        at(hub)
        assert line in str(check_base_model(settings(), TOKEN))


def test_preflight_tells_every_failure_at_once(settings, tmp_path, capsys):
    cfg = settings(base_model=str(tmp_path), output_dir=str(tmp_path), backup_to="drive")
    cfg.final_model.mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no config\.json") as error:
        preflight(cfg, None)
    shown = capsys.readouterr().out
    assert "! a run named mistral-qlora is finished already" in shown
    assert "! push_to_hub is on, but there is no token" in shown
    assert "✗ backup_to = 'drive', but there is no " in shown
    assert "backup_to = 'drive'" in str(error.value) and "there is no token" not in str(error.value)


def test_room_for_download_checkpoints_and_merge_is_counted(settings, tmp_path):
    weights = tmp_path / "base" / "model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    os.truncate(weights, 3 * 2**40)  # a sparse file: 3 TB, more than this machine has
    lines = list(check_room(settings(base_model=str(weights.parent), merge=True, bf16=True), None))
    assert [mark for mark, _ in lines] == ["✗", "✗"]
    assert "merged model 3298.5)" in lines[0][1] and "download" not in lines[0][1]
    assert "the merge holds about 4292.1 GB: set merge = False" in lines[1][1]
    lines = list(check_room(settings(base_model="embedded", model_cache=str(tmp_path)), None))
    assert [mark for mark, _ in lines] == ["✓"] and "checkpoints and adapter 0.3" in lines[0][1]
    assert "download of the base model, from a package, 0.3" in lines[0][1]


def test_the_size_of_a_base_model_comes_from_the_hub_less_what_is_here(settings, at, tmp_path):
    files = {
        "model-1.safetensors": b"x" * 10**6,
        "consolidated.safetensors": b"x" * 2**21,
        "config.json": b"{}",
    }
    cfg = settings(model_cache=str(tmp_path))
    with Hub() as hub:
        hub.repos[cfg.base_model], hub.files[cfg.base_model] = {"private": False}, files
        (blobs := tmp_path / "models--mistralai--Mistral-7B-Instruct-v0.3" / "blobs").mkdir(
            parents=True
        )
        (blobs / "half").write_bytes(b"x" * 500_000)
        at(hub)
        assert base_model_gb(cfg, TOKEN) == (0.001, 0.0005, "as the Hub says")
        hub.refuse["/api/models/"] = (500,)
        size, rest, where = base_model_gb(cfg, TOKEN)
        assert (size, rest) == (14.5, 14.4995) and "taking it for a 7B model" in where
