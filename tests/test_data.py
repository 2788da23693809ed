"""Section 6: rows are read whole or refused with their place, and held out by their own hash."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qlora_helpers as qlora

GOOD = b'{"prompt": "Hi", "completion": "Hello"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "completion": "b"', "broken JSON: Expecting ',' delimiter at column 34"),
        (b"[1, 2]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"prompt": "a"}', "no 'completion'; its keys are 'prompt'"),
        (b'{"question": "a", "answer": "b"}', "no 'prompt'; its keys are 'question', 'answer'"),
        (b'{"prompt": "a", "completion": null}', "'completion' is NoneType, must be text in quotes"),
        (b'{"prompt": 5, "completion": "b"}', "'prompt' is int"),
        (b'{"prompt": " \\n ", "completion": "b"}', "'prompt' is empty"),
        (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "the same key stands twice"),
        (b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "'completion' holds half of a surrogate pair"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "byte 16 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_told_with_file_line_and_reason(tmp_path, line, reason):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(qlora.UserError) as caught:
        qlora.read_rows(str(tmp_path / "*.jsonl"))
    assert f"rows.jsonl:3: {reason}" in str(caught.value)
    assert line[:20].decode("utf-8", "replace") in str(caught.value)


def test_all_bad_lines_are_told_at_once_the_first_ten_and_a_count(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, *[b"{"] * 12]))
    (tmp_path / "b.jsonl").write_bytes(b"nonsense")
    with pytest.raises(qlora.UserError) as caught:
        qlora.read_rows(str(tmp_path / "*.jsonl"))
    text = str(caught.value)
    assert text.startswith("13 line(s) cannot be used")
    assert "a.jsonl:2:" in text and "a.jsonl:11:" in text and "a.jsonl:12:" not in text
    assert text.endswith("… and 3 more")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_byte_order_marks_line_ends_and_blank_lines_change_nothing(tmp_path, newline, bom, end):
    rows = [{"prompt": "a\u2028b", "completion": "c\x85d"}, {"prompt": "é 🙂", "completion": " x\n"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (tmp_path / "rows.jsonl").write_bytes(bom + newline.join(lines) + end.replace(b"\n", newline))
    assert qlora.read_rows(str(tmp_path / "rows.jsonl")) == rows


@given(st.binary())
def test_any_bytes_give_a_row_or_a_reason(line):
    try:
        row = qlora.parse_row(line)
    except ValueError as error:
        assert str(error)
    else:
        assert set(row) == {"prompt", "completion"}


def test_no_file_says_where_to_put_one(tmp_path):
    with pytest.raises(qlora.UserError, match=r"No file matches data_files = .*\n.*Put your JSONL there"):
        qlora.read_rows(str(tmp_path / "*.jsonl"))


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n")
    with pytest.raises(qlora.UserError, match=r"The files hold no rows: rows\.jsonl"):
        qlora.read_rows(str(tmp_path / "*.jsonl"))


def make_rows(n):
    return [{"prompt": f"question {i % (n * 3 // 4)}", "completion": f"answer {i}"} for i in range(n)]


def test_adding_rows_moves_none_across_and_no_prompt_is_on_both_sides():
    train, held = qlora.split_rows(make_rows(1000), 0.1)
    train_more, held_more = qlora.split_rows(
        make_rows(1000) + [{"prompt": f"new {i}", "completion": "x"} for i in range(500)], 0.1
    )
    assert all(row in train_more for row in train) and all(row in held_more for row in held)
    assert not {row["prompt"] for row in train_more} & {row["prompt"] for row in held_more}
    assert 0.07 < len(held) / 1000 < 0.13
    assert len(train) + len(held) == 1000


@pytest.mark.parametrize("fraction", [0.001, 0.5])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_small_data_always_has_something_on_both_sides(n, fraction):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(n)]
    assert all(qlora.split_rows(rows, fraction))


def test_one_prompt_alone_cannot_be_split():
    with pytest.raises(qlora.UserError, match="at least two rows with different prompts"):
        qlora.split_rows([{"prompt": "a", "completion": "b"}] * 5, 0.1)
