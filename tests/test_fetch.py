"""Section 1 fetches the code of just its version, whole or not at all, from a server that stands in
for GitHub.
"""

import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import finetune
from finetune.command_line import NOTEBOOK

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
PARTS = ("finetune", "qlora_helpers.py", "requirements.txt", "data_examples")


@pytest.fixture(scope="module")
def cell():
    """The set-up cell, up to where packages are installed, which `test_setup.py` does."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    source = next(
        "".join(c["source"]) for c in cells if "REPOSITORY, VERSION" in "".join(c["source"])
    )
    return source.partition("\nquiet()")[0] + "\nimport finetune\nprint(finetune.__file__)"


@pytest.fixture
def github(tmp_path):
    """A server with `ada/finetune-mistral`'s archives of this version and of an older one."""
    folder = tmp_path / "github" / "ada" / "finetune-mistral" / "archive" / "refs" / "tags"
    folder.mkdir(parents=True)
    for version in (finetune.VERSION, "0.9.0"):
        tree = tmp_path / "tree" / f"finetune-mistral-{version}"
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            tree.mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, tree / part)
        room = tree / "finetune" / "__init__.py"
        room.write_text(room.read_text().replace(finetune.VERSION, version))
        shutil.make_archive(str(folder / f"v{version}"), "zip", tmp_path / "tree", tree.name)
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(tmp_path / "github"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def run(cell, folder, url="", owner="ada", version=finetune.VERSION):
    """The set-up cell run in an empty folder by a fresh Python: what it said last."""
    folder.mkdir(exist_ok=True)
    code = cell.replace("https://github.com", url or "http://127.0.0.1:9")
    code = code.replace("your_org/", f"{owner}/", 1).replace(
        f'"{finetune.VERSION}"', f'"{version}"'
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_a_whole_archive_becomes_the_code_of_this_notebook(cell, github, tmp_path):
    url, _ = github
    said = run(cell, tmp_path / "here", url)
    assert said.endswith(f"/here/.finetune-mistral-{finetune.VERSION}/finetune/__init__.py")
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {f".finetune-mistral-{finetune.VERSION}", "data_examples"}
    # Again without a server: it is there.
    assert run(cell, tmp_path / "here") == said


def test_an_older_notebook_gets_its_own_code_beside_a_newer_ones(cell, github, tmp_path):
    url, _ = github
    first = run(cell, tmp_path / "here", url)
    assert "-0.9.0/finetune" in run(cell, tmp_path / "here", url, version="0.9.0")
    assert run(cell, tmp_path / "here") == first


def test_a_checkout_of_this_version_is_used_as_it_is(cell, tmp_path):
    (tmp_path / "here").mkdir()
    shutil.copytree(ROOT / "finetune", tmp_path / "here" / "finetune")
    shutil.copy(ROOT / "qlora_helpers.py", tmp_path / "here")
    assert run(cell, tmp_path / "here").endswith("/here/finetune/__init__.py")


def test_code_of_another_version_that_lies_there_is_not_used(cell, github, tmp_path):
    url, _ = github
    shutil.copytree(ROOT / "finetune", tmp_path / "here" / "finetune")
    room = tmp_path / "here" / "finetune" / "__init__.py"
    room.write_text(room.read_text().replace(finetune.VERSION, "0.1"))
    assert "/.finetune-mistral-" in run(cell, tmp_path / "here", url)
    assert "0.1" in room.read_text()


def damaged(whole):
    """An archive's bytes, damaged in ways that `zipfile` tells by different errors."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda file: file.compress_size)
    stream = largest.header_offset + 30 + len(largest.filename)
    yield "cut short", whole[: len(whole) // 2]
    yield "a proxy's page", b"<html>Sign in to the network</html>"
    yield "empty", b"PK\5\6" + bytes(18)
    yield "another byte", whole[: stream + 99] + b"?" + whole[stream + 100 :]
    yield "no stream", whole[:stream] + b"\xff" * 50 + whole[stream + 50 :]
    yield "packed otherwise", re.sub(rb"(?<=PK\x01\x02.{6})..", b"\xff\xff", whole, flags=re.S)


def test_an_archive_that_was_damaged_leaves_nothing_to_run(cell, github, tmp_path):
    url, folder = github
    file = folder / f"v{finetune.VERSION}.zip"
    whole = file.read_bytes()
    for kind, bad in damaged(whole):
        file.write_bytes(bad)
        said = run(cell, tmp_path / "here", url)
        assert said.startswith("http://127") and "could not be fetched (" in said, (kind, said)
        assert not (tmp_path / "here" / f".finetune-mistral-{finetune.VERSION}").exists()
    file.write_bytes(whole)
    assert "/.finetune-mistral-" in run(cell, tmp_path / "here", url)


def test_examples_that_the_user_has_changed_stay(cell, github, tmp_path):
    run(cell, tmp_path / "here", github[0])
    examples = tmp_path / "here" / "data_examples" / "support_triage.jsonl"
    examples.write_text("mine")
    run(cell, tmp_path / "here", github[0])
    assert examples.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": "7.7.7"}, "v7.7.7.zip could not be fetched (HTTP Error 404"),
        ({"url": ""}, "could not be fetched (<urlopen error"),
        ({"owner": "your_org"}, "REPOSITORY, above, is a placeholder: put the owner"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(cell, github, tmp_path, changes, told):
    said = run(cell, tmp_path / "here", **{"url": github[0]} | changes)
    assert told in said
    assert [path.name for path in (tmp_path / "here").iterdir()] == []


def test_an_old_python_is_one_sentence(cell):
    code = cell.replace("import sys\n", "import sys\nsys.version_info = (3, 10, 12)\n", 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("This notebook needs Python 3.11 or newer, and this is ")


def test_notebook_and_readme_name_one_repository_and_the_packages_version(cell):
    repository, version = re.search(r'REPOSITORY, VERSION = "(.+?)", "(.+?)"', cell).groups()
    assert version == finetune.VERSION
    for file in (NOTEBOOK, ROOT / "README.md"):
        links = re.findall(r"github/([\w-]+/[\w-]+)/blob", file.read_text())
        assert links and set(links) == {repository}
