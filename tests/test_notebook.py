"""The notebook: its form as committed, and itself executed on the embedded model, twice in one
kernel.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import child
import nbformat
import pytest
import torch
import transformers
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tiny import pythons

from finetune.base_model import write_config
from finetune.command_line import NOTEBOOK, defaults, parse

ROOT = Path(__file__).parents[1]
HEADINGS = [
    "Set-up",
    "Settings",
    "Sign in",
    "Preflight",
    "Free memory",
    "Data",
    "Base model in 4 bits",
    "LoRA",
    "What it answers now",
    "Plan",
    "Train, save, push",
    "Curves",
    "Before and after",
    "Report",
    "Merge, export (optional)",
    "Use it",
    "Where everything is",
]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_clean_and_valid(committed):
    nbformat.validate(committed)
    assert (committed.nbformat, committed.nbformat_minor) >= (4, 5)
    assert len({cell.id for cell in committed.cells}) == len(committed.cells)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "widgets" not in committed.metadata


def test_its_cells_are_in_order_few_and_short(committed):
    headings = re.findall(r"^## (\d+)\. (.+)$", "\n".join(c.source for c in committed.cells), re.M)
    assert headings == [(str(n), name) for n, name in enumerate(HEADINGS, 1)]
    code = [cell.source.splitlines() for cell in committed.cells if cell.cell_type == "code"]
    assert len(code) <= 22 and sorted(map(len, code))[len(code) // 2] <= 8
    tags = [cell.metadata.get("tags", []) for cell in committed.cells]
    assert tags.count(["parameters"]) == tags.count(["settings"]) == 1
    assert tags.index(["settings"]) < tags.index(["parameters"])
    parts = re.findall(r"^# Part (\d): .+$", "\n".join(c.source for c in committed.cells), re.M)
    assert parts == ["1", "2", "3", "4", "5"]
    assert committed.metadata["accelerator"] == "GPU"
    assert committed.metadata["colab"]["gpuType"] == "T4"


def test_every_setting_is_a_form_field_explained_in_one_line(committed):
    """The line stands above its field and has its name, so that it reads as no other's."""
    cells = {tag: c for c in committed.cells for tag in c.metadata.get("tags", [])}
    counts = []
    for tag in ("settings", "parameters"):
        title, *lines = cells[tag].source.splitlines()
        assert title.startswith("# @title ") and cells[tag].metadata["cellView"] == "form"
        lines = [line for line in lines if not line.startswith("# @markdown ### ")]
        for note, field in zip(lines[::2], lines[1::2], strict=True):
            name = re.fullmatch(r"(\w+) = \S.*  # @param .+", field)[1]
            assert re.fullmatch(rf"# @markdown \*\*{name}:\*\* \S.{{10,110}}", note)
        counts.append(len(lines) // 2)
    assert 14 <= counts[0] <= 17 and sum(counts) == len(defaults()) <= 42


def test_command_line_settings_take_the_cells_types(committed):
    known = defaults()
    given = [
        "EPOCHS=1",
        "LEARNING_RATE=4e-4",
        "RUN_NAME=7",
        "DATA=a=b.jsonl",
        "BF16=auto",
        "MERGE=True",
    ]
    assert parse(given, known) == {
        "epochs": 1,
        "learning_rate": 4e-4,
        "run_name": "7",
        "data_files": "a=b.jsonl",
        "bf16": "auto",
        "merge": True,
    }
    with pytest.raises(SystemExit, match=r"EPOCS=1: no such setting\. There are: DATA_FILES "):
        parse(["EPOCS=1"], known)


@pytest.fixture(scope="module")
def base(tmp_path_factory, smollm_path, smollm_tokenizer):
    """The embedded model's first layers: all that a whole one does, sooner. `make run` has all."""
    folder = tmp_path_factory.mktemp("base") / "SmolLM2-short"
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(smollm_path, num_hidden_layers=6, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    smollm_tokenizer.save_pretrained(folder)
    write_config(model, folder, model.dtype)
    return str(folder)


def small_settings(root: Path, base: str = "embedded") -> dict:
    """Settings of a run that takes seconds: 14 rows of the examples, ten steps of four."""
    rows = (
        (ROOT / "data_examples" / "support_triage.jsonl")
        .read_bytes()
        .splitlines(keepends=True)[:14]
    )
    (root / "rows.jsonl").write_bytes(b"".join(rows))
    return {
        "base_model": base,
        "data_files": str(root / "rows.jsonl"),
        "model_cache": str(ROOT / "content" / "model_cache"),
        "output_dir": str(root / "outputs"),
        "merged_dir": str(root / "merged"),
        "run_name": "small",
        "learning_rate": 4e-3,
        "max_steps": 10,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "validation_fraction": 0.3,
        "max_new_tokens": 6,
        "bf16": False,  # or a CPU that has bf16 finds near ties in the merged model's answers
        "push_to_hub": False,
    }


def client_for(notebook, settings: dict, folder: Path) -> NotebookClient:
    """A client whose kernel runs in the repository, with the parameters cell's values replaced."""
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    return NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )


def printed(cell) -> str:
    """All that a cell wrote to stdout."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


AGAIN = (
    *("LoRA", "What it answers now", "Plan", "Train, save, push", "Report"),
    "Merge, export (optional)",
)


AFTER = ("Curves", "Before and after", "Report", "Merge, export (optional)")


def again(client, notebook, name) -> str:
    """What a section's cells print, or the `UserError` they end in, when it is run again alone."""
    start = next(
        i
        for i, c in enumerate(notebook.cells)
        if re.match(rf"## \d+\. {re.escape(name)}", c.source)
    )
    said = ""
    for index, cell in enumerate(notebook.cells[start + 1 :], start + 1):
        if cell.source.startswith(("## ", "# Part")):
            break
        try:
            if cell.cell_type == "code":
                client.execute_cell(cell, index)
                said += printed(cell) + json.dumps(cell.outputs)
        except CellExecutionError as error:
            return f"{error.ename}: {error.evalue}"
    return said


def edited(client, notebook, root) -> dict[str, str]:
    """What the sections after training say once section 2 names another run, which is there."""
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    before, other = cell.source, root / "outputs" / "other"
    other.mkdir()
    (other / ".in-use").touch()
    cell.source += "\nrun_name = 'other'"
    names = ("Settings", "Train, save, push", *AFTER)
    said = {name: again(client, notebook, name) for name in names}
    cell.source = before
    return said | {"written": str([path.name for path in other.iterdir()])}


@pytest.fixture(scope="module")
def twice(tmp_path_factory, committed, base):
    """Run all, then one number changed and run all again, in one kernel: folder, and what each run
    printed.
    """
    root = tmp_path_factory.mktemp("twice")
    notebook = nbformat.from_dict(committed)
    client, texts = client_for(notebook, small_settings(root, base) | {"merge": True}, ROOT), []
    with client.setup_kernel():
        for rank in (8, 4):
            cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
            cell.source += f"\nlora_r = {rank}\nmerge = {rank == 8}"
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            texts.append("\n".join(printed(c) for c in notebook.cells if c.cell_type == "code"))
            texts[-1] += json.dumps([o for c in notebook.cells for o in c.get("outputs", [])])
            if rank == 8:
                alone = {name: again(client, notebook, name) for name in AGAIN}
                alone["edited"] = edited(client, notebook, root)
                shutil.copytree(root / "outputs" / "small", root / "first")
    return root, notebook, texts, alone


def test_run_all_ends_with_a_saved_adapter_a_backup_a_picture_and_a_merged_model(twice):
    run = twice[0] / "outputs" / "small"
    assert (run / "final_model" / "adapter_model.safetensors").stat().st_size > 100_000
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(run.glob("small-*.zip"))) == 2
    assert (twice[0] / "merged" / "model-00001-of-00001.safetensors").exists()
    assert re.search(
        r"Merged against adapter: .* Same likeliest token 100.0%, same answer (\d) of \1",
        twice[2][0],
    )
    assert "data:image/png;base64," in (run / "report.html").read_text()
    assert json.loads((run / "run.json").read_text())["settings"]["lora_r"] == 4
    assert list(run.rglob("events.out.tfevents.*"))


