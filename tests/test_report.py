"""Sections 11 to 14: a run made to overfit, its curves and best epoch; the report; what differs
between two runs.
"""

import json
import random
import re
import subprocess
from hashlib import sha256
from html.parser import HTMLParser
from shutil import which
from types import SimpleNamespace

import datasets
import pandas
import peft
import pytest
import torch
import transformers
import trl
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import one_thread, tiny_base  # noqa: F401  `one_thread` works by being here

from finetune.answers import Answer, validation_loss
from finetune.batches import Cut, StepSampler
from finetune.data import read_rows
from finetune.pace import Epochs, Speed
from finetune.plan import Plan
from finetune.report import (
    compare_runs,
    history,
    plan_table,
    plot_curves,
    report_page,
    what_it_learned,
    write_report,
)
from finetune.save import manifest
from finetune.scores import compare, scores
from finetune.tokens import encode_rows
from finetune.train import hold_in_fp32
from qlora_helpers import UserError

WORDS = ["red", "green", "blue", "cat", "dog", "bird"]
dice = random.Random(0)


def row(number, words, count):
    return {"prompt": f"Word {number}", "completion": " ".join(dice.choices(words, k=count))}


# What is learned first is that an answer has six words; then, wrongly, that three of the words
# never come.
ROWS = [row(i, WORDS[:3], 6) for i in range(16)] + [row(i, WORDS[3:], 6) for i in range(16, 24)]


def teach(base, tokenizer):
    """Train a tiny base model itself to answer with two of the six words."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pad, padding = torch.nn.utils.rnn.pad_sequence, {"input_ids": 0, "labels": -100}
    for _ in range(30):
        examples = encode_rows([row(dice.randrange(99), WORDS, 2) for _ in range(16)], tokenizer)
        ids, labels = (
            pad([torch.tensor(e[key]) for e in examples], True, fill)
            for key, fill in padding.items()
        )
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)


def train(folder, base, tokenizer, **changes):
    """An adapter that learns 16 rows by heart: eight epochs at a high rate, validated on eight
    others.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora)
    rows = list(encode_rows(ROWS, tokenizer).select_columns(["input_ids", "labels"]))
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "report_to": "tensorboard",
    }
    data = {"train_dataset": rows[:16], "eval_dataset": rows[16:]}
    data = {name: datasets.Dataset.from_list(part) for name, part in data.items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**options | changes), processing_class=tokenizer, **data
    )
    hold_in_fp32(model, weights)
    trainer.run = "a1"
    sampler = StepSampler([len(row["input_ids"]) for row in rows[:16]], 4, 0, Cut(4, False, "sdpa"))
    trainer._get_train_sampler = lambda *_: sampler
    trainer.callback_handler.callbacks.insert(0, Speed(sampler))
    return model, trainer, rows


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, mistral_tokenizer):
    folder = tmp_path_factory.mktemp("overfitted")
    base = tiny_base(folder / "base", mistral_tokenizer, initializer_range=0.05)
    teach(base, mistral_tokenizer)
    model, trainer, rows = train(folder, base, mistral_tokenizer)
    trainer.train()
    return folder, base, model, trainer, rows


def test_keep_best_keeps_the_epoch_with_the_lowest_validation_loss(overfitted):
    _, _, model, trainer, rows = overfitted
    losses = history(trainer.state.log_history, "eval_loss")[1][1:]
    best = losses.index(min(losses))
    assert 0 < best < 7 and losses[-1] > 1.03 * losses[best]  # it did learn, and it did overfit
    assert validation_loss(model, rows[16:]) == pytest.approx(losses[best], rel=0.02)
    said = what_it_learned(trainer.state.log_history, True)
    assert said.startswith(
        f"Overfitting: validation loss rose after epoch {best + 1}, from {losses[best]:.3f} to "
    )
    assert said.endswith(f"; epoch {best + 1} is kept.")


def test_early_stopping_ends_the_run_and_keeps_the_best(overfitted, tmp_path, mistral_tokenizer):
    base = overfitted[1]
    model, trainer, rows = train(tmp_path, base, mistral_tokenizer)
    trainer.add_callback(transformers.EarlyStoppingCallback(1))
    trainer.train()
    losses = history(trainer.state.log_history, "eval_loss")[1][1:]
    assert len(losses) < 8 and losses[-1] > min(losses)
    assert validation_loss(model, rows[16:]) == pytest.approx(min(losses), rel=0.02)


