"""Sections 8, 10 and 11: every way of computing a step is the same training, in real NF4 on the
CPU.
"""

import dataclasses
import itertools
import math
import random
import types
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
import trl

from finetune.arithmetic import FrozenHeadLoss, varlen_attention, varlen_mask, varlen_options
from finetune.base_model import mend_cpu_gradients
from finetune.batches import Collator, Cut, StepSampler
from finetune.plan import make_plan
from finetune.report import history
from finetune.speed import (
    checkpointable,
    flat_attention,
    fuse_lora,
    fuse_loss,
    keep_dense,
    recompute_layers,
    use_fast_kernels,
)
from finetune.train import follow_plan, survive_out_of_memory, trim_steps
from finetune.trials import Trials
from qlora_helpers import UserError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny(dropout=0.0, layers=3, **lora):
    """A model of Mistral's architecture with random weights, in real NF4 and fp32 compute, with
    LoRA.
    """
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
    )
    plain = transformers.MistralForCausalLM(config)
    folder = Path("content/tiny_mistral")
    plain.save_pretrained(folder)
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"}
    )
    mend_cpu_gradients(model)
    recipe = {
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": dropout,
        "target_modules": TARGETS,
    }
    config = peft.LoraConfig(**recipe | lora)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def rows(n=37, seed=1, longest=60):
    """Encoded rows of random ids: prompts untrained, lengths from 5 to `longest`."""
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        ids = [chance.randrange(3, 500) for _ in range(chance.randrange(5, longest))]
        start = chance.randrange(1, len(ids) - 1)
        found.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return datasets.Dataset.from_list(found)


def gradients(model, batch, **kwargs):
    model.zero_grad()
    model.train()
    loss = model(**batch, num_items_in_batch=50, **kwargs).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def close(one, other, tolerance):
    norm = sum((a - other[n]).norm() ** 2 for n, a in one.items()) ** 0.5
    assert (
        one.keys() == other.keys()
        and norm <= tolerance * sum(a.norm() ** 2 for a in one.values()) ** 0.5
    )


PADDED, FLAT = Cut(4, False, "sdpa"), Cut(4, True, "sdpa")


def test_fused_lora_and_loss_equal_pefts_and_transformers_own():
    model, batch = tiny(), Collator(PADDED, 2)(list(rows(4)))
    loss, expected = gradients(model, batch)
    assert fuse_lora(model) == 12 and fuse_loss(model.get_base_model())
    fused_loss, found = gradients(model, batch)
    assert fused_loss == pytest.approx(loss.item(), rel=1e-6)
    assert len(found) == 24
    close(found, expected, 1e-5)


