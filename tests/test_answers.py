"""Sections 9 and 13: answers, and how they are scored."""

import copy
import re

import datasets
import pytest
import torch
from tiny import tiny_base, tiny_tuned
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MistralConfig

from finetune.answers import (
    Answer,
    AnswerStreamer,
    batches,
    cache_tokens,
    draw_sample,
    evaluating,
    evaluation_tokens,
    generate_answers,
    read_answer,
    trained_logits,
    validation_loss,
)
from finetune.machine import device
from finetune.report import history, plot_curves
from finetune.scores import (
    compare,
    rows_of,
    score_lines,
    scores,
    show_comparison,
    verdict,
    words_in_common,
)
from finetune.tokens import encode_rows
from qlora_helpers import UserError


def test_a_batch_answers_as_each_prompt_does_alone(nf4_model, smollm_tokenizer):
    model = nf4_model(layers=30)
    prompts = [
        "What is the capital of France?",
        "Hi",
        "Name three colours of the rainbow, and one animal.",
    ]
    together = generate_answers(model, smollm_tokenizer, prompts, 6)
    alone = [generate_answers(model, smollm_tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) == 3


def test_generating_leaves_the_model_in_its_mode(nf4_model, smollm_tokenizer):
    model = nf4_model()
    for mode in (True, False):
        model.train(mode)
        generate_answers(model, smollm_tokenizer, ["Hi"], 2)
        assert model.training is mode


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_is_in_its_mode_again_after_an_evaluation_that_was_interrupted(mode):
    model = torch.nn.Linear(2, 2).train(mode)
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not model.training and not model(torch.ones(2)).requires_grad
        raise KeyboardInterrupt
    assert model.training is mode and model(torch.ones(2)).requires_grad


def test_answers_are_greedy_and_end_at_the_tokenizers_eos_whatever_the_model_was_saved_with(
    tmp_path, mistral_tokenizer
):
    model = tiny_tuned(tiny_base(tmp_path, mistral_tokenizer))
    greedy = generate_answers(model, mistral_tokenizer, ["Hi", "What is it?"], 8)
    assert all(len(answer.text) > 8 for answer in greedy)
    saved = model.generation_config
    saved.do_sample, saved.temperature, saved.top_k = True, 9.0, 0
    saved.eos_token_id = list(range(3, 20_000))  # as a chat model that has other ends of a turn
    assert generate_answers(model, mistral_tokenizer, ["Hi", "What is it?"], 8) == greedy


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (" Paris\n\n### End</s>", Answer("Paris", True)),
        (" Paris\n\n### End</s></s></s>", Answer("Paris", True)),
        (" Paris\n\n### End", Answer("Paris", False)),
        (" Paris\n\n### End \n</s>", Answer("Paris", True)),
        (" ### End of the road</s>", Answer("### End of the road", True)),
        (" Paris[/INST]\n\n### End</s>", Answer("Paris", True)),
        ("</s>", Answer("", True)),
    ],
)
def test_an_answer_ends_at_eos_and_loses_only_its_own_marker(mistral_tokenizer, generated, answer):
    ids = mistral_tokenizer(generated, add_special_tokens=False)["input_ids"]
    assert read_answer(mistral_tokenizer, ids) == answer


ROWS = [{"prompt": f"p{i}", "completion": f" c{i} "} for i in range(4)]
BEFORE = [Answer("no", False)] * 4
AFTER = [
    Answer("c0", True),
    Answer("c1", True),
    Answer("C2", True),
    Answer("c3", False),
]
LOG = [{"step": 0, "eval_loss": 6.0}, {"step": 5, "loss": 3.0}, {"step": 5, "eval_loss": 1.25}]
LOSSES = {"before": 6.0, "after": 1.25}


def test_scores_count_exact_answers_and_those_that_stopped():
    table = compare(ROWS, BEFORE, AFTER)
    result = scores(table, LOSSES)
    assert result["rows"] == 4 and [*table["reference"]] == ["c0", "c1", "c2", "c3"]
    before = {"exact_match": 0.0, "f1": 0.0, "stopped": 0.0, "validation_loss": 6.0}
    after = {"exact_match": 0.75, "f1": 0.75, "stopped": 0.75, "validation_loss": 1.25}
    assert result["before"] == before | {"perplexity": pytest.approx(403.43, abs=0.01)}
    assert result["after"] == after | {"perplexity": pytest.approx(3.4903, abs=1e-4)}