def test_the_changed_number_takes_effect_in_the_same_kernel(twice):
    run = twice[0] / "outputs" / "small" / "final_model"
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 4
    assert "r 8, alpha" in twice[2][0] and "r 4, alpha" in twice[2][1]


def test_a_section_run_again_alone_gives_the_same_or_says_what_to_run_first(twice):
    """After the first run, which merged, and loaded the saved adapter in section 16."""
    _, _, (first, _), alone = twice
    faster = r"trainable params: .*\nComputed by: loss over trained tokens; fused LoRA in \d+ of .*"
    assert re.search(faster, alone["LoRA"])[0] in first
    answer = r"Answered: .*"
    assert re.search(answer, alone["What it answers now"])[0] == re.search(answer, first)[0]
    assert "As planned before for this run" in alone["Plan"]
    assert "nothing is trained again" in alone["Train, save, push"]
    assert "Adapter: " in alone["Train, save, push"] and "Report: " in alone["Report"]
    assert re.search("same answer [1-9]", alone["Merge, export (optional)"])


def test_no_section_writes_one_runs_results_into_another_that_section_2_was_edited_to(twice):
    said = twice[3]["edited"]
    assert "Run folder" in said["Settings"] and said["written"] == "['.in-use']"
    for name in ("Train, save, push", *AFTER):
        assert "• run_name was 'small', is 'other'" in said[name], name


