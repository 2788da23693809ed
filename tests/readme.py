"""Write the parts of README.md that come from code and runs: `make readme`. `test_readme.py` checks
the settings table and the tree.

    python tests/readme.py [content/model_outputs/triage]

With a run's folder its picture is taken anew, too.
"""

import ast
import html
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from papermill.iorw import load_notebook_node

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetune.command_line import NOTEBOOK, defaults  # noqa: E402

OTHERS = {
    "requirements.txt": "what the notebook needs, with its bounds",
    "data_examples/": "360 rows that a small model can visibly learn from",
    "tests/": "tests and measurements; stacks/ has the three sets of versions they run on",
    "Makefile": "make run, launch, test, lint",
}


def settings_table() -> str:
    """A Markdown table of the hyperparameter cell: name, default, and the line beside it."""
    notebook = load_notebook_node(str(NOTEBOOK))
    source = "\n".join(c.source for c in notebook.cells)
    notes = dict(re.findall(r"^# @markdown \*\*(\w+):\*\* (.+)$", source, re.M))
    values = defaults()
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


def shown(answers: list[dict]) -> list[dict]:
    """The shortest rows: three answered rightly, each wanting another answer, and a wrong one."""
    ordered = sorted(answers, key=lambda row: len(row["prompt"]))
    right = [row for row in ordered if row["after"] == row["reference"]]
    kinds = {row["reference"].partition(";")[0]: row for row in reversed(right)}
    wrong = [row for row in ordered if row["after"] != row["reference"]]
    return [*[row for row in right if row in kinds.values()][:3], *wrong[:1]]


def page(folder: Path) -> str:
    """HTML of a run at a glance: scores, a few answers before and after, curves."""
    result = json.loads((folder / "run.json").read_text())["results"]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    before, after = result["before"], result["after"]
    right = [round(score["exact_match"] * result["rows"]) for score in (before, after)]
    rows = "".join(
        f"<tr><td>{html.escape(row['prompt'])}"
        f"<td class=b>{html.escape(textwrap.shorten(row['before'], 60, placeholder=' …'))}"
        f"<td>{'✓' if row['after'] == row['reference'] else '✗'} {html.escape(row['after'])}"
        for row in shown(answers)
    )
    return (
        "<meta charset=utf-8><style>body{font:15px sans-serif;margin:14px;width:1120px}"
        "td,th{text-align:left;vertical-align:top;padding:5px 10px;border-top:1px solid #ddd}"
        "table{border-collapse:collapse;width:640px}.b{color:#777}"
        "div{display:flex;align-items:center}"
        "img{width:455px;height:332px;object-fit:cover;object-position:left}</style>"
        f"<h3>{result['rows']} rows that it never saw: {right[0]} answered exactly before, "
        f"{right[1]} after. Loss {before['validation_loss']:.3f} → {after['validation_loss']:.3f}"
        f"</h3><div><table><tr><th>asked<th>before<th>after{rows}</table>"
        f"<img src='{(folder / 'curves.png').absolute().as_uri()}'></div>"
    )


def take_picture(folder: Path) -> None:
    """Draw `page` into the README's picture, by Chromium."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "page.html"
        source.write_text(page(folder), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1150,420"]
        options.append("--force-device-scale-factor=2")
        picture = f"--screenshot={ROOT / 'tests' / 'readme' / 'run.png'}"
        subprocess.run(["chromium", *options, picture, source.as_uri()], check=True)


def main() -> None:
    """Write README.md anew."""
    readme = ROOT / "README.md"
    text = replace(readme.read_text(), "settings", settings_table())
    text = replace(text, "tree", tree())
    if len(sys.argv) > 1:
        take_picture(Path(sys.argv[1]))
    readme.write_text(text)


if __name__ == "__main__":
    main()