def test_a_model_that_learned_nothing_at_all_still_has_scores():
    result = scores(compare(ROWS, BEFORE, AFTER), {"before": 1000.0, "after": float("inf")})
    assert all(1e300 < result[when]["perplexity"] < float("inf") for when in ("before", "after"))


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("a b", "a b", 1),
        ("b a", "a b", 1),
        ("a", "a b", 2 / 3),
        ("a a a", "a b", 0.4),
        ("", "a", 0),
        ("c", "a b", 0),
    ],
)
def test_words_in_common_are_counted_as_squad_does(answer, reference, f1):
    assert words_in_common(answer, reference) == pytest.approx(f1)


def test_the_table_shows_the_scores_and_keeps_html_out():
    table = compare(
        [{"prompt": "<b>x</b>", "completion": "y"}],
        [Answer("a", False)],
        [Answer("y", True)],
    )
    html = show_comparison(table, scores(table, LOSSES)).to_html()
    assert (
        "1 held-out row · exact answers 0% → 100%" in html
        and "6.000 → 1.250" in html
        and "no → yes" in html
    )
    assert "&lt;b&gt;x" in html and "<b>x" not in html


def test_the_table_shows_the_first_rows_shortened_and_marks_exact_answers_after_training():
    rows = [{"prompt": f"p{i}.", "completion": f"c{i}"} for i in range(12)]  # 2 and 11 are right
    rows[4]["prompt"], rows[5]["prompt"] = "y" * 300, "z" * 301
    before, after = ([Answer("no", False)] * 12 for _ in range(2))
    before[1], after[2], after[11] = Answer("c1", True), Answer("c2", True), Answer("c11", True)
    table = compare(rows, before, after)
    html = show_comparison(table, scores(table, LOSSES)).to_html()
    assert "p10." in html and "p2." not in html and "p11." not in html
    assert f">{'y' * 300}<" in html and f">{'z' * 150} … {'z' * 150}<" in html
    assert "10 are shown, all are in the report" in html
    assert "#d7f0dd" not in html
    everything = show_comparison(table, scores(table, LOSSES), 12, 4000).to_html()
    assert f">{'z' * 301}<" in everything and "are shown" not in everything
    green = next(rule for rule in everything.split("}") if "#d7f0dd" in rule)
    assert re.findall(r"_row(\d+)_col(\d+)", green) == [("10", "3"), ("11", "3")]
    assert everything.index("p10.") < everything.index("p2.") < everything.index("p11.")


def test_dollars_stay_dollars_and_each_text_runs_in_its_own_direction():
    rows = [{"prompt": "How much?", "completion": "It costs $5 today and $6 tomorrow"}]
    table = compare(rows, [Answer("$1 or $2", True)], [Answer("\u05e9\u05dc\u05d5\u05dd", True)])
    html = show_comparison(table, scores(table, LOSSES)).to_html()
    assert re.search(r'<table [^>]*class="tex2jax_ignore mathjax_ignore"', html)
    assert "unicode-bidi: plaintext" in html and "It costs $5 today and $6" in html


def test_losses_of_a_model_in_16_bits_are_computed_in_32(tmp_path, mistral_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base(tmp_path, mistral_tokenizer), dtype=torch.bfloat16
    )
    examples = encode_rows([{"prompt": "p", "completion": "c"}], mistral_tokenizer)
    ((logits, _),) = trained_logits(model, examples)
    assert logits.dtype == torch.float32 and not logits.requires_grad


