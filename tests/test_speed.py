"""Section 8: what is replaced on a model computes the same, and is put back.

In real NF4 on the CPU.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import itertools
import re
import sys
import types

import datasets
import pytest
import torch
import transformers
import trl
from architectures import MODELS, known, random_model
from computing import FLAT, PADDED, close, gradients, in_nf4, rows, tiny, with_lora
from tiny import tiny_base, tiny_tuned

from finetune.answers import generate_answers, validation_loss
from finetune.arithmetic import FrozenHeadLoss, LoraMatmul, has_varlen, varlen_options
from finetune.batches import Collator, Cut, StepSampler, row_lengths
from finetune.checkpoints import finished
from finetune.compare import Comparison, on_device, relative_distance
from finetune.lock import claim, release
from finetune.machine import computing_type
from finetune.merge import merge_adapter
from finetune.plan import make_plan
from finetune.save import manifest, save_adapter
from finetune.speed import (
    attend_by,
    bare,
    checkpointable,
    compute_by,
    keep_dense,
    own_attention,
    recompute_layers,
    reversibly,
    state_preserved,
    taken_back,
    undo,
    use_fast_kernels,
    use_liger,
)
from finetune.tokens import encode_rows
from finetune.train import PlannedTrainer, hold_in_fp32
from finetune.trials import flat_attention


def fast(model, data=None):
    """`model` with all that is faster, and what was said of it."""
    return use_fast_kernels(model, data or rows(20), "fp32")


def test_fused_lora_and_loss_equal_pefts_and_transformers_own():
    model, batch = tiny(), Collator(PADDED, 2)(list(rows(4)))
    loss, expected = gradients(model, batch)
    assert fast(model) == "loss over trained tokens; fused LoRA in 12 of 12 layers"
    fused_loss, found = gradients(model, batch)
    assert fused_loss == pytest.approx(loss.item(), rel=1e-6) and fused_loss != 0
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


def test_the_frozen_heads_gradient_is_scaled_without_rounding_the_scale_to_bf16():
    """A third is 0.2 % too large in bf16, and so would be every gradient of the run."""
    chance = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=chance).bfloat16() for n in (40, 50))
    found, expected = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    targets = torch.arange(40)
    (FrozenHeadLoss.apply(found, weight, None, targets) / 3).backward()
    logits = expected @ weight.float().t()
    (torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 3).backward()
    share = (found.grad.float() * expected.grad).sum() / expected.grad.square().sum()
    assert share.item() == pytest.approx(1, abs=1e-3)


def test_with_dropout_pefts_own_lora_runs():
    model, batch = tiny(dropout=0.4), Collator(PADDED, 2)(list(rows(4)))
    torch.manual_seed(5)
    loss, expected = gradients(model, batch)
    assert fast(model) == "loss over trained tokens"
    torch.manual_seed(5)
    found_loss, found = gradients(model, batch)
    assert found_loss == pytest.approx(loss.item(), rel=1e-6)
    close(found, expected, 1e-5)
    assert gradients(model, batch)[0] != pytest.approx(loss.item(), rel=1e-6)


def test_with_dropout_too_a_wrong_loss_is_told_from_rounding(monkeypatch):
    """In training mode two passes differ more than a mistake does."""
    model = tiny(dropout=0.4).train()
    assert fast(model) == "loss over trained tokens"
    weaker = types.SimpleNamespace(apply=lambda *args: 0.9 * FrozenHeadLoss.apply(*args))
    monkeypatch.setattr("finetune.speed.FrozenHeadLoss", weaker)
    assert fast(model).startswith("not loss (")


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}])
def test_another_kind_of_lora_keeps_pefts_own_code_and_says_so(variant):
    model, batch = tiny(**variant), Collator(PADDED, 2)(list(rows(4)))
    _, expected = gradients(model, batch)
    said = fast(model)
    assert said.startswith("loss over trained tokens; not lora (")
    close(gradients(model, batch)[1], expected, 1e-5)


def test_rank_stabilised_lora_is_fused_with_its_own_scale():
    model, batch = tiny(use_rslora=True), Collator(PADDED, 2)(list(rows(4)))
    _, expected = gradients(model, batch)
    assert "fused LoRA in 12 of 12" in fast(model)
    close(gradients(model, batch)[1], expected, 1e-5)


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_lora_is_fused_on_layers_with_biases_too(name):
    model = random_model(name)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            parameter.normal_()
    model, batch = with_lora(in_nf4(model)), Collator(PADDED, 2)(list(rows(4)))
    _, expected = gradients(model, batch)
    assert "fused LoRA in 8 of 8 layers" in fast(model)
    close(gradients(model, batch)[1], expected, 1e-5)


def test_a_computation_that_gives_no_number_is_left_out(monkeypatch):
    model, batch = tiny(), Collator(PADDED, 2)(list(rows(4)))
    _, expected = gradients(model, batch)
    broken = types.SimpleNamespace(apply=lambda *args: LoraMatmul.apply(*args) * torch.nan)
    monkeypatch.setattr("finetune.speed.LoraMatmul", broken)
    assert "not lora (nan from the model's own" in fast(model)
    close(gradients(model, batch)[1], expected, 1e-5)


@pytest.mark.parametrize("same_length", [False, True])
def test_answers_are_computed_as_before_while_rows_of_training_go_end_to_end(same_length):
    """Padded on the left, as `generate` wants them, and alone."""
    model = tiny().eval()
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if not same_length:
        mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    inputs |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    expected = model.generate(**inputs).logits
    attend_by(model, "varlen")
    found = model.generate(**inputs).logits
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("capability", "has"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_the_varlen_kernel_is_for_ampere_and_newer(monkeypatch, capability, has):
    spec = importlib.util.find_spec
    known = lambda name: name.endswith("varlen") or spec(name)  # noqa: E731
    monkeypatch.setattr("finetune.arithmetic.importlib.util.find_spec", known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert has_varlen() is has


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_answers_and_a_switched_off_adapter_use_the_original_code():
    model, ids = tiny(), torch.tensor([[5, 6, 7]])
    on = logits(model, ids)
    with model.disable_adapter():
        off = logits(model, ids)
    fast(model)
    assert torch.equal(logits(model, ids), on) and not torch.equal(on, off)
    with model.disable_adapter():
        assert torch.equal(logits(model.train(), ids), off)
        assert torch.equal(model.train()(ids).logits, off)  # with gradients, too
    out = model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])  # through `LoraMatmul`, and through PEFT's own
def test_a_dense_copy_changes_no_bit_and_is_dropped_again(dropout):
    model, batch = tiny(dropout=dropout), Collator(PADDED, 2)(list(rows(4)))
    fast(model)
    torch.manual_seed(5)
    loss, expected = gradients(model, batch)
    keep_dense(model, True)
    copies = [m.dense for m in model.modules() if getattr(m, "dense", None) is not None]
    assert sum(copy.numel() for copy in copies) == 3 * 4 * (64 * 64 * 2 + 64 * 32 * 2) // 4 + 3 * (
        3 * 64 * 128
    )
    for copy in copies:
        copy.mul_(2)  # it is read
    assert gradients(model, batch)[0] != loss
    for copy in copies:
        copy.div_(2)
    torch.manual_seed(5)
    dense_loss, found = gradients(model, batch)
    assert dense_loss == loss and all(torch.equal(found[n], g) for n, g in expected.items())
    keep_dense(model, False)
    assert not any(getattr(m, "dense", None) is not None for m in model.modules())


@pytest.mark.parametrize("cut", [PADDED, FLAT, dataclasses.replace(FLAT, attention="eager")])
@pytest.mark.parametrize("layers", [0, 2, 3])
def test_layouts_and_recomputed_layers_give_the_same_gradients(cut, layers):
    model, data = tiny(), list(rows(4))
    fast(model)
    one_by_one = [gradients(model, Collator(Cut(1, False, "sdpa"), 2)([row])) for row in data]
    expected = {n: sum(g[n] for _, g in one_by_one) for n in one_by_one[0][1]}
    attend_by(model, cut.attention)
    recompute_layers(model, layers)
    assert [layer.gradient_checkpointing for layer in checkpointable(model)] == [True] * layers + [
        False
    ] * (3 - layers)
    loss, found = gradients(model, Collator(cut, 2)(data))
    assert loss == pytest.approx(sum(part.item() for part, _ in one_by_one), rel=1e-5)
    close(found, expected, 1e-4)


# The mode, and what a recurrent layer remembers of the last pass.
PASSING = {"training", "recurrent_states", "conv1d_state"}


def state(model):
    """What `undo` must bring back: classes, forwards and other attributes, hooks, configs.

    Call it after a first pass, in which 4-bit layers set flags of their own.
    """
    causal = model.get_base_model()
    source = sys.modules[type(causal).__module__]
    found = {"config": causal.config.to_dict(), "attention": causal.config._attn_implementation}
    for name, holder in {"source": source, **dict(model.named_modules())}.items():
        held = {key: id(value) for key, value in vars(holder).items() if key not in PASSING}
        hooks = {k: [*v] for k, v in vars(holder).items() if re.fullmatch("_.*_hooks", k)}
        found[name] = (id(type(holder)), held, hooks)
    return found


def test_after_undo_a_model_is_as_peft_made_it():
    model = tiny()
    expected = gradients(model, Collator(PADDED, 2)(list(rows(4))))
    before = state(model)
    fast(model)
    compute_by(model, Cut(4, True, "eager", recomputed_layers=2, dense=True))
    assert state(model) != before
    undo(model)
    model.zero_grad()
    assert state(model) == before
    assert "_replaced" not in vars(model)
    loss, found = gradients(model, Collator(PADDED, 2)(list(rows(4))))
    assert loss == expected[0] and all(torch.equal(found[n], g) for n, g in expected[1].items())


def test_section_8_again_begins_with_the_base_model_as_it_was_loaded():
    model, ids = tiny(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    fast(model)
    compute_by(model, Cut(4, True, "eager", recomputed_layers=2, dense=True))
    base = bare(model)
    assert base.config._attn_implementation == "sdpa" and "forward" not in vars(base)
    assert not any(layer.gradient_checkpointing for layer in checkpointable(base))
    assert not any("lora" in name or "dense" in vars(m) for name, m in base.named_modules())
    assert bare(base) is base
    with torch.no_grad():
        assert torch.equal(base(ids).logits, expected)
    again = with_lora(base)
    assert again.peft_config.keys() == {"default"}
    assert fast(again) == "loss over trained tokens; fused LoRA in 12 of 12 layers"


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupted_comparison_or_trial_leaves_nothing_behind(monkeypatch, error):
    model = tiny()
    gradients(model.eval(), Collator(PADDED, 2)(list(rows(4))))
    model.zero_grad()
    before, weights = state(model), [p.detach().clone() for p in model.parameters()]
    states = torch.random.get_rng_state()
    calls = itertools.count()

    def stop(self, *_):
        if next(calls) == 3:
            raise error
        return [torch.ones(1)]

    monkeypatch.setattr(Comparison, "gradients", stop)
    with contextlib.suppress(error):
        fast(model)
    undo(model)
    assert next(calls) == 4 + (error is not KeyboardInterrupt)
    with pytest.raises(error), state_preserved(model), taken_back(model):
        compute_by(model.train(), Cut(4, True, "eager", recomputed_layers=2, dense=True))
        gradients(model, Collator(PADDED, 2)(list(rows(4))))
        torch.rand(3)
        raise error
    assert state(model) == before and all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))
    assert torch.equal(torch.random.get_rng_state(), states)


def test_modes_that_differ_between_modules_are_put_back_as_they_were():
    model = tiny()
    modes = [number % 3 == 0 for number, _ in enumerate(model.modules())]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    with state_preserved(model):
        model.train()
    assert [module.training for module in model.modules()] == modes


class Plain(trl.SFTTrainer):
    """trl and peft as they come, but for the fp32 adapter and the rows of each step."""

    plainer = False

    def compute_loss(self, *args, **kwargs):
        own = transformers.Trainer if self.plainer else super()
        return own.compute_loss(*((self,) * self.plainer), *args, **kwargs)

    def _get_train_sampler(self, *_):
        return self.sampler


def two_steps(model, data, trainer_for, tokenizer, folder, **changes):
    """Loss, gradient norm, and the gradients of each of two steps, and the adapter after them."""
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,
        "loss_type": "nll",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
    }
    if hasattr(trl.SFTConfig, "router_aux_loss_coef"):
        args["router_aux_loss_coef"] = 0.0
    trainer = trainer_for(model, trl.SFTConfig(**args | changes), data, tokenizer)
    found = []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            found.append(grads)

    trainer.add_callback(Keep())
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return (
        logs,
        found,
        {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
    )


def with_mask(data):
    """Padded micro-batches as trl's collator makes them."""
    batch = Collator(PADDED, 2)(data)
    real = [[1] * len(row["labels"]) for row in data]
    width = batch["labels"].shape[1]
    mask = torch.tensor([row + [0] * (width - len(row)) for row in real])
    return batch | {"attention_mask": mask}


