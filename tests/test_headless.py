"""The notebook without a browser: settings from the command line and from make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from finetune.headless import NOTEBOOK, SMALL, defaults, given_to_make, parse

ROOT = Path(__file__).parents[1]

NASTY = [
    "my rows (1)/*.jsonl",
    "it's.jsonl",
    'say "hi".jsonl',
    "a;b && touch planted | c > planted",
    "a$b $(HOME) ${HOME} $$",
    "`touch planted`",
    "Größe/日本 🙂.jsonl",
    "a\\b\\ c\\\\",
    "# no comment",
    "[x]{y}*?!",
    "-- EPOCHS=9 --",
    "a=b,c:=d",
    "~/x %d {prompt}",
    "two  blanks and one ",
    "tab\there",
    "",
]


@pytest.fixture(scope="module")
def settings_of_make(tmp_path_factory):
    """The real Makefile's `run` with a stand-in for Python that prints the settings it is given."""
    python = tmp_path_factory.mktemp("make") / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nassert sys.argv.pop(1) == '-m'; sys.argv.pop(0)\n"
        "from finetune.headless import arguments, defaults, parse\n"
        "print(json.dumps(parse(arguments(), defaults())))\n"
    )
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}

    def make(*arguments, **more):
        own = (f"PY={python}", f"VENV={Path(sys.executable).parents[1]}")
        command = [
            "make",
            "--silent",
            "--no-print-directory",
            "-o",
            f"{Path(sys.executable).parents[1]}/ready",
            "run",
        ]
        environment_now = environment | {"PYTHONPATH": str(ROOT)} | more
        options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment_now}
        done = subprocess.run([*command, *own, *arguments], **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return make


TEXTS = ("base_model", "run_name", "data_files", "hub_repo", "output_dir", "merged_dir")


@pytest.mark.parametrize("start", range(0, len(NASTY), len(TEXTS)))
def test_any_value_arrives_through_make_as_it_was_typed(settings_of_make, start):
    given = dict(zip(TEXTS, NASTY[start:], strict=False))
    settings = settings_of_make(*(f"{k.upper()}={v}" for k, v in given.items()), "EPOCHS=2")
    assert {name: settings[name] for name in given} == given
    assert settings["epochs"] == 2 and not (ROOT / "planted").exists()


def test_any_value_arrives_in_the_notebook_as_it_was_given():
    for value in NASTY:
        notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOK)), {"data_files": value})
        injected = next(c for c in notebook.cells if "injected" in str(c.metadata.get("tags")))
        values = {}
        exec(injected.source, values)
        assert values["data_files"] == value


def test_numbers_lists_and_words_take_the_cells_types(settings_of_make):
    settings = settings_of_make(
        "TARGET_MODULES=['q_proj', 'v_proj']", "LEARNING_RATE=3e-4", "BF16=auto", "MERGE=True"
    )
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert settings["learning_rate"] == 3e-4 and settings["bf16"] == "auto" and settings["merge"]


def test_what_suits_the_small_model_is_not_given_to_another(settings_of_make):
    small = settings_of_make()
    assert small["base_model"] == "embedded" and SMALL.items() <= small.items()
    assert settings_of_make("EPOCHS=1") == small | {"epochs": 1}
    large = settings_of_make("BASE_MODEL=mistralai/Mistral-7B-Instruct-v0.3")
    assert not SMALL.keys() & large.keys()
    assert (defaults() | large)["learning_rate"] == 1e-4


def test_variables_of_make_itself_are_no_settings(settings_of_make):
    assert settings_of_make("STACK=newest", "PYTHON=python3") == settings_of_make()
    outer = {"MAKEFLAGS": "w -- STACK=colab", "MAKELEVEL": "1"}
    assert settings_of_make("EPOCHS=4", **outer)["epochs"] == 4
    assert given_to_make("") == given_to_make("ks") == []


def test_a_name_that_is_no_setting_is_told_with_those_that_are():
    with pytest.raises(SystemExit, match=r"EPOCS=1: no such setting\. There are: BASE_MODEL "):
        parse(["EPOCS=1"], defaults())
