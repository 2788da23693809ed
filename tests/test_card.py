"""The card: what it says to run runs, wherever its folder is, and leads to no other weights."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from serve.serving import blocks
from test_export import RUN
from test_notebook import CARD
from tiny import pythons, tiny_base, tiny_tuned
from transformers import AddedToken

from finetune.answers import generate_answers
from finetune.base_model import write_config
from finetune.card import model_card
from finetune.save import push_adapter, save_adapter, save_tokenizer, write_for_others
from qlora_helpers import Settings

pytestmark = pytest.mark.slow  # it starts the Python of the other major itself
TOKEN = "hf_" + "s3cret" * 5
OURS = json.dumps(["trl", "datasets", "pandas", "qlora_helpers", "finetune", "matplotlib"])


@pytest.fixture
def tuned(defaults, hub, tmp_path, mistral_tokenizer):
    """A run on a base that the Hub has, `ada/tiny`, saved; and what it answers."""
    base = tiny_base(tmp_path / "tiny", mistral_tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    write_config(plain, Path(base), torch.float32)  # RoPE as both majors read it
    (Path(base) / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    hub.repos["ada/tiny"] = {"private": False}
    hub.files["ada/tiny"] = {p.name: p.read_bytes() for p in Path(base).iterdir()}
    cfg = Settings.from_cell(
        defaults
        | {
            "base_model": "ada/tiny",
            "output_dir": str(tmp_path / "out"),
            "run_name": "mine",
            "bf16": False,
            "max_new_tokens": 6,
        }
    )
    model = tiny_tuned(base)
    run = RUN | {"base_model": "ada/tiny"}
    save_adapter(model, mistral_tokenizer, cfg.final_model, model_card(cfg, run), run)
    prompts = [f"Say the number {n}" for n in range(4)]
    answers = generate_answers(model, mistral_tokenizer, prompts, 6)
    return cfg, prompts, [answer.text for answer in answers]


@pytest.mark.parametrize("python", pythons())
def test_the_adapter_loads_by_its_card_on_a_machine_that_has_nothing(
    tuned, hub, tmp_path, python, monkeypatch
):
    """The base comes from the Hub by its id; the adapter's folder was copied to another place."""
    cfg, prompts, wanted = tuned
    folder = shutil.copytree(cfg.final_model, tmp_path / "elsewhere")
    told = json.loads((folder / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "ada/tiny"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "empty")}
    env |= {"HF_HUB_DISABLE_XET": "1"}
    command = [python, "-c", CARD, OURS, json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
    assert len(set(wanted)) > 1


def test_the_pushed_card_names_its_repository_and_the_one_here_its_folder(tuned, hub):
    cfg = tuned[0]
    assert push_adapter(cfg, TOKEN) == f"{hub.url}/ada/mine"
    here = (cfg.final_model / "README.md").read_text()
    pushed = hub.files["ada/mine"]["README.md"].decode()
    assert 'name = "."  # this folder' in here and "\nIn this folder:\n" in here
    assert 'name = "ada/mine"\n' in pushed and "this folder" not in pushed
    assert "(`hf download ada/mine --local-dir mine`):" in pushed
    sealed = json.loads(hub.files["ada/mine"]["checksums.json"])["files"]["README.md"]
    import hashlib

    assert sealed == hashlib.sha256(pushed.encode()).hexdigest()


def test_the_card_as_pasted_from_the_hub_answers_as_the_notebook_did(tuned, hub, tmp_path):
    """In a folder that is empty: adapter and base both come from the Hub."""
    cfg, prompts, wanted = tuned
    push_adapter(cfg, TOKEN)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "README.md").write_bytes(hub.files["ada/mine"]["README.md"])
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "empty")}
    env |= {"HF_HUB_DISABLE_XET": "1"}
    command = [pythons()[0], "-c", CARD, OURS, json.dumps(prompts)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path / "here", env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


@pytest.mark.parametrize(
    ("base_model", "name"),
    [("embedded", "SmolLM2-135M-Instruct"), ("/home/me/bases/mine", "mine"), ("o/n", "o/n")],
)
def test_what_is_saved_names_its_base_by_no_path(
    defaults, tmp_path, mistral_tokenizer, base_model, name
):
    base = tiny_base(tmp_path / "tiny", mistral_tokenizer)
    run = RUN | {"base_model": base_model, "base_revision": "c0ffee"}
    save_adapter(tiny_tuned(base), mistral_tokenizer, tmp_path / "run" / "final_model", "", run)
    folder = tmp_path / "run" / "final_model"
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == (name, "c0ffee")
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}
    card = model_card(Settings.from_cell(defaults | {"base_model": base_model}), run)
    assert f'base = "{name}"' in card and 'revision="c0ffee"' in card and "/home" not in card


def card_of(defaults, merged=False, run=RUN, **changes):
    return model_card(Settings.from_cell(defaults | changes), run, merged)


