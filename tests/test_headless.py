"""The notebook without a browser: settings from the command line and from make."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from finetune import headless
from finetune.command_line import NOTEBOOK, SMALL, arguments, defaults, given_to_make, parse
from finetune.headless import execute, main
from qlora_helpers import UserError

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
    """The settings of the real Makefile's `run`; a stand-in for Python prints how it is called."""
    python = tmp_path_factory.mktemp("make") / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('MAKEFLAGS', '')]))\n"
    )
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}

    def make(*given, **more):
        own = (f"PY={python}", f"VENV={Path(sys.executable).parents[1]}")
        command = [
            "make",
            "--silent",
            "--no-print-directory",
            "-o",
            f"{Path(sys.executable).parents[1]}/installed",
            "run",
        ]
        environment_now = environment | {"PYTHONPATH": str(ROOT)} | more
        options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment_now}
        done = subprocess.run([*command, *own, *given], **options)
        assert done.returncode == 0, done.stderr
        (module, name, *words), flags = json.loads(done.stdout)
        assert (module, name) == ("-m", "finetune.headless")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words])
            patch.setenv("MAKEFLAGS", flags)
            return parse(arguments(), defaults())

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
    assert given_to_make("s -- STACK:=colab EPOCHS=2 PY=python") == ["EPOCHS=2"]


def test_a_setting_that_is_a_word_or_a_truth_value_takes_both():
    given = [
        "BF16=True",
        "GRADIENT_CHECKPOINTING=False",
        "RESUME=never",
        "TARGET_MODULES=all-linear",
    ]
    settings = {"bf16": True, "gradient_checkpointing": False, "resume": "never"}
    settings |= {"target_modules": "all-linear"}
    assert parse(given, defaults()) == settings
    words = ["BF16=auto", "GRADIENT_CHECKPOINTING=auto", "EPOCHS=9", "EPOCHS=10"]
    expected = {"bf16": "auto", "gradient_checkpointing": "auto", "epochs": 10}
    assert parse(words, defaults()) == expected


def test_several_files_are_a_list_unless_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, value in {
        "['a.jsonl', 'b.csv']": ["a.jsonl", "b.csv"],
        "[a].jsonl": "[a].jsonl",
        "[2024]": [2024],
    }.items():
        assert parse([f"DATA={text}"], defaults()) == {"data_files": value}
    (tmp_path / "[2024]").mkdir()
    assert parse(["DATA=[2024]"], defaults()) == {"data_files": "[2024]"}


def test_a_name_that_is_no_setting_is_told_with_those_that_are():
    with pytest.raises(SystemExit, match=r"EPOCS=1: no such setting\. There are: DATA_FILES "):
        parse(["EPOCS=1"], defaults())


# -------- a notebook of few cells in the real one's place ---------------------------------


@pytest.fixture
def with_cells(tmp_path, monkeypatch):
    """Lets `execute` run the real hyperparameter cells and then these, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(*sources):
        notebook = load_notebook_node(str(NOTEBOOK))
        tags = {"settings", "parameters"}
        head = [c for c in notebook.cells if tags & {*c.metadata.get("tags", [])}]
        notebook.cells = head + [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(notebook, tmp_path / "few_cells.ipynb")
        monkeypatch.setattr(headless, "NOTEBOOK", tmp_path / "few_cells.ipynb")

    return make


BAR = """
import sys
from IPython.display import HTML, display
bar = "<div><progress value='{0}'></progress>[{0:>2}/12 00:0{0} &lt; 00:09, Epoch 1/3]</div>"
shown = display(HTML(bar.format(3)), display_id=True)
for step in (3, 4, 4, 12):
    shown.update(HTML(bar.format(step)))