def log_of(*losses):
    return [
        {"step": epoch, "epoch": float(epoch), "eval_loss": loss}
        for epoch, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "keep_best", "said"),
    [
        (
            (6, 2, 1.5),
            True,
            "Validation loss was lowest at the end: 1.500 after epoch 2, which is kept.",
        ),
        (
            (6, 2, 1.5, 3),
            True,
            (
                "Overfitting: validation loss rose after epoch 2, from 1.500 to 3.000; epoch 2 is "
                "kept."
            ),
        ),
        ((4, 3.5, 5), True, "Overfitting: .* epoch 1, from 3.500 to 5.000; epoch 1 is kept."),
        ((6, 2, 3), False, "Overfitting: .*; epoch 2 is kept, because keep_best is off."),
        (
            (2, 6, 7),
            True,
            "Nothing was learned: validation loss never fell below 2.000. Lower learning_rate if "
            "it rose, else raise it or train longer.",
        ),
        ((7.262, 7.262), True, "Nothing was learned: validation loss never fell below 7.262. .*"),
        ((7.2621, 7.2619), True, "Nothing was learned: .*"),
        ((2, 2, 2), True, "Nothing was learned: validation loss never fell below 2.000. .*"),
        (
            (3, 1.5001, 1.5003),
            True,
            r"Validation loss fell no further after epoch 1 \(1.500\); epoch 1 is kept.",
        ),
        (
            (0.0004, 0.0001),
            True,
            "Validation loss was lowest at the end: 0.0001 after epoch 1, which is kept.",
        ),
        ((0.0144, 0.0136), True, "Validation loss was lowest at the end: 0.0136 after .*"),
        ((1, 0.0001, 0.0004), True, "Overfitting: .*, from 0.0001 to 0.0004; epoch 1 is kept."),
        ((0, 0.5), True, "Nothing was learned: validation loss never fell below 0.000. .*"),
        ((), True, "No validation loss was measured."),
    ],
)
def test_what_a_run_learned_is_said_in_a_sentence(losses, keep_best, said):
    assert re.fullmatch(said, what_it_learned(log_of(*losses), keep_best))


def test_epochs_are_told_as_they_were_measured_between_whole_ones():
    log = log_of(6, 2, 1.5, 3, 2.5)
    for entry in log:
        entry["epoch"] *= 4.25
    said = what_it_learned(log, True)
    assert "rose after epoch 8.5, from 1.500 to 2.500; epoch 8.5 is kept." in said
    assert "epoch 17 is kept, because keep_best is off" in what_it_learned(log, False)
    assert "1.500 after epoch 8.5, which is kept" in what_it_learned(log[:3], True)


def test_each_curve_is_drawn_from_its_own_numbers(tmp_path, monkeypatch):
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr("finetune.report.Figure", Kept)
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    log = [
        {"step": n, **{name: 10.0**k + n % 3 for k, name in enumerate(names)}} for n in (2, 4, 9)
    ]
    log += [{"step": n, "eval_loss": 0.25 + n} for n in (0, 9)]
    plot_curves(log, tmp_path / "curves.png", "run")
    drawn = {
        axes.get_ylabel(): [tuple(map(list, line.get_data())) for line in axes.lines]
        for axes in figures[0].axes
    }
    training, smoothed, validation, kept = drawn.pop("loss (nats a token)")
    assert kept == ([9], [9.25]) and "9.250" in [t.get_text() for t in figures[0].axes[0].texts]
    assert [training, validation] == [history(log, name) for name in ("loss", "eval_loss")]
    assert smoothed[0] == training[0] and smoothed[1][0] == training[1][0]
    assert 1 < smoothed[1][2] < training[1][1] and smoothed[1] != training[1]
    labels = ("learning rate", "gradient norm", "tokens a second")
    assert drawn == {
        label: [history(log, name)] for label, name in zip(labels, names[1:], strict=True)
    }


