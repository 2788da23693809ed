"""The notebook's cells as a script, in one process a GPU, by `accelerate launch`: `make launch`.

    python -m finetune.launch GPUS=2 BASE_MODEL=mistralai/Mistral-7B-Instruct-v0.3 DATA='my/*.jsonl'
    accelerate launch --multi_gpu --num_processes 8 -m finetune.launch DATA='my/*.jsonl'

Every process runs the same cells; those tagged `main-process` (answers, plots, saving, pushing) run
in the first alone, and only that one talks. If one process ends, all do, and the same command
continues from the last whole checkpoint.

With `FSDP=True` (or a file like `fsdp.yaml` beside this) the base model's 4-bit weights are spread
over the GPUs. The processes then only train; one process after them, which lays the model over the
GPUs layer by layer, does the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

from finetune.command_line import NOTEBOOK, arguments, defaults, parse
from finetune.machine import is_sharded
from qlora_helpers import Settings, UserError

MODULE = "finetune.launch"


def run_cells(settings: Mapping[str, object]) -> None:
    """Run every code cell in this process's turn; ends the process at the first that fails."""
    # Rank 0 answers, merges and pushes while the others wait for it.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    if not state.is_main_process:
        # Until the process ends.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    alone = state.is_main_process and not is_sharded()
    for cell in parameterize_notebook(load_notebook_node(str(NOTEBOOK)), settings).cells:
        mine = alone or "main-process" not in cell.metadata.get("tags", [])
        if cell.cell_type != "code" or not mine:
            continue
        # Stored, so that a `;` at a cell's end keeps its value to itself.
        if not shell.run_cell(cell.source, store_history=True).success:
            os._exit(1)  # at once: the launcher ends the others, which may be waiting for this one
    state.wait_for_everyone()
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()


def launcher(gpus: str, fsdp: str) -> list[str]:
    """The command that starts `gpus` processes of this module; `fsdp` is "", "True" or a file."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1"]
    command += [f"--num_processes={gpus}", "--mixed_precision=no", "--dynamo_backend=no"]
    if fsdp:
        own = str(Path(__file__).with_name("fsdp.yaml"))
        command += ["--config_file", own if fsdp == "True" else fsdp]
    elif gpus != "1":
        command.append("--multi_gpu")
    return [*command, "--module", MODULE]


def main() -> None:
    """In a launched process: the cells. Else launch `GPUS` of them; say what to do if they fail."""
    given = dict(argument.partition("=")[::2] for argument in arguments())
    gpus, fsdp = given.pop("GPUS", "2"), given.pop("FSDP", "False")
    fsdp = "" if fsdp == "False" else fsdp
    words = [f"{name}={value}" for name, value in given.items()]
    settings = parse(words, known := defaults())
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        run_cells(settings)
        return
    if not gpus.isdecimal() or int(gpus) < 1:
        raise SystemExit(f"GPUS={gpus}: how many GPUs train, as a number: GPUS=2")
    if fsdp not in ("", "True") and not Path(fsdp).is_file():
        raise SystemExit(f"FSDP={fsdp}: there is no such file; FSDP=True needs none of your own")
    try:
        folder = Settings.from_cell(known | settings).run_dir
    except UserError as error:
        raise SystemExit(str(error)) from None
    # The launcher would leave each process one thread, and all cores make FSDP's 4-bit weights.
    threads = max(1, len(os.sched_getaffinity(0)) // int(gpus))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    failed = subprocess.run([*launcher(gpus, fsdp), *words], env=environment).returncode
    if fsdp and not failed:
        print(
            "\nTrained. Now its answers, curves and report, and the adapter is saved:", flush=True
        )
        environment |= {"QLORA_SPREAD": "1", "ACCELERATE_MIXED_PRECISION": "no"}
        failed = subprocess.run([sys.executable, "-m", MODULE, *words], env=environment).returncode
    if failed:
        raise SystemExit(
            "\nA process ended before its time, so all were ended; what it said stands above. "
            "Nothing that was saved is lost: run this again, with as many GPUs or fewer, and it "
            f"continues from the last whole checkpoint in {folder}"
        )


if __name__ == "__main__":
    main()
