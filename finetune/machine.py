"""What this process runs on: device, processes, precision, memory, versions."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
import psutil
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from qlora_helpers import UserError, many

T = TypeVar("T")
BAR_AFTER = 2
RandomStates = tuple[Any, ...]  # of Python, NumPy, torch and a GPU, each as its library has it


def device() -> str:
    """This process's GPU (`'cuda:0'` unless several were launched), or `'cpu'` without one."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def processes() -> tuple[int, int]:
    """This process's number, from 0, and how many train together; 0 and 1 without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_sharded() -> bool:
    """Whether this process trains under FSDP, which spreads the base model over all GPUs."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_spread() -> bool:
    """Whether several GPUs hold parts of the base model: under FSDP, or in the process after it."""
    return is_sharded() or "QLORA_SPREAD" in os.environ


def main_first(function: Callable) -> Callable:
    """Let the first process run `function` before the others: it writes what they then find."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        if processes()[1] == 1:
            return function(*args, **kwargs)
        with PartialState().main_process_first():
            return function(*args, **kwargs)

    return run


def progress(
    work: Iterable[T], what: str, unit: str = "it", total: int | None = None
) -> Iterable[T]:
    """`work`, with a bar that shows how far it is, after `BAR_AFTER` seconds.

    `total` is how many there are, where `work` does not say.
    """
    other = processes()[0] > 0  # the first process alone talks
    return tqdm(work, what, total, unit=unit, delay=BAR_AFTER, leave=False, disable=other)


def duration(seconds: float) -> str:
    """A time in words: seconds, minutes or hours."""
    if seconds < 90:
        return many(round(seconds), "second")
    if seconds < 5400:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} minutes"
    return f"{seconds / 3600:.1f} hours"


def resolve_precision(bf16: bool | Literal["auto"]) -> tuple[str, str]:
    """The computing precision (`'bf16'`, `'fp16'`, `'fp32'`) and the reason for it.

    bf16 needs compute capability 8 (Ampere): `torch.cuda.is_bf16_supported()` also says yes to a
    T4, which only emulates it. Raises `UserError` for `bf16 = True` on such a GPU.
    """
    if not torch.cuda.is_available():
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        fast = bf16 is True or (bf16 == "auto" and native)
        return "bf16" if fast else "fp32", f"on a CPU {'with' if native else 'without'} native bf16"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if bf16 is False:
        return "fp16", "bf16 = False"
    if major >= 8:
        return "bf16", f"{name} has native bf16"
    if bf16 is True:
        raise UserError(
            f"bf16 = True, but {name} has no native bf16. Set bf16 = 'auto' in section 2."
        )
    return "fp16", f"{name} (compute capability {major}.{minor}) has no native bf16"


def computing_type(precision: str) -> torch.dtype:
    """The torch type of `'bf16'`, `'fp16'` or `'fp32'`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def free_memory(namespace: dict[str, object], names: Iterable[str]) -> None:
    """Drop a previous run's objects and give their memory back, then print what this process holds.

    `namespace` is the notebook's `globals()`. A model stays alive as long as anything refers to it,
    so the last error's traceback and the notebook's own record of results are dropped as well.
    """
    for name in names:
        namespace.pop(name, None)
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    for name in [n for n in namespace if re.fullmatch(r"_+|_i+|_\d+", n)]:
        namespace[name] = None
    if isinstance(said := namespace.get("Out"), dict):
        said.clear()
    free_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Python frees to glibc, and glibc keeps it
    kind = "GPU" if torch.cuda.is_available() else "main"
    print(f"Memory in use by models: {memory_in_use():.2f} GB of {kind} memory")


def memory_in_use() -> float:
    """GiB that tensors hold: on the GPU where there is one, else in main memory.

    There each storage is counted once, however many tensors are views of it.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.device.type == "cpu"
    }
    return sum(storages.values()) / 2**30


def free_memory_size() -> float:
    """GiB that can still be had: on the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def peak_memory() -> float:
    """The most GiB that this process has held: on the GPU if there is one, else in main memory."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_limit(setting: float) -> float:
    """GiB that training may hold: 92 % of what is free or already ours, or less if so set.

    `setting` is `memory_limit_gb`, 0 for none; on a GPU 95 % of it counts. What is left is for
    evaluation, generation and fragmentation. Without a GPU, where no setting is allowed
    (`preflight`): all that is free.
    """
    if not torch.cuda.is_available():
        return free_memory_size()
    ours = 0.92 * (free_memory_size() + torch.cuda.memory_reserved() / 2**30)
    return min(ours, 0.95 * setting) if setting else ours


def free_cache() -> None:
    """Give unused GPU memory back."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without one


def autocast(precision: str) -> Any:
    """The context in which the Trainer computes, for `'bf16'`, `'fp16'` or `'fp32'`."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    hardware = device().partition(":")[0]  # "cuda" or "cpu", without the GPU's number
    return torch.autocast(hardware, kinds.get(precision), enabled=precision in kinds)


def same_randomness() -> Any:
    """A context after which the random states are what they were before."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def random_states() -> RandomStates:
    """The random states of Python, NumPy, torch and this process's GPU."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def set_random_states(states: RandomStates) -> None:
    """Put `random_states` back."""
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that FSDP has taken apart; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    names = ["torch", "transformers", "peft", "trl", "bitsandbytes"]
    names += ["accelerate", "datasets", "huggingface_hub"]
    if torch.cuda.is_available():  # and those of the kernels that are here
        packages = importlib.metadata.distributions()
        installed = {str(package.metadata["Name"]).replace("_", "-") for package in packages}
        names += installed & {"liger-kernel", "triton"}
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": sys.version.split()[0]} | found


def short(error: Exception) -> str:
    """The kind of an error and the first line of what it says, behind the Hub's request number."""
    said = re.sub(r"^\([\w ]+ ID: [^)]*\)\s+", "", str(error).strip())
    return f"{type(error).__name__}: {(said or 'no reason given').splitlines()[0]}"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
