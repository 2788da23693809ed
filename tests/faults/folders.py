"""A fuzz of folders: random arrangements of a user's folders, with files of theirs in each.

    python tests/faults/folders.py [--cases 500] [--first 0]

Every case lays out a working folder anew: `output_dir`, `merged_dir`, `model_cache`, `data_files`
and the base model's folder, nested, equal, linked or relative, and plants files of the user's in
them. Then the notebook's file-handling cells run, twice: rows, checkpoint, save, card, merge. No
file of the user's may be gone or changed (a moved one must be told), and every refusal must name
its setting. Prints how many cases reached a saved adapter and a merge.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402
import transformers  # noqa: E402
from mistral import mistral_tokenizer  # noqa: E402
from tiny import tiny_base, tiny_tuned  # noqa: E402

from finetune.base_model import base_model_path  # noqa: E402
from finetune.batches import Cut  # noqa: E402
from finetune.callbacks import KeepSafe  # noqa: E402
from finetune.card import model_card  # noqa: E402
from finetune.checkpoints import find_checkpoint, fingerprint  # noqa: E402
from finetune.command_line import defaults  # noqa: E402
from finetune.data import read_rows, split_rows  # noqa: E402
from finetune.files import NEEDED  # noqa: E402
from finetune.folders import check_folders  # noqa: E402
from finetune.lock import claim, release  # noqa: E402
from finetune.merge import merge_adapter  # noqa: E402
from finetune.plan import Plan  # noqa: E402
from finetune.save import complete_adapter, manifest, save_adapter  # noqa: E402
from finetune.tokens import encode_rows  # noqa: E402
from qlora_helpers import Settings, UserError, listed  # noqa: E402

NAMES = ("output_dir", "merged_dir", "model_cache", "data_files", "base_model", "run_name")
ROWS = "".join(f'{{"prompt": "{n}?", "completion": "{n}"}}\n' for n in range(12))
# What a user may have in any folder, under names that are ours elsewhere, too.
THEIRS = [
    *("notes.txt", "sub/thesis.doc", "checkpoint-500/weights.bin", "checkpoint-2/adapter.bin"),
    *("checkpoint-2-keep/x.bin", "final_model/weights.bin", "final_model.old/x", "data/own.arrow"),
    *("final_model.writing/x", "run/notes.md", "run/report.html", "run/final_model/w.bin"),
    *("run/checkpoint-9/w.bin", "run/data/rows.txt", "model.safetensors.bak", "merged.old/m.bin"),
    *("checkpoints-before/checkpoint-1/w.bin", "run/run-20200101-000000.zip", "README.bak"),
]


@dataclasses.dataclass
class Result:
    """How far a case came, and what went wrong in it."""

    saved: bool = False
    merged: bool = False
    refusals: list = dataclasses.field(default_factory=list)
    wrong: list = dataclasses.field(default_factory=list)


class Model:
    """One tiny model in NF4 with an adapter, and its base model's folder to copy."""

    def __init__(self, folder: Path):
        self.base = Path(tiny_base(folder / "base", mistral_tokenizer(), hidden_size=32))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        self.tuned = tiny_tuned(str(self.base))
        self.trained = {n: p.detach().clone() for n, p in self.tuned.named_parameters()}


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(root: Path) -> dict[str, str]:
    """Every file below `root`, links not followed: its path and its hash."""
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    return {str(path.relative_to(root)): hashed(path) for path in files}


def pick(chance: random.Random, root: Path, used: list[str], fresh: str) -> str:
    """Where a setting points: a new folder, one that another setting has, one in it, or a link."""
    kind = chance.choice(["fresh"] * 11 + ["nested", "deep", "same", "link", "relative", "here"])
    known = chance.choice(used) if used else fresh
    if kind == "nested":
        return f"{known}/{fresh}"
    if kind == "deep":
        return f"{fresh}/{known.rstrip('/').split('/')[-1]}"
    if kind == "same":
        return known
    if kind == "link":
        target = root / "far" / fresh
        target.mkdir(parents=True, exist_ok=True)
        if not (root / fresh).exists():
            (root / fresh).symlink_to(target)
        return fresh
    if kind == "relative":
        return chance.choice([f"./{fresh}", f"{fresh}/../{fresh}-2", f"../{root.name}/{fresh}"])
    return "." if kind == "here" and chance.random() < 0.5 else fresh