def test_validation_loss_is_the_mean_over_trained_tokens_however_they_are_batched(
    tmp_path, mistral_tokenizer, monkeypatch
):
    model = tiny_tuned(tiny_base(tmp_path, mistral_tokenizer))
    rows = [{"prompt": f"p{i}", "completion": "word " * (1 + 5 * i)} for i in range(4)]
    examples = list(encode_rows(rows, mistral_tokenizer).select_columns(["input_ids", "labels"]))
    with torch.no_grad():  # transformers' own loss is a row's mean over its trained tokens
        alone = [
            (model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.item(), row)
            for row in examples
        ]
    counts = [sum(label != -100 for label in row["labels"]) for row in examples]
    mean = sum(loss * n for (loss, _), n in zip(alone, counts, strict=True)) / sum(counts)
    assert validation_loss(model, examples) == pytest.approx(mean, rel=1e-5)
    for name in ("RANK", "LOCAL_RANK"):  # a second process that takes all rows, as under FSDP
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert validation_loss(model, examples) == pytest.approx(mean, rel=1e-5)
    one_by_one = [ids.tolist() for _, ids in trained_logits(model, examples, tokens=1)]
    assert one_by_one == [[i for i in row["labels"] if i != -100] for row in examples]
    with model.disable_adapter():
        assert abs(validation_loss(model, examples) - mean) > 0.1
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_validation_loss_is_computed_as_training_computes(tmp_path, mistral_tokenizer, dtype):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base(tmp_path, mistral_tokenizer), dtype=dtype
    )
    examples, seen = encode_rows([{"prompt": "p", "completion": "c"}], mistral_tokenizer), []
    kind = device().partition(":")[0]
    model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled(kind)))
    validation_loss(model, examples)
    assert seen == [dtype == torch.bfloat16]


@pytest.mark.parametrize(("vocabulary", "tokens"), [(30_000, 4096), (131_072, 1024)])
def test_fewer_tokens_go_at_once_where_a_vocabulary_is_large(vocabulary, tokens):
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = MistralConfig(vocab_size=vocabulary, intermediate_size=8, **shape)
    assert evaluation_tokens(AutoModelForCausalLM.from_config(config)) == tokens


def test_batches_hold_rows_of_like_length_and_no_more_tokens_than_asked_for():
    assert batches([5, 1, 4, 2, 9], 8) == [[1, 3], [2], [0], [4]]
    assert batches([3, 3], 6) == [[0, 1]] and batches([3, 3], 5) == [[0], [1]]


@pytest.mark.parametrize(
    ("config", "token"),
    [
        (MistralConfig(num_key_value_heads=2, head_dim=32), 2 * 3 * 2 * 32 * 4),
        (GPTNeoXConfig(), 2 * 3 * 4 * 16 * 4),  # as many keys as heads, as wide as it follows
    ],
)
def test_keys_and_values_are_counted_by_the_models_own_shape(config, token, monkeypatch):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    config.update(shape | {"intermediate_size": 64, "vocab_size": 32})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    monkeypatch.setattr("finetune.answers.free_memory_size", lambda: 3 * 1000 * token / 2**30)
    assert cache_tokens(model) in (999, 1000)
    monkeypatch.setattr("finetune.answers.free_memory_size", lambda: 3 * 500 * token / 2**30)
    assert cache_tokens(model.to(torch.bfloat16)) in (999, 1000)


def test_answers_are_batched_by_the_memory_that_is_free(tmp_path, mistral_tokenizer, monkeypatch):
    model = tiny_tuned(tiny_base(tmp_path, mistral_tokenizer))
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, fp32
    monkeypatch.setattr("finetune.answers.free_memory_size", lambda: 3 * 1000 * token / 2**30)
    assert cache_tokens(model) in (999, 1000)
    seen = []
    monkeypatch.setattr(
        "finetune.answers._generate",
        lambda m, t, batch, new: seen.append(len(batch)) or [[2]] * len(batch),
    )
    generate_answers(model, mistral_tokenizer, ["Hi"] * 25, 90)  # 10 + 90 tokens each
    assert sum(seen) == 25 and max(seen) in (9, 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"report_to": "wandb"}, "report_to = 'wandb' needs a package.*%pip install wandb"),
        ({"report_to": "trackio"}, "report_to = 'trackio' needs a package.*%pip install trackio"),
        ({"target_modules": []}, "target_modules = "),
        ({"early_stopping_patience": -1}, "early_stopping_patience = -1"),
    ],
)
def test_a_mistaken_option_is_told_early(settings, change, words):
    with pytest.raises(UserError, match=re.compile(words, re.S)):
        settings(**change)


