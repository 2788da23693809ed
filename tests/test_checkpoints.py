"""Section 11: what makes a run the same run, which checkpoint it goes on from, what comes back of a
finished one. Killed and damaged runs are in faults/test_resume.py.
"""

import contextlib
import dataclasses
import json
import shutil
import types
from collections import OrderedDict

import datasets
import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, TrainerState

from finetune.backup import back_up, drive_folder
from finetune.batches import with_void_row
from finetune.checkpoints import (
    find_checkpoint,
    finished,
    replace_lost_best,
    require_same_state,
    state_hashes,
)
from finetune.files import NEEDED, checkpoints, edit_json, seal
from finetune.identity import fingerprint
from qlora_helpers import UserError

TOKENS = [{"input_ids": [n, n + 1, 7], "labels": [-100, n + 1, 7]} for n in range(2500)]


def trainer_of(rows=TOKENS[:2], revision="abc", **parts):
    """What of a trainer decides whether a run is the same, and an untrained model."""
    model = torch.nn.Linear(1, 1)
    model.config = types.SimpleNamespace(_commit_hash=revision)
    data = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    args = types.SimpleNamespace(eval_on_start=True, load_best_model_at_end=True)
    made = {"model": model, "train_dataset": data, "args": args, "planned_for": None}
    return types.SimpleNamespace(**made | parts)


def test_any_other_row_makes_another_run(settings):
    def mark(rows):
        return fingerprint(settings(), trainer_of(rows))["training rows"]

    other = {"input_ids": [5, 6, 7], "labels": [-100, 6, 8]}
    (a, b), rest = TOKENS[:2], TOKENS[2:]
    cut = [{name: a[name][:2] for name in a}, {name: a[name][2:] + b[name] for name in a}]
    kinds = {
        "these": TOKENS,
        "another last one": [*TOKENS[:-1], other],
        "another one past a thousand": [*TOKENS[:1500], other, *TOKENS[1501:]],
        "one fewer": TOKENS[:-1],
        "in another order": [b, a, *rest],
        "with other labels": [a | {"labels": [-100, -100, 7]}, b, *rest],
        "cut at another place": [*cut, *rest],
    }
    marks = {kind: mark(rows) for kind, rows in kinds.items()}
    assert len(set(marks.values())) == len(kinds), marks
    parts = [datasets.Dataset.from_list(rows) for rows in (TOKENS[:1300], TOKENS[1300:])]
    assert mark(datasets.concatenate_datasets(parts)) == marks["these"]


def test_the_row_that_two_processes_need_besides_makes_no_other_run(settings, monkeypatch):
    alone = fingerprint(settings(), trainer_of())
    monkeypatch.setenv("WORLD_SIZE", "2")
    filled = with_void_row(datasets.Dataset.from_list(TOKENS[:2]))
    assert len(filled) == 3 and fingerprint(settings(), trainer_of(filled)) == alone


OTHER_TRAINING = [
    *({"seed": 987}, {"epochs": 2.5}, {"max_steps": 7}, {"learning_rate": 3e-4}),
    *({"warmup_ratio": 0.3}, {"lora_r": 8}, {"lora_alpha": 8}, {"lora_dropout": 0.1}),
    *({"target_modules": ["q_proj"]}, {"use_rslora": True}, {"use_dora": True}),
    *({"neftune_noise_alpha": 5.0}, {"completion_only_loss": False}, {"batch_size": 2}),
    *({"gradient_accumulation": 2}, {"base_model": "embedded"}),
]
SAME_TRAINING = [
    *({"batch_size": 2, "gradient_accumulation": 8}, {"max_new_tokens": 7}, {"sample_rows": 2}),
    *({"report_to": "none"}, {"push_to_hub": False}, {"hub_repo": "x"}, {"backup_to": "hub"}),
    *({"resume": "never"}, {"merge": True}, {"memory_limit_gb": 9.0}, {"run_name": "other"}),
    *({"model_cache": "/tmp/c"}, {"output_dir": "/tmp/o"}, {"gradient_checkpointing": True}),
]