def test_the_embedded_models_card_says_how_its_folder_is_made(defaults):
    card = card_of(defaults, base_model="embedded")
    assert "as a package brings it, in 4 bits (Q4_1), and not the Hub's" in card
    command = next(c for c in blocks(card, "bash") if "prepare_embedded" in c)
    assert "prepare_embedded(Path('SmolLM2-135M-Instruct'))" in command
    assert "Q4_1" not in card_of(defaults) and "base_model:" not in card


@pytest.mark.parametrize(
    ("rank", "told"),
    [(1, 1), (4, 8), (8, 8), (9, 16), (32, 32), (129, 256), (300, 320), (512, 512)],
)
def test_vllm_is_given_a_rank_that_it_takes(defaults, rank, told):
    (command,) = [c for c in blocks(card_of(defaults, lora_r=rank), "bash") if "vllm" in c]
    assert f"--max-lora-rank {told} " in command and "serve dequantised " in command
    assert "--chat-template chat_template.jinja" in command


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"use_dora": True}, "vLLM takes no DoRA"), ({"lora_r": 600}, "takes no rank of 600")],
)
def test_what_vllm_cannot_serve_leads_to_the_merged_model_alone(defaults, changes, why):
    card = card_of(defaults, **changes)
    assert "Serve it merged (`merge = True` in the notebook)" in card
    assert "--lora-modules" not in card and "dequantised" not in card
    assert "--lora-modules" in card_of(defaults, use_rslora=True)


@pytest.mark.parametrize("merged", [False, True])
def test_no_recipe_leads_to_the_16_bit_base(defaults, merged):
    """A server is never given the base by its own name."""
    for command in blocks(card_of(defaults, merged), "bash"):
        assert "mistralai/" not in command
    if not merged:
        code = blocks(card_of(defaults), "python")
        assert all("load_in_4bit=True" in each for each in code) and len(code) == 2


@pytest.mark.parametrize("merged", [False, True])
def test_a_request_is_json_that_stops_before_the_end_marker_alone(defaults, merged):
    run = RUN | {"roles": ["system", "user", "assistant", "user"]}
    card = card_of(defaults, merged, run, run_name="mine", max_new_tokens=77)
    body = json.loads(re.search(r"-d '(.+)'", card)[1])
    assert body["stop"] == ["\n\n### End"] and body["temperature"] == 0
    assert (body["model"], body["max_tokens"]) == ("mine", 77)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert {m["content"] for m in body["messages"]} == {"…"}
    assert "served-model-name mine" in card or "--lora-modules mine=." in card
    plain = card_of(defaults, merged, RUN, prompt_format="chat")
    assert "stop" not in json.loads(re.search(r"-d '(.+)'", plain)[1])


def test_the_header_has_the_bases_licence_where_it_is_known(defaults):
    assert "license:" not in card_of(defaults).split("---")[1]
    card = card_of(defaults, run=RUN | {"base_license": "apache-2.0"})
    assert "license: apache-2.0\n" in card.split("---")[1]
    assert "The base model's licence (apache-2.0) holds" in card
    assert "base_model_relation: adapter" in card
    assert "base_model_relation: finetune" in card_of(defaults, merged=True)


def test_a_card_tells_its_runs_own_numbers(defaults):
    result = {"rows": 37, "sixteen_bits": {"right": 2, "rows": 36, "ours": 33, "same": 4}}
    for when, loss, right in (("before", 6.5, 0.0), ("after", 0.25, 0.5)):
        result[when] = {"exact_match": right, "validation_loss": loss}
    changes = {"lora_r": 7, "lora_alpha": 9, "batch_size": 3, "gradient_accumulation": 5}
    changes |= {"learning_rate": 3e-4, "seed": 11, "base_adapter": "ada/earlier", "bf16": False}
    run = RUN | {"results": result, "base_revision": "c0ffee"}
    plain, merged = (card_of(defaults, merged, run, **changes) for merged in (False, True))
    for card in (plain, merged):
        assert "r 7, alpha 9, learning rate 0.0003,\n15 examples a step, seed 11." in card
        assert "revision c0ffee, trained with 4-bit NF4 (QLoRA) on a CPU.\nTraining went" in card
        assert 'the adapter ada/earlier, which is what "before" means.' in card
        assert "| on 37 held-out rows | before | after |" in card
        assert "| exact answers | 0% | 50% |\n| loss (nats a token) | 6.500 | 0.250 |" in card
        assert "(SHA-256 of their tokens): `f00d`" in card
    assert "\nlibrary_name: peft\n" in plain and "\nlibrary_name: transformers\n" in merged
    told = "on its 16-bit weights 2 of 36 held-out answers were exactly right in place of 33, and 4"
    assert f"{told} were the same" in " ".join(plain.split())
    for code in blocks(plain, "python"):
        assert 'revision="c0ffee", quantization_config=nf4, dtype="float32"' in code
        assert "bnb_4bit_use_double_quant=True" in code
    assert "Training went on" not in card_of(defaults) and "revision" not in card_of(defaults)[:400]
    assert "It has not been asked the held-out rows yet." in card_of(defaults)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "roles", [["user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"]]
)
def test_the_python_that_asks_is_of_the_rows_own_shape(defaults, merged, roles):
    run = RUN | {"roles": [*dict.fromkeys(roles)]}
    ours, chats = (
        blocks(card_of(defaults, merged, run, prompt_format=form, max_new_tokens=77), "python")[0]
        for form in ("question-answer", "chat")
    )
    said = re.search(r"messages = (\[.+\])", ours)[1]
    assert [message["role"] for message in json.loads(said)] == roles
    assert "max_new_tokens=77)\n" in ours and 'removesuffix("### End").rstrip())' in ours
    assert "removesuffix" not in chats and ours.count("\n") == chats.count("\n")
    for code in (ours, chats):
        compile(code, "card", "exec")


