"""Section 1: real pip on real wheels, made here, so that nothing is fetched."""

import importlib.metadata
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import packaging
import pytest

from finetune.setup import (
    LIGER,
    install_missing,
    install_pinned,
    loaded_pins,
    missing_requirements,
    quiet,
)
from qlora_helpers import UserError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def wheel(folder, name, version, requires=()):
    """A minimal wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


GPU = ["liger-kernel"]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that is pip's only source; what the test installed from it is removed again."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    yield tmp_path
    pip = [
        sys.executable,
        "-m",
        "pip",
        "uninstall",
        "--quiet",
        "--yes",
        "qlora_probe",
        "torchao",
        *GPU,
    ]
    subprocess.run(pip, check=True, capture_output=True)


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(shelf, *lines):
    (shelf / "requirements.txt").write_text("\n".join(lines))
    return shelf / "requirements.txt"


def test_nothing_is_installed_when_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert install_missing(Path(__file__).parent.parent / "requirements.txt") == []


def test_only_what_is_missing_is_installed(shelf):
    wheel(shelf, "qlora_probe", "1.5")
    assert install_missing(
        ask(shelf, "# for numbers", "numpy>=1  # a comment", "", "qlora_probe>=1.2,<2")
    ) == ["qlora_probe>=1.2,<2"]
    assert installed("qlora_probe") == "1.5"
    assert install_missing(ask(shelf, "qlora_probe>=1.2,<2")) == []


@pytest.mark.parametrize("version", ["1.5", "1.6.0rc1", "1.9.dev20260101", "1.2.1+cu128"])
def test_a_version_that_satisfies_is_not_replaced_be_it_a_nightly(monkeypatch, tmp_path, version):
    info = tmp_path / f"qlora_probe-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: qlora-probe\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["qlora_probe>=1.2,<2", "qlora-probe>=2", "qlora_probe<1.2", "qlora_probe_2"]
    assert missing_requirements(lines) == lines[1:]


def test_a_machine_with_a_gpu_gets_its_kernels_too(shelf, monkeypatch):
    wheel(shelf, "liger_kernel", "0.8.5")
    assert install_missing(ask(shelf, "numpy")) == []
    (shelf / "nvidia-smi").write_text("#!/bin/sh\n")
    (shelf / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shelf}:{os.environ['PATH']}")
    assert install_missing(ask(shelf, "numpy")) == [LIGER]
    assert installed("liger-kernel") == "0.8.5"
    assert install_missing(ask(shelf, "numpy")) == []


def test_the_processes_of_a_launch_install_one_after_the_other(shelf):
    wheel(shelf, "qlora_probe", "1.5")
    code = (
        "from finetune.setup import install_missing; "
        f"print(len(install_missing({str(ask(shelf, 'qlora_probe'))!r})))"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert sorted(rank.communicate()[0].strip() for rank in ranks) == ["0", "1"]


def test_it_installs_where_torch_is_not_there_yet(shelf):
    wheel(shelf, "qlora_probe", "1.5")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from finetune.setup import install_missing; del sys.modules['torch']\n"
        f"print(install_missing({str(ask(shelf, 'qlora_probe'))!r}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['qlora_probe']"


def test_a_package_that_the_kernel_has_loaded_is_never_replaced(shelf):
    import numpy  # noqa: F401

    before = installed("numpy")
    wheel(shelf, "numpy", "99.0")
    wheel(shelf, "qlora_probe", "1.5", requires=["numpy>=99"])
    with pytest.raises(UserError, match=r"(?s)pip install .*numpy.*restart the kernel, Run all"):
        install_missing(ask(shelf, "qlora_probe"))
    assert installed("numpy") == before and installed("qlora_probe") is None


def test_the_words_that_pip_ended_with_are_told(tmp_path, monkeypatch):
    """A stand-in for Python that says a lot before it says why."""
    (tmp_path / "python").write_text(
        "#!/bin/sh\nseq 5000; echo the log ends here; echo the reason is this >&2; exit 1\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="qlora_probe>=1 failed:\n") as caught:
        install_pinned(["qlora_probe>=1"])
    told = str(caught.value)
    assert "4999\n5000\nthe log ends here\nthe reason is this\nCheck that" in told
    assert len(told) < 3000


def test_only_what_a_reader_cannot_act_on_is_silenced(monkeypatch):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("'pin_memory' argument is set as true but there is no GPU", stacklevel=1)
        warnings.warn("IProgress not found. Please update jupyter", stacklevel=1)
        warnings.warn("will go", FutureWarning, stacklevel=1)
        warnings.warn("your rows are odd", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["your rows are odd"]


@pytest.mark.parametrize(("own", "now"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_the_user_has_said_otherwise(monkeypatch, own, now):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    if own:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", own)
    quiet()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == now


def test_torch_keeps_its_version_though_it_is_not_loaded_yet(monkeypatch):
    packages = importlib.metadata.packages_distributions()
    for name in list(sys.modules):
        if "torch" in packages.get(name.partition(".")[0], []):
            monkeypatch.delitem(sys.modules, name)
    version = importlib.metadata.version("torch").partition("+")[0]
    assert f"torch=={version}" in loaded_pins()


def test_pins_leave_out_the_local_part_of_a_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu128")
    assert "torch==2.11.0" in loaded_pins()


def test_the_torchao_that_breaks_merging_is_removed(shelf):
    from peft.import_utils import is_torchao_available

    wheel(shelf, "torchao", "0.10.0")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "torchao"], check=True)
    importlib.invalidate_caches()
    is_torchao_available.cache_clear()
    with pytest.raises(ImportError, match="incompatible version of torchao"):
        is_torchao_available()
    install_missing(ask(shelf, "numpy"))
    assert installed("torchao") is None
    assert is_torchao_available() is False


def in_a_bare_environment(folder, code, **environment):
    """What the set-up says in a Python with `packaging` alone, as Jupyter's kernel brings it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "bare"], check=True)
    (folder / "has").mkdir()
    (folder / "has" / "packaging").symlink_to(Path(packaging.__file__).parent)
    path = os.pathsep.join([str(ROOT), str(folder / "has")])
    command = [folder / "bare" / "bin" / "python", "-c", f"import finetune.setup as setup\n{code}"]
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_an_environment_without_pip_and_pydantic_gets_what_is_missing(shelf):
    wheel(shelf, "qlora_probe", "1.5")
    code = (
        "setup.remove_old_torchao = lambda: None\n"
        f"print(setup.install_missing({str(ask(shelf, 'qlora_probe'))!r}))\n"
        "import qlora_probe"
    )
    done = in_a_bare_environment(shelf, code)
    assert done.stdout.strip() == "['qlora_probe']" and done.returncode == 0, done.stderr


def test_a_proxy_that_refuses_is_one_sentence(tmp_path):
    code = "setup.install_pinned(['qlora_probe>=1'])"
    refusing = {"HTTPS_PROXY": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}
    done = in_a_bare_environment(tmp_path, code, **refusing)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is there a proxy that refuses?" in done.stderr
