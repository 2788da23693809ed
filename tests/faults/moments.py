"""SIGTERM and SIGKILL at random moments: the run goes on and ends as if nothing had happened.

    python tests/faults/moments.py --times 30      # a line each; CI does four of them

Each is a two-epoch run of the notebook's cells with a checkpoint every 0.3 s, in one process or two
that train together, interrupted once and continued. The adapter's bytes must equal those of the run
that nothing interrupts, and so must every loss that was logged for steps after the interruption.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (0, 2, 1)]

import child  # noqa: E402

ROWS = [json.dumps({"prompt": f"{n} and {n}", "completion": f"{2 * n}"}) for n in range(60)]
SLOWLY = ("saved_by_time", 0.3, 0.05)
SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def settings_in(folder: Path, make) -> dict:
    """Two epochs of some dozen steps each, with dropout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(ROWS))
    return make(folder, data_files=str(folder / "rows.jsonl"), epochs=2)


def interrupt(settings: dict, log: Path, number: int, after: float, processes: int) -> str:
    """Begin a run and send it a signal `after` seconds of training; returns what it printed."""
    begun = child.begin_two(settings, log, SLOWLY) if processes == 2 else [
        child.begin(settings, log, SLOWLY)
    ]  # fmt: skip
    child.wait_for("CALL train", log, begun[0])
    time.sleep(after)
    for process in begun:  # as a launcher ends all
        if process.is_alive():
            os.kill(process.pid, number)
    for process in begun:
        process.join(60)
    assert not any(process.is_alive() for process in begun), log.read_text()
    return log.read_text()


def go_on(settings: dict, log: Path, processes: int) -> str:
    """Run all once more, to the end; returns what was printed."""
    run = child.run_two if processes == 2 else child.run
    code, shown = run(settings, log, SLOWLY)
    assert code == 0, shown
    return shown


def result(folder: Path) -> SimpleNamespace:
    """The adapter's bytes, every logged loss by step and kind, and the best step."""
    final = folder / "outputs" / "faults" / "final_model"
    state = json.loads((final / "run.json").read_text())["trainer_state"]
    kinds = ("loss", "eval_loss", "grad_norm")
    log = {(e["step"], kind): e[kind] for e in state["log_history"] for kind in kinds if kind in e}
    adapter = (final / "adapter_model.safetensors").read_bytes()
    return SimpleNamespace(adapter=adapter, log=log, best=state["best_global_step"])


def require_undisturbed(folder: Path, wanted: SimpleNamespace) -> None:
    """Raise `AssertionError` if a run does not end as the one that nothing interrupts."""
    found = result(folder)
    assert found.adapter == wanted.adapter and found.best == wanted.best
    assert found.log == wanted.log, set(found.log.items()) ^ set(wanted.log.items())


def one(make, folder: Path, wanted: SimpleNamespace, number: int, after: float, processes: int):
    """One interruption and what comes after it; returns where the run went on."""
    settings = settings_in(folder, make)
    first = interrupt(settings, folder / "log", number, after, processes)
    if number == signal.SIGTERM and "CALL answers" not in first.partition("CALL train")[2]:
        assert "and saved" in first or "nothing to save yet" in first, first
    shown = go_on(settings, folder / "log", processes)
    require_undisturbed(folder, wanted)
    found = re.search(
        "Continuing from (checkpoint-\\d+)|Starting at step 0|nothing is trained", shown
    )
    return found[0]


def main() -> None:
    from conftest import settings_of, shared_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        make, wanted, seconds = settings_of(shared_model(Path(name))), {}, {}
        for processes in (1, 2):
            folder = Path(name) / f"undisturbed-{processes}"
            began = time.monotonic()
            go_on(settings_in(folder, make), folder / "log", processes)
            wanted[processes] = result(folder)
            state = json.loads((folder / "outputs/faults/final_model/run.json").read_text())
            seconds[processes] = state["results"]["training"]["train_runtime"]
            print(f"{processes} process(es): {seconds[processes]:.1f} s of training in "
                  f"{time.monotonic() - began:.1f} s")  # fmt: skip
        for turn in range(options.times):
            number, processes = draw.choice(SIGNALS), 1 + turn % 2
            after = draw.uniform(0, seconds[processes])
            place = one(make, Path(name) / str(turn), wanted[processes], number, after, processes)
            what = f"{number.name} after {after:.2f} s, {processes} process(es)"
            print(f"{turn + 1:3} {what}: {place}; same adapter, same losses", flush=True)


if __name__ == "__main__":
    main()