print("nothing to act on", file=sys.stderr)
print("Grüße,", end=" "); print(run_name, epochs)
"""


def test_what_cells_print_and_how_far_training_is_is_shown_as_it_happens(
    with_cells, tmp_path, capsys
):
    plan = "from pandas import DataFrame; DataFrame([{'steps': 63}])"
    with_cells(BAR, plan, "DataFrame([{'steps': 63}]).style")
    notebook = execute({"run_name": "mine", "epochs": 7}, tmp_path / "elsewhere")
    shown = capsys.readouterr().out
    assert "   steps\n0     63\n" in shown and "<pandas" not in shown
    steps = [line for line in shown.splitlines() if "/12" in line]
    assert [step.partition("/")[0].strip("[ ") for step in steps] == ["3", "4", "12"]
    assert "Grüße, mine 7\n" in shown and "nothing to act on" not in shown
    assert f"Notebook: {tmp_path / 'elsewhere' / 'notebook.html'}" in shown
    assert "Grüße, mine 7" in (tmp_path / "elsewhere" / "notebook.html").read_text("utf-8")
    assert nbformat.read(tmp_path / "elsewhere" / "notebook.ipynb", 4) == notebook
    assert not (tmp_path / "content").exists()


def test_the_page_has_no_bars_and_the_notebook_keeps_them():
    bar = "Reading:  50%|#####     | 1/2\rReading: 100%|##########| 2/2"
    out = nbformat.v4.new_output
    outputs = [out("stream", name="stderr", text=text) for text in (bar, f"{bar}\ra warning\n")]
    outputs += [out("stream", text="said"), out("display_data", {"text/plain": "a plot"})]
    outputs.append(out("display_data", {headless.WIDGET: {}, "text/plain": "a widget"}))
    cells = [nbformat.v4.new_code_cell("1", outputs=outputs), nbformat.v4.new_markdown_cell("2")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    before = copy.deepcopy(notebook)
    shown = headless.without_bars(notebook).cells[0].outputs
    told = [each.get("text") or each.data["text/plain"] for each in shown]
    assert [text.strip() for text in told] == ["a warning", "said", "a plot"]
    assert notebook == before


def test_what_was_executed_before_a_cell_failed_is_kept(with_cells, tmp_path, capsys):
    with_cells("print('the first', 2 + 3)", "1 / 0", "print('never')")
    with pytest.raises(CellExecutionError):
        execute({"run_name": "mine"})
    run = tmp_path / "content" / "model_outputs" / "mine"
    page = (run / "notebook.html").read_text("utf-8")
    assert "the first 5" in page and "ZeroDivisionError" in page
    assert "the first 5" in (run / "notebook.ipynb").read_text("utf-8")
    assert "the first 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        ("from qlora_helpers import UserError; raise UserError('lora_r = 0: mend it')", 1),
        ("below = 0\nprint(7 / below)", 1),
        ("print('all well')", 0),
    ],
    ids=["a mistake", "an error", "neither"],
)
def test_a_mistake_is_told_in_its_own_words_alone_and_an_error_with_its_line(
    with_cells, tmp_path, monkeypatch, capsys, cell, code
):
    with_cells(cell)
    monkeypatch.setattr(sys, "argv", ["headless", "RUN_NAME=mine", "OUTPUT_DIR=out"])
    run = tmp_path / "out" / "mine"
    if not code:
        main()
        assert capsys.readouterr().out.splitlines()[-1] == f"Curves:   {run / 'curves.png'}"
        return
    with pytest.raises(SystemExit) as caught:
        main()
    words = str(caught.value)
    assert (words == "\nUserError: lora_r = 0: mend it") == ("UserError" in cell)
    assert ("print(7 / below)" in words and "ZeroDivisionError" in words) == ("below" in cell)
    assert (run / "notebook.html").exists()


def test_a_first_run_that_was_refused_does_not_stand_in_the_seconds_way(with_cells, tmp_path):
    with_cells("raise ValueError('refused')")
    for _ in range(2):
        with pytest.raises(CellExecutionError, match="refused"):
            execute({"run_name": "mine", "output_dir": "runs"})
    assert (tmp_path / "runs" / "mine" / "notebook.html").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"run_name": "../up"}, "run_name = '../up'"), ({}, r"did not write \(notebook\.html\)")],
    ids=["a setting", "a folder of others"],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    with_cells, tmp_path, changes, words
):
    with_cells("print('never')")
    theirs = tmp_path / "runs" / "mine" / "notebook.html"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("my own page")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        execute({"run_name": "mine", "output_dir": "runs"} | changes)
    assert sorted(tmp_path.rglob("*")) == before and theirs.read_text() == "my own page"
