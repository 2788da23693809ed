"""Section 2: the hyperparameter cell becomes checked settings."""

import ast
import json
import re
import sys
from pathlib import Path

import pydantic
import pytest
import torch

from finetune.machine import resolve_precision
from qlora_helpers import Settings, UserError, base_name, is_local, listed, locate, many


def test_the_defaults_are_the_recipe(defaults):
    recipe = {
        "base_model": "mistralai/Mistral-7B-Instruct-v0.3",
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "learning_rate": 1e-4,
        "epochs": 5,
        "batch_size": 4,
        "gradient_accumulation": 4,
        "max_length": 4096,
        "warmup_ratio": 0.1,
        "bf16": "auto",
        "data_files": "/content/data/*.jsonl",
        "model_cache": "/content/model_cache",
        "output_dir": "/content/model_outputs",
        "merged_dir": "/content/merged_mistral_7b",
        "push_to_hub": True,
        "hub_private": True,
        "merge": False,
    }
    assert {name: defaults[name] for name in recipe} == recipe


def test_every_setting_of_the_cell_is_checked_and_none_is_unknown(defaults):
    assert set(defaults) == set(Settings.model_fields)


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "..",
        ".",
        "",
        "a/b",
        "/etc",
        "a\\b",
        "a..b",
        "-a",
        "a-",
        ".a",
        "a b",
        "a\nb",
        "é",
        "a" * 97,
        "~",
    ],
)
def test_a_run_name_cannot_leave_the_outputs_folder(settings, name):
    with pytest.raises(UserError, match="run_name = "):
        settings(run_name=name)


def test_blanks_around_a_text_are_no_part_of_it(settings):
    pasted = {"run_name": "\tmine ", "output_dir": " /out", "base_model": "o/n\n", "hub_repo": " "}
    cfg = settings(**pasted, data_files=[" a b.jsonl ", "c.jsonl"])
    assert (cfg.run_name, cfg.output_dir, cfg.base_model) == ("mine", "/out", "o/n")
    assert cfg.hub_repo == "" and cfg.data_files == ["a b.jsonl", "c.jsonl"]
    with pytest.raises(UserError, match="base_model = ' ': input should be a text that is not"):
        settings(base_model=" ")


@pytest.mark.parametrize("name", ["mistral-qlora", "a", "run_2", "v1.2", "A__b", "a" * 96])
def test_ordinary_run_names_are_folders_of_the_outputs_folder(settings, name):
    cfg = settings(run_name=name)
    assert cfg.run_dir.parent == locate(cfg.output_dir)
    assert cfg.final_model == cfg.run_dir / "final_model"


@pytest.mark.parametrize("name", ["owner/x.git", "x.git", "a--b", "o/n/m", "o/", "a b"])
def test_a_repository_may_have_an_owner_and_a_run_may_not(settings, name):
    with pytest.raises(UserError, match=r"hub_repo = .* may have owner/name or a name alone: let"):
        settings(hub_repo=name)
    with pytest.raises(UserError, match=r"run_name = .* it may have letters, digits and single"):
        settings(run_name=name)


def test_all_mistakes_are_told_at_once_and_without_a_traceback(settings):
    wrong = {
        "lora_r": 0,
        "learning_rate": "1e-4",
        "bf16": "yes",
        "epochs": float("nan"),
        "batch_size": True,
    }
    with pytest.raises(UserError) as caught:
        settings(**wrong, hub_repo="a/b/c")
    shown = "\n".join(caught.value._render_traceback_())
    for line in [
        "lora_r = 0: input should be greater than or equal to 1",
        "learning_rate = '1e-4': input should be a number, as 0.5 or 2e-4 (no quotes)",
        "bf16 = 'yes': ",
        "epochs = nan: ",
        "batch_size = True: input should be a whole number, as 4 (no quotes)",
        "hub_repo = 'a/b/c': ",
    ]:
        assert line in shown
    assert "Traceback" not in shown


def test_a_deleted_line_of_the_cell_is_named(defaults):
    cell = {name: value for name, value in defaults.items() if name != "lora_alpha"}
    with pytest.raises(UserError, match="lora_alpha: put its line back"):
        Settings.from_cell(cell)


