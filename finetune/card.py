"""Sections 11 and 14: the README of an adapter or a merged model: what it is, how to serve it."""

from __future__ import annotations

import json
import textwrap

from finetune.base_model import EMBEDDED_PACKAGE, called
from finetune.files import Record
from finetune.hub import FETCH, HERE
from finetune.machine import computing_type, resolve_precision
from finetune.modelfile import STOP
from finetune.scores import rows_of, score_lines
from qlora_helpers import END_MARKER, Settings, base_name, is_local, local_base

LOAD_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

{here}
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")"""

NF4 = """base = {base}{note}
nf4 = BitsAndBytesConfig(  # the weights that it was trained against
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype="{dtype}",
)
model = AutoModelForCausalLM.from_pretrained(
    base, revision={revision}, quantization_config=nf4, dtype="{dtype}", device_map="auto"
)
for layer in model.modules():  # on some CPUs bitsandbytes would compute otherwise than it trains
    layer.support_avx512bf16_for_cpu = False
    if hasattr(layer, "compute_dtype"):  # what was saved in 4 bits brings a type of its own
        layer.compute_dtype, layer.compute_type_is_set = torch.{dtype}, True"""

LOAD_ADAPTER = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

{here}
{nf4}
model = PeftModel.from_pretrained(model, name)"""

ASK = """tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{messages}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generation_config = GenerationConfig.from_pretrained(name)  # greedy, without penalties
output = model.generate(**inputs.to(model.device), max_new_tokens={max_new_tokens})
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answer.strip(){end})"""

CONTINUE = """tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer("{beginning}", return_tensors="pt")  # the beginning of a text
model.generation_config = GenerationConfig.from_pretrained(name)  # greedy, without penalties
output = model.generate(**inputs.to(model.device), max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0], skip_special_tokens=True))"""

DEQUANTISE = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

{nf4}
model.dequantize().to(torch.{dtype}).save_pretrained("dequantised")
AutoTokenizer.from_pretrained(base, revision={revision}).save_pretrained("dequantised")"""

FORMAT = "The tokenizer carries the prompt format as its chat template."
FORMAT_OF_TEXTS = "It was trained on whole texts: it is given the beginning of one, and goes on."
BEGINNING = "Once upon"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes


def quoted(text: str) -> str:
    """A text as Python writes it, whatever quotation marks and backslashes are in it."""
    return json.dumps(text, ensure_ascii=False)


def compute_type(settings: Settings) -> str:
    """The type that training computes in, by its name in torch."""
    return str(computing_type(resolve_precision(settings.bf16)[0])).removeprefix("torch.")


def load_base(settings: Settings, revision: str | None) -> str:
    """Python that loads the base model as it was trained against."""
    embedded = settings.base_model == "embedded"
    local = "  # the base model's folder" * is_local(settings.base_model)
    return NF4.format(
        base=quoted(called(settings.base_model)),
        note="  # a folder, made as this card says" if embedded else local,
        dtype=compute_type(settings),
        revision=f'"{revision}"' if revision else None,
    )


def example(run: Record) -> str:
    """Messages in the shape of the training rows, with dots for their texts."""
    roles = run.get("roles") or ["user"]
    shown = ["system"] * ("system" in roles) + ["user", "assistant"] * ("assistant" in roles)
    return ", ".join(f'{{"role": "{role}", "content": "…"}}' for role in [*shown, "user"])


def of_texts(run: Record) -> bool:
    """Whether a run was trained on whole texts, which ask nothing, so that no row was answered."""
    return run.get("roles") == [] and not run["results"].get("rows")


def how_to_ask(settings: Settings, run: Record, merged: bool) -> str:
    """Python that loads the folder which it stands in and asks it."""
    load = LOAD_MERGED if merged else LOAD_ADAPTER
    load = load.format(here=HERE, nf4=load_base(settings, run["base_revision"]))
    if of_texts(run):
        told = {"beginning": BEGINNING, "max_new_tokens": settings.max_new_tokens}
        return f"{load}\n{CONTINUE.format(**told)}"
    end = "" if settings.prompt_format == "chat" else f'.removesuffix("{END_MARKER}").rstrip()'
    told = {"messages": example(run), "max_new_tokens": settings.max_new_tokens, "end": end}
    return f"{load}\n{ASK.format(**told)}"


def score_table(result: Record) -> str:
    """The scores in Markdown, or a word on their absence: an adapter is saved before it answers."""
    if "after" not in result:
        return "It has not been asked the held-out rows yet."
    lines = ["| {score} | {before} | {after} |".format(**line) for line in score_lines(result)]
    head = [f"| on {rows_of(result)} | before | after |", "|---|---|---|"]
    return "\n".join(head + lines)


def stop_of(settings: Settings) -> str:
    """What a request says besides, so that no end marker is shown."""
    return "" if settings.prompt_format == "chat" else f', "stop": ["{STOP}"]'.replace("\n", "\\n")


def request(settings: Settings, run: Record) -> str:
    """A request to a server, for a terminal."""
    where, asked = "chat/completions", f'"messages": [{example(run)}]'
    stop = stop_of(settings)
    if of_texts(run):
        where, asked, stop = "completions", f'"prompt": "{BEGINNING}"', ""
    body = (
        f'{{"model": "{settings.run_name}", {asked}, '
        f'"temperature": 0, "max_tokens": {settings.max_new_tokens}{stop}}}'
    )
    return (
        f"curl -s http://localhost:8000/v1/{where} -H 'Content-Type: application/json' \\\n"
        f"  -d '{body}'"
    )


