"""The house: how large a room may be, and which rooms may know which."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELPER, PACKAGE = "qlora_helpers.py", "finetune"
TOP = {
    *("finetune_mistral.ipynb", HELPER, PACKAGE, "requirements.txt", "README.md", "LICENSE"),
    *("Makefile", "pyproject.toml", "data_examples", "tests", ".ci", ".gitignore"),
}


def order(root: Path) -> list[str]:
    """The rooms as the package's docstring lists them: its last paragraph."""
    text = ast.get_docstring(ast.parse((root / PACKAGE / "__init__.py").read_text()))
    return re.findall(r"\w+", text.split("\n\n")[-1])


def imported(tree: ast.AST) -> set[str]:
    """The modules that are imported anywhere in `tree`, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {f"{PACKAGE}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def rooms_of(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith(f"{PACKAGE}.")}


def in_a_file(name: str, text: str):
    """What is wrong with one file whatever the others hold."""
    tree, lines = ast.parse(text), text.splitlines()
    yield from (f"{name}:{n} is wide" for n, line in enumerate(lines, 1) if len(line) > 100)
    if len(lines) > 350:
        yield f"{name} has {len(lines)} lines"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        long = node.end_lineno - node.lineno + 1
        if isinstance(node, ast.FunctionDef) and long > 60:
            yield f"{name}:{node.name} has {long} lines"
    for holder in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in [holder, *holder.body]:
            public = not getattr(node, "name", "").startswith("_")
            kind = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            event = getattr(node, "name", "").startswith("on_")  # a callback's, named by its class
            if kind and public and not event and not ast.get_docstring(node):
                yield f"{name}:{getattr(node, 'name', 'file')} has no docstring"


def in_the_locales_encoding(text: str) -> list[str]:
    """Calls that read or write text as the locale has it, which on some machines is not UTF-8."""
    found = []
    for node in ast.walk(ast.parse(text)):
        name = getattr(getattr(node, "func", None), "attr", "")
        if name not in ("read_text", "write_text", "open") or not isinstance(node, ast.Call):
            continue
        mode = getattr(node.args[0], "value", "rb") if name == "open" and node.args else "r"
        if "b" not in str(mode) and "encoding" not in {k.arg for k in node.keywords}:
            found.append(ast.unparse(node))
    return found


def problems(root: Path) -> list[str]:
    """Every rule of the house that is broken in `root`."""
    found, listed = [], order(root)
    files = {path.stem: path for path in (root / PACKAGE).glob("*.py") if path.stem != "__init__"}
    if set(files) != set(listed) or len(listed) != len(set(listed)):
        found.append(f"listed are {sorted(listed)}, there are {sorted(files)}")
    for name, path in {"qlora_helpers": root / HELPER, **files}.items():
        text = path.read_text(encoding="utf-8")
        found += in_a_file(path.name, text)
        modules = imported(ast.parse(text))
        before = listed[: listed.index(name)] if name in listed else []
        found += [f"{name} imports {room}" for room in rooms_of(modules) if room not in before]
        if name == "qlora_helpers" and modules & {"torch", PACKAGE}:
            found.append("the helper imports torch or the package")
        found += [f"{name}: {call} without an encoding" for call in in_the_locales_encoding(text)]
        if name == "setup" and not {m.split(".")[0] for m in modules} <= {
            *sys.stdlib_module_names,
            *("qlora_helpers", "packaging", "peft"),  # the last two once they are there
        }:
            found.append("setup imports what may not be there yet")
        if name != "speed" and re.search(r"\.forward = |\.__class__ = |register_\w+_hook", text):
            found.append(f"{name} changes a model")
    return found


def test_the_house_is_in_order():
    assert problems(ROOT) == []


def append(text):
    return lambda old: old + text


BREAKS = {
    "wide": ("finetune/plan.py", append("\n# " + "x" * 100), r"plan\.py:\d+ is wide"),
    "long room": ("finetune/hub.py", append("\n# x" * 350), r"hub\.py has \d+ lines"),
    "long helper": (HELPER, append("\n# x" * 350), r"qlora_helpers\.py has \d+ lines"),
    "long function": (
        "finetune/data.py",
        append("\n\ndef f():\n    '''x'''\n" + "    x = 1\n" * 60),
        r"data\.py:f has 62 lines",
    ),
    "torch in the helper": (HELPER, append("\nimport torch\n"), "the helper imports torch"),
    "package in the helper": (
        HELPER,
        append("\ndef f():\n    '''x'''\n    from finetune.machine import device\n"),
        "qlora_helpers imports machine",
    ),
    "upwards": (
        "finetune/tokens.py",
        append("\ndef f():\n    '''x'''\n    from finetune import plan\n"),
        "tokens imports plan",
    ),
    "circle": ("finetune/files.py", append("\nimport finetune.files\n"), "files imports files"),
    "unlisted": ("finetune/attic.py", lambda _: "'''x'''\n", "listed are"),
    "undocumented": ("finetune/merge.py", append("\n\ndef f():\n    pass\n"), "f has no docstring"),
    "setup needs torch": ("finetune/setup.py", append("\nimport torch\n"), "setup imports what"),
    "locale": (
        "finetune/save.py",
        append("\n\ndef f(path):\n    '''x'''\n    path.write_text('x')\n"),
        "save: path.write_text\\('x'\\) without an encoding",
    ),
    "another changes models": (
        "finetune/train.py",
        append("\n\nmodel.forward = len\n"),
        "train changes a model",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_found(tmp_path, name):
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE)
    shutil.copy(ROOT / HELPER, tmp_path)
    file, change, words = BREAKS[name]
    path = tmp_path / file
    path.write_text(change(path.read_text() if path.exists() else ""))
    assert re.search(words, "\n".join(problems(tmp_path)))


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP


def test_tests_hold_no_product():
    for path in [ROOT / "Makefile", ROOT / "finetune_mistral.ipynb", *ROOT.glob("finetune/*.py")]:
        assert not re.search(r"\btests[/.]\w+\.py", path.read_text().replace("tests/readme.py", ""))


# What an import may not change, and how to look at it. The libraries come first.
UNCHANGED = """
import os, sys, warnings, logging, signal
import torch, transformers, peft, trl, bitsandbytes, accelerate, datasets, huggingface_hub
import matplotlib, pandas, numpy, pyarrow, psutil, pydantic, IPython, nbconvert, nbclient, papermill
import IPython.core.interactiveshell, papermill.iorw, papermill.parameterize, nbclient.exceptions
from huggingface_hub.utils import _http as http
import transformers.masking_utils, transformers.modeling_utils, torch.distributed.tensor
import peft.tuners.lora.bnb, IPython.display, matplotlib.figure, pandas.io.formats.style