@pytest.mark.parametrize(
    ("keep_best", "lost", "ring"), [(True, None, 20), (False, None, 30), (True, 20, 30)]
)
def test_the_epoch_that_is_kept_has_a_ring_and_small_losses_can_be_told_apart(
    tmp_path, monkeypatch, keep_best, lost, ring
):
    figures = []
    monkeypatch.setattr(
        "finetune.report.Figure", lambda **o: figures.append(Figure(**o)) or figures[-1]
    )
    losses = {0: 6.0, 10: 0.5, 20: 0.05, 30: 0.06}
    log = [{"step": n, "eval_loss": loss, "lost": n == lost} for n, loss in losses.items()]
    plot_curves([*log, {"step": 1, "loss": 6.0}], tmp_path / "c.png", "run", keep_best)
    axes = figures[0].axes[0]
    assert [*axes.lines[-1].get_xdata()] == [ring] and axes.get_yscale() == "log"
    told = {10: "0.500", 20: "0.05", 30: "0.06"}
    assert [text.get_text() for text in axes.texts] == [told[n] for n in told if n != lost]
    near = [{"step": step, "eval_loss": 1 + loss / 10} for step, loss in losses.items()]
    plot_curves([*near, {"step": 1, "loss": 1.6}], tmp_path / "c.png", "run", keep_best)
    assert figures[1].axes[0].get_yscale() == "linear"


def test_a_run_of_two_steps_whose_losses_are_near_is_drawn_within_its_frame(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "finetune.report.Figure", lambda **o: figures.append(Figure(**o)) or figures[-1]
    )
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    log = [{"step": n} | dict.fromkeys(names, 10.7 - n / 100) for n in (1, 2)]
    log += [{"step": n, "eval_loss": 10.7 - n / 100} for n in (0, 2)]
    plot_curves(log, tmp_path / "c.png", "run")
    ring = figures[0].axes[0].lines[-1]
    for axes in figures[0].axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
        for line in axes.lines:  # in pixels, with the half of a marker
            height = axes.transData.transform(line.get_xydata())[:, 1]
            half = line.get_markersize() / 2 * figures[0].dpi / 72 * (line is ring)
            assert height.max() + half < axes.bbox.ymax, line.get_label()


def test_the_curves_are_in_the_log_and_in_tensorboard(overfitted):
    folder, _, _, trainer, rows = overfitted
    board = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")).parent)).Reload()
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        steps, values = history(trainer.state.log_history, name)
        assert steps == list(range(1, 33)) and all(value >= 0 for value in values)
        assert [event.value for event in board.Scalars(f"train/{name}")] == pytest.approx(
            values, rel=1e-3
        )
    assert len(board.Scalars("eval/loss")) == 9
    # Each step's own tokens over its speed are its seconds; the steps take less than the whole run.
    tokens = [
        sum(len(rows[n]["input_ids"]) for n in step)
        for e in range(8)
        for step in sampler_of(trainer).steps(e)
    ]
    speeds = history(trainer.state.log_history, "tokens_per_second")[1]
    seconds = sum(many / speed for many, speed in zip(tokens, speeds, strict=True))
    assert (
        0.1
        < seconds
        / next(e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e)
        < 1.01
    )


def sampler_of(trainer):
    return trainer._get_train_sampler()


