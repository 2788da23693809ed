"""Sections 12 and 14: curves, the page of a run, and what differs between two."""

from __future__ import annotations

import html
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame, Series, concat, json_normalize

from finetune.base_model import called
from finetune.data import data_hashes
from finetune.files import Record, file_hash, telling_if_full
from finetune.scores import loss_told, rows_of, score_lines, show_comparison, verdict
from finetune.sixteen_bits import in_words
from qlora_helpers import Settings, UserError, locate


def history(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a Trainer's `log_history`."""
    found = [(entry["step"], entry[key]) for entry in log if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def what_it_learned(log: Sequence[Mapping[str, float]], keep_best: bool) -> str:
    """A sentence or two: the epoch of lowest validation loss, any overfitting, and what is kept."""
    measured = [entry for entry in log if "eval_loss" in entry]
    start = next((entry["eval_loss"] for entry in measured if not entry["step"]), math.inf)
    found = [(entry["eval_loss"], entry["epoch"]) for entry in measured if entry["step"]]
    if not found:
        return "No validation loss was measured."
    left = [(entry["eval_loss"], entry["epoch"]) for entry in not_lost(measured) if entry["step"]]
    (best, epoch), (last, end) = min(left or found), found[-1]
    if best >= start or loss_told(best) == loss_told(start):
        return (
            f"Nothing was learned: validation loss never fell below {loss_told(start)}. "
            "Lower learning_rate if it rose, else raise it or train longer."
        )
    if epoch == end:
        return (
            "Validation loss was lowest at the end: "
            f"{loss_told(best)} after epoch {end:.3g}, which is kept."
        )
    kept = f"epoch {epoch:.3g} is kept"
    if not keep_best:
        kept = f"epoch {end:.3g} is kept, because keep_best is off"
    if loss_told(best) == loss_told(last):
        told = f"Validation loss fell no further after epoch {epoch:.3g}"
        return f"{told} ({loss_told(best)}); {kept}."
    return (
        f"Overfitting: validation loss rose after epoch {epoch:.3g}, "
        f"from {loss_told(best)} to {loss_told(last)}; {kept}."
    )


def not_lost(log: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The entries of a log but for evaluations whose checkpoint is lost (`replace_lost_best`)."""
    return [entry for entry in log if not entry.get("lost")]


def plot_curves(
    log: Sequence[Mapping[str, float]], path: Path, title: str, keep_best: bool = True
) -> Image:
    """Losses, learning rate, gradient norm and tokens a second over steps.

    They are drawn into a PNG at `path`, which is returned to be shown; the training loss as logged
    and smoothed (exponential moving average, weight 0.3 on the newest value). Where losses fall to
    a tenth and less their axis is logarithmic, so that the last epochs can be told apart.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    side = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens a second",
    }
    grid = [["loss", name] for name in side]  # the losses on the left, as high as all the others
    axes = figure.subplot_mosaic(grid, width_ratios=[2, 1], sharex=True)
    steps, losses = history(log, "loss")
    point = "o" if len(steps) == 1 else ""  # a line of one point cannot be seen
    axes["loss"].plot(steps, losses, color="#4c78a8", alpha=0.3, marker=point, label="training")
    smooth = Series(losses, dtype=float).ewm(alpha=0.3).mean()
    axes["loss"].plot(steps, smooth, color="#4c78a8", label="training, smoothed")
    measured = history(log, "eval_loss")
    axes["loss"].plot(*measured, "o-", color="#f58518", label="validation")
    mark_kept(axes["loss"], *history(not_lost(log), "eval_loss"), keep_best)
    if (few := history(log, "eval_part_loss"))[0]:
        axes["loss"].plot(*few, "x", color="#f58518", alpha=0.6, label="validation, a few rows")
    axes["loss"].set(ylabel="loss (nats a token)", xlabel="step")
    axes["loss"].legend()
    for name, label in side.items():
        axes[name].plot(*history(log, name), color="#54a24b", marker=point)
        axes[name].set_ylabel(label)
    axes["tokens_per_second"].set_xlabel("step")
    axes["loss"].xaxis.get_major_locator().set_params(integer=True)
    positive = [value for value in (*losses, *measured[1]) if value > 0]
    far = positive and max(positive) > 10 * min(positive)
    for name, each in axes.items():
        if name == "loss" and far:
            each.set_yscale("log")
            each.yaxis.set_major_formatter("{x:g}")
        else:
            each.set_ylim(0, 1.1 * each.get_ylim()[1])  # room for the ring and the figures
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    return Image(filename=str(path), width=1000)


def mark_kept(axes: Axes, steps: list[float], losses: list[float], keep_best: bool) -> None:
    """Write epochs' validation losses at their points, and a ring around the one that is kept.

    Of many epochs every second, third, … and the last.
    """
    trained = [(loss, step) for step, loss in zip(steps, losses, strict=True) if step]
    every = 1 + len(trained) // 16
    for loss, step in trained[(len(trained) - 1) % every :: every]:
        place = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "fontsize": 9}
        axes.annotate(loss_told(loss), (step, loss), color="#b35900", **place)
    if trained:
        loss, step = min(trained) if keep_best else trained[-1]
        axes.plot([step], [loss], "o", ms=13, mfc="none", mec="#b35900", label="kept")


def write_report(
    settings: Settings,
    run: Record,
    table: DataFrame,
    log: list[dict],
    data: Record,
) -> Path:
    """Write the run to its folder: `run.json`, and `report.html`, which needs no other file.

    `run` is `manifest`'s, `table` `compare`'s, `log` the trainer's `log_history`; `data` is what is
    to be said of the rows. The hashes (SHA-256) are of the data files, as they were read, and of
    the saved adapter. Raises `UserError` if the curves have not been drawn.
    """
    adapter = "adapter_model.safetensors"
    hashes = data_hashes(settings) | {adapter: file_hash(settings.final_model / adapter)}
    run = {**run, "data": data, "sha256": hashes}
    answers = {"log": log, "answers": table.to_dict("records")}
    text = json.dumps(run | answers, indent=1, ensure_ascii=False)
    page = settings.run_dir / "report.html"
    with telling_if_full(settings.run_dir, f"The adapter is safe: {settings.final_model}."):
        (settings.run_dir / "run.json").write_text(text + "\n", encoding="utf-8")
        page.write_text(report_page(settings, run, table, log), encoding="utf-8")
    return page


REPORT_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #222 }
h1 { margin-bottom: 0 }
h2 { margin-top: 1.6em; border-bottom: 1px solid #ddd } img { max-width: 100% }
table { border-collapse: collapse; width: 100%; font-size: 13px } caption { display: none }
td, th { border: 0; border-bottom: 1px solid #e4e4e4; padding: 4px 8px; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; font-weight: normal }
thead th, tbody th { font-weight: 600 }
tbody th { width: 14em }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 3em; align-items: start }
@media (max-width: 700px) { .pair { display: block } }
"""


def curves_of(settings: Settings) -> Path:
    """The picture that section 12 draws; raises `UserError` if it is not there."""
    curves = settings.run_dir / "curves.png"
    if not curves.is_file():
        raise UserError(f"The report shows the curves, and {curves} is not there: run section 12.")
    return curves


def report_page(settings: Settings, run: Record, table: DataFrame, log: list[dict]) -> str:
    """The report as HTML: scores, curves, answers, then all that made them.

    Texts from data are escaped.
    """

    def lines(values: Record) -> str:
        column = Series({name: str(value) for name, value in values.items()}).to_frame()
        return column.to_html(header=False, border=0)

    result = run["results"]
    served = in_words(result.get("sixteen_bits", {}))
    scores = DataFrame(score_lines(result)).to_html(index=False, border=0)
    curves = b64encode(curves_of(settings).read_bytes()).decode()
    learned = html.escape(what_it_learned(log, settings.keep_best))
    created = run["created"][:16].replace("T", " ")
    made = {name: value for name, value in run.items() if not isinstance(value, (dict, list))}
    made = {name: value for name, value in made.items() if name != "run" and value}
    plan = {n: v for n, v in run["plan"].items() if not isinstance(v, float) and n != "table"}
    plan |= plan.pop("cut", {})
    trials = run["plan"].get("table", [])
    settings_now = list(run["settings"].items())
    half = (len(settings_now) + 1) // 2
    left, right = lines(dict(settings_now[:half])), lines(dict(settings_now[half:]))
    parts = {
        f"Scores on {rows_of(result)}": f"<p>{verdict(table, result)} {served}</p>{scores}",
        "Curves": f"<p>{learned}</p>"
        '<img alt="losses, learning rate, gradient norm, speed" '
        f'src="data:image/png;base64,{curves}">',
        "Answers to held-out rows": show_comparison(table, result, len(table), 4000).to_html(),
        "Settings": f'<div class="pair">{left}{right}</div>',
        "Plan": lines(plan) + (plan_table(trials) if trials else ""),
        "Data": lines(run["data"]),
        "Made with": f'<div class="pair">{lines(made)}{lines(run["versions"])}</div>',
    }
    if not len(table):
        del parts["Answers to held-out rows"]
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in parts.items())
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{settings.run_name}</title>\n"
        f"<style>{REPORT_STYLE}</style>\n<h1>{settings.run_name}</h1>\n"
        f"<p>{html.escape(called(settings.base_model))}, {created} UTC</p>\n{body}\n</html>\n"
    )


def plan_table(tried: Sequence[Record]) -> str:
    """The ways that a plan has tried as a table in HTML, the chosen one green."""
    style = DataFrame(tried).convert_dtypes().style.hide(axis="index")
    style = style.hide("chosen", axis="columns").format(precision=1, thousands=",", na_rep="")
    # The text is dark on the green in dark mode, too.
    mark = ["background-color: #d7f0dd; color: #111" * row["chosen"] for row in tried]
    return style.apply(lambda column: mark).to_html()


def finished_run(folder: Path) -> Record:
    """What the report of a run has written down; raises `UserError` if there is none."""
    told = folder / "run.json"
    if not told.is_file():
        raise UserError(
            f"{folder} is no folder of a finished run: it has no run.json, which section 14 writes."
        )
    return json.loads(told.read_text(encoding="utf-8"))


def compare_runs(first: str | Path, second: str | Path) -> DataFrame:
    """What differs between two runs, given by their folders: one line each.

    Compared are settings, data, plan, results and versions. Raises `UserError` for a folder that
    holds no finished run.
    """
    columns, folders = [], [locate(str(folder)) for folder in (first, second)]
    same = folders[0].name == folders[1].name
    for folder in folders:
        run = finished_run(folder)
        left_out = ("log", "answers", "created", "trainer_state")
        kept = {name: value for name, value in run.items() if name not in left_out}
        run["plan"].pop("table", None)  # every way that was tried
        columns.append(json_normalize(kept).iloc[0].rename(str(folder) if same else folder.name))
    both = concat(columns, axis=1)
    names = both.index
    # Of the fingerprint the rows alone: the rest is among the settings or `base_revision`.
    both = both[~names.str.startswith("fingerprint.") | (names == "fingerprint.training rows")]
    return both[both.iloc[:, 0].map(str) != both.iloc[:, 1].map(str)]
