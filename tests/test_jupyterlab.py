"""The notebook in JupyterLab, in a real browser: Run › Run All Cells, once."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tiny import tiny_base

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not which("chromium"), reason="needs Chromium")]


@contextmanager
def jupyterlab(folder: Path):
    """JupyterLab's own server over `folder`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def code_cells(path: Path) -> list:
    """The file's code cells; it is read again where JupyterLab was in the middle of saving it."""
    for _ in range(50):
        with suppress(json.JSONDecodeError):
            cells = json.loads(path.read_text())["cells"]
            return [cell for cell in cells if cell["cell_type"] == "code"]
        time.sleep(0.1)
    raise AssertionError(f"no notebook: {path.read_text()[:200]!r}")


def test_run_all_cells_by_the_menu(tmp_path, mistral_tokenizer):
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    base = tiny_base(tmp_path / "base", mistral_tokenizer)
    settings = {
        "base_model": base,
        "data_files": "data_examples/*.jsonl",
        "run_name": "lab",
        "push_to_hub": False,
    }
    settings |= {"max_steps": 2, "sample_rows": 2, "max_new_tokens": 4}
    file = tmp_path / "finetune_mistral.ipynb"
    nbformat.write(
        parameterize_notebook(load_notebook_node(str(ROOT / "finetune_mistral.ipynb")), settings),
        file,
    )
    for name in ("finetune", "qlora_helpers.py", "requirements.txt", "data_examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    with jupyterlab(tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        until = time.monotonic() + 300
        while True:
            try:
                page.goto(f"{address}/lab/tree/{file.name}")
                break
            except Exception:
                assert time.monotonic() < until, (tmp_path / "lab.log").read_text()
                time.sleep(1)
        page.locator(".jp-NotebookPanel-notebook").wait_for(timeout=120_000)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        while not code_cells(file)[-1]["execution_count"]:
            failed = [
                out
                for cell in code_cells(file)
                for out in cell["outputs"]
                if out["output_type"] == "error"
            ]
            assert not failed and time.monotonic() < until, (
                failed or page.inner_text("body")[-3000:]
            )
            time.sleep(2)
            page.keyboard.press("Control+s")
        page.locator("text=Wanted:").first.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / "lab.png")
        browser.close()
    assert all(cell["execution_count"] for cell in code_cells(file))
    assert (
        tmp_path / "content" / "model_outputs" / "lab" / "final_model" / "adapter_model.safetensors"
    ).exists()
