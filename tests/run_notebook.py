"""Run the notebook itself, headless, with settings from the command line: what `make run` calls.

    python tests/run_notebook.py BASE_MODEL=embedded DATA='data_examples/*.jsonl' EPOCHS=1

Any setting of the hyperparameter cell goes by its name in capitals; DATA is short for DATA_FILES.
What the cells print is streamed. The executed notebook stays in the run's folder, with an HTML page
of it beside it.
"""

import ast
import re
import sys
from pathlib import Path

import nbconvert
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "finetune_mistral.ipynb"
sys.path.insert(0, str(ROOT))

import qlora_helpers as qlora  # noqa: E402


def defaults(notebook) -> dict:
    """The values of the notebook's hyperparameter cell."""
    values: dict = {}
    exec(
        next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])), values
    )
    return {name: value for name, value in values.items() if not name.startswith("__")}


def parse(arguments: list[str], known: dict) -> dict:
    """`NAME=value` arguments as settings; text where the cell has text, else a Python value."""
    settings = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        name = {"data": "data_files"}.get(name.lower(), name.lower())
        if name not in known:
            raise SystemExit(f"{argument}: no such setting. There are: {' '.join(known).upper()}")
        try:
            is_text = isinstance(known[name], str) and known[name] != "auto"
            settings[name] = text if is_text else ast.literal_eval(text)
        except (SyntaxError, ValueError):
            settings[name] = text
    return settings


class Streaming(NotebookClient):
    """Runs a notebook and prints what its cells print, and how far training is, as it happens."""

    def process_message(self, msg, cell, cell_index):
        """Print streams and the Trainer's progress bar (an HTML display that is updated)."""
        content = msg["content"]
        if msg["msg_type"] == "stream" and content["name"] == "stdout":
            print(content["text"], end="", flush=True)
        bar = re.search(r"\[\s*\d+/\d+ [^\]]*\]", content.get("data", {}).get("text/html", ""))
        if bar and bar[0] != getattr(self, "_bar", None):
            self._bar = bar[0]
            print(bar[0], flush=True)
        return super().process_message(msg, cell, cell_index)


def execute(settings: dict, folder: Path | None = None) -> nbformat.NotebookNode:
    """Execute the notebook with `settings`, write it and its HTML page to `folder` (the run's),
    return it.
    """
    notebook = load_notebook_node(str(NOTEBOOK))
    cfg = qlora.Settings.from_cell(defaults(notebook) | settings)
    folder = folder or cfg.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    notebook = parameterize_notebook(notebook, settings)
    place = {"metadata": {"path": str(Path.cwd())}}
    client = Streaming(
        notebook, timeout=None, kernel_name="python3", resources=place, coalesce_streams=True
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, folder / "notebook.ipynb")
        page, _ = nbconvert.HTMLExporter(embed_images=True).from_notebook_node(notebook)
        (folder / "notebook.html").write_text(page)
        print(f"\nNotebook: {folder / 'notebook.html'}")
    return notebook


def main() -> None:
    """Run with the command line's settings; a user's mistake ends in its own words, without a
    traceback.
    """
    known = defaults(load_notebook_node(str(NOTEBOOK)))
    settings = parse(sys.argv[1:], known)
    try:
        execute(settings)
    except CellExecutionError as error:
        raise SystemExit(
            f"\n{error.ename}: {error.evalue}" if error.ename == "UserError" else str(error)
        ) from None
    except qlora.UserError as error:
        raise SystemExit(str(error)) from None
    run = qlora.Settings.from_cell(known | settings)
    print(f"Curves:   {run.run_dir / 'curves.png'}\nAdapter:  {run.final_model}")


if __name__ == "__main__":
    main()
