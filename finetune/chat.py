"""Section 6: `prompt_format = "chat"`: rows written by the base model's own chat template.

The template sees only ready text, so that a row whose text holds a control token of the model is
refused: no one could tell it from the template's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from qlora_helpers import UserError

Turns = Sequence[Sequence[Any]]  # of a conversation: role, text, and of a row whether it is trained


class Written(NamedTuple):
    """A conversation as the template writes it, up to the EOS of its last answer.

    `answers` are their places in `text`: start, end behind EOS, whether it is trained.
    """

    text: str
    answers: list[tuple[int, int, bool]]


def is_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether rows are written by this tokenizer's own chat template (`require_chat`)."""
    return tokenizer.init_kwargs.get("prompt_format") == "chat"


def require_chat(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, marked so that rows are written by its template; saved, it keeps the mark.

    Raises `UserError` for a template by which no row can be trained.
    """
    template = tokenizer.chat_template
    why = "it has none (is it a base model that is not tuned to chat?)" if not template else ""
    if "strftime_now" in str(template):
        why = "it writes today's date, so that no two days ask alike"
    try:
        if not why:
            write(tokenizer, [("user", "a"), ("assistant", "b", True)])
    except ValueError as error:
        why = str(error)
    if why:
        raise UserError(
            f"prompt_format = 'chat' cannot be used with this base model's chat template: {why}. "
            "Set prompt_format = 'question-answer'."
        )
    tokenizer.init_kwargs["prompt_format"] = "chat"
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, ask: bool = False) -> str:
    """Turns as the template writes them; `ask` adds what an answer begins behind.

    Raises `ValueError` for turns that it does not take.
    """
    messages = [{"role": turn[0], "content": turn[1]} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except jinja2.TemplateError as error:
        raise ValueError(f"it does not take these turns ({error})") from None


def write(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Written:
    """A row's turns as they are trained; raises `ValueError` for turns that cannot be.

    Each answer must follow what it is asked with, to the letter, and the next turns must follow it:
    else a model would be asked otherwise than it was trained.
    """
    text, answers, eos = "", [], tokenizer.eos_token
    for number, (role, _, *mark) in enumerate(turns):
        if role != "assistant":
            continue
        asked = render(tokenizer, turns[:number], ask=True)
        told = render(tokenizer, turns[: number + 1])
        if not (asked.startswith(text) and told.startswith(asked)):
            raise ValueError("it writes earlier turns otherwise when others follow")
        end = told.rfind(eos, len(asked)) + len(eos)
        if end < len(asked) + len(eos) or told[end:].strip():
            raise ValueError(f"it does not end an answer in the tokenizer's EOS, {eos}")
        answers.append((len(asked), end, *mark))
        text = told
    if lost := next((turn[0] for turn in turns if turn[1].strip() not in text), ""):
        raise ValueError(f"it leaves out or changes a text of the {lost}")
    return Written(text[: answers[-1][1]], answers)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text: BOS, EOS, `[INST]` and their like."""
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | {*tokenizer.all_special_ids}
    # unk stands for text that the tokenizer does not know; it counts only where it is BOS or EOS.
    return special - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id})


def encode_written(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoding]:
    """What the template wrote as tokens; its control tokens are such in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.encode_batch(list(texts), add_special_tokens=False)


class Controls:
    """The control tokens that the template itself writes, by the roles of a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.all = tokenizer, control_ids(tokenizer)
        self.known: dict[tuple, list[int]] = {}

    def of(self, ids: Sequence[int]) -> list[int]:
        """Those in `ids`, in their order."""
        return [i for i in ids if i in self.all]

    def require(self, talk: Turns, ids: Sequence[int], ask: bool = False) -> None:
        """Raise `ValueError` if `ids`, of `talk`, hold one that is not the template's."""
        roles = (ask, *(turn[0] for turn in talk))
        if roles not in self.known:
            plain = [(turn[0], "a", True) for turn in talk]
            text = render(self.tokenizer, plain, True) if ask else write(self.tokenizer, plain).text
            self.known[roles] = self.of(encode_written(self.tokenizer, [text])[0].ids)
        known, found = self.known[roles], self.of(ids)
        if found != known:
            strange = next((i for i in found if found.count(i) > known.count(i)), found[0])
            token = self.tokenizer.convert_ids_to_tokens(strange)
            raise ValueError(f"a text holds {token}, a control token of this model")


def encode_asked(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Turns]) -> list[list[int]]:
    """Ids from which answers to `talks` are generated.

    Raises `UserError` for a text that holds a control token.
    """
    controls = Controls(tokenizer)
    try:
        found = encode_written(tokenizer, [render(tokenizer, talk, ask=True) for talk in talks])
        for talk, one in zip(talks, found, strict=True):
            controls.require(talk, one.ids, ask=True)
    except ValueError as error:
        raise UserError(
            f"This cannot be asked of the base model's chat template: {error}."
        ) from None
    return [one.ids for one in found]


def encode_talks(
    tokenizer: PreTrainedTokenizerBase, talks: Sequence[Turns], whole: bool
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation, both `[length]`; `whole` trains the questions, too.

    Raises `ValueError` for one that cannot be trained.
    """
    controls, written = Controls(tokenizer), [write(tokenizer, talk) for talk in talks]
    examples = []
    encoded = encode_written(tokenizer, [one.text for one in written])
    for talk, one, encoding in zip(talks, written, encoded, strict=True):
        controls.require(talk, encoding.ids)
        examples.append((encoding.ids, label_talk(encoding, one, whole)))
    return examples


def label_talk(encoding: Encoding, written: Written, whole: bool) -> list[int]:
    """The labels of one conversation, `[length]`; see `encode_talks`."""
    ids = encoding.ids
    labels = [*ids] if whole else [-100] * len(ids)
    for start, end, trained in written.answers:
        places = enumerate(encoding.offsets)
        inside = [n for n, (first, last) in places if last > start and first < end]
        if encoding.offsets[inside[0]][0] < start:
            raise ValueError(
                "an answer starts with blanks that the tokenizer joins with what is asked: take "
                "them away"
            )
        answer = slice(inside[0], inside[-1] + 1)
        labels[answer] = ids[answer] if trained else [-100] * len(ids[answer])
    return labels


def find_refused(
    tokenizer: PreTrainedTokenizerBase, talks: Iterable[Turns], places: Iterable[str]
) -> Iterator[str]:
    """The rows that cannot be trained by the template: their places, and why."""
    for talk, where in zip(talks, places, strict=True):
        try:
            encode_talks(tokenizer, [talk], whole=False)
        except ValueError as error:
            yield f"{where}: {error}"


def borders(
    tokenizer: PreTrainedTokenizerBase, talk: Turns
) -> list[tuple[list[int], list[int], bool]]:
    """For each answer: the ids of all text before it, the ids up to its EOS, and if it is trained.

    Every prefix is encoded on its own, so that the audit does not depend on the token offsets that
    `label_talk` uses. Raises `ValueError` for a conversation that cannot be trained.
    """
    text, answers = write(tokenizer, talk)
    before = encode_written(tokenizer, [text[:start] for start, _, _ in answers])
    through = encode_written(tokenizer, [text[:end] for _, end, _ in answers])
    trained = [mark for _, _, mark in answers]
    return [
        (prefix.ids, whole.ids, mark)
        for prefix, whole, mark in zip(before, through, trained, strict=True)
    ]