def test_the_options_are_off_by_default(settings):
    cfg = settings(target_modules="all-linear")
    assert cfg.target_modules == "all-linear" and settings().target_modules == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert cfg.keep_best and not (
        cfg.use_rslora or cfg.use_dora or cfg.neftune_noise_alpha or cfg.early_stopping_patience
    )


def test_curves_are_a_picture_of_the_log(tmp_path):
    image = plot_curves(LOG, tmp_path / "curves.png", "run")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" == image.data[:4]
    assert history(LOG, "eval_loss") == ([0, 5], [6.0, 1.25])


def test_answers_are_greedy_whatever_the_base_models_authors_recommend(nf4_model, smollm_tokenizer):
    model = nf4_model(layers=30)
    plain = generate_answers(model, smollm_tokenizer, ["Count: one one one one"], 12)
    odd = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "min_new_tokens": 12}
    config = model.generation_config
    for name, value in odd.items():
        setattr(config, name, value)
    assert generate_answers(model, smollm_tokenizer, ["Count: one one one one"], 12) == plain
    assert model.generation_config is config and config.repetition_penalty == 1.9


def test_decoding_alters_no_text(smollm_tokenizer):
    smollm_tokenizer = copy.deepcopy(smollm_tokenizer)
    for text in ("Yes , it 's fine .", "a  b", "do n't !"):
        ids = smollm_tokenizer(text)["input_ids"]
        for clean in (True, False):
            smollm_tokenizer.clean_up_tokenization_spaces = clean
            assert read_answer(smollm_tokenizer, ids).text == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Paris\n\n### End", "Paris"),
        (" Paris", "Paris"),
        (" Two words ### Endpoints are\n\n### End", "Two words ### Endpoints are"),
        (" a # b ## c\n\n\n d", "a # b ## c\n\n\n d"),
        (" ### E", "### E"),
        (" Paris\n\n### End \n", "Paris"),
    ],
)
def test_a_streamed_answer_never_shows_the_end_marker(smollm_tokenizer, capsys, text, shown):
    streamer = AnswerStreamer(smollm_tokenizer)
    streamer.put(torch.tensor([smollm_tokenizer("asked\n")["input_ids"]]))
    for token in smollm_tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.put(torch.tensor([smollm_tokenizer.eos_token_id]))
    streamer.end()
    assert capsys.readouterr().out == shown + "\n"


def test_what_is_asked_is_drawn_by_the_seed_and_long_references_are_told(
    settings, smollm_tokenizer, capsys
):
    rows = [{"prompt": f"q{n}", "completion": "word " * n} for n in range(1, 31)]
    rows.append({"prompt": "", "completion": "a whole text"})
    data = encode_rows(rows, smollm_tokenizer)
    cfg = settings(sample_rows=31, max_new_tokens=20)
    sample = draw_sample(data, smollm_tokenizer, cfg)
    assert len(sample) == 30
    # A word a token, and four for the end.
    longest = len(smollm_tokenizer(" " + "word " * 30 + "\n\n### End")["input_ids"]) + 1
    shown = capsys.readouterr().out
    fits = sum(
        len(smollm_tokenizer(f" {r['completion']}\n\n### End")["input_ids"]) < 20 for r in rows[:-1]
    )
    assert f"! {30 - fits} of the 30 references are longer than max_new_tokens = 20" in shown
    assert f"{longest} would hold all" in shown
    draw_sample(data, smollm_tokenizer, settings(sample_rows=30, max_new_tokens=longest - 1))
    assert "! 1 of the 30 references is longer than" in capsys.readouterr().out
    drawn = [settings(sample_rows=5, seed=seed, max_new_tokens=99) for seed in (1, 1, 2)]
    few = [draw_sample(data, smollm_tokenizer, each) for each in drawn]
    assert few[0] == few[1] != few[2] and capsys.readouterr().out == ""