@pytest.mark.parametrize("name", ['7b "new"', "back\\slash", "Straße"])
def test_a_folder_of_any_name_stands_in_lines_that_python_reads(defaults, name):
    for code in blocks(card_of(defaults, base_model=f"/home/me/{name}"), "python"):
        compile(code, "card", "exec")
        scope = {}
        exec(next(line for line in code.splitlines() if line.startswith("base = ")), scope)
        assert scope["base"] == name and ("ß" in code) == ("ß" in name)


@pytest.mark.parametrize(
    ("base_adapter", "name"),
    [
        ("/home/me/outputs/first/final_model", "first"),
        ("/home/me/outputs/first", "first"),
        ("/home/me/final_model/checkpoint-30", "checkpoint-30"),
        ("ada/earlier", "ada/earlier"),
    ],
)
def test_the_adapter_that_it_went_on_from_is_called_by_its_run(defaults, base_adapter, name):
    assert f"Training went on from the adapter {name}, " in card_of(
        defaults, base_adapter=base_adapter
    )


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_of_whole_texts_is_given_the_beginning_of_one(defaults, merged):
    run = RUN | {"roles": [], "results": {"rows": 0}}
    card = card_of(defaults, merged, run, max_new_tokens=77)
    code = blocks(card, "python")[0]
    compile(code, "card", "exec")
    assert 'tokenizer("Once upon", return_tensors="pt")' in code and "max_new_tokens=77)" in code
    assert "whole texts" in card and "messages" not in card and "### End" not in card
    assert "localhost:8000/v1/completions " in card
    body = json.loads(re.search(r"-d '(.+)'", card)[1])
    assert body["prompt"] == "Once upon" and "stop" not in body
    asked = run | {"results": {"rows": 3}}  # the first row is a text, and others are not
    assert "messages" in card_of(defaults, merged, asked)


@pytest.mark.parametrize(
    ("base_model", "note"),
    [
        ("embedded", "  # a folder, made as this card says"),
        ("/home/me/bases/mine", "  # the base model's folder"),
        ("ada/tiny", ""),
    ],
)
def test_a_base_that_no_hub_has_is_told_as_a_folder(defaults, base_model, note):
    card = card_of(defaults, base_model=base_model)
    assert re.search(r'\nbase = "[^"]+"(.*)\n', card)[1] == note
    assert ("embedded)" in card) == ("prepare_embedded" in card) == (base_model == "embedded")
    assert "prepare_embedded" not in card_of(defaults, True, base_model=base_model)


READ = """
import sys, json, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
made = tokenizer("a <x> b <y>")
print(json.dumps([made["input_ids"], sorted(tokenizer.all_special_tokens), sorted(made)]))
"""


@pytest.mark.parametrize("python", pythons())
def test_extra_special_tokens_load_on_both_majors(python, smollm_path, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm_path)
    extra = [AddedToken("<x>", special=True), AddedToken("<y>", special=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    save_tokenizer(tmp_path, tokenizer)
    done = subprocess.run(
        [python, "-c", READ, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ids, special, made = json.loads(done.stdout.splitlines()[-1])
    assert made == ["attention_mask", "input_ids"]  # models take no token_type_ids
    assert ids == tokenizer("a <x> b <y>")["input_ids"] and {"<x>", "<y>"} <= set(special)


def test_the_generation_config_is_greedy_whatever_the_base_recommends(tuned):
    told = json.loads((tuned[0].final_model / "generation_config.json").read_text())
    assert "repetition_penalty" not in told and not told.get("do_sample")
    assert told["pad_token_id"] == told["eos_token_id"] != told["bos_token_id"]


def test_tokenizer_model_goes_along_where_the_base_has_it(smollm_tokenizer, tmp_path):
    import copy

    tokenizer = copy.deepcopy(smollm_tokenizer)
    for number, own in enumerate((None, tmp_path / "spm.model")):
        (tmp_path / "spm.model").write_bytes(b"pieces")
        tokenizer.sentencepiece_file = own
        folder = tmp_path / str(number)
        folder.mkdir()
        write_for_others(folder, tokenizer)
        assert (folder / "tokenizer.model").exists() == (own is not None)


def test_torch_is_what_the_card_was_made_with(defaults):
    assert f"Made with torch {torch.__version__}." in card_of(defaults)
