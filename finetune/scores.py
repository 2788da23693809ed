"""Section 13: answers before and after training, compared, scored and shown."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pandas import DataFrame

from finetune.answers import Answer
from finetune.files import Record
from qlora_helpers import many


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


def percent(share: float) -> str:
    """A share as a percentage; all and nothing are said of all and nothing alone."""
    return f"{share:.0%}" if share in (0, 1) else f"{min(max(share, 0.01), 0.99):.0%}"


def loss_told(loss: float) -> str:
    """A loss in three decimals; a small one in three digits, so that none reads as 0.000."""
    return f"{loss:.3g}" if 0 < loss < 0.1 else f"{loss:.3f}"


def perplexity_told(value: float) -> str:
    """A perplexity in four digits, a large one in whole numbers, and one without bounds as such."""
    if value >= 1e300:  # as large as `scores` lets it become
        return "over 1e+300"
    return f"{value:,.0f}" if 1000 <= value < 1e12 else f"{value:.4g}"


# How the scores are named and printed wherever they are shown.
SCORES: dict[str, tuple[str, Callable[[float], str]]] = {
    "exact_match": ("exact answers", percent),
    "f1": ("words in common (F1)", percent),
    "stopped": ("stopped by itself", percent),
    "validation_loss": ("loss (nats a token)", loss_told),
    "perplexity": ("perplexity", perplexity_told),
}


# Scripts that put no spaces between words: Thai to Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
UNSPACED += "\U00020000-\U0003ffff"


def words_of(text: str) -> list[str]:
    """The words of a text; where words are not parted by spaces, its characters."""
    return re.findall(f"[{UNSPACED}]|[^\\s{UNSPACED}]+", text)


def normal(text: str) -> str:
    """A text as it is compared: one spelling of each character, no blanks around it."""
    return unicodedata.normalize("NFC", text).strip()


def words_in_common(answer: str, reference: str) -> float:
    """F1 of an answer's words against the reference's, 0 to 1.

    As SQuAD scores answers, but without its normalisation:
    https://arxiv.org/abs/1606.05250, section 6.1.
    """
    ours, theirs = Counter(words_of(normal(answer))), Counter(words_of(normal(reference)))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def scores(table: DataFrame, losses: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of `SCORES` under `"before"` and `"after"`, and under `"rows"` how many answered.

    `losses` holds the `validation_loss` before and after, and of how many `"rows"`: whole texts are
    asked nothing, and of many rows some are asked.
    """
    result: dict[str, Any] = {"rows": len(table), "loss_rows": losses.get("rows", len(table))}
    for when in ("before", "after"):
        result[when] = answer_scores(table, when) | {
            "validation_loss": losses[when],
            "perplexity": math.exp(min(losses[when], 700)),  # a float holds no exp(710)
        }
    return result


def answer_scores(table: DataFrame, when: str) -> dict[str, float]:
    """Mean exact match, F1 and share that stopped by itself, 0 to 1; empty if none was asked."""
    if not len(table):
        return {}
    pairs = zip(table[when], table["reference"], strict=True)
    return {
        "exact_match": float(is_right(table, when).mean()),
        "f1": sum(words_in_common(answer, wanted) for answer, wanted in pairs) / len(table),
        "stopped": float(table[f"stopped_{when}"].mean()),
    }


def score_lines(result: Record) -> list[dict[str, str]]:
    """Name, before and after of every score in `result`, as text."""
    rows: int = result["rows"]
    of_loss = result.get("loss_rows", rows)
    others = f", over {many(of_loss, 'row')}" if rows not in (0, of_loss) else ""
    return [
        {"score": name + others * (key in ("validation_loss", "perplexity"))}
        | {when: form(result[when][key]) for when in ("before", "after")}
        for key, (name, form) in SCORES.items()
        if key in result["after"]
    ]


def rows_of(result: Record) -> str:
    """What the scores are of, in words: the rows that were asked, or whole texts."""
    asked = result["rows"]
    return many(asked or result.get("loss_rows", 0), f"held-out {'row' if asked else 'text'}")


def is_right(table: DataFrame, when: str) -> Any:
    """Which answers equal their references, `[rows]`, by `normal`."""
    return table[when].map(normal) == table["reference"].map(normal)


def verdict(table: DataFrame, result: Record) -> str:
    """In words: how many answers are right, before and after, or how the loss of texts fell."""
    if not len(table):
        before, after = (result[when]["validation_loss"] for when in ("before", "after"))
        return f"Loss on held-out texts: {loss_told(before)} before, {loss_told(after)} after."
    right, before = (int(is_right(table, when).sum()) for when in ("after", "before"))
    wrong = len(table) - right
    others = " The wrong ones are shown first." if wrong else ""
    return f"{right} of {len(table)} answers are exactly right (before: {before}).{others}"


def middle_out(text: str, most: int) -> str:
    """A text, a long one without its middle."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


# Jupyter and Colab would else take what stands between two dollar signs for a formula.
NO_FORMULAS = 'class="tex2jax_ignore mathjax_ignore"'


def show_comparison(table: DataFrame, result: Record, rows: int = 10, most: int = 300) -> Any:
    """Rows of `compare` as a styled table, those not right first, scores in its caption.

    Exact answers are green; of texts of more than `most` characters the middle is left out.
    """
    table = table.iloc[np.argsort(is_right(table, "after").to_numpy(), kind="stable")]
    lines = ("{score} {before} → {after}".format(**line) for line in score_lines(result))
    some = [f"{rows} are shown, all are in the report"] * (len(table) > rows)
    caption = " · ".join([rows_of(result), *lines, *some])
    shown = table[["prompt", "reference", "before", "after"]].head(rows)
    shown = shown.map(lambda text: middle_out(text, most))
    stopped = table[["stopped_before", "stopped_after"]].head(rows)
    stopped = stopped.map(lambda itself: "yes" if itself else "no").astype(str)
    shown["stopped by itself"] = stopped["stopped_before"] + " → " + stopped["stopped_after"]
    exact = is_right(table, "after").head(rows)
    green = ["background-color: #d7f0dd; color: #111" if right else "" for right in exact]
    left = {"text-align": "left", "vertical-align": "top"}
    left |= {"white-space": "pre-wrap", "max-width": "24em", "unicode-bidi": "plaintext"}
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
        .set_table_attributes(NO_FORMULAS)
        .set_table_styles(head)
    )
