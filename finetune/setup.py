"""Section 1: installs what is missing, and keeps loaded packages at their versions.

Importing it needs the standard library alone, because it runs before anything else is there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def quiet() -> None:
    """Silence what a reader cannot act on: deprecations between libraries, and TRL's telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*|IProgress not found")
    for library in ("bitsandbytes", "liger_kernel"):
        logging.getLogger(library).setLevel(logging.ERROR)


LIGER = "liger-kernel>=0.8,<1"  # kernels that are of no use, and 200 MB of compiler, without a GPU


def has_gpu() -> bool:
    """Whether this machine has a GPU of NVIDIA's, as far as can be known without torch."""
    return shutil.which("nvidia-smi") is not None


def missing_requirements(lines: Iterable[str]) -> list[str]:
    """Those of the lines of a requirements file that nothing installed satisfies."""
    from packaging.requirements import Requirement

    def met(wanted: Requirement) -> bool:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(wanted.name)
            return wanted.specifier.contains(version, prereleases=True)
        return False

    asked = filter(None, (line.partition("#")[0].strip() for line in lines))
    return [line for line in asked if not met(Requirement(line))]


def loaded_pins() -> list[str]:
    """`name==version` of torch and every loaded package, without local suffixes (`+cu128`).

    Replacing a package under a running kernel breaks it until a restart (pyarrow on Colab is the
    usual one), so the installer gets these as constraints.
    """
    loaded = {name.partition(".")[0] for name in list(sys.modules)} | {"torch"}
    packages = importlib.metadata.packages_distributions()
    names = {package for module in loaded for package in packages.get(module, [])}
    return sorted(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names)


def plain_error() -> type[BaseException]:
    """`UserError`; where pydantic, which the helper needs, is not there yet, what ends a cell."""
    with contextlib.suppress(ImportError):
        from qlora_helpers import UserError

        return UserError
    return SystemExit


def run_pip(*arguments: str) -> None:
    """Run pip for this kernel's Python; raises `UserError` with its last words if it fails.

    An environment that uv has made comes without pip; Python itself brings one.
    """
    if importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"], capture_output=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise plain_error()(
            f"pip {' '.join(arguments)} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}\n"
            "Check that this machine reaches the internet (Kaggle: Settings › Internet; is there a "
            "proxy that refuses?), restart the kernel, Run all."
        )
    importlib.invalidate_caches()


def install_pinned(lines: Sequence[str]) -> None:
    """Install requirement `lines`, with what is loaded as constraints.

    Raises `UserError` with pip's last words if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "loaded-packages.txt"
        pins.write_text("\n".join(loaded_pins()), encoding="utf-8")
        run_pip("install", "--constraint", str(pins), *lines)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """The processes of a launch, each of which runs the set-up cell, install in turn."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    import fcntl

    with (folder / ".installing").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        importlib.invalidate_caches()
        yield


REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def install_missing(requirements: str | Path = REQUIREMENTS) -> list[str]:
    """Install what `requirements` asks for and this kernel lacks; what is loaded stays as it is.

    Returns the requirement lines that were installed; an empty list means that nothing was done.
    Raises `UserError` when the installer fails, with its last lines.
    """
    path = Path(requirements)
    with in_turn(path.parent):
        lines = path.read_text(encoding="utf-8").splitlines()
        missing = missing_requirements(lines + [LIGER] * has_gpu())
        if missing:
            install_pinned(missing)
    remove_old_torchao()
    return missing


def remove_old_torchao() -> None:
    """Uninstall a torchao that peft refuses: Colab's breaks merging, and nothing here needs it.

    https://github.com/huggingface/peft/blob/main/src/peft/import_utils.py (`is_torchao_available`)
    """
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError:
        run_pip("uninstall", "--yes", "torchao")