@pytest.mark.parametrize("logits", [150, 2**26])
def test_the_frozen_heads_loss_and_gradient_are_cross_entropys(logits):
    torch.manual_seed(0)
    weight, bias, targets = torch.randn(50, 8), torch.randn(50), torch.randint(50, (10,))
    found, expected = (
        torch.randn(10, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in "ab"
    )
    loss = FrozenHeadLoss.apply(found, weight, bias, targets, logits)
    wanted = torch.nn.functional.cross_entropy(
        expected @ weight.t() + bias, targets, reduction="sum"
    )
    (2 * loss).backward()
    (2 * wanted).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(found.grad, expected.grad, atol=1e-5)
    with torch.no_grad():
        assert FrozenHeadLoss.apply(found[:0], weight, bias, targets[:0]) == 0


def test_the_frozen_heads_loss_keeps_its_types_in_the_trainers_bf16():
    chance = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=chance).bfloat16() for n in (10, 50))
    found, expected = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    targets = torch.arange(10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = FrozenHeadLoss.apply(found, weight, None, targets)
    loss.backward()
    wanted = torch.nn.functional.cross_entropy(
        expected @ weight.float().t(), targets, reduction="sum"
    )
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert (found.grad - expected.grad).norm() < 0.01 * expected.grad.norm()


def test_fused_dropout_is_pefts_to_the_bit():
    model, batch = tiny(dropout=0.4), Collator(PADDED, 2)(list(rows(4)))
    torch.manual_seed(5)
    loss, expected = gradients(model, batch)
    fuse_lora(model)
    torch.manual_seed(5)
    fused_loss, found = gradients(model, batch)
    assert fused_loss == pytest.approx(loss.item(), rel=1e-6)
    close(found, expected, 1e-5)
    torch.manual_seed(6)
    assert gradients(model, batch)[0] != pytest.approx(loss.item(), rel=1e-6)


def test_a_variant_of_lora_keeps_pefts_own_code():
    model = tiny(use_dora=True)
    assert fuse_lora(model) == 0


def test_answers_and_a_switched_off_adapter_use_the_original_code():
    model, ids = tiny(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        on, (off, _) = model(ids).logits, (None, None)
        with model.disable_adapter():
            off = model(ids).logits
        use_fast_kernels(model)
        assert torch.equal(model(ids).logits, on) and not torch.equal(on, off)
        with model.disable_adapter():
            assert torch.equal(model.train()(ids).logits, off)
        assert model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (
            1,
            6,
        )


def test_a_dense_copy_changes_no_bit_and_is_dropped_again():
    model, batch = tiny(), Collator(PADDED, 2)(list(rows(4)))
    use_fast_kernels(model)
    loss, expected = gradients(model, batch)
    keep_dense(model, True)
    assert sum(getattr(m, "dense", None) is not None for m in model.modules()) == 21
    dense_loss, found = gradients(model, batch)
    assert dense_loss == loss and all(torch.equal(found[n], g) for n, g in expected.items())
    keep_dense(model, False)
    assert not any(getattr(m, "dense", None) is not None for m in model.modules())


@pytest.mark.parametrize("cut", [PADDED, FLAT, dataclasses.replace(FLAT, attention="eager")])
@pytest.mark.parametrize("layers", [0, 2, 3])
def test_layouts_and_recomputed_layers_give_the_same_gradients(cut, layers):
    model, data = tiny(), list(rows(4))
    use_fast_kernels(model)
    one_by_one = [gradients(model, Collator(Cut(1, False, "sdpa"), 2)([row])) for row in data]
    expected = {n: sum(g[n] for _, g in one_by_one) for n in one_by_one[0][1]}
    model.set_attn_implementation(cut.attention)
    recompute_layers(model, layers)
    assert [layer.gradient_checkpointing for layer in checkpointable(model)] == [True] * layers + [
        False
    ] * (3 - layers)
    loss, found = gradients(model, Collator(cut, 2)(data))
    assert loss == pytest.approx(sum(part.item() for part, _ in one_by_one), rel=1e-5)
    close(found, expected, 1e-4)


def test_rows_end_to_end_do_not_see_each_other_where_the_model_computes_its_loss_itself():
    model, data = tiny(), list(rows(4))
    model.config.final_logit_softcapping = 30.0
    assert "trained tokens" not in use_fast_kernels(model)
    one_by_one = [
        gradients(model, Collator(Cut(1, False, "sdpa"), 2)([row]))[0].item() for row in data
    ]
    assert gradients(model, Collator(FLAT, 2)(data))[0] == pytest.approx(sum(one_by_one), rel=1e-5)


SIZE = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
OTHERS = {
    "Qwen3": (SIZE | GQA, True),
    "Gemma2": (SIZE | GQA, True),  # without sdpa, and with a cap on its logits
    "Bloom": (SIZE, False),  # it has distances in place of positions
    "Lfm2": (SIZE | GQA | {"layer_types": ["conv", "full_attention"]}, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_only_models_that_keep_rows_apart_get_them_end_to_end(planning, name):
    torch.manual_seed(0)
    settings, apart = OTHERS[name]
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "query_key_value"])
    )
    use_fast_kernels(model)
    plan = make_plan(planning(), model, rows(40))
    assert any(row["layout"].startswith("end to end") for row in plan.table) == apart


def test_a_layout_that_lets_rows_see_each_other_would_be_noticed():
    model, data = tiny(), list(rows(4))
    use_fast_kernels(model)
    loss, _ = gradients(model, Collator(FLAT, 2)(data))
    leaking = Collator(FLAT, 2)(data)
    leaking["position_ids"] = torch.arange(leaking["input_ids"].shape[1])[None]
    assert gradients(model, leaking)[0] != pytest.approx(loss.item(), rel=1e-4)


def varlen_by_hand(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
):
    """torch's kernel as its page describes it, row by row:
    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    assert enable_gqa and cu_seq_q is cu_seq_k and max_q == max_k == max(cu_seq_q.diff())
    parts, (back, ahead) = [], window_size
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        at = torch.arange(end - start)
        seen = at[None] - at[:, None] <= ahead
        seen &= (at[:, None] - at[None] <= back) | (back < 0)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        )
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 7])
def test_the_varlen_kernel_is_asked_for_what_the_model_computes(monkeypatch, window):
    model, data = tiny(), list(rows(4))
    model.config.sliding_window = window
    loss, expected = gradients(model, Collator(FLAT, 2)(data), use_cache=False)
    transformers.AttentionInterface.register("varlen", varlen_attention)
    transformers.AttentionMaskInterface.register("varlen", varlen_mask)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    varlen_options.cache_clear()
    model.set_attn_implementation("varlen")
    found_loss, found = gradients(
        model, Collator(dataclasses.replace(FLAT, attention="varlen"), 2)(data)
    )
    assert found_loss == pytest.approx(loss.item(), rel=1e-6)
    close(found, expected, 1e-5)


def test_a_model_whose_attention_the_varlen_kernel_does_not_have_keeps_sdpa(monkeypatch):
    model = tiny()
    monkeypatch.setattr("finetune.speed.has_varlen", lambda: True)
    assert flat_attention(model) == "varlen"
    model.config.attn_logit_softcapping = 50.0
    assert flat_attention(model) == "sdpa"


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


def train(model, settings, plan, data, folder, **changes):
    """Steps through TRL's trainer as the notebook builds it; returns losses and the adapter."""
    args = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=plan.cut.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        "content/model_cache/SmolLM2-135M-Instruct"
    )
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=data,
        data_collator=Collator(plan.cut, 2),
        processing_class=tokenizer,
    )
    follow_plan(trainer, plan, settings)
    for name, value in changes.items():
        setattr(trainer, name, value(trainer))
    trainer.train()
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
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


