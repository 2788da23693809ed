"""The same training, whatever the layout, the rows at once, the processes, the interruptions.

    python tests/faults/same.py        # all 36, a line each; CI runs a few of them

Each is a whole run of the notebook's cells over 48 rows, 16 a step, for three epochs.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (0, 2, 1)]

import child  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROWS = [{"prompt": f"{n} and " * (1 + n % 7) + f"{n}", "completion": f"{2 * n}"} for n in range(60)]
KINDS = ("fresh", "resumed", "resumed under another plan")


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train."""

    flat: bool
    rows: int
    processes: int
    kind: str = "fresh"

    def other(self) -> tuple[int, bool]:
        """Another plan, by which the run began."""
        return (2, not self.flat)


# Two processes share the 16 rows of a step, so that each has 8 at most.
ALL = [
    Case(flat, min(rows, 16 // processes), processes, kind)
    for flat, rows, processes, kind in itertools.product((False, True), (1, 4, 16), (1, 2), KINDS)
]
FIRST = Case(False, 1, 1)


def train(case: Case, make, folder: Path) -> SimpleNamespace:
    """Losses by step, validation losses, chosen step, adapter of a run of `case` in `folder`."""
    folder.mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    settings = make(
        folder, data_files=str(data), batch_size=4, gradient_accumulation=4, lora_dropout=0.0,
        bf16=False, learning_rate=6e-3,
    )  # fmt: skip
    start = child.run if case.processes == 1 else child.run_two
    run = folder / "outputs" / "faults"
    if case.kind != "fresh":
        cut = (case.rows, case.flat) if case.kind == "resumed" else case.other()
        code, shown = start(settings, folder / "log", ("cut_as", *cut, 6))
        assert code == -9 and (run / "checkpoint-4").exists(), shown
        (run / "plan.json").unlink()
    code, shown = start(settings, folder / "log", ("cut_as", case.rows, case.flat))
    assert code == 0 and ("Continuing from checkpoint-4" in shown) == (case.kind != "fresh"), shown
    state = json.loads((run / "final_model" / "run.json").read_text())["trainer_state"]
    log = state["log_history"]
    return SimpleNamespace(
        losses={e["step"]: e["loss"] for e in log if "loss" in e},
        validation={e["step"]: e["eval_loss"] for e in log if "eval_loss" in e},
        chosen=Path(state["best_model_checkpoint"]).name,
        adapter=load_file(run / "final_model" / "adapter_model.safetensors"),
    )


def apart(found: SimpleNamespace, wanted: SimpleNamespace) -> dict[str, float]:
    """How far two trainings are apart: largest difference of losses, adapter relative in norm."""

    def most(name: str) -> float:
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.keys() == other.keys(), (one, other)
        return max(abs(one[step] - other[step]) for step in one)

    pairs = [(found.adapter[name], weight) for name, weight in wanted.adapter.items()]
    far = sum((one - other).norm() ** 2 for one, other in pairs) ** 0.5
    size = sum(other.norm() ** 2 for _, other in pairs) ** 0.5
    return {"losses": most("losses"), "validation": most("validation"), "adapter": far / size}


def require_same(found: SimpleNamespace, wanted: SimpleNamespace) -> dict[str, float]:
    """`apart`, once it was found to be rounding, and the same epoch to be chosen."""
    result = apart(found, wanted)
    assert len(wanted.losses) == 12 and len(wanted.validation) == 4, wanted
    rounded = all(round(loss, 4) == loss for loss in found.losses.values())  # before 5.0
    assert result["losses"] <= (1.01e-4 if rounded else 1e-5) and result["validation"] <= 1e-6, (
        result
    )
    assert result["adapter"] <= 1e-4 and found.chosen == wanted.chosen, result
    return result


def main() -> None:
    from conftest import settings_of, shared_model

    with tempfile.TemporaryDirectory() as folder:
        make = settings_of(shared_model(Path(folder)))
        wanted = train(FIRST, make, Path(folder) / "first")
        values = sorted(wanted.validation.values())
        assert all(high - low >= 1e-3 for low, high in itertools.pairwise(values)), values
        for number, case in enumerate(ALL):
            result = require_same(train(case, make, Path(folder) / str(number)), wanted)
            print(case, {name: f"{far:.1e}" for name, far in result.items()}, flush=True)


if __name__ == "__main__":
    main()
