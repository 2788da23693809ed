"""Section 15: the Modelfile with which Ollama takes a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.chat import is_chat
from finetune.template import spaces
from qlora_helpers import ANSWER_START, COMPLETION_TEMPLATE, QUESTION_TEMPLATE, SYSTEM_TEMPLATE

STOP = "\n\n### End"  # not "### End" alone, which would cut "### Endpoints"


def go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format in Go's text/template, over Ollama's `.Messages`; without BOS.

    Its rendering is that of the chat template (`template.chat_template`) but for BOS, which Ollama
    adds: https://github.com/ollama/ollama/blob/main/docs/template.mdx
    """
    start, gap = spaces(tokenizer)
    parts = (SYSTEM_TEMPLATE, QUESTION_TEMPLATE, ANSWER_START + COMPLETION_TEMPLATE)
    system, question, answer = (re.sub(r"{\w+}", "{{ .Content }}", part) for part in parts)
    return (
        f"{start}{{{{ range $i, $_ := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "system" }}}}{{{{ if .Content }}}}{system}{{{{ end }}}}'
        f'{{{{ else if eq .Role "user" }}}}{question}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{tokenizer.eos_token}'
        f"{{{{ if not $last }}}}{gap}{{{{ end }}}}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{ANSWER_START}{{{{ end }}}}'
        "{{ end }}"
    )


def write_modelfile(
    file: Path, tokenizer: PreTrainedTokenizerBase, context: int, model: str, adapter: str = ""
) -> None:
    """Write a Modelfile by Ollama's grammar, for talks of `context` tokens at most.

    With a base model's own chat template none is written: that one stands in the GGUF file, and
    Ollama knows some of them by heart. Quoted values may hold line ends, and nothing in them is
    escaped:
    https://github.com/ollama/ollama/blob/main/parser/parser.go
    """
    if is_chat(tokenizer):
        return
    lines = [f"FROM {model}"] + [f"ADAPTER {adapter}"] * bool(adapter)
    lines += [f'TEMPLATE """{go_template(tokenizer)}"""', f'PARAMETER stop """{STOP}"""']
    lines += ["PARAMETER temperature 0", f"PARAMETER num_ctx {context}"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