def test_every_cut_trains_the_same_adapter(planning, smollm_path, tmp_path):
    cfg, data, results = planning(max_steps=20), rows(90), []
    for cut in CUTS:
        model = tiny()
        use_fast_kernels(model)
        results.append(train(model, cfg, plan_for(cfg, model, data, cut), data, tmp_path))
    losses, adapter = results[0]
    assert len(losses) == 20 and losses[-1] < losses[0]
    for other, weights in results[1:]:
        assert other == pytest.approx(losses, abs=1e-4)
        close(weights, adapter, 1e-4)


def test_steps_without_the_walks_over_all_modules_train_the_same(
    planning, smollm_path, tmp_path, monkeypatch
):
    cfg, data, results = planning(max_steps=4, lora_dropout=0.1), rows(40), []
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *a, **k: clipped.append(clip(*a, **k)) or clipped[-1],
    )
    for trimmed in (True, False):
        if not trimmed:
            monkeypatch.setattr("finetune.train.trim_steps", lambda trainer: None)
        model = tiny(dropout=0.1)
        use_fast_kernels(model)
        low = {"args": lambda trainer: setattr(trainer.args, "max_grad_norm", 0.2) or trainer.args}
        results.append(
            train(model, cfg, plan_for(cfg, model, data, CUTS[1]), data, tmp_path, **low)
        )
    assert (
        len(clipped) == 8 and min(clipped) > 0.2
    )  # both ways clip, and there is something to clip
    assert results[0][0] == results[1][0]
    assert all((results[0][1][name] == weight).all() for name, weight in results[1][1].items())


def test_a_step_after_an_evaluation_trains_with_dropout_again():
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    wrapped = torch.nn.Sequential(
        inner
    )  # as DDP wraps it; the Trainer evaluates the inner model alone
    trainer = types.SimpleNamespace(
        model=inner, training_step=lambda model: model.train(), is_fsdp_enabled=True
    )
    trim_steps(trainer)
    for _ in range(2):
        trainer.training_step(wrapped)
        assert all(module.training for module in wrapped.modules())
        inner.eval()
    wrapped.eval()
    assert not any(module.training for module in wrapped.modules())


