"""Write the parts of README.md that come from code and runs: `make readme`. `test_readme.py` checks
the settings table and the tree.

    python tests/readme.py [content/model_outputs/triage]

With a run's folder the picture of its report is taken anew, too.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from papermill.iorw import load_notebook_node

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetune.headless import NOTEBOOK, defaults  # noqa: E402

OTHERS = {
    "requirements.txt": "what the notebook needs, with the bounds that were tested",
    "data_examples/": "360 rows that a small model can visibly learn from",
    "tests/": "tests and measurements; stacks/ has the three sets of versions they run on",
    "Makefile": "make run, launch, test, lint",
}


def settings_table() -> str:
    """A Markdown table of the hyperparameter cell: name, default, and the line beside it."""
    notebook = load_notebook_node(str(NOTEBOOK))
    source = "\n".join(c.source for c in notebook.cells)
    notes = dict(re.findall(r"^# @markdown \*\*(\w+):\*\* (.+)$", source, re.M))
    values = defaults(notebook)
    rows = [
        f"| `{name}` | `{json.dumps(value)}` | {notes[name]} |" for name, value in values.items()
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def tree() -> str:
    """The files of the project with a line each; a room's is the first line of its docstring."""
    package = ast.get_docstring(ast.parse((ROOT / "finetune" / "__init__.py").read_text()))
    rooms = re.findall(r"\w+", package.split("\n\n")[-1])
    lines = {"finetune_mistral.ipynb": "the product", "qlora_helpers.py": "", "finetune/": ""}
    lines |= {f"  {room}.py": "" for room in rooms} | OTHERS
    for name in lines:
        path = ROOT / ("finetune" if name.startswith("  ") else "") / name.strip()
        if path.suffix == ".py":
            lines[name] = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    width = max(map(len, lines)) + 2
    return "\n".join(
        ["```", *(f"{name:{width}}{line}".rstrip() for name, line in lines.items()), "```"]
    )


def replace(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    assert re.search(pattern, text, re.S), name
    return re.sub(pattern, lambda m: m[1] + body + m[2], text, flags=re.S)


def main() -> None:
    """Write README.md anew."""
    readme = ROOT / "README.md"
    text = replace(readme.read_text(), "settings", settings_table())
    text = replace(text, "tree", tree())
    if len(sys.argv) > 1:
        report = Path(sys.argv[1]) / "report.html"
        browser = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--window-size=1150,1480",
        ]
        picture = f"--screenshot={ROOT / 'tests' / 'readme' / 'report.png'}"
        subprocess.run([*browser, picture, report.absolute().as_uri()], check=True)
    readme.write_text(text)


if __name__ == "__main__":
    main()
