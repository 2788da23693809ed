"""Sections 9 and 13: answers generated, scored and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from finetune.chat import is_chat
from finetune.fields import Fields
from finetune.machine import autocast, free_memory_size, processes, progress
from finetune.tokens import asked, encode_prompts, tokenize
from qlora_helpers import END_MARKER, Settings, clean_answer, format_answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer: text without the end marker, and whether it stopped by itself (EOS)."""

    text: str
    stopped: bool


@contextlib.contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """Within it `generate` knows nothing of what the base model's authors recommend.

    A repetition penalty, for one, bends greedy answers.
    """
    holders = [model] if not hasattr(model, "get_base_model") else [model, model.get_base_model()]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within it: no dropout, no gradients. After it the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # FSDP cannot gather weights in inference mode
            yield
    finally:
        model.train(was_training)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row numbers in order of length, in batches of at most `tokens` padded tokens, or one row."""
    found: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found[-1] and (len(found[-1]) + 1) * lengths[row] > tokens:
            found.append([])
        found[-1].append(row)
    return found


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values a third of the free memory holds.

    The rest is for the pass itself.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return int(free_memory_size() * 2**30 / 3 / token)


def draw_sample(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, Any]]:
    """The held-out rows that are asked, drawn by the seed; whole texts ask nothing.

    Says how many references are longer than an answer may be.
    """
    asking = [number for number, prompt in enumerate(data["prompt"]) if prompt]
    drawn = data.select(asking).shuffle(settings.seed)
    rows = list(drawn.select(range(min(settings.sample_rows, len(drawn)))))
    end = str if is_chat(tokenizer) else format_answer
    wanted = tokenize(tokenizer, [end(row["completion"]) for row in rows], places=False)
    lengths, most = [len(one.ids) + 1 for one in wanted], settings.max_new_tokens
    if cut := sum(length > most for length in lengths):
        are, them = ("is", "it") if cut == 1 else ("are", "them")
        print(
            f"! {cut} of the {len(rows)} references {are} longer than max_new_tokens = {most}, so "
            f"that no answer can equal {them}: {max(lengths)} would hold all."
        )
    return rows


def first_answer(sample: Sequence[Fields], answers: Sequence[Answer]) -> str:
    """The first row that was asked, what was wanted, and what came."""
    if not sample:
        return "These rows are whole texts: nothing is asked, and the loss alone will tell."
    row = sample[0]
    asked, wanted = row["prompt"], row["completion"]
    return f"Asked:    {asked}\nWanted:   {wanted}\nAnswered: {answers[0].text}"


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Fields],
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers, in the order of `prompts`, which are texts or rows.

    They are generated in left-padded batches as large as memory allows.
    """
    if not prompts:
        return []
    texts = [prompt if isinstance(prompt, str) else asked(prompt) for prompt in prompts]
    ids = encode_prompts(tokenizer, texts)
    answers: dict[int, Answer] = {}
    with evaluating(model), plainly(model):
        cut = batches([len(row) + max_new_tokens for row in ids], cache_tokens(model))
        for chosen in progress(cut, "Answering"):
            new = _generate(model, tokenizer, [ids[i] for i in chosen], max_new_tokens)
            answers |= {i: read_answer(tokenizer, out) for i, out in zip(chosen, new, strict=True)}
    return [answers[i] for i in range(len(ids))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """New ids for each prompt of one batch, padded on the left."""
    width, eos = max(map(len, batch)), tokenizer.eos_token_id
    padded = torch.tensor([[eos] * (width - len(ids)) + ids for ids in batch], device=model.device)
    real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
    mask = torch.tensor(real, device=model.device)
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": eos}
    out = model.generate(input_ids=padded, attention_mask=mask, do_sample=False, **ends)
    return out[:, width:].tolist()


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Answer:
    """The answer in generated ids: up to EOS, without the end marker and the space in front."""
    stopped = tokenizer.eos_token_id in ids
    if stopped:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    as_it_is = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return Answer(clean_answer(tokenizer.decode(ids, **as_it_is), end_of(tokenizer)), stopped)


def end_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What answers end in before EOS; a base model's own chat template has nothing there."""
    return "" if is_chat(tokenizer) else END_MARKER


def may_be_end(text: str, end: str) -> bool:
    """Whether an answer that goes on with `text` may end in `end` with it."""
    return end.startswith(text.strip())


class AnswerStreamer(TextStreamer):
    """Prints an answer as it is generated, without the end marker and the blanks around it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        super().__init__(tokenizer, skip_prompt=True, **options)
        self.held, self.begun, self.marker = "", False, end_of(tokenizer)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what cannot be a part of the end marker; the rest is held back."""
        self.held += text
        if not self.begun:
            self.held = self.held.lstrip()
            self.begun = bool(self.held)
        ends = range(len(self.held) + 1)
        held = next(n for n in ends if may_be_end(self.held[n:], self.marker))
        shown, self.held = (self.held, "") if stream_end else (self.held[:held], self.held[held:])
        if stream_end:
            shown = shown.rstrip().removesuffix(self.marker).rstrip()
        super().on_finalized_text(shown, stream_end)


def trained_logits(
    model: PreTrainedModel, examples: Iterable[Mapping[str, list[int]]], tokens: int = 4096
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits `[n, vocabulary]`, fp32, of each example's n trained tokens, and their ids `[n]`.

    `examples` are `encode_rows`'. They come in order of length, in batches of at most `tokens`
    padded tokens.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    rows = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in examples]
    with evaluating(model):
        for chosen in batches([len(ids) for ids, _ in rows], tokens) if rows else ():
            ids = [rows[i][0] for i in chosen]
            mask = pad([*map(torch.ones_like, ids)], batch_first=True).to(model.device)
            ids = pad(ids, batch_first=True).to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            # logits [rows, longest, vocabulary]: row[t] predicts token t + 1.
            for i, row in zip(chosen, logits, strict=True):
                labels = rows[i][1][1:]  # [length - 1]
                trained = labels.ne(-100).nonzero().flatten()
                yield row[trained.to(row.device)].float(), labels[trained].to(row.device)


def validation_loss(
    model: PreTrainedModel, examples: Iterable[Mapping[str, list[int]]], ranks: int = 1
) -> float:
    """Mean loss in nats over all trained tokens of `examples`; its exponential is the perplexity.

    Every token counts the same, so that neither the batches matter nor how many processes (`ranks`,
    all of which must call this) share the rows. Computed as in training: in the base model's type.
    """
    share = itertools.islice(examples, processes()[0] % ranks, None, ranks)
    many = -(-len(examples) // ranks) if isinstance(examples, Sized) else None
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    sums = torch.zeros(2, dtype=torch.float64)
    with autocast(kinds.get(model.dtype, "fp32")):
        found = trained_logits(model, share, evaluation_tokens(model))
        for logits, ids in progress(found, "Validation loss", " rows", many):
            loss = torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
            sums += torch.tensor([loss.item(), len(ids)])
    if ranks > 1:
        sums = reduce(sums.to(PartialState().device)).cpu()
    total, count = sums.tolist()
    return total / count


def evaluation_tokens(model: PreTrainedModel) -> int:
    """How many tokens go at once where nothing is kept for a backward pass.

    4,096, or fewer where a large vocabulary would make their logits larger than 256 MB in 16 bits.
    """
    return min(4096, 2**27 // model.get_output_embeddings().weight.shape[0])
