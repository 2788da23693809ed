"""Section 11: the prompt format as a chat template, which goes with the saved tokenizer."""

from __future__ import annotations

import itertools
import json
import re

from transformers import PreTrainedTokenizerBase

from finetune.tokens import adds_bos, encode_prompt
from qlora_helpers import ANSWER_START, COMPLETION_TEMPLATE, QUESTION_TEMPLATE, SYSTEM_TEMPLATE


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt format as a Jinja chat template, so that it travels with the saved tokenizer.

    Its rendering gives exactly the encoder's ids, for any number of turns. Tokenizers of
    SentencePiece's kind put a space before the first word of a text but not after a `<s>` or `</s>`
    written into it, so Mistral's template writes that space itself. Raises `ValueError` if no form
    gives the ids that were trained.
    """
    known = [encode_prompt(tokenizer, turns) for turns in (SOME_TURNS[1:2], SOME_TURNS)]
    starts = ("{{ bos_token }}", "{{ bos_token + ' ' }}") if adds_bos(tokenizer) else ("",)
    for start, gap in itertools.product(starts, ("", " ")):
        template = start + template_of_turns(gap)
        talks = [
            [{"role": role, "content": text} for role, text in turns]
            for turns in (SOME_TURNS[1:2], SOME_TURNS)
        ]
        options = {"chat_template": template, "return_dict": True}
        found = [tokenizer.apply_chat_template(talk, **options)["input_ids"] for talk in talks]
        if found == known:
            return template
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