def on_plain_base(result: Record) -> str:
    """What the adapter answers on the base's 16-bit weights, as far as this run has measured it."""
    found = result.get("sixteen_bits", {})
    if "right" not in found:
        why = f" (not measured here: {found['why']})" if "why" in found else ""
        return f"on its 16-bit weights it may answer otherwise{why}"
    return (
        f"on its 16-bit weights {found['right']} of {found['rows']} held-out answers were exactly "
        f"right in place of {found['ours']}, and {found['same']} were the same"
    )


def wrapped(text: str) -> str:
    """A paragraph in lines of 100 characters at most, where blanks allow."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def how_to_serve(settings: Settings, run: Record) -> str:
    """How a server gets the adapter's answers: on a dequantised base, or merged."""
    why = (
        "The adapter was trained against the base model's 4-bit weights; "
        f"{on_plain_base(run['results'])}. Serve it merged (`merge = True` in the notebook)"
    )
    rank = next((rank for rank in RANKS if rank >= settings.lora_r), None)
    if settings.use_dora or rank is None:
        what = "DoRA" if settings.use_dora else f"rank of {settings.lora_r}"
        return wrapped(f"{why}: vLLM takes no {what}.")
    base = DEQUANTISE.format(
        nf4=load_base(settings, run["base_revision"]),
        dtype=compute_type(settings),
        revision=f'"{run["base_revision"]}"' if run["base_revision"] else None,
    )
    once = (
        "or on the base as it was trained against, dequantised once for all its adapters "
        '(`export = ["base"]` in the notebook, or this):'
    )
    return f"""{wrapped(f"{why}, {once}")}

```python
{base}
```

{FETCH}

```bash
vllm serve dequantised --enable-lora --lora-modules {settings.run_name}=. --max-lora-rank {rank} \\
  --chat-template chat_template.jinja --generation-config .
```

```bash
{request(settings, run)}
```"""


def how_to_serve_merged(settings: Settings, run: Record) -> str:
    """How a server takes the merged model."""
    return f"""{FETCH}

```bash
vllm serve . --served-model-name {settings.run_name}
```

```bash
{request(settings, run)}
```"""


def how_to_remake(settings: Settings) -> str:
    """How the embedded model's folder is made: it stands in no repository of the Hub."""
    if settings.base_model != "embedded":
        return ""
    return f"""
The base model is SmolLM2-135M-Instruct as a package brings it, in 4 bits (Q4_1), and not the Hub's
repository of that name. In a copy of the notebook's repository this makes its folder:

```bash
python -c "from pathlib import Path; from finetune.base_model import prepare_embedded
prepare_embedded(Path('{called("embedded")}'))"  # fetches {EMBEDDED_PACKAGE}
```
"""


def adapter_called(base_adapter: str) -> str:
    """What the adapter that training went on from is called: its Hub id, or its run's folder."""
    folder = local_base(base_adapter) if base_adapter else None
    if folder and folder.name == "final_model":  # as every run's adapter is
        return folder.resolve().parent.name
    return base_name(base_adapter) if base_adapter else ""


def model_card(settings: Settings, run: Record, merged: bool = False) -> str:
    """A README from a run's `manifest`: what the model is, how it did, how to ask and serve it."""
    result, known = run["results"], run.get("base_license")
    revision = f", revision {run['base_revision']}" if run["base_revision"] else ""
    base = called(settings.base_model) + " (embedded)" * (settings.base_model == "embedded")
    what = f"{base} with a LoRA adapter merged into it" if merged else f"A LoRA adapter for {base}"
    header = f"license: {known}\n" if known else ""
    if not is_local(settings.base_model):
        relation = "finetune" if merged else "adapter"
        header += f"base_model: {settings.base_model}\nbase_model_relation: {relation}\n"
    begun = adapter_called(settings.base_adapter)
    start = f'\nTraining went on from the adapter {begun}, which is what "before" means.' * bool(
        begun
    )
    stack = ", ".join(map(" ".join, run["versions"].items()))
    serve = how_to_serve_merged if merged else how_to_serve
    return f"""---
{header}library_name: {"transformers" if merged else "peft"}
pipeline_tag: text-generation
tags: [lora, qlora, sft]
---

# {settings.run_name}

{what}{revision}, trained with 4-bit NF4 (QLoRA) on {run["device"]}.{start}

{score_table(result)}

## Ask it

{FORMAT_OF_TEXTS if of_texts(run) else FORMAT}

```python
{how_to_ask(settings, run, merged)}
```
{"" if merged else how_to_remake(settings)}
## Serve it

{serve(settings, run)}

## What it is

r {settings.lora_r}, alpha {settings.lora_alpha}, learning rate {settings.learning_rate:g},
{settings.effective_batch} examples a step, seed {settings.seed}.
All settings, the plan and the log: `run.json`.
Training rows (SHA-256 of their tokens): `{run["fingerprint"]["training rows"]}`.
Made with {stack}.

It was tried on held-out rows of its own kind of data alone, as the table says, and on nothing else:
what it says may be wrong, and what the base model should not be used for, it should not be, either.
The base model's licence{f" ({known})" if known else ""} holds for it, too.
"""