def test_memory_returns_to_where_the_first_run_began(twice):
    first, second = (
        float(re.search(r"in use by models: ([\d.]+) GB", text)[1]) for text in twice[2]
    )
    assert abs(second - first) <= max(0.05 * first, 0.01)


def test_training_steps_and_answers_were_real(twice):
    result = json.loads((twice[0] / "outputs" / "small" / "final_model" / "run.json").read_text())[
        "results"
    ]
    assert result["after"]["validation_loss"] < result["before"]["validation_loss"] - 0.05


def test_a_fresh_process_answers_as_the_notebook_did(twice, committed):
    root = twice[0]
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import peft, torch, transformers
from finetune.answers import generate_answers
from finetune.base_model import base_model_path, mend_cpu_gradients
from finetune.machine import computing_type, device, resolve_precision
from qlora_helpers import Settings
folder = {str(root / "outputs" / "small")!r}
run = json.load(open(folder + "/final_model/run.json"))
cfg = Settings(**run["settings"])
dtype = computing_type(resolve_precision(cfg.bf16)[0])
nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                      bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=dtype)
base = transformers.AutoModelForCausalLM.from_pretrained(
    base_model_path(cfg), quantization_config=nf4, dtype=dtype, device_map={{"": device()}})
mend_cpu_gradients(base)
model = peft.PeftModel.from_pretrained(base, cfg.final_model)
tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.final_model)
rows = [json.loads(line) for line in open(folder + "/answers.jsonl")]
now = generate_answers(model, tokenizer, [row["prompt"] for row in rows], cfg.max_new_tokens)
assert len(rows) >= 2 and any(row["before"] != row["after"] for row in rows)
assert [a.text for a in now] == [row["after"] for row in rows], (now, rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# What the saved folder's own card says to run, by a Python that has nothing else of this project
# installed.
CARD = """
import json, pathlib, re, sys
sys.modules |= dict.fromkeys(json.loads(sys.argv[1]))
card = pathlib.Path("README.md").read_text()
start, ask = re.search(r"```python\\n(.*?)```", card, re.S)[1].split("messages = ")
answers = []
scope = {"print": answers.append}
exec(start, scope)
for prompt in json.loads(sys.argv[2]):
    exec("messages = " + ask.replace('"…"', repr(prompt)), scope)
print(json.dumps(answers))
"""


@pytest.mark.parametrize("python", pythons())
@pytest.mark.parametrize(
    ("folder", "absent"),
    [
        pytest.param("merged", ["peft", "bitsandbytes"], marks=pytest.mark.slow),
        ("first/final_model", ["matplotlib", "tensorboard"]),
    ],
)
def test_the_cards_own_lines_answer_as_the_notebook_did(twice, base, python, folder, absent):
    rows = [
        json.loads(line) for line in (twice[0] / "first" / "answers.jsonl").read_text().splitlines()
    ]
    place = twice[0] / folder / "SmolLM2-short"
    if not place.exists():
        place.symlink_to(base)
    absent = json.dumps(["trl", "datasets", "pandas", "qlora_helpers", "finetune", *absent])
    command = [python, "-c", CARD, absent, json.dumps([row["prompt"] for row in rows])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=twice[0] / folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [row["after"] for row in rows]
    assert any(row["before"] != row["after"] for row in rows)


COLAB = """
import importlib.machinery, sys, types
import google  # a namespace: protobuf lives in it too
parts = ("", ".userdata", ".output", ".files")
colab, userdata, output, files = (types.ModuleType(f"google.colab{part}") for part in parts)
for name in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
    setattr(userdata, name, type(name, (Exception,), {}))
userdata.get = lambda name: "hf_" + "t0ken" * 6
google.colab, colab.userdata, colab.output, colab.files = colab, userdata, output, files
files.download = lambda path: print("Downloads", path)
for module in (colab, userdata, output, files):
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    sys.modules[module.__name__] = module
shown = lambda line: print("TensorBoard shows", line)
get_ipython().register_magic_function(shown, "line", "tensorboard")
get_ipython().extension_manager.loaded.add("tensorboard")
"""


@pytest.mark.skipif(transformers.__version__ < "5", reason="Colab has 5")
def test_on_colab_secret_and_tensorboard_are_used_and_the_token_is_not_shown(
    tmp_path, committed, base
):
    notebook = nbformat.from_dict(committed)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COLAB))
    optional = next(cell for cell in notebook.cells if "merge_adapter(" in cell.source)
    notebook.cells.remove(optional)  # section 15
    client_for(
        notebook, small_settings(tmp_path, base) | {"push_to_hub": False, "max_steps": 1}, ROOT
    ).execute()
    text = "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "Hugging Face token found in Colab's secrets." in text
    assert f"TensorBoard shows --logdir {tmp_path / 'outputs' / 'small'}" in text
    assert "t0kent0ken" not in nbformat.writes(notebook)
    assert "\nDone.\n" in text and "\nDownloads " in text


