"""Conversations, whole texts and long held-out rows, from their files to the report."""

import json

import child
import pytest


def talk(*texts, **more):
    roles = ["system", *["user", "assistant"] * len(texts)]
    turns = zip(roles, texts, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in turns]} | more


KINDS = {
    "talks": [talk("Be brief.", f"{n}?", f"{n}!", f"{n}.", f"{n};", id=n) for n in range(30)],
    "texts": [{"text": f"Log line {n}: pump {n % 3} restarted."} for n in range(30)],
    "long": [
        {"prompt": f"Say {n}" + " again" * 90 * (n > 3), "completion": f"{n}"} for n in range(30)
    ],
}


@pytest.mark.parametrize(
    "kind", [k if k == "talks" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_a_run_over_each_kind_of_rows_ends_in_its_report(tiny, tmp_path, kind):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, KINDS[kind])))
    settings = tiny(tmp_path, data_files=str(tmp_path / "rows.jsonl"), max_length=64, epochs=1)
    code, shown = child.run(settings, tmp_path / "log")
    assert code == 0, shown
    run = tmp_path / "outputs" / "faults"
    lines = (run / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines if line]
    result = json.loads((run / "final_model" / "run.json").read_text())["results"]
    if kind == "talks":
        assert "Not used: 'id' in 30" in shown and len(answers) == result["rows"] == 2
        n = answers[0]["reference"][:-1]
        assert answers[0] | {"before": 0, "after": 0} == {
            "prompt": f"System: Be brief.\n\nUser: {n}?\n\nAssistant: {n}!\n\nUser: {n}.",
            "reference": f"{n};", "before": 0, "after": 0,
            "stopped_before": answers[0]["stopped_before"],
            "stopped_after": answers[0]["stopped_after"],
        }  # fmt: skip
        assert "[EOS]### Question: " in shown
    if kind == "texts":
        assert "These rows are whole texts: nothing is asked" in shown
        assert "Loss on held-out texts: " in shown and "exact" not in shown
        assert answers == [] and result["after"].keys() == {"validation_loss", "perplexity"}
        assert "exact" not in (run / "report.html").read_text().partition("</style>")[2]
    if kind == "long":
        assert {row["prompt"] for row in answers} < {f"Say {n}" for n in range(4)}
        assert "Left out: 26." in shown and "1 row held out" in shown
