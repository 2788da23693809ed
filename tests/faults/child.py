"""The notebook's own cells, run in a process that a test can kill, stop or starve.

A fork server imports the libraries once; each run is then a fresh process of two or three seconds.
The model is a tiny one of a real architecture with random weights, in real NF4, with SmolLM2's real
tokenizer.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import finetune.save
from finetune.base_model import base_model_path
from finetune.batches import Cut
from finetune.machine import is_sharded
from finetune.trials import Trial, Trials
from qlora_helpers import Settings, UserError

ROOT = Path(__file__).parents[2]
BEST = Trials.best
# What the fork server imports once for all runs: libraries, and the rooms that are slow to import.
PRELOADED = [
    *("child", "trl", "peft", "transformers", "bitsandbytes", "datasets", "torch"),
    *("finetune.audit", "finetune.report", "finetune.train", "finetune.preflight", "IPython"),
    *("matplotlib.backends.backend_agg", "torch.utils.tensorboard", "finetune.answers"),
]
SKIPPED = ("## 1.", "## 5.", "## 15.", "## 16.", "## 17.")  # set-up, memory, merge, use, the end


def make_model(folder: Path) -> None:
    """Two layers, hidden size 64, SmolLM2's tokenizer: random weights, always the same."""
    import transformers

    torch.set_num_threads(1)
    settings = {"base_model": "embedded", "model_cache": str(ROOT / "content" / "model_cache")}
    smollm = base_model_path(Settings(**defaults() | settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cells() -> list[tuple[str, str]]:
    """Heading and source of every code cell that this process runs."""
    alone = os.environ.get("RANK", "0") == "0" and not is_sharded()
    heading, found = "", []
    for cell in json.loads((ROOT / "finetune_mistral.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if alone or "main-process" not in cell["metadata"].get("tags", []):
                found.append((heading, source))
        elif source.startswith("## "):
            heading = source.splitlines()[0]
    return found


def defaults() -> dict:
    """The hyperparameter cell's values."""
    values: dict = {}
    for _, source in cells():
        if "@param" in source:
            exec(source, values)
    return {name: value for name, value in values.items() if not name.startswith("__")}


def run_all(settings: dict, again: str = "") -> dict:
    """Run the cells from settings to push; a cell under the heading `again` is run once more after
    a `UserError`, and any cell after each `Planted` error.
    """
    import datasets
    import peft
    import transformers
    import trl
    from IPython.display import display

    transformers.set_seed(
        1
    )  # a new notebook kernel has no such luck; the Trainer sets its own seed for training
    names = {
        "display": display,
        "datasets": datasets,
        "peft": peft,
        "transformers": transformers,
        "trl": trl,
    }
    for heading, source in cells():
        if heading.startswith(SKIPPED):
            continue
        if "@param" in source:
            source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
        try_again = heading.startswith(again) if again else False
        while True:
            try:
                exec(compile(source, heading, "exec"), names)
                break
            except (UserError, Planted) as error:
                if isinstance(error, UserError) and not try_again:
                    raise
                print(f"{type(error).__name__}: {error}", flush=True)
                try_again = False
    return names


# -------- faults --------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(step: int, act) -> None:
    """Call `act(model)` in the given step, counted from 1: after the backward pass of its first
    micro-batch.
    """
    from finetune.train import PlannedTrainer

    original, seen = PlannedTrainer.training_step, set()

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == step - 1 and step not in seen:
            seen.add(step)
            act(model)
        return loss

    PlannedTrainer.training_step = training_step


def kill_at(step: int) -> None:
    """SIGKILL in the middle of a step."""
    in_step(step, lambda model: kill())


def signal_in_evaluation(number: int) -> None:
    """SIGTERM in the training's evaluation of this number, counted from 0 before the first step."""
    from finetune.train import PlannedTrainer

    original, calls = PlannedTrainer.loss_of, []

    def loss_of(self, rows):
        calls.append(rows)
        if len(calls) == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, rows)

    PlannedTrainer.loss_of = loss_of


def slow_step(step: int, seconds: float) -> None:
    """A step takes so long; says that it has begun."""

    def sleep(model):
        print("SLEEPS", flush=True)
        time.sleep(seconds)

    in_step(step, sleep)


def saved_by_time(interval: float, seconds: float) -> None:
    """Every step takes `seconds` more, a checkpoint is made every `interval`; tells the calls."""
    callbacks = importlib.import_module("finetune.callbacks")
    callbacks.SAVE_SECONDS, callbacks.SAVE_SHARE = interval, 1e9
    original = importlib.import_module("finetune.train").PlannedTrainer.training_step

    def training_step(self, *args, **kwargs):
        time.sleep(seconds)
        return original(self, *args, **kwargs)

    importlib.import_module("finetune.train").PlannedTrainer.training_step = training_step
    tell_calls()


def stop_at(step: int) -> None:
    """The Stop button in the middle of a step."""
    in_step(step, lambda model: os.kill(os.getpid(), signal.SIGINT))


def nan_at(step: int) -> None:
    """One weight of the adapter becomes NaN in the middle of a step."""

    def plant(model):
        next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")

    in_step(step, plant)


def in_save(step: int, act) -> None:
    """Call `act(folder, names)` when another file has come to the checkpoint of `step`.

    Looked for whenever Python is about to open, rename or remove a file.
    """
    from transformers import Trainer

    original, seen, folders = Trainer._save_checkpoint, set(), []

    def watch(event, _):
        if folders and event in ("open", "os.rename", "os.remove", "os.mkdir"):
            folder = folders.pop()  # what is done here is not looked at
            names = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()  # noqa: PTH208
            if names not in seen:
                seen.add(names)
                act(folder, names)
            folders.append(folder)

    def save(self, *args, **kwargs):
        if self.state.global_step == step:
            folders.append(Path(self.args.output_dir) / f"checkpoint-{step}")
        return original(self, *args, **kwargs)

    sys.addaudithook(watch)
    Trainer._save_checkpoint = save


def signal_in_save(step: int, number: int) -> None:
    """A signal, once, while the checkpoint of `step` is being written."""
    sent = []

    def send(folder: Path, names: frozenset[str]) -> None:
        if names and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    in_save(step, send)


def kill_in_save(step: int, name: str) -> None:
    """SIGKILL as soon as the checkpoint of `step` has a file of this name."""
    in_save(step, lambda folder, names: kill() if name in names else None)


def copy_in_save(step: int, to: str) -> None:
    """What a SIGKILL would leave of the checkpoint of `step`, at each file that comes to it."""

    def copy(folder: Path, names: frozenset[str]) -> None:
        shutil.copytree(folder, Path(to) / f"{len(list(Path(to).glob('*'))):02}")

    Path(to).mkdir()
    in_save(step, copy)


def fill_up(disk: str, leave: int) -> None:
    """Write a file that leaves so many bytes free."""
    stat = os.statvfs(disk)
    (Path(disk) / "ballast").write_bytes(bytes(stat.f_bavail * stat.f_frsize - leave))


def full_at(step: int, disk: str, leave: int) -> None:
    """The disk fills up in training."""
    in_step(step, lambda model: fill_up(disk, leave))


def full_at_the_end(disk: str, leave: int) -> None:
    """The disk fills up before the final save."""
    original = finetune.save.save_adapter

    def save_adapter(*args):
        fill_up(disk, leave)
        return original(*args)

    finetune.save.save_adapter = save_adapter


def cut_as(rows: int, flat: bool, step: int = 0) -> None:
    """The plan is this one, and nothing is measured; SIGKILL in the given step, if any."""

    def choose(trials: Trials) -> Trial:
        trials.tried = [Trial(Cut(rows, flat, "sdpa"), 1.0, 1.0)]
        return trials.tried[0]

    Trials.choose = choose
    if step:
        kill_at(step)


def as_measured() -> None:
    """The plan is chosen by time, as in a notebook."""
    Trials.best = BEST


def overflow_at(step: int) -> None:
    """A gradient is infinite in a step; prints the scaler's scale after each step."""
    update = torch.amp.GradScaler.update

    def told(self, *args):
        update(self, *args)
        print(f"SCALE {self.get_scale():.0f}", flush=True)

    torch.amp.GradScaler.update = told

    def plant(model):
        next(p for n, p in model.named_parameters() if "lora_B" in n).grad[0, 0] = float("inf")

    in_step(step, plant)


def save_often(step: int) -> None:
    """A checkpoint is made after every step, and SIGKILL comes in the given one."""
    save_always()
    kill_at(step)


def save_always() -> None:
    """A checkpoint is made after every step, whatever it costs."""
    callbacks = importlib.import_module("finetune.callbacks")
    callbacks.SAVE_SECONDS, callbacks.SAVE_SHARE = 0, 1e9


def under_fsdp() -> None:
    """Train under FSDP without a GPU: accelerate offers it to GPUs alone, and is told otherwise.

    Everything else is the real thing: torch's FSDP2 over gloo, accelerate's wrapping.
    """
    initialise = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = with_fsdp
    told = yaml.safe_load((ROOT / "finetune" / "fsdp.yaml").read_text())["fsdp_config"]
    os.environ |= {name.upper(): str(value) for name, value in told.items()}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}


def back_in_time() -> None:
    """Every checkpoint gets an older time stamp than the one before."""
    from transformers import Trainer

    original = Trainer._save_checkpoint

    def save(self, *args, **kwargs):
        original(self, *args, **kwargs)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        os.utime(folder, (1e9 - self.state.global_step,) * 2)

    Trainer._save_checkpoint = save


def wrap(room: str, name: str, act) -> None:
    """Call `act(number of the call)` before each call of a room's function."""
    module = importlib.import_module(room)
    original, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        act(len(calls))
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


class Planted(RuntimeError):
    """What no one expects, in a section that a run goes on without."""


def fail_once_in(calls: list[tuple[str, str, int]]) -> None:
    """An error in one call of each room's function; says what is in the run's folder by then."""
    for room, name, call in calls:

        def act(number: int, name: str = name, call: int = call) -> None:
            if number == call:
                run = Path("outputs/faults")
                card = (run / "final_model" / "README.md").read_text()
                weights = (run / "final_model" / "adapter_model.safetensors").read_bytes()
                told = (
                    "not asked" if "has not been asked the held-out rows yet" in card else "asked"
                )
                zips = len(list(run.glob("*.zip")))
                raise Planted(f"in {name}: {hashlib.sha256(weights).hexdigest()}, {zips}, {told}")

        wrap(room, name, act)


def tell_calls() -> None:
    """Print when training, answering, plotting and scoring begin."""
    calls = {"train": ("finetune.callbacks", "safe_training")}
    calls |= {"answers": ("finetune.answers", "generate_answers")}
    calls |= {
        "curves": ("finetune.report", "plot_curves"),
        "scores": ("finetune.scores", "scores"),
    }
    for word, place in calls.items():
        wrap(*place, lambda _, word=word: print(f"CALL {word}", flush=True))


FAULTS = {
    fault.__name__: fault
    for fault in (
        kill_at,
        kill_in_save,
        signal_in_save,
        copy_in_save,
        stop_at,
        nan_at,
        full_at,
        full_at_the_end,
        back_in_time,
        under_fsdp,
        save_often,
        save_always,
        saved_by_time,
        signal_in_evaluation,
        slow_step,
        as_measured,
        overflow_at,
        cut_as,
        fail_once_in,
        tell_calls,
    )
}


def main(settings: dict, log: str, fault: tuple, environment: dict, again: str) -> None:
    """What a process does: everything it prints goes to `log`; exit code 1 for an error."""
    os.environ.update(environment)
    os.chdir(Path(log).parent)  # `/content` is a folder of the working directory
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from huggingface_hub import constants

    if endpoint := os.environ.get("HF_ENDPOINT"):  # the fork server read it when it imported
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint, template
    if "WORLD_SIZE" in os.environ:
        PartialState(cpu=True)
    torch.set_num_threads(1)  # sums in one order, and no thread pools across a fork
    # Time decides on the cut, and the cut on the last digits.
    Trials.best = lambda self: self.fitting()[0]
    if fault:
        FAULTS[fault[0]](*fault[1:])
    code = 0
    try:
        run_all(settings, again)
    except UserError as error:
        print(f"UserError: {error}")
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported what is `PRELOADED`; on a GPU, for CUDA does not survive
    a fork, nothing is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([] if torch.cuda.is_available() else PRELOADED)
    return context


def begin(
    settings: dict, log: Path, fault: tuple = (), environment: dict | None = None, again: str = ""
) -> multiprocessing.Process:
    """Start one process."""
    arguments = (settings, str(log), fault, environment or {}, again)
    process = fork_server().Process(target=main, args=arguments)
    process.start()
    return process


def run(
    settings: dict, log: Path, fault: tuple = (), environment: dict | None = None, again: str = ""
) -> tuple:
    """One process from start to end: its exit code (-9 if killed) and what it printed."""
    process = begin(settings, log, fault, environment, again)
    process.join(300)
    return process.exitcode, log.read_text(errors="replace")


def wait_for(word: str, log: Path, process: multiprocessing.Process) -> None:
    """Wait until a process has printed `word`."""
    for _ in range(3000):
        if log.exists() and word in log.read_text(errors="replace"):
            return
        if not process.is_alive():
            break
        time.sleep(0.02)
    raise AssertionError(log.read_text(errors="replace"))


def begin_two(settings: dict, log: Path, fault: tuple = ()) -> list[multiprocessing.Process]:
    """Start two processes that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    parts = []
    for rank in "01":
        place = log if rank == "0" else log.with_name("log of the second")
        own = together | {"RANK": rank, "LOCAL_RANK": rank}
        parts.append(begin(settings, place, fault, own))
    return parts


def run_two(settings: dict, log: Path, fault: tuple = ()) -> tuple:
    """Two processes that train together; exit code and output of the first."""
    parts = begin_two(settings, log, fault)
    for part in parts:
        part.join(300)
    return parts[0].exitcode, log.read_text(errors="replace")