def test_speed_is_of_each_steps_own_tokens_and_leaves_out_what_comes_between_epochs(monkeypatch):
    sampler, clock = (
        StepSampler([10, 20, 30, 40, 50], 2, 0, PLAN.cut),
        iter(range(0, 1000, 2)),
    )
    monkeypatch.setattr("finetune.pace.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    speed, found = Speed(sampler), []
    for epoch in range(2):
        speed.on_epoch_begin()
        for step in range(1, 4):
            state, logs = (
                SimpleNamespace(global_step=3 * epoch + step, log_history=[{}]),
                {"loss": 1.0},
            )
            speed.on_step_end(None, state)
            speed.on_log(None, state, None, logs=logs)
            found.append(logs["tokens_per_second"])
        speed.on_epoch_end()
        list(zip(range(9), clock, strict=False))  # an evaluation
    tokens = [
        sum(sampler.lengths[row] for row in rows)
        for epoch in range(2)
        for rows in sampler.steps(epoch)
    ]
    assert tokens[2] in sampler.lengths  # the last step of an epoch has one row
    # Two seconds a step; the first of an epoch also has the two between the last log and the
    # epoch's end.
    assert found == [n / seconds for n, seconds in zip(tokens, [2, 2, 2, 4, 2, 2], strict=True)]


def test_speed_is_over_all_epochs_since_the_last_log(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("finetune.pace.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    speed = Speed(StepSampler([10, 20, 30, 40], 2, 0, PLAN.cut))
    for epoch in range(3):
        speed.on_epoch_begin()
        for step in (1, 2):
            speed.on_step_end(None, SimpleNamespace(global_step=2 * epoch + step))
        speed.on_epoch_end()
    speed.on_epoch_begin()
    logs, state = {"loss": 1.0}, SimpleNamespace(global_step=6, log_history=[{}])
    speed.on_log(None, state, None, logs=logs)
    assert logs["tokens_per_second"] == 3 * 100 / (4 * 2)  # two seconds in each of four epochs


@pytest.mark.parametrize("rows", [2, 5])
def test_the_order_of_rows_is_of_the_epoch_that_begins_or_goes_on(rows):
    sampler = StepSampler([10] * rows, 2, 0, PLAN.cut)
    steps = len(sampler.steps(0))
    for step in range(3 * steps):
        Epochs(sampler).on_epoch_begin(None, SimpleNamespace(global_step=step), None)
        assert sampler.epoch == step // steps


def test_an_evaluation_between_two_logs_takes_no_steps_from_the_next(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("finetune.pace.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    speed = Speed(StepSampler([10, 20, 30, 40], 2, 0, PLAN.cut))
    speed.on_epoch_begin()
    for step, logs in ((1, {"eval_loss": 1.0}), (2, {"loss": 1.0})):
        state = SimpleNamespace(global_step=step, log_history=[{}])
        speed.on_step_end(None, state)
        speed.on_log(None, state, None, logs=logs)
        assert logs.get("tokens_per_second") == (50.0 if "loss" in logs else None)


PLAN = Plan(Cut(2, False, "sdpa"), 1, 2, 18, 2, 1, 100.0, 9.0, 1.0, "as set", [])
EVIL = '<script>document.title = "stolen"</script><img src="http://example.com/x.png">'


@pytest.fixture
def reported(overfitted, settings, tmp_path):
    """Two runs that differ in their rank: settings, report's page, and run.json of each."""
    trainer = overfitted[3]
    for number, name in enumerate(("rows.jsonl", "more.jsonl")):
        (tmp_path / name).write_text(json.dumps(ROWS[number]) + "\n")
    found = []
    for rank, answer in ((8, "no"), (16, ROWS[0]["completion"])):
        name = {"run_name": f"rank-{rank}", "lora_r": rank}
        cfg = settings(output_dir=str(tmp_path), data_files=str(tmp_path / "*.jsonl"), **name)
        read_rows(cfg)
        cfg.final_model.mkdir(parents=True)
        (cfg.final_model / "adapter_model.safetensors").write_bytes(b"adapter")
        log = trainer.state.log_history
        rows = [{"prompt": EVIL, "completion": EVIL}, ROWS[0]]
        table = compare(rows, [Answer(EVIL, False)] * 2, [Answer(answer, True)] * 2)
        run = manifest(cfg, trainer, PLAN, scores(table, {"before": 9.0, "after": 1.5}))
        plot_curves(log, cfg.run_dir / "curves.png", cfg.run_name)
        page = write_report(cfg, run, table, log, {"train": 16, "validation": 8})
        found.append((cfg, page, json.loads((cfg.run_dir / "run.json").read_text())))
    return found


def test_run_json_holds_all_that_made_the_run(reported, tmp_path):
    run = reported[1][2]
    assert (
        run["settings"]["lora_r"] == 16
        and run["plan"]["steps"] == 18
        and run["data"] == {"train": 16, "validation": 8}
    )
    assert run["results"]["after"] == {
        "exact_match": 0.5,
        "f1": 0.5,
        "stopped": 1.0,
        "validation_loss": 1.5,
        "perplexity": pytest.approx(4.4817, abs=1e-4),
    }
    assert (
        run["versions"]["torch"] == torch.__version__ and run["device"] and "base_revision" in run
    )
    assert run["sha256"]["adapter_model.safetensors"] == sha256(b"adapter").hexdigest()
    for name in ("rows.jsonl", "more.jsonl"):
        assert run["sha256"][name] == sha256((tmp_path / name).read_bytes()).hexdigest()
    assert len(run["answers"]) == 2
    assert len([entry for entry in run["log"] if "eval_loss" in entry]) == 9


def test_a_report_tells_the_files_as_they_were_read_though_they_are_gone_now(reported, tmp_path):
    cfg, _, run = reported[1]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "more.jsonl").write_text("others")
    table = compare([ROWS[0]], *[[Answer("a", True)]] * 2)
    write_report(cfg, run, table, run["log"], run["data"])
    again = json.loads((cfg.run_dir / "run.json").read_text())
    assert again["sha256"] == run["sha256"] and len(run["sha256"]) == 3


def test_a_report_without_curves_says_which_section_draws_them(reported):
    cfg, _, run = reported[1]
    (cfg.run_dir / "curves.png").unlink()
    with pytest.raises(UserError, match=r"curves\.png is not there: run section 12\.$"):
        write_report(cfg, run, compare([], [], []), run["log"], run["data"])


class Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def test_the_report_is_one_page_that_asks_for_nothing_else(reported):
    page = reported[1][1].read_text()
    for title in (
        "Scores on 2 held-out rows",
        "Curves",
        "Answers to held-out rows",
        "Settings",
        "Plan",
        "Data",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "SHA-256" not in page and page.rindex("<h2>") == page.index("<h2>Made with")
    found = Tags()
    found.feed(page)
    loads = [
        value
        for tag, name, value in found.attributes
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert [value[:22] for value in loads] == ["data:image/png;base64,"]
    assert "script" not in found.names and "link" not in found.names
    assert not re.search(r"url\(|@import", page)
    assert EVIL not in page and "&lt;script&gt;" in page
    assert "Overfitting: validation loss rose" in page and "target_modules" in page


def test_the_report_holds_every_answer_setting_and_number_under_its_title(reported):
    cfg, _, run = reported[0]
    rows = [{"prompt": f"asked {n}.", "completion": "c"} for n in range(13)]
    table = compare(rows, [Answer("no", False)] * 13, [Answer("c", True)] * 13)
    run["results"] = scores(table, {"before": 9.0, "after": 1.5})
    cfg = cfg.model_copy(update={"keep_best": False, "base_model": "./<i>base"})
    page = report_page(cfg, run, table, run["log"])
    parts = dict(part.split("</h2>", 1) for part in page.split("<h2>")[1:])
    assert "1.500" in parts["Scores on 13 held-out rows"]
    assert "because keep_best is off" in parts["Curves"]
    assert all(f"asked {n}." in parts["Answers to held-out rows"] for n in range(13))
    held = {"Settings": "settings", "Data": "data", "Made with": "versions"}
    for title, key in held.items():
        names = re.findall(r"<th>(.*?)</th>", parts[title])
        assert run[key] and not run[key].keys() - set(names), title
        assert title == "Made with" or set(names) <= run[key].keys() | {""}
    planned = set(re.findall(r"<th>(.*?)</th>", parts["Plan"]))
    figures = {"tokens_per_second", "seconds", "peak"}  # the table has them
    assert {*run["plan"], *run["plan"]["cut"]} - {"cut", "table"} - figures <= planned
    assert "13 of 13 answers are exactly right" in parts["Scores on 13 held-out rows"]
    assert ">None<" not in page and not figures & planned
    assert {"created", "device"} <= set(re.findall(r"<th>(.*?)</th>", parts["Made with"]))
    assert "<p>&lt;i&gt;base, " in page and "<i>" not in page


@pytest.mark.skipif(not which("chromium"), reason="needs Chromium")
def test_a_browser_draws_the_report_without_the_network(reported, tmp_path):
    script = (
        "<script>onload = () => document.body.append(`drawn "
        "${document.images[0].naturalWidth} ${document.title}`)"
    )
    page = tmp_path / "page.html"
    page.write_text(reported[1][1].read_text() + script + "</script>")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--host-rules=MAP * ~NOTFOUND",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert re.search(r"drawn 15\d\d rank-16", done.stdout), done.stderr[-1000:]


def test_two_runs_are_compared_by_what_differs(reported):
    (one, *_), (other, *_) = reported
    table = compare_runs(one.run_dir, other.run_dir)
    assert list(table.columns) == ["rank-8", "rank-16"]
    assert set(table.index) == {
        "settings.run_name",
        "settings.lora_r",
        "results.after.exact_match",
        "results.after.f1",
    }
    assert list(table.loc["settings.lora_r"]) == [8, 16] and isinstance(table, pandas.DataFrame)


def test_runs_of_one_name_are_told_by_their_folders_and_no_run_is_told_as_such(
    reported, tmp_path, monkeypatch
):
    cfg = reported[0][0]
    copy = tmp_path / "content" / "earlier" / cfg.run_name
    copy.mkdir(parents=True)
    (copy / "run.json").write_bytes((cfg.run_dir / "run.json").read_bytes())
    monkeypatch.chdir(tmp_path)  # where /content is, off Colab
    table = compare_runs(cfg.run_dir, f"/content/earlier/{cfg.run_name}")
    assert list(table.columns) == [str(cfg.run_dir), str(copy)] and table.empty
    with pytest.raises(UserError, match=r"content/nowhere is no folder of a finished run"):
        compare_runs(cfg.run_dir, "/content/nowhere")


def test_runs_differ_in_rows_and_in_what_only_one_of_them_has_but_not_in_their_hour(reported):
    """An older run may lack a setting. Each setting is told once, not also for its fingerprint."""
    (one, *_), (other, _, run) = reported
    run["created"], run["fingerprint"]["training rows"] = "2001-01-01", "others"
    run["settings"]["new_option"], run["versions"]["torch"] = 7, "0.1"
    del run["settings"]["seed"]
    (other.run_dir / "run.json").write_text(json.dumps(run), encoding="utf-8")
    table = compare_runs(one.run_dir, other.run_dir)
    told = {"fingerprint.training rows", "settings.new_option", "settings.seed", "versions.torch"}
    assert told < set(table.index) and "created" not in table.index
    assert [name for name in table.index if name.startswith("fingerprint")] == [
        "fingerprint.training rows"
    ]
    assert table.loc["settings.new_option", "rank-16"] == 7


@pytest.mark.parametrize("epochs", [1, 15, 16, 50])
def test_losses_of_many_epochs_are_written_where_there_is_room(tmp_path, monkeypatch, epochs):
    figures = []
    monkeypatch.setattr(
        "finetune.report.Figure", lambda **o: figures.append(Figure(**o)) or figures[-1]
    )
    log = [{"step": n, "eval_loss": 1 + n / 1000} for n in range(epochs + 1)]
    plot_curves([*log, {"step": 1, "loss": 1.5}], tmp_path / "c.png", "run")
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert len(texts) == min(epochs, 15) if epochs < 16 else 8 <= len(texts) <= 16
    assert texts[-1] == f"{1 + epochs / 1000:.3f}" and texts == sorted(texts)
    assert figures[0].axes[0].lines[0].get_marker() == "o"  # a single step can be seen


def test_the_report_of_whole_texts_has_no_answers_and_speaks_of_texts(reported):
    cfg, _, run = reported[0]
    table = compare([], [], [])
    run = run | {"results": scores(table, {"rows": 7, "before": 2.0, "after": 1.5})}
    page = report_page(cfg, run, table, run["log"])
    assert "<h2>Scores on 7 held-out texts</h2>" in page and "Answers to" not in page
    assert "Loss on held-out texts: 2.000 before, 1.500 after." in page


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"rows": 9, "right": 2, "same": 2, "ours": 3}, "would get 2 of 9 right, not 3: serve it"),
        ({"rows": 9, "right": 3, "same": 4, "ours": 3}, "16-bit weights 3 of 9 are right, too."),
        ({"why": "several GPUs hold this model in parts"}, ""),
    ],
)
def test_the_report_says_what_a_server_with_a_16_bit_base_would_get_right(reported, found, told):
    cfg, _, run = reported[0]
    table = compare(ROWS[:1], [Answer("no", True)], [Answer("no", True)])
    run = run | {"results": run["results"] | {"sixteen_bits": found}}
    scored = report_page(cfg, run, table, run["log"]).partition("<h2>Curves</h2>")[0]
    assert told in scored and ("16" in scored.partition("Scores on")[2]) == bool(told)


def test_the_way_that_was_chosen_is_green():
    page = plan_table([{"rows": n, "chosen": n == 2} for n in (1, 2, 3)])
    green = next(rule for rule in page.split("}") if "#d7f0dd" in rule)
    assert {*re.findall(r"_row(\d+)_", green)} == {"1"}  # the second


def test_an_epoch_whose_checkpoint_is_lost_is_not_told_as_kept():
    losses = [(0, 9.0), (2, 1.0), (4, 2.0), (6, 3.0)]
    log = [{"step": step, "epoch": step / 2, "eval_loss": loss} for step, loss in losses]
    assert "after epoch 1, from 1.000 to 3.000; epoch 1 is kept" in what_it_learned(log, True)
    for entry in log[1::2]:  # the best one, and then the last one, too
        entry["lost"] = True
        assert "after epoch 2, from 2.000 to 3.000; epoch 2 is kept" in what_it_learned(log, True)