MISTAKES = [
    ({"data_files": "nowhere/*.jsonl"}, r"No file matches data_files = 'nowhere/\*\.jsonl'"),
    ({"run_name": "../out"}, "run_name = '../out'"),
    ({"lora_r": 0, "learning_rate": "fast"}, "lora_r = 0.*learning_rate = 'fast'"),
    (
        {"base_model": "mistralai/Mistral-7B-Instruct-v0.3"},
        "no GPU.*Change runtime type.*base_model = 'embedded'",
    ),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES)
def test_a_mistake_ends_in_its_own_words_and_nothing_is_trained(tmp_path, base, change, words):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1"}  # a Hub that cannot be asked
    settings = small_settings(tmp_path, base) | change
    code, shown = child.run(settings, tmp_path / "log", (), nowhere)
    assert code == 2 and "Traceback" not in shown
    assert re.search(words, shown[shown.rindex("UserError: ") :], re.S), shown
    assert not list((tmp_path).rglob("adapter_model.safetensors"))


@pytest.mark.slow
def test_a_mistake_ends_the_command_in_its_own_words_alone(tmp_path):
    settings = {k.upper(): v for k, v in (small_settings(tmp_path) | {"lora_r": 0}).items()}
    words = (f"{k}={v}" for k, v in settings.items())
    command = [sys.executable, "-m", "finetune.headless", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1 and "lora_r = 0" in done.stderr
    # No traceback, but for the one that the kernel's sockets may log as it is shut down.
    assert all("zmq/" in part for part in done.stderr.split("Traceback")[1:])
