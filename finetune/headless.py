"""The notebook without a browser, with settings from the command line: behind `make run`.

    python -m finetune.headless BASE_MODEL=embedded DATA='data_examples/*.jsonl' EPOCHS=1

Any setting of section 2 goes by its name in capitals; DATA is short for DATA_FILES.
What the cells print is streamed. The executed notebook stays in the run's folder, beside a page of
it in HTML.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbconvert
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

from finetune.command_line import NOTEBOOK, arguments, defaults, parse
from finetune.lock import FILE, require_unused
from qlora_helpers import Settings, UserError

# What nbclient raises when a signal has ended its kernel; it asserts that there is one.
ENDED = (DeadKernelError, AssertionError, asyncio.CancelledError)
WIDGET = "application/vnd.jupyter.widget-view+json"


class Streaming(NotebookClient):
    """Runs a notebook and prints what its cells print, and how far training is, as it happens."""

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> Any:
        """Print streams and the Trainer's progress bar (an HTML display that is updated)."""
        content = msg["content"]
        if msg["msg_type"] == "stream" and content["name"] == "stdout":
            print(content["text"], end="", flush=True)
        shown = content.get("data", {}).get("text/plain", "")
        if msg["msg_type"] == "execute_result" and not shown.startswith("<"):  # the plan
            print(shown, flush=True)
        bar = re.search(r"\[\s*\d+/\d+ \d[^\]]*\]", content.get("data", {}).get("text/html", ""))
        if bar and bar[0] != getattr(self, "_bar", None):
            self._bar = bar[0]
            print(bar[0], flush=True)
        return super().process_message(msg, cell, cell_index)

    async def _async_cleanup_kernel(self) -> None:
        """Once: after a signal nbclient does it twice."""
        if self.km is not None:
            await super()._async_cleanup_kernel()


def execute(settings: Mapping[str, object], folder: Path | None = None) -> nbformat.NotebookNode:
    """Execute the notebook with `settings`; write it and its page to `folder`, the run's if None.

    Raises `UserError` for settings that cannot be, `CellExecutionError` for a cell that fails; what
    was executed is written all the same.
    """
    notebook = load_notebook_node(str(NOTEBOOK))
    cfg = Settings.from_cell(defaults(NOTEBOOK) | dict(settings))
    require_unused(cfg.run_dir)
    folder = folder or cfg.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    if folder == cfg.run_dir:
        (folder / FILE).touch()  # it is a run's from here on, though preflight may refuse it
    notebook = parameterize_notebook(notebook, settings)
    place = {"metadata": {"path": str(Path.cwd())}}
    # At SIGINT and SIGTERM training saves a checkpoint; only then the kernel is killed.
    patient = Config({"KernelManager": {"shutdown_wait_time": 120}})
    streaming = Streaming(
        notebook,
        resources=place,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        config=patient,
    )
    try:
        streaming.execute()
    finally:
        nbformat.write(notebook, folder / "notebook.ipynb")
        exporter = nbconvert.HTMLExporter(embed_images=True)
        page, _ = exporter.from_notebook_node(without_bars(notebook))
        (folder / "notebook.html").write_text(page, encoding="utf-8")
        print(f"\nNotebook: {folder / 'notebook.html'}")
    return notebook


def without_bars(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without progress bars, which a page that is read afterwards shows as red bands."""
    copied = copy.deepcopy(notebook)
    for cell in copied.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                lines = re.split(r"[\r\n]+", output.text)
                output.text = "\n".join(line for line in lines if not re.search(r"\d%\|", line))
        if "outputs" in cell:
            kept = (o for o in cell.outputs if o.get("name") != "stderr" or o.text.strip())
            cell.outputs = [o for o in kept if WIDGET not in o.get("data", {})]
    return copied


def main() -> None:
    """Run with the command line's settings; a user's mistake ends in its own words alone."""
    settings = parse(arguments(), known := defaults())
    try:
        execute(settings)
    except CellExecutionError as error:
        words = f"\n{error.ename}: {error.evalue}" if error.ename == "UserError" else str(error)
        raise SystemExit(words) from None
    except UserError as error:
        raise SystemExit(str(error)) from None
    except ENDED:
        raise SystemExit(
            "\nThe notebook's process was ended. Nothing that was saved is lost: run this again, "
            "and it continues from the last whole checkpoint."
        ) from None
    run = Settings.from_cell(known | settings)
    print(f"Curves:   {run.run_dir / 'curves.png'}")


if __name__ == "__main__":
    main()