def plain(model, args, data, tokenizer):
    options = {"train_dataset": data, "processing_class": tokenizer}
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = Plain(model, args, data_collator=with_mask, **options)
    trainer.plainer = any(type(model.get_base_model()).__name__.startswith(n) for n in NOT_TRLS)
    trainer.model_accepts_loss_kwargs |= trainer.plainer
    trainer.sampler = StepSampler(row_lengths(data), 16, 42, PADDED)
    hold_in_fp32(model, weights)
    return trainer


OLD = transformers.__version__ < "5"
FAIL = {"RecurrentGemma", "Llama4"} if OLD else set()  # by themselves
# Whose body trl does not find or whose cap it leaves out: there transformers' loss is the measure.
NOT_TRLS = {"Llama4", "RecurrentGemma", *(("GPTNeoX", "Gemma3") if OLD else ())}


@pytest.mark.parametrize("name", [name for name in known() if name not in FAIL])
def test_every_architecture_trains_as_under_trl_and_peft(
    name, settings, smollm_tokenizer, tmp_path
):
    data, results = rows(32, longest=40), []
    cfg = settings(output_dir=str(tmp_path), bf16=False, max_steps=2)

    def planned(model, args, data, tokenizer):
        gradients(model, Collator(PADDED, 2)(list(data)[:4]))
        before = state(model)
        said, plan = use_fast_kernels(model, data, "fp32"), make_plan(cfg, model, data)
        assert ("not loss" in said) == (name in NOT_LOSS), said
        flat = any(row["layout"].startswith("end to end") for row in plan.table)
        assert not flat or name not in NOT_FLAT
        undo(model)
        assert state(model) == before
        use_fast_kernels(model, data, "fp32")
        with taken_back(model):
            attention = flat_attention(model, data, "fp32")
        again = len(checkpointable(model))
        cut = Cut(8, bool(attention), attention or plan.cut.attention, again)
        plan = dataclasses.replace(plan, cut=cut, accumulation=2)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = 8, 2
        return PlannedTrainer(model, args, plan, train_dataset=data, processing_class=tokenizer)

    for way in (plain, planned):
        model = with_lora(in_nf4(random_model(name)), target_modules=MODELS[name][1])
        results.append(two_steps(model, data, way, smollm_tokenizer, tmp_path))
    (logs, grads, adapter), (found_logs, found_grads, found_adapter) = results
    assert len(logs) == 2
    for (loss, norm), (found_loss, found_norm) in zip(logs, found_logs, strict=True):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=2e-5)  # processors sum otherwise
    for wanted, found in zip(grads, found_grads, strict=True):
        close(found, wanted, 1e-5)
    close(found_adapter, adapter, 1e-4)


