"""What a process runs on: its place among others, memory, random states, versions, errors."""

import contextlib
import gc
import importlib.metadata
import os
import platform
import random
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from finetune.machine import (
    autocast,
    chain,
    computing_type,
    device,
    duration,
    free_memory,
    free_memory_size,
    is_sharded,
    is_spread,
    memory_in_use,
    memory_limit,
    peak_memory,
    processes,
    random_states,
    same_randomness,
    set_random_states,
    short,
    versions,
)

ROOT = Path(__file__).parents[1]
GB = 2**30


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 16 GB: 10 are free, 3 this process's own, the others somebody else's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * GB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * GB)


# -------- processes -----------------------------------------------------------------------


def test_on_a_second_machine_a_process_counts_among_all_and_has_a_gpu_of_its_own(
    monkeypatch, no_gpu
):
    """The second of four processes there: number 5 of 8."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes() == (0, 1) and device() == "cpu"
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert processes() == (5, 8) and device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == "cuda:1"


@pytest.mark.parametrize(
    ("environment", "sharded", "spread"),
    [
        ({}, False, False),
        ({"ACCELERATE_USE_FSDP": "false"}, False, False),
        ({"ACCELERATE_USE_FSDP": "true"}, True, True),
        ({"ACCELERATE_USE_FSDP": "True"}, True, True),
        ({"QLORA_SPREAD": "1"}, False, True),
    ],
)
def test_a_model_is_spread_under_fsdp_and_in_the_process_after_it(
    monkeypatch, environment, sharded, spread
):
    for name in ("ACCELERATE_USE_FSDP", "QLORA_SPREAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (is_sharded(), is_spread()) == (sharded, spread)


FIRST = """
import os, sys, time; from pathlib import Path
from accelerate import PartialState
from finetune.machine import main_first
PartialState(cpu=True)
@main_first
def prepare(path, text):
    found = path.exists()
    if os.environ["RANK"] == "0":
        time.sleep(1)
        path.write_text(text)
    return found, path.read_text()