def test_content_moves_beside_the_notebook_outside_colab(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert locate("/content/data/*.jsonl") == tmp_path / "content" / "data" / "*.jsonl"
    assert locate("/contents/x") == Path("/contents/x")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert str(locate("/content/model_cache")) == "/kaggle/working/model_cache"
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert str(locate("/content/model_cache")) == "/content/model_cache"


@pytest.mark.parametrize(
    ("capability", "setting", "precision"),
    [
        ((7, 5), "auto", "fp16"),
        ((8, 0), "auto", "bf16"),
        ((9, 0), True, "bf16"),
        ((9, 0), False, "fp16"),
    ],
)
def test_a_t4_computes_in_fp16_though_torch_says_it_has_bf16(
    monkeypatch, capability, setting, precision
):
    card(monkeypatch, capability)
    found, why = resolve_precision(setting)
    assert found == precision
    if setting == "auto":
        lacks = "Tesla T4 (compute capability 7.5) has no native bf16"
        assert why == (lacks if capability == (7, 5) else "Tesla T4 has native bf16")


def test_bf16_forced_on_a_t4_is_refused_with_the_way_out(monkeypatch, settings):
    card(monkeypatch, (7, 5))
    with pytest.raises(UserError, match="Set bf16 = 'auto'"):
        resolve_precision(settings(bf16=True).bf16)


@pytest.mark.parametrize(
    ("native", "setting", "precision"),
    [(True, "auto", "bf16"), (False, "auto", "fp32"), (True, False, "fp32"), (False, True, "bf16")],
)
def test_a_cpu_computes_in_bf16_where_it_has_it_or_is_told_to(
    monkeypatch, native, setting, precision
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    words = "with native bf16" if native else "without native bf16"
    assert resolve_precision(setting) == (precision, f"on a CPU {words}")


def card(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_what_follows_from_the_cell_is_printed(settings):
    numbers = {"batch_size": 2, "gradient_accumulation": 7, "lora_r": 24, "lora_alpha": 36}
    text = settings(base_model="owner/name", **numbers).summary("fp16: a reason")
    assert text.splitlines()[:5] == [
        "Base model       owner/name",
        "LoRA             r 24, alpha 36 (scale 1.5)",
        "Effective batch  14 examples a step (2 × 7)",
        "Training         5 epochs, learning rate 0.0001, cosine",
        "Precision        fp16: a reason",
    ]


@pytest.mark.parametrize(
    ("max_steps", "length"),
    [(-1, "2.5 epochs"), (0, "2.5 epochs"), (1, "1 step"), (20, "20 steps")],
)
def test_the_length_that_is_printed_is_the_one_that_counts(settings, max_steps, length):
    text = settings(epochs=2.5, max_steps=max_steps).summary("")
    assert f"Training         {length}, learning rate 0.0001, cosine" in text


def test_the_folders_that_are_printed_are_those_that_are_used(settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = {
        "data_files": "rows/*.jsonl",
        "model_cache": "/content/models",
        "output_dir": "~/runs",
    }
    cfg = settings(**places)
    printed = dict(line.split("  ", 1) for line in cfg.summary("").splitlines())
    assert printed["Data"].strip() == str(tmp_path / "rows" / "*.jsonl")
    assert printed["Model cache"].strip() == str(cfg.cache_dir)
    assert cfg.cache_dir == tmp_path / "content" / "models"
    assert printed["Run folder"].strip() == str(cfg.run_dir)
    assert str(cfg.run_dir) == str(Path.home() / "runs" / "mistral-qlora")
    assert printed["Adapter"].strip() == str(cfg.final_model)


def test_checked_settings_cannot_be_changed_past_the_check(settings):
    cfg = settings()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        cfg.epochs = -1


@pytest.mark.parametrize("name", ["embedded", "/m", "./m", "../m", "~/m", ".", "..", "there/is"])
def test_a_folder_needs_no_hub_whether_it_is_there_or_not(name, monkeypatch, tmp_path):
    (tmp_path / "work" / "there" / "is").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert is_local(name) and not is_local("there/is-none")


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"base_model": "owner/name"}, True),
        ({"base_adapter": "owner/name"}, True),
        ({"base_adapter": "./mine"}, False),
        ({"data_files": ["rows.jsonl", "hf:owner/name"]}, True),
        ({"push_to_hub": True}, True),
        ({"backup_to": "hub"}, True),
        ({"backup_to": "drive"}, False),
        ({"merge": "push"}, True),
        ({"merge": True}, False),
    ],
)
def test_the_hub_is_needed_for_what_comes_from_it_or_goes_there(settings, changes, needed):
    here = {"base_model": "embedded", "push_to_hub": False}
    assert settings(**here | changes).needs_hub == needed


def test_a_base_model_goes_by_its_folders_own_name(monkeypatch, tmp_path):
    (tmp_path / "mistral-v3" / "sub").mkdir(parents=True)
    (tmp_path / "current").symlink_to("mistral-v3")
    monkeypatch.chdir(tmp_path / "mistral-v3" / "sub")
    names = {".": "sub", "..": "mistral-v3", "../../current": "mistral-v3", "./": "sub"}
    names |= {"../../gone/m7": "m7", "owner/name": "owner/name", "embedded": "embedded"}
    assert {name: base_name(name) for name in names} == names