def test_planning_leaves_everything_as_it_was_to_the_bit(planning, smollm_path, tmp_path):
    cfg, data, results = planning(max_steps=3, lora_dropout=0.1, resume="never"), rows(40), []
    for planned in (False, True):
        model = tiny(dropout=0.1)
        use_fast_kernels(model)
        model.eval()
        fixed = plan_for(cfg, tiny(), data, Cut(4, False, "sdpa"))
        torch.manual_seed(3)
        if planned:
            make_plan(cfg, model, data)
            assert model.training is False and all(p.grad is None for p in model.parameters())
        drawn = torch.rand(3)
        results.append((drawn, *train(model, cfg, fixed, data, tmp_path)))
    (drawn, losses, adapter), (drawn_after, losses_after, adapter_after) = results
    assert torch.equal(drawn, drawn_after) and losses == losses_after
    assert all(torch.equal(weight, adapter_after[name]) for name, weight in adapter.items())


def test_the_plan_keeps_the_effective_batch_and_marks_its_choice(planning):
    model, data = tiny(), rows(50)
    use_fast_kernels(model)
    plan = make_plan(planning(batch_size=3, gradient_accumulation=5, epochs=2), model, data)
    assert plan.cut.micro_batch * plan.accumulation == 15
    assert (plan.steps_per_epoch, plan.steps) == (4, 8)
    assert sum(row["chosen"] for row in plan.table) == 1 and len(plan.table) >= 2
    best = min((r for r in plan.table if r["tokens/s"]), key=lambda r: r["minutes an epoch"])
    assert (
        best["minutes an epoch"] == next(r for r in plan.table if r["chosen"])["minutes an epoch"]
    )
    assert "← chosen" in plan._repr_html_() and str(plan) in plan._repr_html_()


def test_a_plan_is_used_again_until_something_that_it_depends_on_changes(
    planning, capsys, monkeypatch
):
    model, data, measured, choose = tiny(), rows(40), [], Trials.choose
    monkeypatch.setattr(Trials, "choose", lambda self: measured.append(1) or choose(self))
    use_fast_kernels(model)
    first = make_plan(planning(), model, data)
    assert make_plan(planning(epochs=2), model, data).table == first.table and len(measured) == 1
    assert "As planned before" in capsys.readouterr().out
    monkeypatch.setattr("finetune.plan.versions", lambda: {"torch": "9"})
    make_plan(planning(batch_size=2), model, data)
    said = capsys.readouterr().out
    assert len(measured) == 2 and "batch_size: 4 then, 2 now" in said and "versions: " in said
    make_plan(planning(batch_size=2, resume="never"), model, data)
    assert len(measured) == 3


@pytest.mark.parametrize("cut", [Cut(8, False, "sdpa"), Cut(8, True, "sdpa")])
def test_when_memory_runs_out_the_step_is_done_in_halves_and_says_so_once(
    planning, smollm_path, tmp_path, capsys, cut
):
    cfg, data, results = planning(max_steps=4), rows(64), []

    def failing(trainer):
        """Runs out of memory after the backward pass of every micro-batch of more than two rows."""
        inner = trainer.training_step

        def step(model, inputs, count=None):
            loss = inner(model, inputs, count)
            many = (
                inputs.get("position_ids", torch.zeros(1, 0)).eq(0).sum()
                if cut.flat
                else len(inputs["input_ids"])
            )
            if many > 2:
                raise torch.OutOfMemoryError("planted")
            return loss

        trainer.training_step = step
        survive_out_of_memory(trainer)
        return trainer.training_step

    for changes in ({}, {"training_step": failing}):
        model = tiny()
        use_fast_kernels(model)
        results.append(
            train(model, cfg, plan_for(cfg, model, data, cut), data, tmp_path, **changes)
        )
    (losses, adapter), (losses_after, adapter_after) = results
    assert losses_after == pytest.approx(losses, abs=1e-5)
    close(adapter_after, adapter, 1e-4)
    assert (
        capsys.readouterr().out.count("Memory ran out") == 2
    )  # 8 rows to 4, 4 to 2, and never again


def test_a_single_row_that_does_not_fit_is_a_clear_error():
    class Failing:
        model = torch.nn.Linear(1, 1)

        def training_step(self, *_):
            raise torch.OutOfMemoryError

    trainer = Failing()
    survive_out_of_memory(trainer)
    with pytest.raises(UserError, match=r"single row\. Lower max_length"):
        trainer.training_step(None, Collator(PADDED, 2)(list(rows(1))))
