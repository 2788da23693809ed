"""The notebook's cells as a script, in one process a GPU, by `accelerate launch`: what `make launch
GPUS=2` calls.

    python tests/launch.py GPUS=2 BASE_MODEL=mistralai/Mistral-7B-Instruct-v0.3 DATA='mine/*.jsonl'
    accelerate launch --multi_gpu --num_processes 8 tests/launch.py DATA='mine/*.jsonl'

Every process runs the same cells; those tagged `main-process` (answers, plots, saving, pushing) run
in the first alone, and only that one talks. If one process ends, all do, and the same command
continues from the last whole checkpoint.

With `FSDP=True` (or a file like `fsdp.yaml` beside this) the base model's 4-bit weights are spread
over the GPUs. The processes then only train; one process after them, which lays the model over the
GPUs layer by layer, does the rest.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

VISIBLE = {
    k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"
}  # before the module narrows it

from papermill.iorw import load_notebook_node  # noqa: E402
from papermill.parameterize import parameterize_notebook  # noqa: E402
from run_notebook import NOTEBOOK, defaults, parse, qlora  # noqa: E402


def run_cells(settings: dict) -> None:
    """Run every code cell in this process's turn; ends the process at the first that fails."""
    import torch
    from accelerate import PartialState
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    # Rank 0 answers, merges and pushes while the others wait for it.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    if not state.is_main_process:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  until the process ends
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in parameterize_notebook(load_notebook_node(str(NOTEBOOK)), settings).cells:
        alone = state.is_main_process and not qlora.is_sharded()
        mine = alone or "main-process" not in cell.metadata.get("tags", [])
        # Counted, so that a `;` at a cell's end keeps its value to itself.
        if (
            cell.cell_type == "code"
            and mine
            and not shell.run_cell(cell.source, store_history=True).success
        ):
            os._exit(1)  # at once: the launcher ends the others, which may be waiting for this one
    state.wait_for_everyone()
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    """In a process that was launched: the cells. Else launch `GPUS` of them and say what to do if
    they fail.
    """
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    gpus, fsdp = given.pop("GPUS", "2"), given.pop("FSDP", "")
    arguments = [f"{name}={value}" for name, value in given.items()]
    settings = parse(arguments, defaults(load_notebook_node(str(NOTEBOOK))))
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        run_cells(settings)
        return
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_machines=1",
        f"--num_processes={gpus}",
    ]
    if fsdp:
        command += [
            "--config_file",
            str(Path(__file__).with_name("fsdp.yaml")) if fsdp == "True" else fsdp,
        ]
    elif gpus != "1":
        command.append("--multi_gpu")
    command += ["--mixed_precision=no", "--dynamo_backend=no", __file__, *arguments]
    # CUDA_VISIBLE_DEVICES: the module, imported here too, leaves one GPU to a single process.
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | VISIBLE
    # The launcher would leave each process one thread, and FSDP's 4-bit weights are made by all
    # cores.
    environment.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(gpus)))
    )
    failed = subprocess.run(command, env=environment).returncode
    if fsdp and not failed:
        print(
            "\nTrained. Now its answers, curves and report, and the adapter is saved:", flush=True
        )
        after = {"QLORA_SPREAD": "1", "ACCELERATE_MIXED_PRECISION": "no"}
        failed = subprocess.run(
            [sys.executable, __file__, *arguments], env=environment | after
        ).returncode
    if failed:
        run = qlora.Settings.from_cell(
            defaults(load_notebook_node(str(NOTEBOOK))) | settings
        ).run_dir
        raise SystemExit(
            "\nA process ended before its time, so all were ended; what it said stands above. "
            "Nothing that was saved "
            "is lost: run this again, with as many GPUs or fewer, and it continues from the "
            "last whole checkpoint in "
            f"{run}"
        )


if __name__ == "__main__":
    main()