def state():
    factory = [getattr(http, n, None) for n in dir(http) if "factory" in n.lower()]
    constants = {k: v for k, v in vars(huggingface_hub.constants).items() if k.isupper()}
    switches = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
                torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                torch.initial_seed(), torch.random.get_rng_state().tolist()]
    attention = sorted(transformers.AttentionInterface().keys())
    classes = [transformers.LlamaForCausalLM.forward, transformers.Trainer.training_step,
               trl.SFTTrainer.compute_loss, peft.tuners.lora.bnb.Linear4bit.forward,
               bitsandbytes.nn.Linear4bit.forward]
    python = [list(warnings.filters), logging.getLogger().level, signal.getsignal(signal.SIGINT),
              logging.getLogger("bitsandbytes").level, sys.excepthook, os.getcwd()]
    return dict(os.environ), factory, constants, switches, attention, classes, python

before = state()
import importlib
for room in sys.argv[1:]:
    importlib.import_module(room)
for was, now in zip(before, state()):
    assert was == now, (was, now)
"""


@pytest.mark.slow
def test_importing_the_rooms_changes_nothing():
    rooms = ["qlora_helpers", *(f"finetune.{room}" for room in order(ROOT))]
    command = [sys.executable, "-c", UNCHANGED, *rooms]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_helper_loads_neither_torch_nor_a_room():
    code = (
        "import sys, qlora_helpers; print([m for m in ('torch', 'finetune') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_measuring_speed_needs_neither_jupyter_nor_mistrals_packages():
    blocked = ("IPython", "nbconvert", "nbclient", "papermill", "matplotlib", "mistral_common")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "sys.path[:0] = ['tests/bench', 'tests/gpu']\n"
        "import anywhere, speed, mistral_7b\n"
        "from finetune import base_model, batches, machine, plan, speed as kernels, train\n"
        "from pathlib import Path; import tempfile\n"
        "anywhere.write_tokenizer(Path(tempfile.mkdtemp()), 99)\n"
        "print(speed.settings('there', 22)['lora_r'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["32"], done.stderr[-2000:]
