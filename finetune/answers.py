"""Sections 9 and 13: answers generated, scored and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from pandas import DataFrame
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.machine import autocast, free_memory_size, processes
from finetune.tokens import encode_prompt
from qlora_helpers import clean_answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer: text without the end marker, and whether it stopped by itself (EOS)."""

    text: str
    stopped: bool


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


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers, in the order of `prompts`.

    They are generated in left-padded batches as large as memory allows.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers: dict[int, Answer] = {}
    with evaluating(model):
        cut = batches([len(row) + max_new_tokens for row in ids], cache_tokens(model))
        for chosen in tqdm(cut, desc="Answering", leave=False):
            new = _generate(model, tokenizer, [ids[i] for i in chosen], max_new_tokens)
            answers |= {i: read_answer(tokenizer, out) for i, out in zip(chosen, new, strict=True)}
    return [answers[i] for i in range(len(ids))]


def _generate(
    model: Any, tokenizer: Any, batch: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """New ids for each prompt of one batch, padded on the left."""
    width, eos = max(map(len, batch)), tokenizer.eos_token_id
    padded = torch.tensor([[eos] * (width - len(ids)) + ids for ids in batch], device=model.device)
    real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
    mask = torch.tensor(real, device=model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": eos}
    out = model.generate(input_ids=padded, attention_mask=mask, **greedy, **ends)
    return out[:, width:].tolist()


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Answer:
    """The answer in generated ids: up to EOS, without the end marker and the space in front."""
    stopped = tokenizer.eos_token_id in ids
    if stopped:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Answer(clean_answer(tokenizer.decode(ids, skip_special_tokens=True)), stopped)


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
            for i, row in zip(chosen, logits, strict=True):
                labels = rows[i][1][1:]
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
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    sums = torch.zeros(2, dtype=torch.float64)
    with autocast(kinds.get(model.dtype, "fp32")):
        for logits, ids in trained_logits(model, share, evaluation_tokens(model)):
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


def compare(rows: Sequence[dict], before: Sequence[Answer], after: Sequence[Answer]) -> DataFrame:
    """A line per held-out row: prompt, reference, both answers, whether each stopped by itself."""
    return DataFrame(
        {
            "prompt": [row["prompt"] for row in rows],
            "reference": [row["completion"].strip() for row in rows],
            "before": [answer.text for answer in before],
            "after": [answer.text for answer in after],
            "stopped_before": [answer.stopped for answer in before],
            "stopped_after": [answer.stopped for answer in after],
        }
    )


# How the scores are named and printed wherever they are shown.
SCORES = {
    "exact_match": ("exact answers", ".0%"),
    "f1": ("words in common (F1)", ".0%"),
    "stopped": ("stopped by itself", ".0%"),
    "validation_loss": ("loss (nats a token)", ".3f"),
    "perplexity": ("perplexity", ".4g"),
}


def words_in_common(answer: str, reference: str) -> float:
    """F1 of an answer's words against the reference's, 0 to 1.

    As SQuAD scores answers, but without its normalisation:
    https://arxiv.org/abs/1606.05250, section 6.1.
    """
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def scores(table: DataFrame, losses: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of `SCORES` under `"before"` and `"after"`, and under `"rows"` how many rows.

    `losses` holds the `validation_loss` before and after.
    """
    result: dict[str, Any] = {"rows": len(table)}
    for when in ("before", "after"):
        pairs = list(zip(table[when], table["reference"], strict=True))
        result[when] = {
            "exact_match": sum(answer == wanted for answer, wanted in pairs) / len(pairs),
            "f1": sum(words_in_common(answer, wanted) for answer, wanted in pairs) / len(pairs),
            "stopped": float(table[f"stopped_{when}"].mean()),
            "validation_loss": losses[when],
            "perplexity": math.exp(min(losses[when], 700)),  # a float holds no exp(710)
        }
    return result


def score_lines(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name, before and after of every score in `result`, as text."""
    return [
        {"score": name} | {when: format(result[when][key], form) for when in ("before", "after")}
        for key, (name, form) in SCORES.items()
        if key in result["after"]
    ]


def show_comparison(table: DataFrame, result: Mapping[str, Any], rows: int = 10) -> Any:
    """The first rows of `compare` as a styled table, exact answers green, scores in its caption."""
    lines = ("{score} {before} → {after}".format(**line) for line in score_lines(result))
    caption = " · ".join([f"{result['rows']} held-out rows", *lines])
    shown = table[["prompt", "reference", "before", "after"]].head(rows)
    shown = shown.map(lambda text: text if len(text) <= 300 else text[:299] + "…")
    stopped = table[["stopped_before", "stopped_after"]].head(rows)
    stopped = stopped.map(lambda itself: "yes" if itself else "no")
    shown["stopped by itself"] = stopped["stopped_before"] + " → " + stopped["stopped_after"]
    exact = (table["after"] == table["reference"]).head(rows)
    green = ["background-color: #d7f0dd; color: #111" if right else "" for right in exact]
    left = {"text-align": "left", "vertical-align": "top"}
    left |= {"white-space": "pre-wrap", "max-width": "24em"}
    head = [
        {"selector": "caption", "props": "caption-side: top; text-align: left; font-weight: bold"},
        {"selector": "th", "props": "text-align: left"},
    ]
    return (
        shown.style.hide(axis="index")
        .format(escape="html")
        .set_properties(**left)
        .apply(lambda _: green, subset=["after"])
        .set_caption(html.escape(caption))
        .set_table_styles(head)
    )