print(prepare(Path(sys.argv[1]), text="whole"))
"""


@pytest.mark.slow
def test_what_the_first_process_prepares_is_there_before_the_others_look(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [sys.executable, "-c", FIRST, str(tmp_path / "prepared")]
    ranks = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": n, "LOCAL_RANK": n}, **options)
        for n in "01"
    ]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert said == ["(False, 'whole')", "(True, 'whole')"]


# -------- precision -----------------------------------------------------------------------


def test_the_trainers_precision_is_the_one_that_is_named(no_gpu):
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {name: computing_type(name) for name in types} == types
    x = torch.ones(2, 2)
    for name in ("bf16", "fp32"):
        with autocast(name):
            assert (x @ x).dtype == types[name]
    with autocast("bf16"), autocast("fp32"):
        assert (x @ x).dtype == torch.float32


def test_what_is_drawn_in_between_changes_no_later_draw(no_gpu):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with same_randomness():
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_every_kind_of_randomness_goes_on_from_where_it_was(no_gpu):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random_states()
    drawn = [draw() for _ in range(3)]
    set_random_states(states)
    assert [draw() for _ in range(3)] == drawn


# -------- memory --------------------------------------------------------------------------


class Model:
    """Something large that refers to itself, as a module does by its hooks."""

    def __init__(self):
        self.itself = self


def test_a_previous_runs_objects_are_let_go_wherever_the_notebook_has_them(no_gpu, capsys):
    held = [Model() for _ in range(7)]
    seen = [weakref.ref(model) for model in held]
    names = ("model", "_", "__", "_7", "_31", "___")
    namespace = dict(zip(names, held, strict=False)) | {"Out": {31: held[-1]}}
    namespace |= {"rows": [1], "_own": [2], "_3d": [3]}
    del held

    def fail():
        model = Model()
        seen.append(weakref.ref(model))
        raise ValueError(model)

    with contextlib.suppress(ValueError):
        try:
            fail()
        except ValueError as error:  # as IPython keeps the last one
            sys.last_type, sys.last_value = type(error), error
            sys.last_traceback = sys.last_exc = error.__traceback__
            raise
    free_memory(namespace, ["trainer", "model"])
    assert [ref() for ref in seen] == [None] * 8
    assert "model" not in namespace and namespace["Out"] == {}
    assert [namespace[name] for name in ("rows", "_own", "_3d")] == [[1], [2], [3]]
    assert capsys.readouterr().out.startswith("Memory in use by models: ")


def test_memory_is_counted_once_however_many_views_of_it_there_are(no_gpu):
    gc.collect()
    before = memory_in_use()
    whole = torch.zeros(2**20, 16)  # 64 MB
    views = [whole[: 2**n] for n in range(9, -1, -1)]
    assert len(views) == 10 and memory_in_use() - before == pytest.approx(1 / 16, rel=0.01)


def test_training_may_hold_most_of_what_is_free_or_ours_and_no_more_than_is_set(gpu):
    assert (free_memory_size(), memory_in_use(), peak_memory()) == (10, 2, 5)
    untold = memory_limit(0)
    assert 10 < untold < 13
    assert memory_limit(1000) == untold
    assert 4 < memory_limit(5) < 5


def test_without_a_gpu_what_is_free_of_main_memory_counts(no_gpu):
    total = psutil.virtual_memory().total / GB
    for free in (memory_limit(0), free_memory_size()):
        assert free == pytest.approx(psutil.virtual_memory().available / GB, rel=0.3)
        assert 0 < free < total


def test_the_peak_is_at_least_what_is_held_now(no_gpu):
    held = psutil.Process().memory_info().rss / GB
    assert 0.9 * held <= peak_memory() <= psutil.virtual_memory().total / GB


# -------- versions and errors -------------------------------------------------------------


def test_the_versions_are_those_of_what_decides_a_result(no_gpu):
    found = versions()
    assert found.pop("python") == platform.python_version()
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate"} <= set(found)
    assert found == {name: importlib.metadata.version(name) for name in found}


@pytest.mark.parametrize("spelling", ["liger_kernel", "liger-kernel"])
def test_on_a_gpu_its_kernels_are_among_the_versions(gpu, monkeypatch, tmp_path, spelling):
    info = tmp_path / "liger_kernel-0.8.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {spelling}\nVersion: 0.8.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions()["liger-kernel"] == "0.8.5"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("first\nsecond\nthird", "ValueError: first"),
        ("\n\n first \n", "ValueError: first "),
        ("", "ValueError: no reason given"),
        (" \n", "ValueError: no reason given"),
        (" (Request ID: Root=1-2;3)\n\n429 Too Many\nRetry", "ValueError: 429 Too Many"),
        ("Refused. (Request ID: 4)\n\nNo.", "ValueError: Refused. (Request ID: 4)"),
    ],
)
def test_an_error_is_told_in_one_line_by_its_first(said, told):
    assert short(ValueError(said)).rstrip() == told.rstrip()


def test_what_an_error_came_from_is_found_raised_from_it_or_in_handling_it():
    first, second, third = OSError("first"), ValueError("second"), RuntimeError("third")
    with contextlib.suppress(RuntimeError):
        try:
            try:
                raise first
            except OSError:
                raise second  # noqa: B904 (it is what a library does)
        except ValueError:
            raise third from second
    assert list(chain(third)) == [third, second, first]
    assert list(chain(None)) == []


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.2, "0 seconds"),
        (1.2, "1 second"),
        (2.4, "2 seconds"),
        (89, "89 seconds"),
        (222, "3.7 minutes"),
        (3599, "60 minutes"),
        (36_000, "10.0 hours"),
    ],
)
def test_a_time_is_told_in_its_own_unit(seconds, told):
    assert duration(seconds) == told
