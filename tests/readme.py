"""Write the parts of README.md that come from code and runs: `make readme`. `test_readme.py` checks
the settings table.

    python tests/readme.py [content/model_outputs/triage]

Without a run's folder only the settings table is written anew.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from papermill.iorw import load_notebook_node
from run_notebook import NOTEBOOK, ROOT, defaults, qlora


def settings_table() -> str:
    """A Markdown table of the hyperparameter cell: name, default, and the line beside it."""
    notebook = load_notebook_node(str(NOTEBOOK))
    source = next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    notes = dict(re.findall(r"^(\w+) = .+\n# @markdown (.+)$", source, re.M))
    values = defaults(notebook)
    rows = [
        f"| `{name}` | `{json.dumps(value)}` | {notes[name]} |" for name, value in values.items()
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def results_table(run: dict) -> str:
    """A Markdown table of one run's scores, with what made it."""
    settings, versions = run["settings"], run["versions"]
    lines = [f"| {run['results']['rows']} held-out rows | before | after |", "|---|---|---|"]
    lines += [
        "| {score} | {before} | {after} |".format(**line)
        for line in qlora.score_lines(run["results"])
    ]
    lines += [
        "",
        f"One run of `make run SEED={settings['seed']}` on {run['created'][:10]}, on a "
        f"{run['device'].upper()} with two"
        f" cores: {settings['epochs']:g} epochs, learning rate {settings['learning_rate']:g},"
        f" transformers {versions['transformers']}, trl {versions['trl']}.",
    ]
    return "\n".join(lines)


def replace(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    assert re.search(pattern, text, re.S), name
    return re.sub(pattern, lambda m: m[1] + body + m[2], text, flags=re.S)


def main() -> None:
    """Write README.md anew."""
    readme = ROOT / "README.md"
    text = replace(readme.read_text(), "settings", settings_table())
    if len(sys.argv) > 1:
        run_dir = Path(sys.argv[1])
        run = json.loads((run_dir / "final_model" / "run.json").read_text())
        text = replace(text, "results", results_table(run))
        browser = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--window-size=1150,1480",
        ]
        picture = f"--screenshot={ROOT / 'tests' / 'readme' / 'report.png'}"
        subprocess.run(
            [*browser, picture, (run_dir / "report.html").absolute().as_uri()], check=True
        )
    readme.write_text(text)


if __name__ == "__main__":
    main()
