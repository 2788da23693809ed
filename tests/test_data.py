"""Section 6: rows are read whole or refused with their place, and held out by their own hash."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune.data import (
    KEPT,
    RowReader,
    at_most,
    read_rows,
    share_held_out,
    split_rows,
)
from finetune.fields import LONGEST_LINE, UNSEEN
from finetune.notes import data_notes
from qlora_helpers import UserError

GOOD = b'{"prompt": "Hi", "completion": "Hello"}'
many = hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def read(settings, tmp_path_factory):
    """Reads some files as the notebook does; settings can be changed."""
    out = str(tmp_path_factory.mktemp("out"))
    return lambda files, **changes: read_rows(
        settings(data_files=str(files), output_dir=out, **changes)
    )


def texts(rows):
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def chat(*turns):
    return json.dumps(
        {"messages": [{"role": role, "content": text} for role, text in turns]}
    ).encode()


MISTAKES = [
    (b'{"prompt": "a", "completion": "b"', "broken JSON: Expecting ',' delimiter at column 34"),
    (b"[1, 2]", "not an object: each line must be"),
    (b'{"prompt": "a"}', "no 'completion': its keys are 'prompt'"),
    (b'{"prompt": "a", "completion": null}', "'completion' is null: it must be text in quotes"),
    (b'{"prompt": {}, "completion": "b"}', "'prompt' is an object: "),
    (b'{"prompt": " \\n ", "completion": "b"}', "'prompt' is empty"),
    (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "the same key stands twice"),
    (b'{"prompt": "a", "completion": NaN}', "'completion' is NaN: it must be text"),
    (b'{"prompt": "a", "completion": "\\ud800"}', "'completion' holds half of a surrogate pair"),
    (b'{"prompt": "caf\xe9", "completion": "b"}', "not UTF-8: byte 16"),
]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        *MISTAKES,
        (b'"text"', "not an object"),
        (b'{"prompt": ["a"], "completion": "b"}', "a turn is no object with 'role'"),
        (b'{"prompt": "a", "completion": -Infinity}', "'completion' is -Infinity"),
        (b'{"prompt": {"text": "a"}, "completion": "b"}', "'prompt' is an object"),
        (b'{"prompt": "a", "completion": true}', "'completion' is true or false"),
        (b'{"prompt": "\\udc4b", "completion": "b"}', "'prompt' holds half of a surrogate pair"),
        (b"{}", "no 'prompt': its keys are none"),
        (b'{"question": "a", "reply": "b"}', "no 'answer': its keys are 'question', 'reply'"),
        (b'{"instruction": "a", "input": [3], "output": "b"}', "'input' is a list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', "longer than 1,048,576 bytes"),
        (b'{"messages": {"role": "user"}}', "'messages' is no conversation"),
        (chat(("user", "a")), "no turn is the assistant's"),
        (chat(("user", "a"), ("narrator", "b")), "a turn's 'role' is none of"),
        (chat(("tool", "a"), ("user", "b"), ("assistant", "c")), "tool calls"),
        (chat(("user", "a"), ("system", "b")), "no turn is the assistant's"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "a system turn comes after"),
        (chat(("assistant", "a"), ("user", "b")), "the assistant speaks first"),
        (chat(("user", None), ("assistant", "b")), "a turn's 'content' is null"),
    ],
)
def test_a_bad_line_is_told_with_file_line_and_reason(tmp_path, read, line, reason):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "*.jsonl")
    assert f"rows.jsonl:3: {reason}" in str(caught.value)
    assert line[:20].decode("utf-8", "replace") in str(caught.value)


def test_ten_different_mistakes_appear_in_one_run_of_the_cell(tmp_path, settings, notebook):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([GOOD, *(line for line, _ in MISTAKES)]))
    cfg = settings(data_files=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path))
    cell = next(text for c in notebook["cells"] if "read_rows" in (text := "".join(c["source"])))
    with pytest.raises(UserError) as caught:
        exec(cell, {"cfg": cfg})
    for number, (_, reason) in enumerate(MISTAKES, start=2):
        assert f"rows.jsonl:{number}: {reason}" in str(caught.value)


def test_bad_lines_are_counted_by_kind_and_all_are_written_down(tmp_path, read):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, *[b"{"] * 12]))
    (tmp_path / "b.jsonl").write_bytes(b'"nonsense"\n5')
    for _ in range(2):  # the second time, what the first wrote down is not written down again
        with pytest.raises(UserError) as caught:
            read(tmp_path / "*.jsonl")
    text = str(caught.value)
    assert text.startswith("14 lines cannot be used (12 × broken JSON; 2 × not an object)")
    shown = [line.split(": ")[0] for line in text.splitlines() if "•" in line]
    assert shown == [f"  • a.jsonl:{n}" for n in range(2, 12)]
    rejected = text.partition("All are in ")[2].splitlines()[0]
    lines = [json.loads(line) for line in Path(rejected).read_text().splitlines()]
    assert [line["line"] for line in lines] == [
        *(f"a.jsonl:{n}" for n in range(2, 14)),
        "b.jsonl:1",
        "b.jsonl:2",
    ]
    assert (lines[-1]["reason"].partition(":")[0], lines[-1]["text"]) == ("not an object", "5")


def test_of_very_many_bad_lines_the_first_are_written_down_and_that_is_said(tmp_path, read):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([b"{" + b"x" * 2000, *[b"{"] * KEPT]))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows.jsonl")
    told = re.search(r"10,001 lines cannot .* The first 10,000 are in (.*)", str(caught.value))
    lines = Path(told[1]).read_text(encoding="utf-8").splitlines()
    assert len(lines) == KEPT and json.loads(lines[-1])["line"] == "rows.jsonl:10000"
    assert json.loads(lines[0])["text"] == "{" + "x" * 999


def test_bad_lines_can_be_skipped_with_a_count_and_none_is_reported_later(tmp_path, read, capsys):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([b"{", GOOD, b"7"]))
    rows = read(tmp_path / "rows.jsonl", on_bad_rows="skip")
    assert texts(rows) == [json.loads(GOOD)] and rows["where"][0] == "rows.jsonl:2"
    out = capsys.readouterr().out
    assert "Skipped: 2 lines cannot be used (1 × broken JSON; 1 × not an object)" in out
    assert "rows.jsonl:1: broken JSON" in out and "rows.jsonl:3: not an object" in out
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    read(tmp_path / "rows.jsonl")
    assert "Skipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "form", "prompt"),
    [
        (b'{"prompt": "p", "completion": "c", "id": 7}', "prompt/completion", "p"),
        (b'{"question": "p", "answer": "c"}', "question/answer", "p"),
        (b'{"instruction": "p", "input": "", "output": "c"}', "instruction/output", "p"),
        (b'{"instruction": "p", "input": "i", "output": "c"}', "instruction/output", "p\n\ni"),
        (b'{"instruction": "p", "input": null, "output": "c"}', "instruction/output", "p"),
        (b'{"context": "i", "question": "p", "answer": "c"}', "question/answer", "i\n\np"),
        (
            b'{"question": "q", "answer": "a", "prompt": "p", "completion": "c"}',
            "prompt/completion",
            "p",
        ),
        (chat(("user", "p"), ("assistant", "c")), "messages", "p"),
        (
            chat(("system", "s"), ("user", "p"), ("assistant", "c")),
            "messages",
            "System: s\n\nUser: p",
        ),
        (
            chat(("user", "p"), ("assistant", "a"), ("user", "q"), ("assistant", "c")),
            "messages",
            "User: p\n\nAssistant: a\n\nUser: q",
        ),
    ],
)
def test_other_formats_are_recognised_by_their_keys_and_said_aloud(
    tmp_path, read, capsys, line, form, prompt
):
    (tmp_path / "rows.jsonl").write_bytes(line)
    assert texts(read(tmp_path / "rows.jsonl")) == [{"prompt": prompt, "completion": "c"}]
    out = capsys.readouterr().out
    assert f"1 row ({form}) from rows.jsonl" in out and "!" not in out


@pytest.mark.parametrize("on_bad_rows", ["stop", "skip"])
def test_a_mix_of_formats_is_never_trained(tmp_path, read, on_bad_rows):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b'\n{"question": "a", "answer": "b"}')
    with pytest.raises(
        UserError,
        match=r"rows.jsonl:2: formats are mixed: this row is question/answer, those",
    ):
        read(tmp_path / "rows.jsonl", on_bad_rows=on_bad_rows)


MESSY = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            GOOD,
            b"",
            b" \t",
            b'{"prompt": "\\ud83d", "completion": "b"}',
            b"\xef\xbb\xbf" + GOOD,
            b"1" * 5000,
        ]
    ),
    st.builds(
        lambda at, junk: GOOD[:at] + junk + GOOD[at + 1 :],
        st.integers(0, len(GOOD)),
        st.binary(max_size=3),
    ),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(["prompt", "completion", "messages", "role", "content"]), inner
            )
            | st.lists(inner, max_size=3)
        ),
    ).map(lambda value: json.dumps(value).encode()),
)


@pytest.mark.slow
@many
@given(content=st.lists(MESSY, max_size=6).map(b"\n".join))
@example(content=b"\x00\xc2\x85\x00")  # U+0085 ends no line
def test_any_bytes_give_rows_or_located_errors(read, tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    content = GOOD + b"\n" + content  # else it may be taken for another kind of file
    file.write_bytes(content)
    reader = RowReader([file], file.with_name("fuzz.rejected.jsonl"))
    rows = list(reader)
    lines = [
        n
        for n, line in enumerate(content.split(b"\n"), 1)
        if line.removeprefix(b"\xef\xbb\xbf").strip()
    ]
    rejected = file.with_name("fuzz.rejected.jsonl")
    bad = rejected.read_text(encoding="utf-8").split("\n")[:-1] if reader.kinds else []
    places = [row["where"] for row in rows] + [json.loads(line)["line"] for line in bad]
    assert sorted(places) == sorted(f"fuzz.jsonl:{n}" for n in lines)
    assert all(row["prompt"].strip() and row["completion"].strip() for row in rows)
    try:
        assert len(read(file)) <= len(rows)
    except UserError as error:
        assert "fuzz.jsonl:" in str(error) if reader.kinds else not rows
    else:
        assert rows and not reader.kinds


def can_be_seen(text):
    return text.strip().strip(UNSEEN).strip()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15).filter(can_be_seen)


@pytest.mark.slow
@many
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4, unique=True),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    end=st.sampled_from([b"", b"\n", b"\n \n"]),
    ascii_only=st.booleans(),
)
def test_what_was_written_is_read(read, tmp_path_factory, pairs, newline, bom, end, ascii_only):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows]
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_bytes(bom + newline.join(lines) + end.replace(b"\n", newline))
    assert texts(read(file)) == rows


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, read):
    with (tmp_path / "rows.jsonl").open("wb") as stream:
        for n in range(15_000):
            stream.write(
                json.dumps({"prompt": f"{n} " * 100, "completion": f"{n} " * 50}).encode() + b"\n"
            )
        stream.write(b'"' + b"a" * 40_000_000)
    assert (tmp_path / "rows.jsonl").stat().st_size > 50_000_000
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    rows = read(tmp_path / "rows.jsonl", on_bad_rows="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 15_000
    assert peak < 12_000_000 and pa.total_allocated_bytes() - before < 2_000_000


def test_a_line_may_be_as_long_as_the_limit_and_no_longer(tmp_path, read, capsys):
    row = b'{"prompt": "a", "completion": "%s"}'
    longest = row % (b"b" * (LONGEST_LINE - len(row) + 2))
    assert len(longest) == LONGEST_LINE
    lines = [longest, longest.replace(b"bb", b"bbb", 1), longest * 3, GOOD]
    for number, newline in enumerate([b"\n", b"\r\n"]):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(newline.join(lines))
        rows = read(file, on_bad_rows="skip")
        assert list(rows["where"]) == [f"{file.name}:1", f"{file.name}:4"]
        out = capsys.readouterr().out
        assert all(f"{file.name}:{n}: longer than " in out for n in (2, 3))
        assert "2 lines cannot be used" in out


def test_files_are_read_by_name_whatever_the_folder_lists_first(tmp_path, read):
    """The order of rows, so the run itself, must be the same on every disk."""
    (tmp_path / "folder.jsonl").mkdir()
    for n in (7, 2, 11, 4, 9, 1, 12, 5, 3, 10, 8, 6):
        (tmp_path / f"{n:02}.jsonl").write_text(
            json.dumps({"prompt": f"p{n}", "completion": f"c{n}"})
        )
    assert list(read(tmp_path / "*.jsonl")["prompt"]) == [f"p{n}" for n in range(1, 13)]


def test_a_file_that_was_renamed_is_told_by_its_new_name(tmp_path, read):
    (tmp_path / "old.jsonl").write_bytes(GOOD)
    read(tmp_path / "*.jsonl")
    (tmp_path / "old.jsonl").rename(tmp_path / "new.jsonl")
    assert list(read(tmp_path / "*.jsonl")["where"]) == ["new.jsonl:1"]


def test_no_file_says_where_to_put_one(tmp_path, read):
    with pytest.raises(UserError, match=r"(?s)No file matches data_files = .*Put your JSONL there"):
        read(tmp_path / "*.jsonl")


def test_an_empty_file_is_told(tmp_path, read):
    (tmp_path / "rows.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"The files hold no rows: rows\.jsonl"):
        read(tmp_path / "*.jsonl")


def test_files_of_which_every_row_was_skipped_are_told_so(tmp_path, read, capsys):
    (tmp_path / "rows.jsonl").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"All rows were skipped, none is left: rows\.jsonl"):
        read(tmp_path / "*.jsonl", on_bad_rows="skip")
    assert (
        "Skipped: 1 line cannot be used (1 × no 'prompt'). All are in " in capsys.readouterr().out
    )
    (tmp_path / "rows.jsonl").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"This file is no data\. Nothing was trained\."):
        read(tmp_path / "*.jsonl")


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path, read):
    for n, folder in enumerate(["a", "b"]):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(
            json.dumps({"prompt": f"p{n}", "completion": "c"})
        )
    assert list(read(tmp_path / "**" / "*.jsonl")["where"]) == ["a/rows.jsonl:1", "b/rows.jsonl:1"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def test_exact_duplicates_are_dropped_with_a_count(tmp_path, read, capsys):
    rows = [("a", "b"), ("a", "c"), ("a", "b"), ("ab", ""), ("a", "b")]
    kept = read(write_rows(tmp_path / "rows.jsonl", [(p, c or "x") for p, c in rows]))
    assert list(kept["where"]) == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    assert "Dropped 2 exact duplicates." in capsys.readouterr().out
    many = [(f"p{n}", "x") for n in range(30)]
    kept = read(write_rows(tmp_path / "rows.jsonl", many + many[5:20]))
    assert list(kept["prompt"]) == [prompt for prompt, _ in many]


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            ("Say ### Answer: now", "Fine."),
            "1 row with a marker of the prompt format: rows.jsonl:1",
        ),
        (
            ("### Question: Who?", "Me."),
            "1 row with a marker of the prompt format: rows.jsonl:1",
        ),
        (
            ("What is it?", "No.\n### End"),
            "1 row with a marker of the prompt format: rows.jsonl:1",
        ),
        (
            ("The capital of Fra", "nce is Paris."),
            "1 row with a prompt that may end in the middle of a word: rows",
        ),
        (
            ("Who?", "Who? Me."),
            "1 row with a completion that begins with the whole prompt: rows.jsonl:1",
        ),
        (
            ("Who?\n", "Who? Me."),
            "1 row with a completion that begins with the whole prompt: rows.jsonl:1",
        ),
        (
            ("Who?", " Me."),
            "1 row with a completion that begins with a space, which is trained as a second one: r",
        ),
        (
            ("[INST] Who? [/INST]", "Me."),
            "1 row with another format's markers ([INST], <|im_start|>, …): rows.jsonl:1",
        ),
        (
            ("Who?", "Me.<|im_end|>"),
            "1 row with another format's markers ([INST], <|im_start|>, …): rows.jsonl:1",
        ),
        (("Who?", "Yes."), "95% of the completions are the same text"),
    ],
)
def test_what_looks_odd_is_told_with_its_line(tmp_path, read, capsys, row, note):
    same = "same" in note
    read(
        write_rows(
            tmp_path / "rows.jsonl",
            [row, *((f"Q{n}?", "Yes." if same else f"A{n}.") for n in range(18)), ("Z?", "No.")],
        )
    )
    out = capsys.readouterr().out
    assert f"! {note}" in out and out.count("!") == 1


def test_what_looks_odd_is_counted_and_its_first_lines_are_named():
    rows = [
        {"prompt": f"Fra{n}nce", "completion": f"is {n}", "where": f"a.jsonl:{n}"}
        for n in range(1, 8)
    ]
    rows += [{"prompt": f"{n}?", "completion": f"A{n}", "where": "b.jsonl:1"} for n in range(8)]
    (note,) = data_notes(as_dataset(rows))
    assert note.startswith("7 rows with a prompt that may end in the middle of a word: ")
    assert note.endswith(", ".join(f"a.jsonl:{n}" for n in range(1, 6)))


def ending(count, end, start=0):
    """Rows of which two in three, from one on, end in the same way."""
    ends = [end if n % 3 and n >= start else "." for n in range(count)]
    return as_dataset(
        [
            {"prompt": f"Q{n}?", "completion": f"A{n}{end}", "where": f"a.jsonl:{n}"}
            for n, end in enumerate(ends)
        ]
    )


def test_an_end_that_most_answers_share_is_told():
    (note,) = data_notes(ending(12, "\n[END OF THE REPLY]"))
    told = "8 rows with a completion that ends in '[END OF THE REPLY]', which is trained, too: "
    assert note == f"{told}a.jsonl:1, a.jsonl:2, a.jsonl:4, a.jsonl:5, a.jsonl:7"
    assert data_notes(ending(3, "\n[END OF THE REPLY]")) == data_notes(ending(12, "!")) == []
    (note,) = data_notes(ending(12_000, " [END]", start=2500))  # all are looked at, here and there
    assert note.endswith(": a.jsonl:2500, a.jsonl:2501, a.jsonl:2503, a.jsonl:2504, a.jsonl:2506")


def test_nine_answers_of_ten_that_are_the_same_are_told():
    rows = [{"prompt": f"Q{n}?", "completion": "Yes.", "where": "a.jsonl:1"} for n in range(10)]
    rows[3]["completion"] = "No."
    assert data_notes(as_dataset(rows)) == ["90% of the completions are the same text"]
    rows[4]["completion"] = "Perhaps."
    assert data_notes(as_dataset(rows)) == []


@pytest.mark.parametrize("prompt", ["Who is {}?", "Item {}", "Say {} in French"])
def test_answers_in_lower_case_are_not_odd_by_themselves(prompt):
    """Neither after a whole prompt, nor where they are the habit of rows by the thousand."""
    rows = [
        {"prompt": prompt.format(n), "completion": f"no {n}.", "where": "rows.jsonl:1"}
        for n in range(2100)
    ]
    assert data_notes(as_dataset(rows)) == []
    if not prompt.endswith("French"):
        rows += [row | {"completion": "N" + row["completion"]} for row in rows]
        assert data_notes(as_dataset(rows)) == []


def test_nothing_looks_odd_in_the_examples(read, capsys):
    read(Path(__file__).parents[1] / "data_examples" / "*.jsonl")
    assert "!" not in capsys.readouterr().out


def as_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def make_rows(n):
    return [
        {"prompt": f"question {i % (n * 3 // 4)}", "completion": f"answer {i}"} for i in range(n)
    ]


def test_adding_rows_moves_none_across_and_no_prompt_is_on_both_sides():
    more = make_rows(1000) + [{"prompt": f"new {i}", "completion": "x"} for i in range(500)]
    train, held = map(texts, split_rows(as_dataset(make_rows(1000)), 0.1))
    train_more, held_more = map(texts, split_rows(as_dataset(more), 0.1))
    assert all(row in train_more for row in train) and all(row in held_more for row in held)
    assert not {row["prompt"] for row in train_more} & {row["prompt"] for row in held_more}
    assert 0.07 < len(held) / 1000 < 0.13
    assert len(train) + len(held) == 1000


@pytest.mark.parametrize("fraction", [0.001, 0.5])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_small_data_always_has_something_on_both_sides(n, fraction):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(n)]
    assert all(map(len, split_rows(as_dataset(rows), fraction)))


def test_where_every_prompt_would_be_held_out_one_is_left_to_train_on():
    rows = as_dataset([{"prompt": str(i), "completion": "x"} for i in range(20)])
    held = split_rows(rows, 0.5)[1]
    assert len(held) > 2
    assert [len(part) for part in split_rows(held, 0.5)] == [1, len(held) - 1]


def test_one_row_alone_cannot_be_split():
    for count in (1, 5):
        with pytest.raises(UserError, match="at least two rows: one to learn from, one to test on"):
            split_rows(as_dataset([{"prompt": "a", "completion": "b"}] * count), 0.1)


def repeated(counts):
    """So many rows for each prompt, the completions all different."""
    rows = [(n, count) for n, count in enumerate(counts)]
    return as_dataset(
        [{"prompt": f"q{n}", "completion": f"{n} {i}"} for n, count in rows for i in range(count)]
    )


@pytest.mark.slow
def test_however_prompts_repeat_at_most_twice_the_share_is_held_out(capsys):
    chance = np.random.default_rng(0)
    for turn in range(400):
        counts = np.ceil(chance.pareto(chance.uniform(0.3, 2), chance.integers(1, 60))).astype(int)
        counts = np.minimum(counts, 2000) + (turn % 3 == 0)
        rows, fraction = repeated(counts), float(chance.choice([0.01, 0.1, 0.3, 0.5]))
        if len(rows) < 2:
            continue
        train, held = split_rows(rows, fraction)
        assert 1 <= len(held) <= max(1, 2 * fraction * len(rows)), counts
        assert len(train) >= 1 and len(train) + len(held) == len(rows)
        by_row = "held out one by one" in capsys.readouterr().out
        assert by_row or not {*train["prompt"]} & {*held["prompt"]}
        if by_row:
            assert counts.max() > min(2 * fraction * len(rows), len(rows) - 1)
            assert len(held) >= min(1, fraction * len(rows) / 4)


@pytest.mark.parametrize("others", [0, 1, 50])
def test_one_prompt_with_most_rows_is_split_row_by_row_and_said(capsys, others):
    train, held = split_rows(repeated([1000, *[1] * others]), 0.1)
    assert 70 < len(held) < 140 and "q0" in train["prompt"] and "q0" in held["prompt"]
    assert "! 1,000 rows ask the same: rows are held out one by one" in capsys.readouterr().out


def test_blanks_and_turns_of_one_talk_do_not_part_a_question(tmp_path, read):
    rows = [{"prompt": f"item {n}{end}", "completion": "x"} for n in range(60)
            for end in ("", " ", "\n")]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held = split_rows(read(tmp_path / "rows.jsonl"), 0.2)
    stripped = [{text.strip() for text in part["prompt"]} for part in (train, held)]
    assert not stripped[0] & stripped[1] and len(held) == 3 * len(stripped[1]) > 9
    talks = []
    for n in range(60):
        turns = []
        for step in range(3):
            turns += [("user", f"talk {n}, {step}?"), ("assistant", f"done {n} {step}")]
            talks.append(chat(*turns).decode())
    (tmp_path / "rows.jsonl").write_text("\n".join(talks))
    train, held = split_rows(read(tmp_path / "rows.jsonl"), 0.2)
    first = [{line.partition(":")[0] for line in part["key"]} for part in (train, held)]
    assert not first[0] & first[1] and len(held) == 3 * len(first[1]) > 9


def held(count, same=1):
    return as_dataset([{"prompt": f"p{n // same}", "completion": str(n)} for n in range(count)])


@pytest.mark.parametrize("same", [1, 5])
def test_the_rows_that_choose_are_not_the_rows_that_are_scored(settings, capsys, same):
    rows = held(200, same)
    validation, test = share_held_out(rows, settings())
    texts = [{*part["completion"]} for part in (validation, test)]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 200
    assert not {*validation["prompt"]} & {*test["prompt"]}
    assert min(len(validation), len(test)) > 60
    said = capsys.readouterr().out
    assert f"{len(validation)} choose the epoch to keep, {len(test)} others are scored" in said
    more = share_held_out(held(400, same), settings())
    assert all(was <= {*now["completion"]} for was, now in zip(texts, more, strict=True))


def test_the_rows_that_were_held_out_fall_into_two_halves(settings):
    """Their own hashes are the lowest of all, by which they were held out."""
    rows = as_dataset([{"prompt": f"p{n}", "completion": str(n)} for n in range(1000)])
    parts = share_held_out(split_rows(rows, 0.1)[1], settings())
    assert all(30 < len(part) < 70 for part in parts)


@pytest.mark.parametrize(
    ("count", "changes", "said"),
    [
        (
            39,
            {},
            "39 rows held out: 39 both choose the epoch and are scored, being fewer than 40.",
        ),
        (200, {"keep_best": False}, "200 rows held out: 200 are scored."),
        (1, {"keep_best": False}, "1 row held out: it is scored, and says little."),
        (
            1,
            {},
            "1 row held out: it both chooses the epoch and is scored, and says little.",
        ),
    ],
)
def test_where_rows_are_few_or_nothing_is_chosen_all_are_scored(
    settings, capsys, count, changes, said
):
    for part in share_held_out(held(count), settings(**changes)):
        assert part["completion"] == [str(n) for n in range(count)]
    assert said in capsys.readouterr().out
    early = settings(**changes | {"early_stopping_patience": 2})
    validation, _ = share_held_out(held(count), early)
    assert (len(validation) < count) == (count >= 40)


def test_at_most_two_thousand_are_evaluated_drawn_by_the_seed(settings):
    rows = held(9000)
    drawn = [share_held_out(rows, settings(seed=seed)) for seed in (1, 1, 2)]
    assert [len(part) for part in drawn[0]] == [2000, 2000]
    numbers = [[int(text) for text in test["completion"]] for _, test in drawn]
    assert numbers[0] == numbers[1] != numbers[2]
    assert all(found == sorted(found) for found in numbers)
    assert max(numbers[0]) > 8500 and min(numbers[0]) < 500
    assert at_most(3, rows.select(range(3)), 1)["completion"] == ["0", "1", "2"]
