"""Sections 10 and 11: every way of cutting a step is the same training, in real NF4 on the CPU."""

import dataclasses
import gc
import itertools
import json
import math
import random
import weakref
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl
from architectures import random_model
from computing import FLAT, PADDED, close, in_nf4, rows, tiny, with_lora
from safetensors.torch import load_file
from tiny import tiny_base, tiny_tuned
from tqdm.auto import tqdm

from finetune.answers import validation_loss
from finetune.batches import (
    Collator,
    Cut,
    StepSampler,
    own_lengths,
    row_lengths,
    split_batch,
    with_void_row,
)
from finetune.data import write_rows
from finetune.merge import write_shards
from finetune.plan import Plan, at_risk, make_plan, planned_before, planned_for, require_known
from finetune.report import history
from finetune.speed import checkpointable, noisy, undo, use_fast_kernels
from finetune.train import PlannedTrainer
from finetune.trials import Trial, Trials
from qlora_helpers import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("cut", [PADDED, FLAT, Cut(16, True, "sdpa"), Cut(1, False, "sdpa")])
@pytest.mark.parametrize("n", [37, 32, 5])
def test_every_cut_holds_the_same_rows_in_each_step(cut, n):
    lengths = [len(row["input_ids"]) for row in rows(n)]
    sampler = StepSampler(lengths, 16, 7, cut)
    reference = StepSampler(lengths, 16, 7, Cut(1, False, "sdpa"))
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        reference.set_epoch(epoch)
        order, other = list(sampler), list(reference)
        assert sorted(order) == list(range(n))
        for start in range(0, n, 16):
            assert set(order[start : start + 16]) == set(other[start : start + 16])
        assert [*itertools.chain(*sampler.micro_batches())] == order
        assert max(map(len, sampler.micro_batches())) <= cut.micro_batch
    assert order != list(range(n))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_micro_batches_of_a_step_end_to_end_have_as_many_tokens_each(size):
    chance = random.Random(3)
    lengths = [min(2000, round(180 * math.exp(0.9 * chance.gauss(0, 1)))) for _ in range(96)]
    found = StepSampler(lengths, 16, 7, Cut(size, True, "sdpa")).micro_batches()
    for start in range(0, len(found), 16 // size):
        tokens = [sum(lengths[row] for row in rows) for rows in found[start : start + 16 // size]]
        longest = max(lengths[row] for rows in found[start : start + 16 // size] for row in rows)
        assert max(tokens) <= 1.2 * max(sum(tokens) / len(tokens), longest)


def test_rows_of_like_length_are_padded_together():
    chance = random.Random(3)
    lengths = [chance.randrange(5, 500) for _ in range(96)]
    sampler = StepSampler(lengths, 16, 7, PADDED)
    least = 0
    for members in sampler.steps(0):
        ordered = sorted(lengths[row] for row in members)
        least += sum(4 * max(ordered[i : i + 4]) for i in range(0, 16, 4))
    assert sum(map(sampler.size, sampler.micro_batches())) == least


@pytest.mark.parametrize("cut", [PADDED, FLAT])
@pytest.mark.parametrize("n", [34, 37, 48, 3])
def test_two_processes_get_as_many_micro_batches_of_every_step(monkeypatch, cut, n):
    lengths = [len(row["input_ids"]) for row in rows(n)]
    reference = StepSampler(lengths, 16, 7, cut).steps(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sampler = StepSampler(lengths, 16, 7, cut)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % (2 * 4) == 0
    for number, members in enumerate(reference):
        step = order[16 * number : 16 * (number + 1)]
        assert sorted(row for row in step if row != n) == sorted(members)


def test_the_row_that_fills_a_step_up_is_the_shortest_and_nothing_of_it_is_trained(monkeypatch):
    data = rows(7)
    filled = with_void_row(data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert StepSampler(row_lengths(data), 16, 7, FLAT).lengths == row_lengths(filled)
    assert list(filled)[:-1] == list(data)
    shortest = min(data["input_ids"], key=len)
    assert filled[7] == {"input_ids": shortest, "labels": [-100] * len(shortest)}


@pytest.mark.parametrize(("longest", "width"), [(64, 64), (65, 128), (10, 64)])
def test_on_a_gpu_padding_ends_at_a_multiple_of_64(monkeypatch, longest, width):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = [{"input_ids": [5] * n, "labels": [5] * n} for n in (longest, 7)]
    batch = Collator(PADDED, 2)(data)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)


def test_the_epochs_order_differs_and_comes_back():
    sampler = StepSampler(list(range(50)), 16, 7, PADDED)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.fixture
def planning(settings, tmp_path):
    """Settings whose plans are kept in the test's own folder, in fp32 on any CPU."""
    return lambda **changes: settings(**{"output_dir": str(tmp_path), "bf16": False} | changes)


@pytest.fixture(scope="module")
def built(smollm_tokenizer):
    """Makes the trainer as the notebook does, for a few steps at a rate that shows differences."""

    def make(model, settings, plan, data, folder, kind=PlannedTrainer, **changes):
        args = {
            "output_dir": str(folder),
            "per_device_train_batch_size": plan.cut.micro_batch,
            "per_device_eval_batch_size": plan.cut.micro_batch,
            "gradient_accumulation_steps": plan.accumulation,
            "max_steps": plan.steps,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": plan.warmup_steps,
            "bf16": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": settings.seed,
        }
        return kind(
            model,
            trl.SFTConfig(**args | changes),
            plan,
            train_dataset=data,
            eval_dataset=data,
            processing_class=smollm_tokenizer,
        )

    return make


def trained(trainer):
    """Losses and the adapter after training."""
    trainer.train()
    adapter = {n: p.detach().clone() for n, p in trainer.trainable().items()}
    return history(trainer.state.log_history, "loss")[1], adapter


def plan_for(settings, model, data, cut=None):
    plan = make_plan(settings, model, data)
    if cut is None:
        return plan
    return dataclasses.replace(
        plan, cut=cut, accumulation=settings.effective_batch // cut.micro_batch
    )


CUTS = [
    Cut(4, False, "sdpa", recomputed_layers=3),
    Cut(16, True, "sdpa"),
    Cut(8, True, "sdpa", recomputed_layers=1),
    Cut(2, False, "sdpa", dense=True),
    Cut(8, True, "sdpa", dense=True),
]


def test_every_cut_trains_the_same_adapter(planning, built, tmp_path):
    cfg, data, results = planning(max_steps=20), rows(90), []
    for cut in CUTS:
        model = tiny()
        use_fast_kernels(model, data, "fp32")
        plan = plan_for(cfg, model, data, cut)
        results.append(trained(built(model, cfg, plan, data, tmp_path)))
    losses, adapter = results[0]
    assert len(losses) == 20 and losses[-1] < losses[0]
    for other, weights in results[1:]:
        assert other == pytest.approx(losses, abs=1.01e-4)  # before 5.0 logged to four decimals
        close(weights, adapter, 1e-4)


@pytest.mark.parametrize("again", [0, 2, 3])
def test_as_many_layers_are_recomputed_as_planned(planning, built, tmp_path, again):
    """trl and transformers would have all of them recomputed, unless told."""
    cfg, data, model = planning(max_steps=2), rows(32), tiny()
    use_fast_kernels(model, data, "fp32")
    cut = Cut(16, True, "sdpa", recomputed_layers=again)
    trainer, passes = built(model, cfg, plan_for(cfg, model, data, cut), data, tmp_path), []
    for number, layer in enumerate(checkpointable(model)):
        norm = layer.input_layernorm
        norm.register_forward_hook(lambda *_, number=number: passes.append(number))
    trainer.train()
    assert sorted(passes) == sorted(2 * [*range(3), *range(again)])


class Walking(PlannedTrainer):
    """With the Trainer's own steps, which walk over all modules in each."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        return transformers.Trainer.training_step(self, model, inputs, num_items_in_batch)

    _clip_grad_norm = transformers.Trainer.__dict__.get("_clip_grad_norm")


def test_steps_without_the_walks_over_all_modules_train_the_same(
    planning, built, tmp_path, monkeypatch
):
    cfg, data, results, clipped = planning(max_steps=4, lora_dropout=0.1), rows(40), [], []
    clip = torch.nn.utils.clip_grad_norm_
    noting = lambda *a, **k: clipped.append(clip(*a, **k)) or clipped[-1]  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
    for kind in (PlannedTrainer, Walking):
        model = tiny(dropout=0.1)
        plan = plan_for(cfg, model, data, CUTS[1])
        results.append(trained(built(model, cfg, plan, data, tmp_path, kind, max_grad_norm=0.2)))
    # Both ways clip, and there is something to clip.
    assert len(clipped) == 8 and min(clipped) > 0.2
    (losses, adapter), (other, weights) = results
    assert losses == other and len(losses) == 4
    assert all(torch.equal(adapter[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("began", [True, False])
def test_every_module_trains_from_the_first_step_and_again_after_an_evaluation(
    planning, built, tmp_path, began
):
    """`from_pretrained` leaves the base model's modules in evaluation mode."""
    cfg, data, model = planning(max_steps=3), rows(32), tiny(dropout=0.1)
    plan = plan_for(cfg, model, data, CUTS[1])
    model.train(began)
    for module in list(model.modules())[1:]:
        module.eval()
    when = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": began}
    trainer, seen = built(model, cfg, plan, data, tmp_path, **when), []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            seen.append({module.training for module in model.modules()})

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [{True}] * 3


def test_planning_leaves_everything_as_it_was_to_the_bit(planning, built, tmp_path):
    cfg, data, results = planning(max_steps=3, lora_dropout=0.1, resume="never"), rows(40), []
    for planned in (False, True):
        model = tiny(dropout=0.1)
        use_fast_kernels(model, data, "fp32")
        model.eval()
        fixed = plan_for(cfg, tiny(), data, Cut(4, False, "sdpa"))
        torch.manual_seed(3)
        if planned:
            make_plan(cfg, model, data)
            assert model.training is False and all(p.grad is None for p in model.parameters())
        drawn = torch.rand(3)
        results.append((drawn, *trained(built(model, cfg, fixed, data, tmp_path))))
    (drawn, losses, adapter), (drawn_after, losses_after, adapter_after) = results
    assert torch.equal(drawn, drawn_after) and losses == losses_after
    assert all(torch.equal(weight, adapter_after[name]) for name, weight in adapter.items())


def test_the_plan_keeps_the_effective_batch_and_marks_its_choice(planning):
    model, data = tiny(), rows(50)
    use_fast_kernels(model, data, "fp32")
    plan = make_plan(planning(batch_size=3, gradient_accumulation=5, epochs=2), model, data)
    assert plan.cut.micro_batch * plan.accumulation == 15
    assert f"× {plan.accumulation}, {plan.cut.layout}; " in str(plan)
    assert (plan.steps_per_epoch, plan.steps) == (4, 8)
    assert sum(row["chosen"] for row in plan.table) == 1 and len(plan.table) >= 2
    assert plan.cut.recomputed_layers == 0  # on a CPU, unless it is asked for
    chosen = next(row for row in plan.table if row["chosen"])
    assert chosen["tokens/s"] == round(plan.tokens_per_second)
    best = min((r for r in plan.table if r["tokens/s"]), key=lambda r: r["minutes an epoch"])
    assert (
        best["minutes an epoch"] == next(r for r in plan.table if r["chosen"])["minutes an epoch"]
    )
    assert "← chosen" in plan._repr_html_() and str(plan) in plan._repr_html_()


@pytest.mark.slow
def test_a_plan_is_used_again_until_something_that_it_depends_on_changes(
    planning, capsys, monkeypatch
):
    model, data, measured, choose = tiny(), rows(40), [], Trials.choose
    monkeypatch.setattr(Trials, "choose", lambda self: measured.append(1) or choose(self))
    use_fast_kernels(model, data, "fp32")
    first = make_plan(planning(), model, data)
    assert make_plan(planning(epochs=2), model, data).table == first.table and len(measured) == 1
    assert "As planned before" in capsys.readouterr().out
    monkeypatch.setattr("finetune.plan.versions", lambda: {"torch": "9"})
    make_plan(planning(batch_size=2), model, data)
    said = capsys.readouterr().out
    assert len(measured) == 2 and "batch_size: 4 then, 2 now" in said
    assert "• the libraries have other versions" in said
    make_plan(planning(batch_size=2, resume="never"), model, data)
    assert len(measured) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 2},
        {"gradient_accumulation": 2},
        {"gradient_checkpointing": True},
        {"memory_limit_gb": 20.0},
        {"seed": 43},
        {"max_steps": 9},
        {"lora_r": 8},
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"bf16": True},
        {"lengths": [8, 7, 9]},
        {"processes": 2},
        {"layers": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_depends_on_all_that_decides_what_fits_and_what_is_fastest(
    planning, monkeypatch, change
):
    lengths, changes, model = [7, 8, 9], dict(change), tiny()
    before = planned_for(planning(), model, lengths)
    assert before == planned_for(planning(lora_alpha=1, learning_rate=1e-3), model, lengths)
    monkeypatch.setenv("WORLD_SIZE", str(changes.pop("processes", 1)))
    lengths = changes.pop("lengths", lengths)
    model = tiny(layers=changes.pop("layers")) if "layers" in changes else model
    assert planned_for(planning(**changes), model, lengths) != before


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "rows_at_once", "passes"),
    [(4, 4, 1, 4, 4), (6, 4, 1, 6, 4), (1, 4, 1, 1, 4), (8, 3, 2, 6, 2)],
)
def test_a_model_over_several_gpus_trains_as_set_with_all_layers_recomputed(
    planning, monkeypatch, batch_size, accumulation, processes, rows_at_once, passes
):
    monkeypatch.setenv("QLORA_SPREAD", "1")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = planning(batch_size=batch_size, gradient_accumulation=accumulation)
    plan = make_plan(cfg, tiny(), rows(50))
    assert plan.cut == Cut(rows_at_once, False, "sdpa", recomputed_layers=3)
    assert plan.accumulation == passes and not plan.table
    assert "About" not in str(plan) and "all layers recomputed" in plan._repr_html_()


@pytest.mark.parametrize(
    ("changes", "steps", "warm_up"),
    [
        ({"epochs": 5}, 30, 3),  # an epoch has 6 steps, a tenth of which would be 1
        ({"epochs": 2.7, "warmup_ratio": 0.5}, 17, 9),  # of 16.2, as the Trainer counts
        ({"epochs": 5, "max_steps": 0}, 30, 3),
        ({"epochs": 5, "max_steps": 12, "warmup_ratio": 0.25}, 12, 3),
        ({"epochs": 20, "warmup_ratio": 0.0}, 120, 0),
        ({"epochs": 50}, 300, 30),
        ({"epochs": 5, "max_steps": 1}, 1, 0),  # the only step is not lost to a rate of 0
        ({"epochs": 5, "max_steps": 3, "warmup_ratio": 1.0}, 3, 2),
    ],
)
def test_the_warm_up_is_a_share_of_all_steps(planning, changes, steps, warm_up):
    model, data = tiny(), rows(90)
    plan = make_plan(planning(**changes), model, data)
    assert (plan.steps_per_epoch, plan.steps, plan.warmup_steps) == (6, steps, warm_up)
    assert plan.logging_steps == max(1, steps // 100)
    assert plan.seconds == pytest.approx(
        steps / 6 * sum(map(len, data["labels"])) / plan.tokens_per_second
    )


def test_a_plan_for_one_row(planning):
    model, data = tiny(), rows(1)
    use_fast_kernels(model, data, "fp32")
    plan = make_plan(planning(epochs=2), model, data)
    assert (plan.steps_per_epoch, plan.steps) == (1, 2)
    assert plan.cut.micro_batch * plan.accumulation == 16


def test_a_plan_for_a_model_without_gradient_checkpointing(planning, monkeypatch):
    model, data = tiny(), rows(20)
    monkeypatch.setattr("finetune.speed.GradientCheckpointingLayer", int)
    use_fast_kernels(model, data, "fp32")
    plan = make_plan(planning(gradient_checkpointing=True), model, data)
    assert plan.cut.recomputed_layers == 0 and plan.seconds > 0


def test_the_steps_of_a_large_effective_batch_are_dealt_in_the_time_of_a_sort():
    """Comparing each of 200,000 rows with each of 100,000 micro-batches would take hours."""
    lengths = [5 + row * 7919 % 997 for row in range(200_000)]
    order = [*StepSampler(lengths, 200_000, 7, Cut(2, True, "sdpa"))]
    assert sorted(order) == list(range(200_000))
    pairs = [lengths[a] + lengths[b] for a, b in zip(order[::2], order[1::2], strict=True)]
    assert max(pairs) - min(pairs) <= 20


def test_an_interrupted_plan_leaves_nothing_behind(planning, monkeypatch):
    model, data = tiny(), rows(40)
    use_fast_kernels(model, data, "fp32")
    model.eval()
    replaced, cfg = dict(vars(model)["_replaced"]), planning(gradient_checkpointing=True)
    timed, calls = Trials.timed, itertools.count()

    def stop(self, *args):
        found = timed(self, *args)
        if next(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Trials, "timed", stop)
    attention, states = model.config._attn_implementation, torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        make_plan(cfg, model, data)
    assert not (cfg.run_dir / "plan.json").exists() and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.random.get_rng_state(), states)
    assert not any(vars(m).get("gradient_checkpointing") for m in model.modules())
    assert replaced.items() <= vars(model)["_replaced"].items()
    assert make_plan(cfg, model, data).cut.recomputed_layers == 3
    assert not any(vars(m).get("gradient_checkpointing") for m in model.modules())


def test_the_adapter_that_validated_best_is_the_one_that_stays(
    planning, built, tmp_path, smollm_tokenizer
):
    class Judged(PlannedTrainer):
        def evaluate(self, *_, **__):
            return {"eval_loss": [0.5, 3.0, 1.0, 2.0][self.state.global_step]}

    model = tiny_tuned(tiny_base(tmp_path / "base", smollm_tokenizer))
    cfg, data = planning(max_steps=3), rows(48)
    when = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    when |= {"eval_on_start": True}  # of what training begins with, which is no epoch to be kept
    when |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    plan = plan_for(cfg, model, data, CUTS[1])
    trainer = built(model, cfg, plan, data, tmp_path, Judged, **when)
    trainer.train()
    second, third = (
        load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3)
    )
    assert not all(torch.equal(weight, third[name]) for name, weight in second.items())
    for name, weight in trainer.trainable().items():
        assert torch.equal(second[name.replace(".default.", ".")], weight)


def test_a_trainer_that_is_let_go_is_freed_with_its_optimizer(planning, built, tmp_path):
    cfg, data, model = planning(max_steps=2), rows(20), tiny()
    use_fast_kernels(model, data, "fp32")
    trainer = built(model, cfg, plan_for(cfg, model, data, CUTS[1]), data, tmp_path)
    trainer.train()
    alive = weakref.ref(trainer), weakref.ref(trainer.optimizer.optimizer)
    del trainer
    gc.collect()
    assert [thing() for thing in alive] == [None, None]
    undo(model)
    assert not {"zero_grad", "forward", "train"} & vars(model).keys()


def test_a_loss_that_is_not_a_number_is_not_logged_as_one(planning, built, tmp_path):
    cfg, data, model = planning(max_steps=2), rows(20), tiny()
    trainer = built(model, cfg, plan_for(cfg, model, data, CUTS[1]), data, tmp_path)
    next(iter(trainer.trainable().values())).data.fill_(math.nan)
    losses, _ = trained(trainer)
    assert len(losses) == 2 and all(map(math.isnan, losses))


def test_after_training_no_dense_copy_is_left(planning, built, tmp_path):
    cfg, data, model = planning(max_steps=1), rows(20), tiny()
    trainer = built(model, cfg, plan_for(cfg, model, data, CUTS[3]), data, tmp_path)
    trainer.train()
    assert any(hasattr(module, "dense") for module in model.modules())
    trainer.free_memory()
    assert not any(hasattr(module, "dense") for module in model.modules())


def test_the_router_of_a_mixture_of_experts_has_no_loss_of_its_own(planning, built, tmp_path):
    """It is a product of means over a micro-batch, so it would depend on the cut."""
    cfg, data, results = planning(max_steps=2), rows(32), []
    for cut in (Cut(2, False, "sdpa"), Cut(16, True, "sdpa")):
        base = random_model("Mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
        model = with_lora(in_nf4(base))
        use_fast_kernels(model, data, "fp32")
        plan = plan_for(cfg, model, data, cut)
        results.append(trained(built(model, cfg, plan, data, tmp_path)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    close(results[1][1], results[0][1], 1e-4)


class OutOfMemory(PlannedTrainer):
    """Runs out of memory after the backward pass of every micro-batch of more than two rows."""

    def passes(self, model, inputs, count):
        loss = super().passes(model, inputs, count)
        flat = inputs.get("position_ids")
        many = len(inputs["input_ids"]) if flat is None else int((flat == 0).sum())
        if many > 2:
            raise torch.OutOfMemoryError("planted")
        return loss


@pytest.mark.parametrize(
    "cut", [Cut(8, False, "sdpa"), pytest.param(Cut(8, True, "sdpa"), marks=pytest.mark.slow)]
)
def test_when_memory_runs_out_the_step_is_done_in_halves_and_says_so_once(
    planning, built, tmp_path, capsys, cut
):
    cfg, data, results = planning(max_steps=4), rows(64), []
    for kind in (PlannedTrainer, OutOfMemory):
        model = tiny()
        use_fast_kernels(model, data, "fp32")
        plan = plan_for(cfg, model, data, cut)
        results.append(trained(built(model, cfg, plan, data, tmp_path, kind)))
    (losses, adapter), (losses_after, adapter_after) = results
    assert losses_after == pytest.approx(losses, abs=1e-5)
    close(adapter_after, adapter, 1e-4)
    # 8 rows to 4, 4 to 2, and never again.
    assert capsys.readouterr().out.count("Memory ran out") == 2


def test_memory_that_runs_out_again_later_leaves_smaller_parts_for_the_rest(
    planning, built, tmp_path, capsys
):
    tried = []

    class Shrinking(PlannedTrainer):
        def passes(self, model, inputs, count):
            tried.append((self.state.global_step, len(inputs["input_ids"])))
            if tried[-1][1] > (4 if self.state.global_step == 0 else 2):
                raise torch.OutOfMemoryError("planted")
            return super().passes(model, inputs, count)

    cfg = planning(max_steps=3, batch_size=8, gradient_accumulation=1)
    data, model = rows(64), tiny()
    plan = plan_for(cfg, model, data, Cut(8, False, "sdpa"))
    built(model, cfg, plan, data, tmp_path, Shrinking).train()
    assert [n for step, n in tried if step == 0] == [8, 4, 4]
    assert [n for step, n in tried if step == 1] == [4, 2, 2, 4, 2, 2]
    assert [n for step, n in tried if step == 2] == [2, 2, 2, 2]  # known by now
    told = capsys.readouterr().out
    assert [told.count(f"goes in {n} parts") for n in (2, 4)] == [1, 1]


def test_a_single_row_that_does_not_fit_is_a_clear_error(planning, built, tmp_path):
    class Full(PlannedTrainer):
        def passes(self, *_):
            raise torch.OutOfMemoryError

    cfg, data, model = planning(max_steps=1), rows(8), tiny()
    trainer = built(model, cfg, plan_for(cfg, model, data, CUTS[0]), data, tmp_path, Full)
    with pytest.raises(UserError, match=r"single row\. Lower max_length"):
        trainer.train()


@pytest.mark.parametrize("parts", [2, 3, 9])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_parts_of_a_micro_batch_are_whole_rows_in_their_order(parts, attention):
    data = list(rows(7))
    whole = Collator(Cut(7, True, attention), 2)(data)
    pieces = split_batch(whole, parts)
    assert len(pieces) == min(parts, 7)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([piece[name] for piece in pieces], 1), whole[name])
    for piece in pieces:
        assert piece["position_ids"][0, 0] == 0 and piece["use_cache"] is False
        if attention == "varlen":
            starts = (piece["position_ids"][0] == 0).nonzero()[:, 0].tolist()
            assert piece["cu_seq_lens_q"].tolist() == [*starts, piece["input_ids"].shape[1]]
            assert piece["max_length_q"] == max(piece["cu_seq_lens_q"].diff())
    whole = Collator(Cut(7, False, "sdpa"), 2)(data)
    padded = split_batch(whole, parts)
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([piece[name] for piece in padded]), whole[name])
    assert all(piece["use_cache"] is False for piece in padded)


def planner(planning, monkeypatch, lengths, gpu=True, limit=40.0, **changes):
    """`Trials` of a model of 32 layers as a GPU of `limit` GB would see it; passes are made up."""
    data = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    model = tiny()
    monkeypatch.setattr("finetune.trials.memory_limit", lambda setting: limit)
    trials = Trials(planning(**changes), model, datasets.Dataset.from_list(data))
    trials.gpu, trials.layers = gpu, 32
    return trials


@pytest.mark.parametrize(("limit", "again"), [(8.0, 30), (10.0, 28), (20.0, 18), (40.0, 0)])
def test_as_many_layers_are_recomputed_as_memory_demands(planning, monkeypatch, limit, again):
    """4 GB of weights, 0.25 MB a token kept anyway, 0.125 MB for each layer that keeps its own."""
    trials = planner(planning, monkeypatch, [4096] * 16, limit=limit)
    trained = sum(p.numel() for p in trials.model.parameters() if p.requires_grad)
    assert trials.limit == pytest.approx(limit - 8 * trained / 2**30, abs=1e-9)
    trials.limit = limit

    def timed(cut, rows):
        tokens = trials.sampler(cut).size(rows)
        peak = 4 + tokens * (256 + 128 * (32 - cut.recomputed_layers)) / 2**20
        if peak > 80:
            raise torch.OutOfMemoryError
        return tokens * (1 + cut.recomputed_layers / 100), 4.0, peak

    monkeypatch.setattr(trials, "timed", timed)
    # Two rows of 4096 tokens: 2 GB and 1 GB a layer, beside the 4 of the weights.
    trial = trials.measure(Cut(2, False, "sdpa"), 32)
    wanted = max(0, 32 - int(limit - 6))
    assert trial.cut.recomputed_layers == wanted and abs(wanted - again) <= 4
    assert (trial.peak <= limit and trial.peak > limit - 1) or wanted == 0
    refused = trials.measure(Cut(2, False, "sdpa"), wanted - 1)
    assert refused.note == f"would recompute {wanted} layers"


@pytest.mark.parametrize("square", [0.0, 4e-6])  # attention's share
def test_seconds_of_an_epoch_are_those_of_its_micro_batches(planning, monkeypatch, square):
    """A pass of t tokens takes 0.1 s, 1 ms a token and more; steps of 16, two rows at once."""
    lengths = [10, 400, 30, 90, 150, 20, 60, 700] * 5
    trials = planner(planning, monkeypatch, lengths, gradient_checkpointing=False)
    cut = Cut(2, False, "sdpa")

    def timed(cut, rows):
        tokens = trials.sampler(cut).size(rows)
        return 0.1 + 0.001 * tokens + square * tokens**2, 0.0, 1.0

    monkeypatch.setattr(trials, "timed", timed)
    batches = trials.sampler(cut).micro_batches()
    expected = sum(timed(cut, rows)[0] for rows in batches)
    found = trials.measure(cut, 32)
    assert found.seconds == pytest.approx(expected, rel=0.12) and found.peak == 1.0
    row = found.row(sum(lengths), 16, True)
    assert row["tokens/s"] == round(sum(lengths) / found.seconds)
    assert row["rows at once"] == "2 × 8" and row[""] == "← chosen"


def test_two_processes_take_half_the_time(planning, monkeypatch):
    seconds = []
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        trials = planner(planning, monkeypatch, [100] * 32, gradient_checkpointing=False)
        monkeypatch.setattr(trials, "timed", lambda *_: (1.0, 0.0, 1.0))
        found = trials.measure(Cut(2, False, "sdpa"), 32)
        seconds.append(found.seconds)
    assert seconds == [16.0, 8.0]
    row = found.row(3200, 16, False)
    assert row["rows at once"] == "2 × 4 × 2 GPUs" and row["tokens/s"] == 400


@pytest.mark.parametrize(("setting", "layers"), [(True, 32), (False, 0)])
def test_a_gpu_recomputes_all_layers_or_none_if_that_is_set(planning, monkeypatch, setting, layers):
    trials = planner(planning, monkeypatch, [100] * 32, gradient_checkpointing=setting)
    monkeypatch.setattr(trials, "timed", lambda *_: (1.0, 0.0, 1.0))
    found = [trials.measure(Cut(size, False, "sdpa"), 32) for size in (1, 4)]
    assert [trial.cut.recomputed_layers for trial in found] == [layers] * 2


def test_on_a_cpu_memory_that_other_things_hold_is_no_reason_against_a_cut(planning, monkeypatch):
    """There the peak is of the whole process since it began."""
    trials = planner(planning, monkeypatch, [100] * 32, gpu=False, limit=1.0)
    monkeypatch.setattr(trials, "timed", lambda *_: (1.0, 0.0, 9.0))
    assert not trials.measure(Cut(2, False, "sdpa"), 32).note


@pytest.mark.parametrize(
    ("lengths", "flat", "layouts"),
    [
        ([300] * 40, "varlen", {True, False}),  # nothing to save, but the kernel may be faster
        ([300] * 40, "sdpa", {False}),
        ([300] * 40, "", {False}),
        ([10, 3000] * 20, "varlen", {True}),
        ([10, 3000] * 20, "sdpa", {True}),
    ],
)
def test_layouts_are_tried_where_they_may_pay(planning, monkeypatch, lengths, flat, layouts):
    trials = planner(planning, monkeypatch, lengths)
    trials.sizes = lambda tokens=0: [4]
    trials.padding = lambda cut: 0.0 if len(set(lengths)) == 1 else 0.5
    monkeypatch.setattr("finetune.trials.flat_attention", lambda *_: flat)
    monkeypatch.setattr(trials, "dense_size", lambda: math.inf)
    monkeypatch.setattr(trials, "measure", lambda cut, most: Trial(cut, 1.0))
    trials.choose()
    assert {trial.cut.flat for trial in trials.tried} == layouts


@pytest.mark.parametrize(("held", "tried"), [(5.0, True), (35.0, False)])
def test_a_dense_copy_is_tried_where_it_fits_beside_what_is_held(
    planning, monkeypatch, held, tried
):
    trials = planner(planning, monkeypatch, [300] * 40, limit=40.0)
    monkeypatch.setattr("finetune.trials.flat_attention", lambda *_: "")
    monkeypatch.setattr("finetune.trials.memory_in_use", lambda: held)
    monkeypatch.setattr(trials, "dense_size", lambda: 10.0)
    monkeypatch.setattr(trials, "measure", lambda cut, most: Trial(cut, 2.0 - cut.dense))
    assert trials.choose().cut.dense is tried
    assert any(trial.cut.dense for trial in trials.tried) is tried


def test_rows_at_once_divide_a_step_and_grow_while_that_pays(planning, monkeypatch):
    trials = planner(planning, monkeypatch, [300] * 40, batch_size=6, gradient_accumulation=4)
    assert trials.sizes() == [1, 2, 3, 4, 6, 8, 12, 24]
    assert trials.sizes(1000) == [4, 6, 8, 12, 24] and trials.sizes(10**6) == [24]
    trials.gpu, trials.deadline, tried = False, math.inf, []
    assert trials.sizes() == [1, 2, 3, 4]
    seconds = {1: 9.0, 2: 5.0, 3: 5.3, 4: 6.0, 6: 1.0}

    def measure(cut, most):
        tried.append(most)
        return Trial(
            dataclasses.replace(cut, recomputed_layers=4 - cut.micro_batch),
            seconds[cut.micro_batch],
        )

    monkeypatch.setattr(trials, "measure", measure)
    trials.climb(Cut(size, True, "sdpa") for size in seconds)
    assert [trial.seconds for trial in trials.tried] == [9.0, 5.0, 5.3, 6.0]
    assert trials.best().seconds == 5.0 and tried == [32, 3, 2, 1]
    trials.deadline = 0.0  # time is up, and there is something that fits
    trials.climb([Cut(1, True, "sdpa")])
    assert len(trials.tried) == 4


def test_rows_go_end_to_end_in_smaller_numbers_where_those_that_pay_do_not_fit(
    planning, monkeypatch
):
    trials = planner(planning, monkeypatch, [10, 300] * 20)
    monkeypatch.setattr("finetune.trials.flat_attention", lambda *_: "sdpa")
    monkeypatch.setattr(trials, "dense_size", lambda: math.inf)

    def measure(cut, most):
        fits = cut.micro_batch <= 2
        return Trial(cut, 9.0 - cut.micro_batch - cut.flat) if fits else Trial(cut, note="no")

    monkeypatch.setattr(trials, "measure", measure)
    assert trials.choose().cut == Cut(2, True, "sdpa")
    assert [trial.cut.micro_batch for trial in trials.tried[:4]] == [8, 1, 2, 4]


def test_rows_are_padded_where_none_fits_end_to_end_however_much_that_pads(planning, monkeypatch):
    trials = planner(planning, monkeypatch, [10, 3000] * 20)
    monkeypatch.setattr("finetune.trials.flat_attention", lambda *_: "sdpa")
    monkeypatch.setattr(trials, "dense_size", lambda: math.inf)
    monkeypatch.setattr(trials, "measure", lambda cut, _: Trial(cut, 1.0, note="no" * cut.flat))
    assert trials.choose().cut.flat is False and trials.tried[0].cut.flat


@pytest.mark.parametrize(("epochs", "counted"), [(0.5, 1), (1, 1), (1.5, 2), (3, 3)])
def test_an_epoch_that_is_only_begun_counts_for_what_must_fit(
    planning, monkeypatch, epochs, counted
):
    assert planner(planning, monkeypatch, [100] * 64, epochs=epochs).epochs == counted


def test_what_fits_nowhere_is_a_clear_error(planning, monkeypatch):
    trials = planner(planning, monkeypatch, [300] * 20, gpu=False)
    monkeypatch.setattr(trials, "measure", lambda cut, most: Trial(cut, note="does not fit"))
    with pytest.raises(UserError, match=r"one row of 300 tokens .* Set max_length = 150 in"):
        trials.choose()


@pytest.mark.parametrize("seed", [1, 7])
def test_the_seed_decides_on_the_rows_of_each_step(planning, built, tmp_path, seed):
    cfg, data, model = planning(seed=seed, batch_size=2), rows(40), tiny()
    plan = plan_for(cfg, model, data, Cut(4, True, "sdpa"))
    sampler = built(model, cfg, plan, data, tmp_path)._get_train_sampler()
    expected = StepSampler([len(row) for row in data["input_ids"]], 8, seed, plan.cut)
    assert list(sampler) == list(expected) and sampler.step == 8


def test_a_model_that_says_it_takes_no_count_of_tokens_is_given_it(
    planning, built, tmp_path, monkeypatch
):
    """Else the loss would be a mean of means, and depend on the cut."""
    kind = transformers.MistralForCausalLM
    monkeypatch.setattr(kind, "accepts_loss_kwargs", False, raising=False)
    cfg, data, results = planning(max_steps=2), rows(32), []
    for cut in (Cut(2, False, "sdpa"), Cut(16, True, "sdpa")):
        model = tiny()
        use_fast_kernels(model, data, "fp32")
        plan = plan_for(cfg, model, data, cut)
        results.append(trained(built(model, cfg, plan, data, tmp_path)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    close(results[1][1], results[0][1], 1e-4)


@pytest.mark.parametrize("cut", [PADDED, FLAT])
def test_a_rows_first_token_is_never_trained(cut):
    """Laid end to end it would be learned as what follows the row before it."""
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = Collator(cut, 2)(data)
    labels = [[-100, 6, 7], [-100, 9, -100]] if cut is PADDED else [[-100, 6, 7, -100, 9]]
    ids = [[5, 6, 7], [8, 9, 2]] if cut is PADDED else [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == labels and batch["input_ids"].tolist() == ids
    assert batch["use_cache"] is False


LAYOUTS = [PADDED, FLAT, Cut(16, True, "varlen")]


@pytest.mark.parametrize("cut", LAYOUTS, ids=str)
def test_each_token_knows_its_own_rows_length_in_every_layout(cut):
    data = list(rows(6))
    data[2]["labels"][-1] = data[2]["input_ids"][-1]  # every row ends in a trained EOS
    wanted = [len(row["input_ids"]) for row in data]
    assert len({*wanted}) > 3
    batch = Collator(cut, 0)(data)
    for pieces in ([batch], split_batch(batch, 2)):
        found = [own_lengths(piece) for piece in pieces]
        if cut.flat:
            each = [n for piece in found for n in piece[0].tolist()]
            assert each == [n for n in wanted for _ in range(n)]
        else:
            assert [n for piece in found for n in piece[:, 0].tolist()] == wanted
            assert all((piece == piece[:, :1]).all() for piece in found)


@pytest.mark.parametrize("cut", LAYOUTS, ids=str)
def test_neftunes_noise_goes_by_each_rows_own_length(cut):
    """Uniform within ±alpha / √(length × width): a deviation of that over √3."""
    model, data = tiny(), list(rows(4, longest=200))
    embeddings, batch = model.get_input_embeddings(), Collator(cut, 0)(data)
    plain, ids = embeddings(batch["input_ids"]), batch["input_ids"]
    with noisy(model, 5.0, own_lengths(batch)):
        noise = embeddings(ids) - plain
        again = embeddings(ids) - plain
    assert torch.equal(embeddings(ids), plain) and not torch.equal(noise, again)
    start = 0
    for number, row in enumerate(data):
        n = len(row["input_ids"])
        own = noise[0, start : start + n] if cut.flat else noise[number, :n]
        start += n
        most = 5.0 / math.sqrt(n * 64)
        assert own.abs().max().item() == pytest.approx(most, rel=0.05)
        assert own.std().item() == pytest.approx(most / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_noise_is_heard_in_training_alone_and_differs_each_step(planning, built, tmp_path, alpha):
    heard = []

    class Listening(PlannedTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            embeddings, ids = self.model.get_input_embeddings(), inputs["input_ids"]
            heard.append((embeddings(ids) - embeddings.weight[ids]).abs().max().item())
            return super().compute_loss(model, inputs, **kwargs)

    model, data, cfg = tiny(), rows(32), planning(max_steps=2)
    plan = plan_for(cfg, model, data, Cut(8, True, "sdpa"))
    options = {"neftune_noise_alpha": alpha, "eval_strategy": "steps", "eval_steps": 1}
    trainer = built(model, cfg, plan, data, tmp_path, Listening, **options)
    silent = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert len(heard) == 4 and len({*heard}) == (4 if alpha else 1)
    assert (min(heard) > 0.05) == (alpha > 0) and trainer.evaluate()["eval_loss"] != silent
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("cut", [Cut(1, False, "sdpa"), Cut(16, False, "sdpa"), FLAT], ids=str)
def test_the_trainers_validation_loss_counts_every_token_alike(planning, built, tmp_path, cut):
    model, data, cfg = tiny(), rows(40, longest=90), planning()
    batches = [Collator(Cut(1, False, "sdpa"), 0)([row]) for row in data]
    model.eval()
    with torch.no_grad():
        each = [
            (model(**batch).loss.item(), (batch["labels"] != -100).sum().item())
            for batch in batches
        ]
    tokens = sum(n for _, n in each)
    wanted, by_rows = sum(loss * n for loss, n in each) / tokens, sum(x for x, _ in each) / 40
    trainer = built(model, cfg, plan_for(cfg, model, data, cut), data, tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-5)
    assert abs(by_rows - wanted) > 1e-3
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(wanted, abs=1e-5)


def test_what_a_plan_is_made_anew_for_is_told_in_words(planning, capsys):
    cfg, model = planning(), tiny()
    about = planned_for(cfg, model, [7, 8, 9])
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "plan.json").write_text(json.dumps({"about": about, "peak": 1.0}))
    assert planned_before(cfg, about)["about"] == about
    now = planned_for(planning(lora_r=8), tiny(layers=2), [7, 8]) | {"versions": {"torch": "9"}}
    assert planned_before(cfg, now) is None
    said = capsys.readouterr().out
    assert f"lora_r: {about['lora_r']} then, 8 now" in said
    for part in ("rows have other lengths", "base model, its", "libraries have other versions"):
        assert f"the {part}" in said
    assert about["rows"] not in said and "[" not in said and "{" not in said


@pytest.mark.parametrize(
    ("steps", "warmup", "told"),
    [
        (1, 0, "1 step (6 an epoch), no warm-up"),
        (3, 1, "3 steps (6 an epoch), warm-up over the first one"),
        (12, 3, "12 steps (6 an epoch), warm-up over the first 3"),
    ],
)
def test_the_warm_up_is_told_for_none_for_one_and_for_many(steps, warmup, told):
    cut = Cut(2, False, "sdpa")
    plan = Plan(cut, 1, 6, steps, warmup, 1, 100.0, 0.6, 1.0, "as set", [{"chosen": True}])
    assert str(plan).splitlines()[0] == told and "About 1 second at" in str(plan)


@pytest.mark.parametrize("tokens", [300, 1])
def test_a_part_of_the_held_out_rows_is_drawn_by_the_seed(
    planning, built, tmp_path, monkeypatch, capsys, tokens
):
    monkeypatch.setattr("finetune.train.PART_TOKENS", tokens)
    model, data, cfg = tiny(), rows(40, longest=90), planning()
    trainer = built(model, cfg, plan_for(cfg, model, data, FLAT), data, tmp_path)
    trainer.control.should_log = True
    trainer.log_part()
    drawn = data.shuffle(cfg.seed)
    count = max(1, sum(n <= tokens for n in itertools.accumulate(row_lengths(drawn))))
    loss = trainer.state.log_history[-1]["eval_part_loss"]
    assert loss == pytest.approx(validation_loss(model, drawn.select(range(count))), abs=1e-5)
    assert abs(loss - validation_loss(model, data.select(range(count)))) > 1e-4
    assert f"({count} row{'s' * (count > 1)})" in capsys.readouterr().out
    assert trainer.control.should_log  # the step's own loss is still to come


def test_a_plan_that_needs_more_than_is_free_now_is_made_anew(planning, monkeypatch, capsys):
    cfg, about = planning(), {"rows": "as before"}
    cfg.run_dir.mkdir(parents=True)
    saved = {"about": about, "peak": 21.0}
    (cfg.run_dir / "plan.json").write_text(json.dumps(saved))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for limit, found in ((21.5, saved), (20.5, None)):
        monkeypatch.setattr("finetune.plan.memory_limit", lambda _, limit=limit: limit)
        assert planned_before(cfg, about) == found
    assert "memory: 21.0 GB were used then, 20.5 may be now" in capsys.readouterr().out
    assert planned_before(cfg, about | {"what a newer release looks at": 1}) is None
    assert "what a newer release looks at: None then, 1 now" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"about": {"GPU": "T4', "[]", "{}", '{"about": null}'])
def test_a_plan_that_was_cut_short_is_made_anew(planning, text):
    cfg, model, data = planning(), tiny(), rows(16)
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "plan.json").write_text(text)
    assert make_plan(cfg, model, data).table
    assert json.loads((cfg.run_dir / "plan.json").read_text())["table"]


def test_rows_beyond_the_base_models_positions_are_told_before_training(planning):
    model, data = tiny(), rows(20, longest=60)
    lengths = sorted(len(row["input_ids"]) for row in data)
    model.config.max_position_embeddings = lengths[-1]
    assert make_plan(planning(), model, data).steps
    model.config.max_position_embeddings = lengths[-3]
    over = sum(n > lengths[-3] for n in lengths)
    with pytest.raises(
        UserError, match=rf"^Longer .*: {over} rows?\. .* max_length = {lengths[-3]} "
    ):
        make_plan(planning(), model, data)


@pytest.mark.parametrize("backup_to", ["none", "drive"])
@pytest.mark.parametrize("place", ["on_colab", "on_kaggle", "elsewhere"])
def test_a_run_without_copies_is_told_what_it_risks_in_minutes(
    settings, monkeypatch, backup_to, place
):
    for name in ("on_colab", "on_kaggle"):
        monkeypatch.setattr(f"finetune.plan.{name}", lambda name=name: name == place)
    assert not at_risk(settings(backup_to=backup_to), 19 * 60)  # no more than with copies
    told = at_risk(settings(backup_to=backup_to), 5400)
    assert bool(told) == (place != "elsewhere" and backup_to == "none")
    if told:
        assert "up to 90 minutes of training are lost" in told and "it would be 20" in told
        assert ("Colab" if place == "on_colab" else "Kaggle") in told


def test_tokens_that_the_base_model_has_no_embedding_of_are_told(built):
    model = tiny()
    known = model.get_input_embeddings().weight.shape[0]
    for largest in (known - 1, known):
        data = datasets.Dataset.from_list(
            [{"input_ids": [1, 2]}] * 1500 + [{"input_ids": [largest, 3]}]
        )
        if largest < known:
            require_known(model, data)
        else:
            with pytest.raises(UserError, match=f"tokens up to {known:,}, and the base model"):
                require_known(model, data)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_long_wait_shows_how_far_it_is_in_the_first_process(
    planning, monkeypatch, tmp_path, capsys, rank
):
    monkeypatch.setattr("finetune.machine.BAR_AFTER", 0)
    # Drawn at every step, however fast the ways are tried.
    monkeypatch.setattr("finetune.machine.tqdm", partial(tqdm, mininterval=0))
    model, data, cfg = tiny(), rows(16), planning(data_files=str(ROOT / "data_examples/*.jsonl"))
    monkeypatch.setenv("RANK", rank)
    write_rows(({"prompt": "a"} for _ in range(600)), tmp_path / "rows.arrow")
    use_fast_kernels(model, data, "fp32")
    Trials(cfg, model, data).choose()
    validation_loss(model, data)
    write_shards(model.named_parameters(), tmp_path, torch.float32, 2**20)
    told = capsys.readouterr().err
    shown = ["Reading: ", "Comparing kernels: ", "Trying ways to do a step: 2 ways"]
    shown += ["Validation loss: ", "Writing weights: "]
    assert [what in told for what in shown] == [rank == "0"] * 5, told
