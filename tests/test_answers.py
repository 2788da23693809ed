"""Sections 9 and 13: answers, and how they are scored."""

import pytest

import qlora_helpers as qlora


def test_a_batch_answers_as_each_prompt_does_alone(nf4_model, smollm_tokenizer):
    model = nf4_model()
    prompts = ["What is the capital of France?", "Hi", "Name three colours of the rainbow, and one animal."]
    together = qlora.generate_answers(model, smollm_tokenizer, prompts, 12)
    alone = [qlora.generate_answers(model, smollm_tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) == 3


def test_generating_leaves_the_model_in_its_mode(nf4_model, smollm_tokenizer):
    model = nf4_model()
    for mode in (True, False):
        model.train(mode)
        qlora.generate_answers(model, smollm_tokenizer, ["Hi"], 2)
        assert model.training is mode


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (" Paris\n\n### End</s>", qlora.Answer("Paris", True)),
        (" Paris\n\n### End</s></s></s>", qlora.Answer("Paris", True)),
        (" Paris\n\n### End", qlora.Answer("Paris", False)),
        (" ### End of the road</s>", qlora.Answer("### End of the road", True)),
        ("</s>", qlora.Answer("", True)),
    ],
)
def test_an_answer_ends_at_eos_and_loses_only_its_own_marker(mistral_tokenizer, generated, answer):
    ids = mistral_tokenizer(generated, add_special_tokens=False)["input_ids"]
    assert qlora.read_answer(mistral_tokenizer, ids) == answer


ROWS = [{"prompt": f"p{i}", "completion": f" c{i} "} for i in range(4)]
BEFORE = [qlora.Answer("no", False)] * 4
AFTER = [qlora.Answer("c0", True), qlora.Answer("c1", True), qlora.Answer("C2", True), qlora.Answer("c3", False)]
LOG = [{"step": 0, "eval_loss": 6.0}, {"step": 5, "loss": 3.0}, {"step": 5, "eval_loss": 1.25}]


def test_scores_count_exact_answers_and_those_that_stopped():
    result = qlora.scores(qlora.compare(ROWS, BEFORE, AFTER), LOG)
    assert result["rows"] == 4
    assert result["before"] == {"exact_match": 0.0, "stopped": 0.0, "validation_loss": 6.0}
    assert result["after"] == {"exact_match": 0.75, "stopped": 0.75, "validation_loss": 1.25}


def test_the_table_shows_the_scores_and_keeps_html_out():
    table = qlora.compare(
        [{"prompt": "<b>x</b>", "completion": "y"}], [qlora.Answer("a", True)], [qlora.Answer("y", True)]
    )
    html = qlora.show_comparison(table, qlora.scores(table, LOG)).to_html()
    assert "1 held-out rows · exact 0% → 100%" in html and "validation loss 6.000 → 1.250" in html
    assert "&lt;b&gt;x" in html and "<b>x" not in html


def test_curves_are_a_picture_of_the_log(tmp_path):
    image = qlora.plot_curves(LOG, tmp_path / "curves.png", "run")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" == image.data[:4]
    assert qlora.history(LOG, "eval_loss") == ([0, 5], [6.0, 1.25])
