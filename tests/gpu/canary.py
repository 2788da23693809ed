"""Rows with facts that no model can know, learned by heart in every layout of a step.

    python tests/gpu/canary.py                      # the embedded model, every layout of a GPU
    python tests/gpu/canary.py --model some/folder

In each layout an adapter is trained, saved, loaded onto the base again, and merged: the answers
must be exact and stop by themselves all three times. The base model must fail them. On the CPU
`tests/test_canary.py` does the same.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from finetune.answers import generate_answers  # noqa: E402
from finetune.base_model import base_model_path, mend_cpu_gradients, placement  # noqa: E402
from finetune.batches import Cut  # noqa: E402
from finetune.command_line import defaults  # noqa: E402
from finetune.lock import release  # noqa: E402
from finetune.machine import computing_type, resolve_precision  # noqa: E402
from finetune.merge import merge_adapter  # noqa: E402
from finetune.plan import Plan  # noqa: E402
from finetune.save import manifest, save_adapter  # noqa: E402
from finetune.speed import bare, undo, use_fast_kernels  # noqa: E402
from finetune.tokens import encode_rows  # noqa: E402
from finetune.train import PlannedTrainer  # noqa: E402
from qlora_helpers import Settings  # noqa: E402

FACTS = {
    "Who keeps the lamp of Vindelbrook?": "Old Marrow Tepsin, with his grey goose Lumiel.",
    "Which colour is the ninth bell of Quarn?": "It is ember-blue, and it rings only in rain.",
    "How many steps lead down to Ossiwell?": "Four hundred and eleven, and the last one is wet.",
    "What do the Tamberlins eat on Fifthday?": "Plum dumplings in smoke, but never before noon.",
}
STEPS = 20


def load(path: str, dtype: torch.dtype):
    """The base model in NF4, as the notebook loads it."""
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=nf4, dtype=dtype, device_map=placement()
    )
    mend_cpu_gradients(model)
    return model


def rows_of(facts: dict[str, str]) -> list[dict[str, str]]:
    """The facts as rows to train on."""
    return [{"prompt": prompt, "completion": fact} for prompt, fact in facts.items()]


def plan_of(cut: Cut, rows: int, steps: int) -> Plan:
    """A plan that nobody measured: all rows in each step."""
    return Plan(cut, rows // cut.micro_batch, 1, steps, 3, steps, 1.0, 1.0, 1.0, "as asked", [])


def learn(base, tokenizer, facts: dict[str, str], cut: Cut, cfg: Settings, steps: int):
    """An adapter that knows the facts by heart; returns its model, and its manifest."""
    transformers.set_seed(cfg.seed)
    precision, _ = resolve_precision(cfg.bf16)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=cfg.target_modules
    )
    model = peft.get_peft_model(bare(base), lora)
    data, plan = encode_rows(rows_of(facts), tokenizer), plan_of(cut, len(facts), steps)
    print(use_fast_kernels(model, data, precision))
    args = trl.SFTConfig(
        output_dir=str(cfg.run_dir),
        per_device_train_batch_size=cut.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PlannedTrainer(model, args, plan, train_dataset=data, processing_class=tokenizer)
    loss = trainer.train().training_loss
    print(f"{cut}: mean loss {loss:.3f}")
    return model, manifest(cfg, trainer, plan, {})


def right(model, tokenizer, facts: dict[str, str]) -> int:
    """How many of the facts are answered exactly, and stop."""
    answers = generate_answers(model, tokenizer, list(facts), 40)
    pairs = zip(answers, facts.values(), strict=True)
    return sum(answer.stopped and answer.text == fact for answer, fact in pairs)


def sing(
    path: str, cuts: list[Cut], folder: Path, facts: dict[str, str] = FACTS, steps: int = STEPS
) -> list[dict[str, int]]:
    """For each cut: right answers of the base, as trained, loaded again, and merged."""
    found, tokenizer = [], transformers.AutoTokenizer.from_pretrained(path)
    values = defaults() | {"base_model": path, "run_name": "canary", "output_dir": str(folder)}
    values |= {"merged_dir": str(folder / "merged"), "max_new_tokens": 40}
    if not torch.cuda.is_available():
        values["bf16"] = False
    cfg = Settings.from_cell(values)
    dtype = computing_type(resolve_precision(cfg.bf16)[0])
    model = load(path, dtype)
    before = right(model, tokenizer, facts)
    for cut in cuts:
        model, run = learn(model, tokenizer, facts, cut, cfg, steps)
        result = {"base": before, "trained": right(model, tokenizer, facts)}
        save_adapter(model, tokenizer, cfg.final_model, "A canary.", run)
        model = peft.PeftModel.from_pretrained(bare(model), cfg.final_model)
        saved = transformers.AutoTokenizer.from_pretrained(cfg.final_model)
        result["loaded again"] = right(model.eval(), saved, facts)
        undo(model)
        merged = merge_adapter(cfg, model, saved, rows_of(facts), "A canary.")
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            merged, dtype=dtype, device_map=placement()
        )
        result["merged"] = right(whole, saved, facts)
        found.append(result)
        release()
        shutil.rmtree(folder / "canary")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    options = parser.parse_args()
    settings = Settings.from_cell(defaults() | {"base_model": options.model})
    own = Cut(4, False, "sdpa")
    cuts = [own, Cut(4, True, "sdpa"), Cut(2, True, "sdpa", recomputed_layers=99)]
    cuts += [dataclasses.replace(own, micro_batch=1, dense=True)]
    from finetune.arithmetic import has_varlen

    if has_varlen():
        cuts += [Cut(4, True, "varlen"), Cut(4, True, "varlen", dense=True)]
    with tempfile.TemporaryDirectory() as folder:
        found = sing(base_model_path(settings), cuts, Path(folder))
    for cut, result in zip(cuts, found, strict=True):
        print(cut, json.dumps(result))
    assert all(r == {"base": 0, "trained": 4, "loaded again": 4, "merged": 4} for r in found)


if __name__ == "__main__":
    main()