def table_of(*pairs):
    rows = [{"prompt": f"q{n}", "completion": wanted} for n, (_, wanted) in enumerate(pairs)]
    answers = [Answer(answer, True) for answer, _ in pairs]
    return compare(rows, [Answer("", False)] * len(pairs), answers)


def test_one_spelling_of_a_character_is_as_right_as_another_and_words_need_no_spaces():
    table = table_of(("Caf\u00e9", "Cafe\u0301"), ("x", "y"))
    result = scores(table, {"before": 1.0, "after": 0.5})
    assert result["after"]["exact_match"] == result["after"]["f1"] == 0.5
    assert show_comparison(table, result).to_html().count("#d7f0dd") == 1
    assert words_in_common("東京です", "東京でした") == pytest.approx(2 * 3 / 9)
    assert words_in_common("กา", "กข") == pytest.approx(0.5)
    assert words_in_common("Tokyo is 東京", "Tokyo is 東") == pytest.approx(2 * 3 / 7)


def test_the_verdict_counts_right_and_wrong_and_shows_the_wrong_first():
    table = table_of(("a", "a"), ("b", "x"), ("c", "c"), ("d", "y"))
    result = scores(table, {"before": 1.0, "after": 0.5})
    assert verdict(table, result) == (
        "2 of 4 answers are exactly right (before: 0). The wrong ones are shown first."
    )
    page = show_comparison(table, result).to_html()
    places = [page.index(f">q{n}<") for n in (1, 3, 0, 2)]
    assert places == sorted(places)
    right = table_of(("a", "a"))
    assert verdict(right, {}) == "1 of 1 answers are exactly right (before: 0)."


def test_of_whole_texts_the_loss_alone_is_shown():
    table = table_of()
    result = scores(table, {"rows": 3, "before": 2.0, "after": 1.0})
    assert result["after"].keys() == {"validation_loss", "perplexity"} and result["rows"] == 0
    assert verdict(table, result) == "Loss on held-out texts: 2.000 before, 1.000 after."
    page = show_comparison(table, result).to_html()
    assert "3 held-out texts · loss (nats a token) 2.000 → 1.000" in page and "exact" not in page


@pytest.mark.parametrize(
    ("right", "of", "told"),
    [(199, 200, "99%"), (200, 200, "100%"), (1, 300, "1%"), (0, 300, "0%"), (2, 3, "67%")],
)
def test_all_and_nothing_are_said_of_all_and_nothing_alone(right, of, told):
    table = table_of(*[("a", "a")] * right, *[("b", "x")] * (of - right))
    result = scores(table, {"rows": 1234, "before": 1.0, "after": 0.5})
    lines = {line["score"]: line["after"] for line in score_lines(result)}
    assert lines["exact answers"] == lines["words in common (F1)"] == told
    assert lines["loss (nats a token), over 1,234 rows"] == "0.500"
    assert rows_of(result) == f"{of} held-out rows"


@pytest.mark.parametrize(
    ("loss", "told", "perplexity"),
    [
        (0.0004, "0.0004", "1"),
        (0.0144, "0.0144", "1.015"),
        (1.25, "1.250", "3.49"),
        (11.7236, "11.724", "123,451"),
        (30.0, "30.000", "1.069e+13"),
        (1000.0, "1000.000", "over 1e+300"),
    ],
)
def test_small_losses_and_large_perplexities_can_be_read(loss, told, perplexity):
    table = table_of(("a", "a"))
    lines = score_lines(scores(table, {"before": 9.0, "after": loss}))
    assert [line["after"] for line in lines[-2:]] == [told, perplexity]


def test_of_texts_and_questions_together_the_questions_are_asked(smollm_tokenizer, settings):
    rows = [{"prompt": "", "completion": f"t{n}"} for n in range(30)]
    rows += [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]
    data = datasets.Dataset.from_list(rows)
    for asked, many in ((2, 2), (50, 3)):
        found = draw_sample(data, smollm_tokenizer, settings(sample_rows=asked))
        assert len({row["prompt"] for row in found} - {""}) == len(found) == many