def test_what_changes_the_training_and_nothing_else_makes_another_run(settings):
    trainer = trainer_of()
    mark = fingerprint(settings(), trainer)
    for changes in OTHER_TRAINING:
        assert fingerprint(settings(**changes), trainer) != mark, changes
    for changes in SAME_TRAINING:
        assert fingerprint(settings(**changes), trainer) == mark, changes
    assert fingerprint(settings(), trainer_of(revision="def")) != mark
    assert json.loads(json.dumps(mark)) == mark  # it is compared with what a file holds


def whole(folder, purpose, weights=None, state=None, **told):
    """A whole checkpoint or adapter of small files."""
    folder.mkdir(parents=True)
    for name in NEEDED[purpose]:
        (folder / name.replace("*", "")).write_text("{}")
    (folder / "run.json").write_text(json.dumps(told))
    if weights:
        save_file(weights, folder / "adapter_model.safetensors")
    if state:
        (folder / "trainer_state.json").write_text(json.dumps(state))
    seal(folder, purpose, "faults")
    return folder


def test_copies_are_fetched_only_where_nothing_is_here(begun, capsys):
    trainer, copies = trainer_of(), drive_folder(begun)
    mark = fingerprint(begun, trainer)
    whole(copies / "checkpoint-9", "checkpoint", fingerprint=mark)
    here = whole(begun.run_dir / "checkpoint-10", "checkpoint", fingerprint=mark)
    assert find_checkpoint(begun, trainer) == str(here)
    assert trainer.args.eval_on_start is False
    assert [path.name for path in checkpoints(begun.run_dir)] == ["checkpoint-10"]
    shutil.rmtree(here)
    assert find_checkpoint(begun, trainer) == str(begun.run_dir / "checkpoint-9")
    for folder in (copies / "checkpoint-9", begun.run_dir / "checkpoint-9"):
        shutil.rmtree(folder)
    whole(copies / "final_model", "adapter", fingerprint=mark)
    assert find_checkpoint(begun, trainer) == str(begun.final_model)
    assert "step 0" not in capsys.readouterr().out


def test_what_is_left_of_another_runs_copies_is_kept_apart_with_the_rest(begun):
    mine, copies = fingerprint(begun, trainer_of()), drive_folder(begun)
    whole(copies / "checkpoint-2", "checkpoint", fingerprint=mine)
    whole(copies / "final_model", "adapter", fingerprint=mine | {"training rows": "others"})
    back_up(begun, whole(begun.run_dir / "checkpoint-4", "checkpoint", fingerprint=mine))
    assert {path.name for path in copies.iterdir()} == {"kept", "checkpoint-4"}
    assert {path.name for path in (copies / "kept").iterdir()} == {"checkpoint-2", "final_model"}


def test_a_setting_that_is_no_more_is_named_as_the_difference(begun):
    trainer = trainer_of()
    mark = fingerprint(begun, trainer) | {"an_older_setting": 3}
    whole(begun.run_dir / "checkpoint-10", "checkpoint", fingerprint=mark)
    with pytest.raises(UserError, match="an_older_setting was 3, is None"):
        find_checkpoint(begun, trainer)


@pytest.fixture
def done(tmp_path):
    """A trainer with a tiny adapter, and the run's last checkpoint, 10; the best one is 8."""
    base = torch.nn.Sequential(OrderedDict(q_proj=torch.nn.Linear(4, 4)))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    log = [{"eval_loss": 1.5, "step": 10}]
    state = TrainerState(global_step=10, max_steps=10, epoch=2.0, log_history=log)
    state = dataclasses.asdict(state) | {"best_model_checkpoint": "/elsewhere/faults/checkpoint-8"}
    for step in (8, 10):
        weights = peft.get_peft_model_state_dict(model)
        weights = {name: torch.full_like(weight, step) for name, weight in weights.items()}
        whole(tmp_path / f"checkpoint-{step}", "checkpoint", weights, state)
    early = EarlyStoppingCallback(3)
    trainer = trainer_of(model=model, state=None, steps=10)
    trainer.callback_handler = types.SimpleNamespace(callbacks=[early])
    return trainer, tmp_path / "checkpoint-10"