# Whose logits are capped or scaled after the head, and whose layers look across rows.
NOT_LOSS = {"Gemma2", "Gemma3", "Granite", "Gemma3n", "Gemma4", "RecurrentGemma"}
NOT_FLAT = {"Bloom", "Lfm2", "RecurrentGemma", "GptOss"}


def test_a_layout_that_lets_rows_see_each_other_would_be_noticed(monkeypatch):
    model, data = tiny(), rows(20)
    with taken_back(model):
        assert flat_attention(model, data, "fp32") == "sdpa"
    flat = Collator.end_to_end

    def leaking(self, ids, labels):
        batch = flat(self, ids, labels)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    monkeypatch.setattr(Collator, "end_to_end", leaking)
    with taken_back(model):
        assert flat_attention(model, data, "fp32") == ""


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


@pytest.fixture
def by_hand(monkeypatch):
    """The kernel's stand-in, where a GPU would have the kernel."""
    monkeypatch.setattr("finetune.trials.has_varlen", lambda: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    varlen_options.cache_clear()
    yield
    varlen_options.cache_clear()


@pytest.mark.parametrize("window", [None, 7])
def test_the_varlen_kernel_is_asked_for_what_the_model_computes(by_hand, window):
    model, data = tiny(), list(rows(4))
    model.config.sliding_window = window
    loss, expected = gradients(model, Collator(FLAT, 2)(data))
    with taken_back(model):
        assert flat_attention(model, rows(20), "fp32") == "varlen"
    assert model.config._attn_implementation == "sdpa"
    attend_by(model, "varlen")
    found_loss, found = gradients(
        model, Collator(dataclasses.replace(FLAT, attention="varlen"), 2)(data)
    )
    assert found_loss == pytest.approx(loss.item(), rel=1e-6)
    close(found, expected, 1e-5)


def test_a_window_that_the_kernel_does_not_see_is_noticed(by_hand, monkeypatch):
    """By the longest row, wherever it stands: the first has no token outside the window."""
    model, data = tiny(), sorted(rows(20), key=lambda row: len(row["input_ids"]))
    assert len(data[0]["input_ids"]) <= 7
    model.config.sliding_window = 7
    monkeypatch.setattr(
        "finetune.arithmetic.varlen_options",
        lambda window: {"window_size": (-1, 0), "enable_gqa": True},
    )
    with taken_back(model):
        assert flat_attention(model, datasets.Dataset.from_list(data), "fp32") == "sdpa"


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Gemma3"])
def test_attention_with_a_cap_or_sinks_keeps_the_models_own(by_hand, name):
    """Of these, Gemma 3 alone computes what the kernel does."""
    model = with_lora(in_nf4(random_model(name)), target_modules=MODELS[name][1])
    own = model.config._attn_implementation
    capped = own if own == "eager" else "varlen"  # transformers' sdpa leaves the cap out, too
    expected = {"Gemma2": {capped}, "GptOss": {own, ""}, "Gemma3": {"varlen"}}[name]
    with taken_back(model):
        assert flat_attention(model, rows(20), "fp32") in expected


def test_attention_dropout_keeps_the_models_own(by_hand):
    plain = random_model("Llama", attention_dropout=0.3)
    model = with_lora(in_nf4(plain), target_modules=["q_proj"], dropout=0.2)
    with state_preserved(model), taken_back(model):
        assert flat_attention(model, rows(20), "fp32") == "sdpa"
    model = with_lora(in_nf4(random_model("Llama")), target_modules=["q_proj"], dropout=0.2)
    with state_preserved(model), taken_back(model):
        assert flat_attention(model, rows(20), "fp32") == "varlen"


def test_a_model_that_is_let_go_is_freed():
    model = tiny()
    fast(model)
    compute_by(model, Cut(4, True, "eager", recomputed_layers=2, dense=True))
    undo(model)
    del model
    gc.collect()
    held = [m for m in gc.get_objects() if isinstance(m, transformers.MistralForCausalLM)]
    assert held == []


def forwards(model):
    """Classes, forwards and hooks, without what libraries keep elsewhere in a model."""
    found = {}
    for name, module in model.named_modules():
        hooks = {k: [*v] for k, v in vars(module).items() if re.fullmatch("_.*_hooks", k)}
        found[name] = (type(module), id(vars(module).get("forward")), hooks)
    return found


@pytest.mark.slow
def test_no_other_room_replaces_anything(settings, smollm_tokenizer, tmp_path):
    """After each function that is given a model: its classes, forwards and hooks as before."""
    base = tiny_base(tmp_path / "base", smollm_tokenizer)
    model, row = tiny_tuned(base), {"prompt": "Who?", "completion": "Nobody at all."}
    data = encode_rows([row | {"prompt": f"Who is {n}?"} for n in range(20)], smollm_tokenizer)
    changes = {"base_model": base, "output_dir": str(tmp_path), "run_name": "run", "bf16": False}
    changes |= {"max_steps": 2, "merged_dir": str(tmp_path / "merged")}
    cfg, args = settings(**changes), trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    model(**on_device(model, Collator(FLAT, 2)(list(data)[:2])))
    fast(model, data)
    claim(cfg.run_dir)
    before, made = forwards(model), {}

    def unchanged(name, function, *arguments):
        made[name] = function(*arguments)
        if name == "trainer":  # trl 1.16 puts a wrapper of its own around the head
            before["base_model.model"] = forwards(model)["base_model.model"]
        assert forwards(model) == before, name

    unchanged("plan", make_plan, cfg, model, data)
    unchanged("loss", validation_loss, model, data)
    unchanged("answers", generate_answers, model, smollm_tokenizer, ["Who?"], 3)

    def build():
        options = {"train_dataset": data, "processing_class": smollm_tokenizer}
        args.max_steps, args.report_to, args.save_strategy = 2, [], "no"
        return PlannedTrainer(model, args, made["plan"], **options)

    unchanged("trainer", build)
    unchanged("train", made["trainer"].train)
    unchanged("run", manifest, cfg, made["trainer"], made["plan"], {})
    unchanged("save", save_adapter, model, smollm_tokenizer, cfg.final_model, "", made["run"])
    unchanged("load", finished, made["trainer"], str(cfg.final_model))
    unchanged("merge", merge_adapter, cfg, model, smollm_tokenizer, [row], "")
    release()
    undo(model)
    assert {name for name in vars(model) if name in ("forward", "_replaced", "_dense")} == set()


def too_weak(x, A, B, layer, scale):
    return LoraMatmul.apply(x, A, B, layer, 0.8 * scale)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_an_error_is_told_from_rounding_in_each_precision(monkeypatch, seed, precision):
    model = with_lora(in_nf4(random_model("Llama"), computing_type(precision)), r=16)
    for parameter in model.parameters():  # as TRL leaves it
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    data = rows(20, seed=seed)
    torch.manual_seed(seed)
    assert "fused LoRA in 8 of 8 layers" in use_fast_kernels(model, data, precision)
    monkeypatch.setattr("finetune.speed.LoraMatmul", types.SimpleNamespace(apply=too_weak))
    said = use_fast_kernels(model, data, precision)
    assert re.search(
        r"not lora \([\d.e-]+ from the model's own, where rounding is [\d.e-]+\)", said
    )


def test_a_mistake_that_an_adapter_of_zeros_would_hide_is_found(monkeypatch):
    """As PEFT makes it, B is zero, and so is the gradient of A, right or wrong."""
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data * 0 if "lora_B" in name else parameter.data
    assert "fused LoRA in 12 of 12" in fast(model)

    def without_gradient(x, A, B, layer, scale):
        return LoraMatmul.apply(x, A.detach() + 0 * A, B, layer, scale)

    monkeypatch.setattr("finetune.speed.LoraMatmul", types.SimpleNamespace(apply=without_gradient))
    assert "not lora (" in fast(model)
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_of_long_rows_the_end_is_compared_where_the_answer_is():
    ids = [3 + n % 400 for n in range(700)]
    data = [{"input_ids": ids, "labels": [-100] * 690 + ids[690:]} for _ in range(8)]
    compare = Comparison(tiny(), datasets.Dataset.from_list(data), "fp32")
    assert [len(row["labels"]) for row in compare.rows] == [256] * 3
    assert compare.own[0] > 0 and compare.distance() == 0


def test_rows_that_are_compared_are_short_ones():
    """The longest may not fit without recomputation, which is planned later."""
    lengths = [60, 50, 40, 30, 20, 10, 70]
    data = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    compare = Comparison(tiny(), datasets.Dataset.from_list(data), "fp32")
    assert sorted(len(row["labels"]) for row in compare.rows) == [10, 20, 40]


def test_results_are_apart_by_direction_size_and_absence():
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert relative_distance([one, one], [one, one]) == 0
    assert relative_distance([one], [other]) == pytest.approx(2**0.5 / 5)
    assert relative_distance([one], [2 * one]) == pytest.approx(1)
    assert relative_distance([one, None], [one, None]) == 0
    assert (
        relative_distance([one, None], [one, one])
        == relative_distance([one, one], [one, None])
        == torch.inf
    )


def test_a_batch_on_its_way_to_the_model_keeps_what_is_no_tensor():
    for cut in (PADDED, dataclasses.replace(FLAT, attention="varlen")):
        batch = Collator(cut, 2)(list(rows(4)))
        moved = on_device(tiny(), batch)
        assert moved.keys() == batch.keys() and moved["use_cache"] is False


def test_the_next_way_of_computing_leaves_nothing_of_the_last_one():
    model = tiny()
    for cut in (Cut(4, True, "eager", 2, dense=True), Cut(4, True, "eager", 1), PADDED):
        compute_by(model, cut)
        assert model.config._attn_implementation == cut.attention
        assert own_attention(model) == "sdpa"
        again = sum(layer.gradient_checkpointing for layer in checkpointable(model))
        assert again == cut.recomputed_layers
        assert any(hasattr(module, "dense") for module in model.modules()) is cut.dense


def test_of_two_changes_to_the_same_the_first_is_taken_back():
    model = tiny()
    layer = checkpointable(model)[0]
    for _ in range(2):
        with reversibly(model):
            layer.forward = lambda x: x
    undo(model)
    assert "forward" not in vars(layer)


def test_a_model_that_lies_on_several_gpus_computes_in_its_own_way(monkeypatch):
    monkeypatch.setenv("QLORA_SPREAD", "1")
    model = tiny()
    assert use_fast_kernels(model, rows(8), "fp32").startswith("nothing: spread over GPUs")
    assert "_replaced" not in vars(model)


def test_a_merged_adapter_is_not_added_a_second_time():
    model, ids = tiny(), torch.tensor([[5, 6, 7, 8]])
    fast(model)
    model.merge_adapter()
    close({"": model(ids).logits}, {"": logits(model, ids)}, 1e-6)
    model.unmerge_adapter()
    assert torch.isfinite(model(ids).logits).all()


def test_a_gpu_without_ligers_kernels_is_told_what_it_loses(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not use_liger(None)()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pip install liger-kernel" in use_liger(None)()


def test_a_dense_copy_has_the_layers_bias():
    model = with_lora(in_nf4(random_model("Qwen2")), target_modules=["o_proj"])
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter)
    loss, expected = gradients(model, Collator(PADDED, 2)(list(rows(4))))
    keep_dense(model, True)
    dense_loss, found = gradients(model, Collator(PADDED, 2)(list(rows(4))))
    assert dense_loss == pytest.approx(loss.item(), rel=1e-6)
    close(found, expected, 1e-5)
