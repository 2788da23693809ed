"""Sections 11 and 14: the README of an adapter or a merged model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.machine import computing_type, resolve_precision
from finetune.scores import score_lines
from qlora_helpers import END_MARKER, Settings, base_name, is_local

LOAD_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this repository or folder
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")"""

LOAD_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

name = "."  # this repository or folder
nf4 = BitsAndBytesConfig(  # as in training; without it more memory is needed and answers may differ
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype="{dtype}",
)
model = AutoPeftModelForCausalLM.from_pretrained(
    name, quantization_config=nf4, dtype="{dtype}", device_map="auto"
)"""

ASK = """tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "…"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(
    **inputs.to(model.device), max_new_tokens={max_new_tokens}, do_sample=False
)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answer.strip(){end})"""


def how_to_ask(settings: Settings, merged: bool) -> str:
    """Python that loads the folder which it stands in and asks it."""
    dtype = str(computing_type(resolve_precision(settings.bf16)[0])).removeprefix("torch.")
    load = LOAD_MERGED if merged else LOAD_ADAPTER.format(dtype=dtype)
    end = "" if settings.prompt_format == "chat" else f'.removesuffix("{END_MARKER}").rstrip()'
    return f"{load}\n{ASK.format(max_new_tokens=settings.max_new_tokens, end=end)}"


def score_table(result: Mapping[str, Any]) -> str:
    """The scores in Markdown, or a word on their absence: an adapter is saved before it answers."""
    if "after" not in result:
        return "It has not been asked the held-out rows yet."
    lines = ["| {score} | {before} | {after} |".format(**line) for line in score_lines(result)]
    head = [f"| on {result['rows']} held-out rows | before | after |", "|---|---|---|"]
    return "\n".join(head + lines)


def model_card(settings: Settings, run: Mapping[str, Any], merged: bool = False) -> str:
    """A README from a run's `manifest`: what the model is, how it did, how to ask it."""
    result = run["results"]
    revision = f", revision {run['base_revision']}" if run["base_revision"] else ""
    embedded = settings.base_model == "embedded"
    base = "SmolLM2-135M-Instruct (embedded)" if embedded else base_name(settings.base_model)
    what = f"{base} with a LoRA adapter merged into it" if merged else f"A LoRA adapter for {base}"
    header = "" if is_local(settings.base_model) else f"base_model: {settings.base_model}\n"
    begun = base_name(settings.base_adapter) if settings.base_adapter else ""
    start = f'\nTraining went on from the adapter {begun}, which is what "before" means.' * bool(
        begun
    )
    stack = ", ".join(map(" ".join, run["versions"].items()))
    return f"""---
{header}library_name: {"transformers" if merged else "peft"}
pipeline_tag: text-generation
tags: [lora, qlora, sft]
---

# {settings.run_name}

{what}{revision}, trained with 4-bit NF4 (QLoRA) on {run["device"]}.{start}

{score_table(result)}

r {settings.lora_r}, alpha {settings.lora_alpha}, learning rate {settings.learning_rate:g},
{settings.effective_batch} examples a step, seed {settings.seed}.
All settings, the plan and the log: `run.json`.
Training rows (SHA-256 of their tokens): `{run["fingerprint"]["training rows"]}`.
Made with {stack}.

The tokenizer carries the prompt format as its chat template. Ask it like any chat model:

```python
{how_to_ask(settings, merged)}
```
"""