def loaded(trainer):
    """The value of all weights of the adapter in memory."""
    values = {w.mean().item() for n, w in trainer.model.named_parameters() if "lora_" in n}
    return values.pop() if len(values) == 1 else None


def test_a_finished_run_comes_back_with_its_best_adapter(done):
    trainer, last = done
    assert finished(trainer, None) is None and loaded(trainer) is None
    assert finished(trainer, str(last)).global_step == 10
    assert loaded(trainer) == 8 and trainer.state.global_step == 10
    trainer.args.load_best_model_at_end = False
    finished(trainer, str(last))
    assert loaded(trainer) == 10


def test_where_the_best_checkpoint_is_damaged_or_gone_the_last_comes_back(done):
    trainer, last = done
    (last.with_name("checkpoint-8") / "adapter_model.safetensors").write_text("garbage")
    assert finished(trainer, str(last)).global_step == 10 and loaded(trainer) == 10
    shutil.rmtree(last.with_name("checkpoint-8"))
    assert finished(trainer, str(last)).global_step == 10


def test_a_run_before_its_last_step_is_not_finished(done):
    trainer, last = done
    trainer.steps = 11  # more than it had when it was saved
    assert finished(trainer, str(last)) is None and loaded(trainer) is None


@pytest.mark.parametrize("epoch", [2.0, 1.5])
def test_a_last_step_that_was_not_evaluated_is_not_the_end(done, epoch):
    trainer, last = done
    for step in (8, 10):
        log = [{"eval_loss": 1.5, "step": step}, {"loss": 1.5, "step": 10}]
        edit_json(last / "trainer_state.json", log_history=log, epoch=epoch)
        seal(last, "checkpoint", "faults")
        assert (finished(trainer, str(last)) is None) == (step == 8)


@pytest.mark.parametrize(("epoch", "evaluated"), [(2.0, 8), (2.0, 10), (1.5, 8)])
def test_the_end_of_an_epoch_that_was_not_evaluated_is_evaluated_on_resume(begun, epoch, evaluated):
    trainer, log = trainer_of(), [{"eval_loss": 1.5, "step": evaluated}]
    state = {"global_step": 10, "max_steps": 20, "epoch": epoch, "log_history": log}
    mark = fingerprint(begun, trainer)
    whole(begun.run_dir / "checkpoint-10", "checkpoint", state=state, fingerprint=mark)
    find_checkpoint(begun, trainer)
    assert trainer.args.eval_on_start == ((epoch, evaluated) == (2.0, 8))


@pytest.mark.parametrize(("waited", "over"), [(2, False), (3, True)])
def test_a_run_that_early_stopping_ended_is_finished_before_its_last_step(done, waited, over):
    trainer, last = done
    trainer.steps = 50
    counts = {"args": {}, "attributes": {"early_stopping_patience_counter": waited}}
    edit_json(last / "trainer_state.json", stateful_callbacks={"EarlyStoppingCallback": counts})
    seal(last, "checkpoint", "faults")
    assert (finished(trainer, str(last)) is not None) == over
    trainer.callback_handler.callbacks.clear()  # early stopping is off now
    assert finished(trainer, str(last)) is None


def test_the_saved_adapter_comes_back_as_it_is_with_its_results(done):
    trainer, last = done
    weights = {n: w * 0 + 9 for n, w in peft.get_peft_model_state_dict(trainer.model).items()}
    state = json.loads((last / "trainer_state.json").read_text()) | {"max_steps": 99}  # early
    results = {"training": {"train_loss": 1.5, "train_runtime": 60.0}}
    told = {"trainer_state": state, "results": results}
    saved = whole(last.with_name("final_model"), "adapter", weights, **told)
    output = finished(trainer, str(saved))
    assert loaded(trainer) == 9 and trainer.state.max_steps == 99
    assert output == (10, 1.5, results["training"])