def test_a_folder_whose_name_says_nothing_is_called_by_its_parents_too(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    for path, name in {
        "mistral/7b/1": "7b-1",
        "7b-instruct/2/1": "7b-instruct-2-1",
        f"models--o--n/snapshots/{commit}": f"models--o--n-{commit}",
        "7b": "7b",
    }.items():
        assert base_name(str(tmp_path / path)) == name
    assert base_name("/1") == "1"


# For each number: a value just inside its bounds and one just outside, on each side that has one.
BOUNDS = {
    "validation_fraction": [(1e-9, 0.0), (0.5, 0.5000001)],
    "max_length": [(16, 15)],
    "lora_r": [(1, 0)],
    "lora_alpha": [(1, 0)],
    "lora_dropout": [(0.0, -1e-9), (0.999999, 1.0)],
    "learning_rate": [(1e-12, 0.0), (1.0, 1.000001)],
    "epochs": [(1e-9, 0.0), (1e9, float("inf"))],
    "max_steps": [(-1, -2)],
    "batch_size": [(1, 0)],
    "gradient_accumulation": [(1, 0)],
    "warmup_ratio": [(0.0, -1e-9), (1.0, 1.000001)],
    "memory_limit_gb": [(0.0, -1e-9)],
    "seed": [(0, -1)],
    "early_stopping_patience": [(0, -1)],
    "neftune_noise_alpha": [(0.0, -1e-9), (1e9, float("inf"))],
    "sample_rows": [(1, 0)],
    "max_new_tokens": [(1, 0)],
    "run_name": [("a" * 96, "a" * 97)],
    "hub_repo": [("", "/"), ("a" * 96, "a" * 97), ("o/n", "o/n/m")],
    "base_model": [("x", "")],
    "data_files": [("x", "")],
    "target_modules": [(["q_proj"], []), ("all-linear", "all")],
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_setting_is_taken_up_to_its_bounds_and_no_further(settings, name):
    for inside, outside in BOUNDS[name]:
        assert getattr(settings(**{name: inside}), name) == inside
        with pytest.raises(UserError, match=f"{name} = "):
            settings(**{name: outside})


def test_every_choice_that_the_cell_offers_can_be_made(notebook, settings):
    offered = {}
    lines = [line for cell in notebook["cells"] for line in cell["source"]]
    for line in (line for line in lines if "allow-input" not in line):
        if choices := re.search(r"# @param (\[.*?\])( {type:\"raw\"})?", line):
            texts = json.loads(choices[1])
            values = [ast.literal_eval(text) for text in texts] if choices[2] else texts
            offered[line.partition(" ")[0]] = values
    assert {"on_bad_rows", "too_long", "bf16", "report_to", "resume", "backup_to"} <= set(offered)
    for name, values in offered.items():
        with_packages = [v for v in values if v not in ("wandb", "trackio")]  # not installed here
        assert [getattr(settings(**{name: value}), name) for value in with_packages] == (
            with_packages
        )
        with pytest.raises(UserError, match=f"{name} = 'other'"):
            settings(**{name: "other"})


def test_every_number_of_the_cell_has_its_bounds_tried(defaults):
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    assert numbers <= set(BOUNDS)


def test_a_list_of_problems_shows_ten_and_counts_the_others():
    problems = [f"problem {n}" for n in range(1, 1235)]
    shown = listed("Title:", problems).splitlines()
    assert shown[0] == "Title:" and shown[1] == "  • problem 1" and shown[10] == "  • problem 10"
    assert shown[11:] == ["  • … and 1,224 more"]
    assert listed("Title:", problems[:10]).splitlines()[-1] == "  • problem 10"
    assert listed("Title:", problems[:11]).splitlines()[-1] == "  • … and 1 more"
    assert (
        listed("Title:", problems[:3], shown=2)
        == "Title:\n  • problem 1\n  • problem 2\n  • … and 1 more"
    )


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("merge", "yes", "input should be True or False (no quotes) or 'push'"),
        ("bf16", "True", "input should be True or False (no quotes) or 'auto'"),
        ("push_to_hub", "no", "input should be True or False (no quotes)"),
        ("export", "gguf", "it is a list, as ['gguf']"),
        ("data_files", 5, "input should be a text in quotes or a list, as ['a', 'b']"),
        ("data_files", "", "input should be a text that is not empty or a list, as ['a', 'b']"),
        ("data_files", [], "input should be a text in quotes or a list that is not empty"),
        ("learning_rate", (0, 2), "input should be a number, as 0.5 or 2e-4 (no quotes)"),
        ("batch_size", 4.0, "input should be a whole number, as 4 (no quotes)"),
        ("run_name", 7, "input should be a text in quotes"),
        ("base_model", "", "input should be a text that is not empty"),
        ("target_modules", "q_proj", "input should be 'all-linear' or a list, as ['a', 'b']"),
        ("seed", 2**32, "input should be less than 4294967296"),
    ],
)
def test_a_setting_of_several_types_is_told_all_that_it_may_be(defaults, name, value, told):
    with pytest.raises(UserError) as error:
        Settings.from_cell(defaults | {name: value})
    lines = str(error.value).splitlines()
    assert lines == [
        "Please correct section 2 and run it again:",
        f"  • {name} = {value!r}: {told}",
    ]


def test_a_number_and_what_it_counts_agree():
    told = [many(n, "row") for n in (0, 1, 2, 1234567)]
    assert told == ["0 rows", "1 row", "2 rows", "1,234,567 rows"]
    told = [many(n, "epoch") for n in (0.5, 1.0, 1.5, 3.0)]
    assert told == ["0.5 epochs", "1 epoch", "1.5 epochs", "3 epochs"]
