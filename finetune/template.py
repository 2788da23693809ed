"""Sections 6 and 11: a usable tokenizer, and the prompt format as the chat template it carries."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from finetune.chat import is_chat, require_chat
from finetune.machine import short
from finetune.tokens import adds_bos, encode_prompt
from qlora_helpers import (
    ANSWER_START,
    COMPLETION_TEMPLATE,
    QUESTION_TEMPLATE,
    SYSTEM_TEMPLATE,
    UserError,
)


def usable(
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    cache: Path | str,
    prompt_format: str = "question-answer",
) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, ready to write and encode rows in `prompt_format`.

    It is that of the base model's `tokenizer.json` where transformers gives one that tells no
    places in a text: to Mistral's newer models (`tekken.json`), where mistral-common is installed.
    Raises `UserError` that names what is wrong with one that cannot be trained with, before
    anything is encoded.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        try:
            cached_file(base, "tokenizer.json", cache_dir=cache)
            load = transformers.PreTrainedTokenizerFast.from_pretrained
            tokenizer = load(base, cache_dir=cache)
        except Exception as error:
            raise UserError(
                f"This base model's tokenizer ({type(tokenizer).__name__}) cannot tell where a "
                f"token stands in a text, and no tokenizer.json is there that could "
                f"({short(error)}). Choose another base_model, or add that file to its folder."
            ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            "This base model's tokenizer has no EOS token, by which an answer ends. Choose another "
            "base_model, or add eos_token to its tokenizer_config.json."
        )
    tokenizer.sentencepiece_file = sentencepiece_file(base, cache)
    if prompt_format == "chat":
        return require_chat(tokenizer)
    try:
        chat_template(tokenizer)
    except ValueError as error:
        raise UserError(f"This base model's tokenizer cannot be used: {error}.") from None
    return tokenizer


def sentencepiece_file(base: str, cache: Path | str) -> str | None:
    """The base model's `tokenizer.model`, where it has one.

    It goes along with what is saved, because converters to GGUF want it.
    """
    quietly = {"_raise_exceptions_for_missing_entries": False, "cache_dir": cache}
    quietly["_raise_exceptions_for_connection_errors"] = False
    return cached_file(base, "tokenizer.model", **quietly)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format as a Jinja chat template, so that it travels with the saved tokenizer.

    With `prompt_format = "chat"` that is the base model's own. Else its rendering gives exactly the
    encoder's ids, for any number of turns. Tokenizers of SentencePiece's kind put a space before
    the first word of a text but not after a `<s>` or `</s>` written into it, so Mistral's template
    writes that space itself. Raises `ValueError` if no form gives the ids that were trained.
    """
    if is_chat(tokenizer):
        return tokenizer.chat_template
    start, gap = spaces(tokenizer)
    return bos_text(tokenizer, start) + template_of_turns(gap)


def bos_text(tokenizer: PreTrainedTokenizerBase, start: str) -> str:
    """How a template begins: with BOS where the tokenizer adds one, and the space behind it."""
    if not adds_bos(tokenizer):
        return ""
    return "{{ bos_token + ' ' }}" if start else "{{ bos_token }}"


def spaces(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a template writes behind BOS and between an EOS and the next turn: a space, or nothing.

    Raises `ValueError` if no such template gives the ids that were trained.
    """
    known = [encode_prompt(tokenizer, turns) for turns in (SOME_TURNS[1:2], SOME_TURNS)]
    for start, gap in itertools.product(("", " ") if adds_bos(tokenizer) else ("",), ("", " ")):
        template = bos_text(tokenizer, start) + template_of_turns(gap)
        talks = [
            [{"role": role, "content": text} for role, text in turns]
            for turns in (SOME_TURNS[1:2], SOME_TURNS)
        ]
        options = {"chat_template": template, "return_dict": True}
        found = [tokenizer.apply_chat_template(talk, **options)["input_ids"] for talk in talks]
        if found == known:
            return start, gap
    raise ValueError("no chat template gives this tokenizer the ids that were trained")


SOME_TURNS = [("system", "b"), ("user", "a"), ("assistant", "c"), ("user", "d")]


def template_of_turns(gap: str) -> str:
    """`format_turns` as Jinja, with `gap` between an EOS and what follows it.

    Turns of a user that follow each other are joined, as they are for training.
    """
    parts = (SYSTEM_TEMPLATE, QUESTION_TEMPLATE, ANSWER_START + COMPLETION_TEMPLATE)
    quoted = ([json.dumps(end) for end in re.split(r"{\w+}", part)] for part in parts)
    system, question, answer = quoted
    return (
        "{% for message in messages %}"
        "{% set role = message['role'] %}"
        "{% set text = message['content'] %}"
        "{% set before = messages[loop.index0 - 1]['role'] if loop.index0 > 0 else '' %}"
        f"{{% if before == 'assistant' %}}{{{{ {json.dumps(gap)} }}}}{{% endif %}}"
        "{% if role == 'assistant' %}"
        f"{{{{ {answer[0]} + text + {answer[1]} + eos_token }}}}"
        "{% elif role == 'user' %}"
        f"{{% if before != 'user' %}}{{{{ {question[0]} }}}}{{% endif %}}"
        f"{{{{ text + {question[1]} }}}}"
        "{% elif role == 'system' or role == 'developer' %}"
        f"{{% if text | trim %}}{{{{ {system[0]} + text + {system[1]} }}}}{{% endif %}}"
        "{% else %}"
        "{{ raise_exception('The roles are system, user and assistant, not ' + role) }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if messages[-1]['role'] != 'assistant' %}"
        f"{{{{ {json.dumps(ANSWER_START)} }}}}"
        "{% endif %}"
    )
