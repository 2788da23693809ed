"""The notebook's settings, and those that a command line gives: any by its name in capitals."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "finetune_mistral.ipynb"
# What the embedded model wants otherwise: a 135M model learns at a higher rate than a 7B one, and
# two cores want fewer epochs.
SMALL = {"learning_rate": 6e-4, "epochs": 3, "max_new_tokens": 32}
MAKES_OWN = {"STACK", "PYTHON", "PY", "VENV"}  # variables of the Makefile, which are no settings


def defaults(notebook: Path = NOTEBOOK) -> dict[str, Any]:
    """The values of the notebook's two cells of settings."""
    values: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if {"settings", "parameters"} & {*cell["metadata"].get("tags", [])}:
            exec("".join(cell["source"]), values)
    return {name: value for name, value in values.items() if not name.startswith("__")}


def arguments() -> list[str]:
    """What the command line gives, and for `--make` what make was called with besides."""
    given = sys.argv[1:]
    if given[:1] == ["--make"]:
        return given[1:] + given_to_make(os.environ.get("MAKEFLAGS", ""))
    return given


def given_to_make(flags: str) -> list[str]:
    r"""The `NAME=value` arguments of a call of make, from its `MAKEFLAGS`, but for make's own.

    They follow ` -- `; there make writes `\` before blanks and backslashes, and `$` twice. No shell
    and no Makefile has read the values then, so any text arrives as it was typed.
    https://www.gnu.org/software/make/manual/html_node/Options_002fRecursion.html
    """
    _, _, text = f" {flags}".partition(" -- ")
    words = re.findall(r"(?:\\.|[^\s\\])+", text)
    given = [re.sub(r"\\(.)", r"\1", word).replace("$$", "$") for word in words]
    return [word for word in given if word.partition("=")[0].rstrip(":") not in MAKES_OWN]


def parse(arguments: Sequence[str], known: Mapping[str, object]) -> dict[str, Any]:
    """`NAME=value` arguments as settings: text where the cell has text, else a Python value.

    A later one counts. With the embedded model, what is not given of `SMALL` is added. Raises
    `SystemExit` for a name that the cell does not have.
    """
    settings: dict[str, Any] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        name = {"data": "data_files"}.get(name.lower(), name.lower())
        if name not in known:
            raise SystemExit(f"{argument}: no such setting. There are: {' '.join(known).upper()}")
        is_text = isinstance(known[name], str) and known[name] != "auto"
        if name == "data_files" and text.startswith("[") and isinstance(python_value(text), list):
            is_text = Path(text).exists()
        settings[name] = text if is_text else python_value(text)
    small = SMALL if settings.get("base_model") == "embedded" else {}
    return {**small, **settings}


def python_value(text: str) -> Any:
    """`text` as Python reads it, or itself where Python cannot."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError):
        return text
