"""Sections 4 and 14: asked early, saved here first, then pushed to a real HTTP server that stands in for the Hub."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from hub import Hub
from peft import PeftModel
from safetensors.torch import load_file

import qlora_helpers as qlora

TOKEN = "hf_" + "s3cret" * 5
RESULT = {"rows": 2} | {
    when: {"exact_match": 0.0, "stopped": 1.0, "validation_loss": 2.0} for when in ("before", "after")
}
PLAN = qlora.Plan(1, 5, 1, 1, False, "as set")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, settings, smollm_path, smollm_tokenizer):
    """A trained adapter (its weights set by hand) saved the notebook's way: settings, model, backup."""
    import peft
    import transformers

    root = tmp_path_factory.mktemp("outputs")
    cfg = settings(base_model="embedded", run_name="save-test", output_dir=str(root))
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    run = qlora.manifest(cfg, model, PLAN, RESULT)
    backup = qlora.save_adapter(model, smollm_tokenizer, cfg.final_model, qlora.model_card(cfg, RESULT), run)
    return cfg, model, backup


def test_what_is_saved_answers_as_what_was_trained(saved, smollm_path, smollm_tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg, model, _ = saved
    ids = torch.tensor([qlora.encode_prompt(smollm_tokenizer, "Hello")])
    base = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.allclose(base(ids).logits, model(ids).logits, atol=1e-2)
        loaded = PeftModel.from_pretrained(base, cfg.final_model)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    chat = [{"role": "user", "content": "Hello"}]
    tokenizer = AutoTokenizer.from_pretrained(cfg.final_model)
    assert (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        == ids[0].tolist()
    )


def test_the_backup_holds_the_folder(saved):
    cfg, _, backup = saved
    with zipfile.ZipFile(backup) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == {path.name for path in cfg.final_model.iterdir()}
        assert archive.testzip() is None


def test_the_manifest_says_what_the_adapter_is(saved):
    cfg = saved[0]
    run = json.loads((cfg.final_model / "run.json").read_text())
    assert run["settings"]["lora_r"] == 32 and run["settings"]["run_name"] == "save-test"
    assert run["versions"]["torch"] == torch.__version__
    assert run["results"] == RESULT and run["plan"] == dataclasses.asdict(PLAN)


def test_a_save_that_dies_leaves_the_earlier_adapter_whole(saved, smollm_tokenizer, monkeypatch):
    cfg, model, _ = saved
    before = load_file(cfg.final_model / "adapter_model.safetensors")
    monkeypatch.setattr(
        type(smollm_tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        qlora.save_adapter(model, smollm_tokenizer, cfg.final_model, "", {})
    after = load_file(cfg.final_model / "adapter_model.safetensors")
    assert before.keys() == after.keys() and (cfg.final_model / "run.json").exists()


def in_fresh_process(code: str, hub: Hub, **environment: str) -> str:
    """Output of `code` in a new Python whose Hub is the stand-in (the address is read at import)."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | environment
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def call(function: str, cfg: qlora.Settings) -> str:
    return f"import qlora_helpers as q\nprint(q.{function}(q.Settings(**{cfg.model_dump()!r}), {TOKEN!r}))"


def test_the_push_is_private_and_sends_the_allowed_files_alone(saved):
    cfg = saved[0]
    (cfg.final_model / "training_args.bin").write_bytes(TOKEN.encode())
    with Hub() as hub:
        shown = in_fresh_process(call("push_adapter", cfg), hub)
    created = hub.repos["ada/save-test"]  # huggingface_hub 2 says it in other words
    assert created.get("private") is True or created.get("visibility") == "private"
    expected = {path.name for path in cfg.final_model.iterdir()} - {"training_args.bin"}
    assert set(hub.files) - {".gitattributes"} == expected >= {"adapter_model.safetensors", "README.md", "run.json"}
    assert hub.files["adapter_model.safetensors"] == (cfg.final_model / "adapter_model.safetensors").read_bytes()
    assert f"{hub.url}/ada/save-test" in shown
    assert TOKEN not in shown and not any(TOKEN.encode() in content for content in hub.files.values())


@pytest.mark.parametrize("refuse", ["/preupload/", "/commit/"])
def test_a_failed_push_costs_nothing_and_says_how_to_push_later(saved, refuse):
    cfg = saved[0]
    with Hub() as hub:
        hub.refuse[refuse] = (403,)
        shown = in_fresh_process(call("push_adapter", cfg), hub)
    assert "Nothing is lost" in shown and f"hf upload ada/save-test {cfg.final_model} --private" in shown
    assert (cfg.final_model / "adapter_model.safetensors").exists()
    assert TOKEN not in shown


@pytest.mark.parametrize(
    ("role", "refuse", "line"),
    [
        ("write", {}, "('✓', 'will push to ada/mistral-qlora (private) as ada')"),
        ("read", {}, "this token can only read"),
        ("write", {"whoami": (401,)}, "the Hub refuses this token"),
        ("write", {"whoami": (503,)}, "pushing will be tried after training"),
    ],
)
def test_the_token_is_tried_before_training(settings, role, refuse, line):
    with Hub(role) as hub:
        hub.refuse = refuse
        assert line in in_fresh_process(call("check_push", settings()), hub)


@pytest.mark.parametrize(
    ("refuse", "line"),
    [
        ({}, "can be downloaded"),
        ({"auth-check": (404, "RepoNotFound")}, "no such repository"),
        ({"auth-check": (403, "GatedRepo")}, "is gated: accept its terms"),
        ({"auth-check": (500,)}, "the Hub cannot be asked"),
    ],
)
def test_the_base_model_is_asked_for_before_it_is_downloaded(settings, refuse, line):
    with Hub() as hub:
        hub.refuse = refuse
        assert line in in_fresh_process(call("check_base_model", settings()), hub)


def test_preflight_tells_every_failure_at_once(settings, tmp_path, capsys):
    cfg = settings(base_model=str(tmp_path), output_dir=str(tmp_path))
    cfg.final_model.mkdir(parents=True)
    with pytest.raises(qlora.UserError, match="there is no token"):
        qlora.preflight(cfg, None)
    shown = capsys.readouterr().out
    assert "! a run named mistral-qlora is finished already" in shown
    assert "✗ push_to_hub is on but there is no token" in shown
    assert "✓ base model" in shown
