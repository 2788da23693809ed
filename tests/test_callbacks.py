"""Section 11: what stops a training, what is told then, and what a finished checkpoint holds."""

import contextlib
import errno
import json
import math
import os
import signal
import time
import types
from pathlib import Path

import pytest
import torch
import transformers

from finetune.callbacks import Dropped, KeepSafe, raise_if_stopped, safe_training
from finetune.files import BEING_WRITTEN, NEEDED, read_seal, seal, why_unusable
from qlora_helpers import UserError


@pytest.fixture
def cfg(settings, tmp_path):
    return settings(output_dir=str(tmp_path), run_name="safe", base_model="./models/mine")


@pytest.fixture
def safe(cfg):
    return KeepSafe(cfg, {"seed": 7})


def state(step=11, **changes):
    return transformers.TrainerState(global_step=step, **changes)


def weights(value):
    """A model of one weight, whose gradient is `value`."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), value)
    return model


def checkpoint(folder: Path) -> Path:
    """What the Trainer leaves of a step."""
    folder.mkdir(parents=True)
    for name in (*NEEDED["checkpoint"], "training_args.bin", "README.md", BEING_WRITTEN):
        (folder / name.replace("*", "")).write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_its_name_and_step(safe, name, value):
    safe.on_log(None, state(), None, logs={name: 1.5, "epoch": 1.0})
    with pytest.raises(UserError, match=rf"at step 11: {name} \({value}\) is not finite"):
        safe.on_log(None, state(), None, logs={name: value})


@pytest.mark.parametrize(("minutes", "due"), [(19, False), (21, True)])
def test_a_checkpoint_is_due_twenty_minutes_after_the_last_however_it_was_made(
    cfg, monkeypatch, minutes, due
):
    inside, evaluated = {"epoch": 1.5, "max_steps": 99}, []
    safe = KeepSafe(cfg, {}, evaluating_trainer(evaluated))

    def saves(**changes):
        safe.on_step_end(None, state(**inside | changes), control := transformers.TrainerControl())
        assert not control.should_training_stop
        return control.should_save

    for number in (1, 2):
        now = time.monotonic() + 60 * minutes
        monkeypatch.setattr("finetune.callbacks.time.monotonic", lambda now=now: now)
        assert saves() == due
        assert not saves(epoch=2.0) and not saves(max_steps=11)  # these are saved anyway
        safe.on_save(None, state(is_world_process_zero=False), None, model=torch.nn.Linear(1, 1))
        assert not saves(), number
    assert len(evaluated) == 2 * due


def evaluating_trainer(evaluated):
    """What of a trainer a checkpoint between epochs asks for."""
    told = types.SimpleNamespace(fp16=False)
    return types.SimpleNamespace(args=told, log_part=lambda: evaluated.append(1))


def test_saves_inside_an_epoch_take_a_twentieth_of_the_time_at_most(cfg, monkeypatch):
    safe, clock = KeepSafe(cfg, {}, evaluating_trainer([])), [time.monotonic()]
    monkeypatch.setattr("finetune.callbacks.time.monotonic", lambda: clock[0])

    def three_minutes(model):
        clock[0] += 180

    monkeypatch.setattr("finetune.callbacks.require_finite", three_minutes)
    for _ in range(2):  # each time by what the last one took
        safe.on_save(None, state(is_world_process_zero=False), None)
        for minutes, due in ((59, False), (61, True)):
            clock[0] = safe.saved + 60 * minutes
            assert safe.is_late() == due


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("step", [0, 11])
def test_what_overflows_in_fp16_is_told_as_that_by_its_first_loss(cfg, fp16, step):
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(fp16=fp16))
    with pytest.raises(UserError) as told:
        KeepSafe(cfg, {}, trainer).on_log(None, state(step), None, logs={"eval_loss": math.nan})
    assert ("fp16, which ends at 65,504: no learning_rate helps" in str(told.value)) == (
        fp16 and not step
    )
    assert ("Lower learning_rate" in str(told.value)) == (step > 0)
    assert ("fp16" in str(told.value)) == fp16
    assert "The last good checkpoint: none" in str(told.value)
    assert "continues from that checkpoint" not in str(told.value)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_gradient_may_overflow_in_fp16_alone_where_the_scaler_skips_the_step(safe, fp16):
    args = types.SimpleNamespace(fp16=fp16)
    words = "at step 11: the gradient is not finite"
    with contextlib.nullcontext() if fp16 else pytest.raises(UserError, match=words):
        safe.on_pre_optimizer_step(args, state(10), None, model=weights(math.inf))
        safe.on_train_end(args, state(), None)


class OnAGpu:
    """An answer that a GPU has not given yet."""

    is_cuda = True

    def isfinite(self):
        return self

    def to(self, *_, **__):
        return torch.tensor(False)


@pytest.mark.parametrize("when", ["on_pre_optimizer_step", "on_log", "on_save", "on_train_end"])
def test_on_a_gpu_a_gradient_is_judged_a_step_later_and_at_the_latest_at_the_end(
    safe, monkeypatch, when
):
    quick = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: quick)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: OnAGpu())
    args, options = types.SimpleNamespace(fp16=False), {"model": weights(1.0), "logs": {}}
    safe.on_pre_optimizer_step(args, state(10), None, model=weights(1.0))
    with pytest.raises(UserError, match="at step 11: the gradient is not finite"):
        getattr(safe, when)(args, state(11), None, **options)


def test_the_newest_whole_checkpoint_is_named_when_training_stops(safe, cfg):
    for step in (2, 9, 10):
        checkpoint(cfg.run_dir / f"checkpoint-{step}")
        seal(cfg.run_dir / f"checkpoint-{step}", "checkpoint")
    checkpoint(cfg.run_dir / "checkpoint-11")
    with pytest.raises(UserError, match=r"The last good checkpoint: .*/checkpoint-10\n"):
        safe.diverged("loss", 12)


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_sealed(safe, cfg):
    model, folder = weights(1.0), checkpoint(cfg.run_dir / "checkpoint-11")
    model.weight.data.fill_(math.nan)
    args = types.SimpleNamespace(output_dir=str(cfg.run_dir))
    with pytest.raises(UserError, match="NaN or infinity"):
        safe.on_save(args, state(), None, model=model)
    assert why_unusable(folder, "checkpoint") and (folder / BEING_WRITTEN).exists()


def test_a_finished_checkpoint_is_whole_and_names_no_path_of_this_machine(safe, cfg):
    folder = checkpoint(cfg.run_dir / "checkpoint-11")
    best = state(best_model_checkpoint=str(cfg.run_dir / "checkpoint-4"))
    safe.finish(folder, best, {"adapter": "1f"})
    assert json.loads((folder / "run.json").read_text())["state"] == {"adapter": "1f"}
    assert not why_unusable(folder, "checkpoint") and read_seal(folder)["run"] == "safe"
    names = {path.name for path in folder.iterdir()}
    assert not names & {"training_args.bin", "README.md", BEING_WRITTEN}
    texts = "".join(path.read_text() for path in folder.glob("*.json"))
    assert str(cfg.run_dir) not in texts and "models/mine" not in texts
    assert '"best_model_checkpoint": "checkpoint-4"' in texts
    assert '"base_model_name_or_path": "mine"' in texts and '"seed": 7' in texts


def test_a_resumed_run_finds_its_best_checkpoint_in_its_own_folder(safe, cfg):
    args = types.SimpleNamespace(output_dir=str(cfg.run_dir))
    (cfg.run_dir / "checkpoint-4").mkdir(parents=True, exist_ok=True)
    for known in ("checkpoint-4", "/content/elsewhere/checkpoint-4"):
        found = state(best_model_checkpoint=known)
        safe.on_train_begin(args, found, None)
        assert found.best_model_checkpoint == str(cfg.run_dir / "checkpoint-4")


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("epoch", [1.5, 2.0])
def test_the_end_of_max_steps_inside_an_epoch_is_saved_and_scored_unless_stopped(
    safe, stopped, epoch
):
    control = transformers.TrainerControl(should_save=True, should_evaluate=True)
    safe.stopped = stopped
    safe.on_epoch_end(None, state(epoch=epoch), control)
    assert control.should_save is control.should_evaluate is not stopped


class Watched:
    """A trainer with callbacks, at a step of ten."""

    def __init__(self, step):
        self.callbacks, self.state = [], state(step, max_steps=10)
        self.args = types.SimpleNamespace(fp16=False)
        self.add_callback, self.remove_callback = self.callbacks.append, self.callbacks.remove


@pytest.fixture
def begun(cfg, monkeypatch):
    """A context of a training that has come to a step."""
    monkeypatch.setattr("finetune.callbacks.fingerprint", lambda *_: {})
    return lambda trainer: safe_training(cfg, trainer)


def press_stop(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("saved", [True, False])
def test_a_full_disk_is_told_with_the_section_from_which_training_goes_on(begun, cfg, saved):
    """With nothing saved the adapter in memory has learned, and section 11 would refuse it."""
    if saved:
        seal(checkpoint(cfg.run_dir / "checkpoint-2"), "checkpoint", "safe")
    then = r"checkpoint-2\..* run this cell again" if saved else r"nothing\..* from section 7 on"
    told = f"The disk is full: .* Saved before: {then}"
    with pytest.raises(UserError, match=told), begun(Watched(4)):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_between_two_steps_a_stop_waits_for_what_is_being_done(begun, number, capsys, monkeypatch):
    trainer, control, ended = Watched(4), transformers.TrainerControl(), []
    with contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: ended.append("as it would have"))
        stack.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(UserError, match="Stopped at step 4 of 10, and saved"), begun(trainer):
            safe = trainer.callbacks[0]
            safe.on_step_end(None, trainer.state, control)
            assert not control.should_save and not control.should_training_stop
            press_stop(number)
            safe.on_step_end(None, trainer.state, control)
    assert control.should_save and control.should_training_stop
    assert "Stopping, with a checkpoint." in capsys.readouterr().out
    assert ended == ["as it would have"] * (number == signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_unfinished_is_dropped_at_once_but_never_half_an_optimizer_step(begun, number):
    trainer = Watched(4)
    with contextlib.suppress(UserError), begun(trainer):
        safe, told = trainer.callbacks[0], (None, trainer.state, transformers.TrainerControl())
        safe.on_step_begin(*told)
        safe.on_pre_optimizer_step(types.SimpleNamespace(fp16=True), *told[1:], model=weights(1.0))
        before = safe.randomness
        press_stop(number)
        with pytest.raises(Dropped) as dropped:
            safe.on_step_begin(*told)
        assert dropped.value.randomness is not before
        safe.asked = None
        with pytest.raises(Dropped), trainer.evaluating():
            press_stop(number)
        safe.asked = None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("seconds", "number", "stops"),
    [(0.1, signal.SIGINT, False), (3, signal.SIGINT, True), (3, signal.SIGTERM, False)],
)
def test_a_second_press_stops_at_once_unless_it_is_the_same_one_passed_on(
    begun, monkeypatch, seconds, number, stops
):
    clock = [time.monotonic()]
    monkeypatch.setattr("finetune.callbacks.time.monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt if stops else ValueError), begun(Watched(4)):
        press_stop()
        clock[0] += seconds
        press_stop(signal.SIGTERM)  # a launcher's, while the checkpoint is being written
        press_stop(number)
        raise ValueError


@pytest.mark.parametrize(
    ("step", "resume", "told"),
    [
        (0, "auto", "before the end of the first step: there is nothing to save yet. Run this"),
        (1, "auto", "at step 1 of 10, and saved. Run this cell again to continue."),
        (4, "anyway", "at step 4 of 10, and saved. Run this"),
        (4, "never", "and saved. Set resume = 'auto' in section 2 and run it. Run this cell again"),
    ],
)
def test_what_a_stop_has_saved_and_how_to_go_on_is_told(cfg, step, resume, told):
    safe = KeepSafe(cfg.model_copy(update={"resume": resume}), {})
    safe.stopped = True
    with pytest.raises(UserError, match=told):
        raise_if_stopped(safe, state(step, max_steps=10))


@pytest.mark.parametrize("fp16", [False, True])
def test_the_time_that_training_took_is_told_where_a_step_was_done(begun, capsys, fp16):
    for steps in (0, 1):
        with begun(trainer := Watched(4)):
            told = (types.SimpleNamespace(fp16=fp16), trainer.state, None)
            for _ in range(steps):
                trainer.callbacks[0].on_pre_optimizer_step(*told, model=weights(1.0))
        assert ("peak memory" in capsys.readouterr().out) == (steps == 1)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_after_training_stop_means_again_what_it_meant_before(begun, error):
    numbers, trainer = (signal.SIGINT, signal.SIGTERM), Watched(4)
    before = [*map(signal.getsignal, numbers)]
    with contextlib.suppress(error or ()), begun(trainer):
        assert not {*before} & {*map(signal.getsignal, numbers)} and len(trainer.callbacks) == 1
        if error:
            raise error
    assert [*map(signal.getsignal, numbers)] == before and trainer.callbacks == []