@pytest.mark.parametrize(
    ("left", "kept", "words"),
    [((10, 12, 14), 12, "the best of those left is checkpoint-12"), ((), None, "none is left")],
)
def test_where_the_best_checkpoint_is_gone_the_best_of_the_others_is_kept(
    tmp_path, capsys, left, kept, words
):
    for step in left:
        (tmp_path / f"checkpoint-{step}").mkdir()
    losses = {0: 9.0, 8: 1.0, 10: 3.0, 12: 2.0, 14: 4.0}
    log = [{"eval_loss": loss, "step": step} for step, loss in losses.items()]
    state = TrainerState(log_history=log, best_metric=1.0)
    state.best_model_checkpoint = str(tmp_path / "checkpoint-8")
    replace_lost_best(state)
    assert state.best_metric == losses.get(kept) and words in capsys.readouterr().out
    best = str(tmp_path / f"checkpoint-{kept}") if kept else None
    assert state.best_model_checkpoint == best
    assert [entry["step"] for entry in log if entry.get("lost")] == [
        step for step in (8, 10, 12, 14) if step not in left
    ]
    if kept:
        replace_lost_best(state)
        assert state.best_metric == 2.0 and not capsys.readouterr().out


def test_each_part_of_what_training_goes_on_from_has_a_hash_of_its_own():
    model, scaler = torch.nn.Linear(2, 2), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    parts = {"optimizer": optimizer, "lr_scheduler": schedule}
    parts |= {"trainable": lambda: dict(model.named_parameters())}
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(scaler=scaler), **parts)
    moment, before = optimizer.state[model.weight]["exp_avg"], state_hashes(trainer)
    for name, change in {
        "adapter": lambda: model.weight.data.add_(1),
        "optimizer": lambda: moment.add_(1),
        "schedule": schedule.step,
        "scaler": lambda: scaler.set_growth_interval(7),
        "random states": lambda: torch.rand(1),
    }.items():
        change()
        now = state_hashes(trainer)
        assert [part for part in now if now[part] != before[part]] == [name]
        before = now


@pytest.mark.parametrize("processes", ["1", "2"])
def test_another_number_of_processes_has_other_random_states(tmp_path, monkeypatch, processes):
    saved = {"adapter": "1f", "random states": "2f", "random state of the GPU": "3f"}
    folder = whole(tmp_path / "checkpoint-2", "checkpoint")
    (folder / "run.json").write_text(json.dumps({"state": saved | {"processes": "2"}}))
    now = dict.fromkeys(saved, "1f") | {"processes": processes}
    monkeypatch.setattr("finetune.checkpoints.state_hashes", lambda _: now)
    words = "loaded as it was saved: random states, random state of the GPU differ"
    same = pytest.raises(UserError, match=words) if processes == "2" else contextlib.nullcontext()
    with same:
        require_same_state(None, folder)
    told = json.loads((tmp_path / "resumed.json").read_text())
    assert [*told["loaded"]] == [*(saved if processes == "2" else ("adapter",))]


def test_settings_that_changed_since_the_plan_are_not_trained_unsaid(begun):
    trainer = trainer_of(planned_for=begun)
    assert find_checkpoint(begun, trainer) is None
    other = begun.model_copy(update={"learning_rate": 0.5, "max_new_tokens": 7})
    with pytest.raises(UserError, match=r"changed since[^•]*• learning_rate [^•]*Run all again"):
        find_checkpoint(other, trainer)
    later = begun.model_copy(update={"push_to_hub": True, "max_new_tokens": 7})
    assert find_checkpoint(later, trainer) is None


@pytest.mark.parametrize(
    "change",
    [
        {"run_name": "other"},
        {"output_dir": "elsewhere"},
        {"data_files": "others.jsonl"},
        {"validation_fraction": 0.2},
        {"max_length": 99},
        {"bf16": False},
    ],
    ids=str,
)
def test_what_rows_model_and_folders_were_made_by_does_not_change_after_the_plan(begun, change):
    """Else others' rows would be trained than the settings say, into another run's folder."""
    other = begun.model_copy(update=change)
    with pytest.raises(UserError, match=rf"(?s)• {next(iter(change))} was .*put them back and run"):
        find_checkpoint(other, trainer_of(planned_for=begun))
    assert not other.run_dir.exists()
