"""Sections 10 and 11: a few real steps of the embedded model in NF4, through TRL as the notebook
calls it.
"""

import pytest
import torch
import trl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.base_model import mend_cpu_gradients
from finetune.machine import free_cache, memory_in_use
from finetune.plan import make_plan
from finetune.report import history
from finetune.speed import use_fast_kernels
from finetune.tokens import encode_rows
from finetune.train import PlannedTrainer, for_encoded_rows

ROWS = [
    {"prompt": f"Say the number {i}", "completion": f"It is {i}, " * (1 + i % 4)} for i in range(22)
]


def train(model, tokenizer, cfg, folder):
    """The notebook's sections 10 and 11 over `ROWS`, in fp32; returns the trainer and the plan."""
    data = encode_rows(ROWS, tokenizer)
    use_fast_kernels(model, data, "fp32")
    plan = make_plan(cfg, model, data)
    args = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=plan.cut.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        bf16=False,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        report_to="tensorboard",
        disable_tqdm=True,
        use_cpu=True,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = PlannedTrainer(model, args, plan, train_dataset=data, processing_class=tokenizer)
    for name, weight in trainer.trainable().items():  # trl rounds them to bf16
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name].float()), name
    trainer.train()
    return trainer, plan


@pytest.fixture(scope="module")
def run(request, tmp_path_factory, settings, smollm_path, smollm_tokenizer):
    """Two epochs of 22 rows, 2 × 4 a step: model, trainer, plan, folder, and the base weights' sum
    before.
    """
    import peft
    import transformers

    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm_path,
        quantization_config=nf4,
        dtype=torch.float32,
        device_map={"": "cpu"},
        num_hidden_layers=4,
    )
    mend_cpu_gradients(model)
    before = fingerprint(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets)
    )
    folder = tmp_path_factory.mktemp("run")
    cfg = settings(batch_size=2, gradient_accumulation=4, epochs=2, output_dir=str(folder))
    return (model, *train(model, smollm_tokenizer, cfg, folder), folder, before)


def fingerprint(model):
    """A number that changes with any weight of the base model."""
    return sum(p.double().sum().item() for n, p in model.named_parameters() if "lora_" not in n)


def test_the_plan_counts_the_steps_as_the_trainer_does(run):
    _, trainer, plan, *_ = run
    assert plan.steps_per_epoch == 3 and plan.warmup_steps == 1
    assert plan.steps == trainer.state.max_steps == trainer.state.global_step == 6


def test_training_learns_and_touches_the_adapter_alone(run):
    model, trainer, _, _, before = run
    losses = history(trainer.state.log_history, "loss")[1]
    assert losses[-1] < 0.9 * losses[0]
    assert fingerprint(model) == before
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert len(adapter) == 4 * 4 * 2 and all(p.dtype == torch.float32 for p in adapter)
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(run):
    rates = history(run[1].state.log_history, "learning_rate")[1]
    assert rates[0] == 0 and rates[1] == pytest.approx(1e-2)
    assert rates[1] > rates[2] > rates[3] > rates[4] > rates[5] > 0


def test_tensorboard_can_read_the_run_back(run):
    _, trainer, _, folder, _ = run
    events = list(folder.rglob("events.out.tfevents.*"))
    assert events
    board = EventAccumulator(str(events[0].parent)).Reload()
    assert len(board.Scalars("train/tokens_per_second")) == 6
    logged = [event.value for event in board.Scalars("train/loss")]
    assert logged == pytest.approx(history(trainer.state.log_history, "loss")[1], abs=1e-3)


def test_a_process_that_sees_two_gpus_trains_on_one(nf4_model, smollm_tokenizer, tmp_path):
    """Untold, the Trainer takes twice the rows for two GPUs, or refuses (trl 1.16)."""
    data = encode_rows(ROWS[:4], smollm_tokenizer)

    def trained_by(tell):
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        args._n_gpu = 2  # as on Kaggle
        options = {"train_dataset": data, "processing_class": smollm_tokenizer}
        trainer = trl.SFTTrainer(nf4_model(), tell(args), **options)
        assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)
        return trainer._train_batch_size

    try:
        assert trained_by(lambda args: args) == 16
    except ValueError as error:
        assert "DataParallel" in str(error)
    assert trained_by(for_encoded_rows) == 8


def test_what_an_optimizer_held_is_given_back_and_the_log_stays(run):
    _, trainer, *_ = run
    free_cache()
    held = memory_in_use()
    adapter = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.free_memory()
    assert held - memory_in_use() == pytest.approx(8 * adapter / 2**30, rel=0.01)
    assert history(trainer.state.log_history, "loss")[0] and trainer.args.seed == 42