def arrange(chance: random.Random, root: Path, model: Model) -> dict:
    """Lay the folders out and plant the user's files; returns the settings."""
    used, places = [], {}
    for name in chance.sample(NAMES[:5], 5):
        places[name] = pick(chance, root, used, name.split("_")[0])
        used.append(places[name])
    base, data = root / places["base_model"], root / places["data_files"]
    shutil.copytree(model.base, base, dirs_exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    (data / "rows.jsonl").write_text(ROWS)
    for name in NAMES[:5]:
        folder = root / places[name]
        if chance.random() < 0.6 and name not in ("base_model", "data_files"):
            continue
        for file in chance.sample(THEIRS, chance.randrange(1, 4)):
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(f"the user's {name} {file}")
    places["data_files"] += chance.choice(["/*.jsonl", "/rows.jsonl", "/**/*.jsonl"])
    if not places["base_model"].startswith((".", "/")):
        places["base_model"] = f"./{places['base_model']}"
    return places | {"run_name": chance.choice(["run", "mine", "base", "merged"]), "merge": True}


def checkpoint(cfg: Settings, trainer, model: Model, step: int) -> None:
    """What the Trainer and `KeepSafe` leave of a step."""
    folder = cfg.run_dir / f"checkpoint-{step}"
    if folder.exists():
        return
    folder.mkdir()
    for name in NEEDED["checkpoint"]:
        (folder / name.replace("*", "")).write_text("{}")
    KeepSafe(cfg, fingerprint(cfg, trainer)).finish(folder, trainer.state, {})


def cells(cfg: Settings, model: Model, result: Result, epoch: int) -> None:
    """The notebook's cells that handle files, in their order."""
    failed = [text for mark, text in check_folders(cfg) if mark == "✗"]
    if failed:
        raise UserError(listed("Before training can start:", failed))
    claim(cfg.run_dir)
    train_rows, _ = split_rows(read_rows(cfg), cfg.validation_fraction)
    base_model_path(cfg)
    data = encode_rows(train_rows, model.tokenizer)
    with contextlib.redirect_stderr(io.StringIO()):
        state = transformers.TrainerState(global_step=2 * epoch, max_steps=9)
    arguments = types.SimpleNamespace(eval_on_start=True, load_best_model_at_end=False)
    options = {"model": model.tuned, "train_dataset": data, "state": state, "args": arguments}
    trainer = types.SimpleNamespace(**options, planned_for=None)
    for name, weight in model.tuned.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()  # untrained, as `begin` wants it
    find_checkpoint(cfg, trainer)
    for name, weight in model.tuned.named_parameters():
        weight.data.copy_(model.trained[name]) if "lora_" in name else None
    checkpoint(cfg, trainer, model, 2 * epoch)
    plan = Plan(Cut(2, False, "sdpa"), 1, 1, 5, 1, 1, 100.0, 9.0, 1.0, "as set", [])
    run = manifest(cfg, trainer, plan, {"training": {}})
    save_adapter(model.tuned, model.tokenizer, cfg.final_model, model_card(cfg, run), run)
    complete_adapter(cfg.final_model, model_card(cfg, run), run)
    result.saved = True
    rows = [{"prompt": "1?", "completion": "1"}]
    merge_adapter(cfg, model.tuned, model.tokenizer, rows, model_card(cfg, run, merged=True))
    result.merged = True


def case(number: int, model: Model, values: dict) -> Result:
    """One arrangement, its cells run twice, and what became of the user's files."""
    chance, result, told = random.Random(number), Result(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = Path(folder).resolve()
        places = arrange(chance, root, model)
        before = snapshot(root)
        cfg = Settings(**values | places | {"max_new_tokens": 1, "sample_rows": 1})
        for epoch, resume in ((1, "auto"), (2, chance.choice(["never", "auto", "anyway"]))):
            try:
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
                    cells(cfg.model_copy(update={"resume": resume}), model, result, epoch)
            except UserError as error:
                result.refusals.append(str(error))
            finally:
                release()
        result.wrong += lost(before, snapshot(root), told.getvalue())
    result.wrong += [f"names no setting: {r}" for r in result.refusals if not names_one(r)]
    result.wrong = [f"case {number} ({places}): {text}" for text in result.wrong]
    return result


def names_one(refusal: str) -> bool:
    return any(name in refusal for name in NAMES)


def lost(before: dict[str, str], after: dict[str, str], told: str) -> list[str]:
    """The user's files that are gone, changed, or moved without a word."""
    wrong = []
    for path, sha in before.items():
        if after.get(path) == sha:
            continue
        moved = [p for p, other in after.items() if other == sha and p not in before]
        top = next((part for part in Path(path).parts if f"{part} is moved aside to " in told), "")
        if path in after and not moved:
            wrong.append(f"{path} was changed")
        elif not moved or not top:
            wrong.append(f"{path} is gone, moved to {moved}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        model, values, results = Model(Path(folder)), defaults(), []
        for number in range(options.first, options.first + options.cases):
            results.append(case(number, model, values))
            print(*results[-1].wrong, sep="\n", end="\n" * bool(results[-1].wrong), flush=True)
    counts = [sum(getattr(r, name) for r in results) for name in ("saved", "merged")]
    refused = sum(bool(r.refusals) for r in results)
    wrong = sum(bool(r.wrong) for r in results)
    print(
        f"{len(results)} arrangements: {counts[0]} reached a saved adapter, {counts[1]} a merge, "
        f"{refused} were refused somewhere; in {wrong} a file of the user was gone or changed, "
        "or a refusal named no setting"
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
