"""Row shapes and files as people have them, each with the exact text that is trained, or told."""

import datetime
import gzip
import io
import json
import os
import re
import sys
import types
import zipfile

import openpyxl
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune.data import RowReader, read_rows, split_rows
from finetune.fields import UNSEEN
from finetune.lengths import fit_length, keys_together
from finetune.readers import encoding_of
from finetune.sources import find_files
from finetune.tokens import encode_rows, training_text
from qlora_helpers import UserError


@pytest.fixture
def read(settings, tmp_path):
    """The training texts of some files, read as the notebook reads them."""

    def texts(names, **changes):
        cfg = settings(data_files=names, output_dir=str(tmp_path / "out"), **changes)
        return [training_text(row) for row in read_rows(cfg)]

    return texts


def qa(question, answer, system=""):
    start = f"### System: {system}\n\n" if system else ""
    return f"{start}### Question: {question}\n\n### Answer: {answer}\n\n### End"


def said(*turns, key="messages", role="role", text="content", **more):
    return {key: [{role: who, text: what} for who, what in turns]} | more


Q, A = ("user", "q"), ("assistant", "a")
LONG = [Q, A, ("user", "q2"), ("assistant", "a2")]
TWO = qa("q", "a") + "[EOS]" + qa("q2", "a2")
PARTS = [{"type": "text", "text": "q"}]
VALUES = [{"type": "text", "value": "q"}]
IMAGE = [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]
MARKED = [
    ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}),
    ({"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2", "weight": 1}),
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}

TRAINED = {
    "one role in two spellings": (
        {"messages": [{"role": "user", "from": "human", "content": "q"}, *said(A)["messages"]]},
        qa("q", "a"),
    ),
    "a system text under the other name": (
        {"messages": [{"role": "system", "content": None, "value": "s"}, *said(Q, A)["messages"]]},
        qa("q", "a", "s"),
    ),
    "an input that is a list of nothing": (
        {"instruction": "Reverse it", "input": "[]", "output": "{}"},
        qa("Reverse it\n\n[]", "{}"),
    ),
    "tools that are none, in a table's words": (
        {"prompt": "q", "completion": "a", "tools": "[]", "images": "{}"},
        qa("q", "a"),
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, qa("q", "a")),
    "numbers": ({"prompt": 5, "completion": 2.50}, qa("5", "2.5")),
    "a system text beside": ({"prompt": "q", "completion": "a", "system": "s"}, qa("q", "a", "s")),
    "a rejected answer that is none": (
        {"prompt": "q", "completion": "a", "rejected": None},
        qa("q", "a"),
    ),
    "Gemini's roles": (said(Q, ("model", "a")), qa("q", "a")),
    "two text parts": (
        {"messages": [{"role": "user", "content": [*PARTS, *VALUES]}, *said(A)["messages"]]},
        qa("qq", "a"),
    ),
    "an answer that is not learned before one that is": (
        {"messages": [*MARKED[0], said(("assistant", "b"))["messages"][0]]},
        qa("q", "a") + "[EOS]### Answer: b\n\n### End",
    ),
    "a weight as a table has it": (
        {"messages": [*said(Q)["messages"], said(A)["messages"][0] | {"weight": 1.0}]},
        qa("q", "a"),
    ),
    "lists of messages": (
        {"prompt": said(Q)["messages"], "completion": said(A)["messages"]},
        qa("q", "a"),
    ),
    "a list that ends in an earlier answer": (
        {"prompt": said(*LONG[:3])["messages"], "completion": said(LONG[3])["messages"]},
        TWO,
    ),
    "messages": (said(Q, A), qa("q", "a")),
    "a system turn": (said(("system", "s"), Q, A), qa("q", "a", "s")),
    "a developer turn": (said(("developer", "s"), Q, A), qa("q", "a", "s")),
    "an empty system turn": (said(("system", " "), Q, A), qa("q", "a")),
    "a system turn and no question": (
        said(("system", "s"), A),
        "### System: s\n\n### Answer: a\n\n### End",
    ),
    "many turns": (said(*LONG), TWO),
    "text parts": ({"messages": [{"role": "user", "content": PARTS}, said(A)["messages"][0]]},
                   qa("q", "a")),
    "LLaMA-Factory's parts": (
        {"messages": [{"role": "user", "content": VALUES}, said(A)["messages"][0]]},
        qa("q", "a"),
    ),
    "turns of one role": (said(Q, ("user", "r"), A, ("assistant", "b")), qa("q\n\nr", "a\n\nb")),
    "a question that nobody answers": (said(*LONG, ("user", "q3")), TWO),
    "a system field beside turns": (said(Q, A, system="s"), qa("q", "a", "s")),
    "no tools": (said(Q, A, tools=[]), qa("q", "a")),
    "ShareGPT": (
        said(("human", "q"), ("gpt", "a"), key="conversations", role="from", text="value"),
        qa("q", "a"),
    ),
    "ShareGPT with a system": (
        said(("system", "s"), ("human", "q"), ("gpt", "a"),
             key="conversations", role="from", text="value"),
        qa("q", "a", "s"),
    ),
    "conversations with roles": (said(*LONG, key="conversations"), TWO),
    "Alpaca": ({"instruction": "q", "input": "i", "output": "a"}, qa("q\n\ni", "a")),
    "Alpaca without input": ({"instruction": "q", "input": " ", "output": "a"}, qa("q", "a")),
    "Alpaca with its prompt": (
        {"instruction": "q", "input": "", "output": "a", "text": "Below is…"},
        qa("q", "a"),
    ),
    "Alpaca with system and history": (
        {"instruction": "q2", "input": "", "output": "a2", "system": "s", "history": [["q", "a"]]},
        qa("q", "a", "s") + "[EOS]" + qa("q2", "a2"),
    ),
    "an empty history": ({"instruction": "q", "output": "a", "history": []}, qa("q", "a")),
    "Dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        qa("q\n\nc", "a"),
    ),
    "Dolly without context": ({"instruction": "q", "context": "", "response": "a"}, qa("q", "a")),
    "question and answer": ({"question": "q", "answer": "a"}, qa("q", "a")),
    "question, context, answer": (
        {"question": "q", "context": "c", "answer": "a"},
        qa("c\n\nq", "a"),
    ),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
                 qa("q", "a", "s")),
    "query and response": ({"query": "q", "response": "a", "type": "x"}, qa("q", "a")),
    "prompt and response": ({"prompt": "q", "response": "a"}, qa("q", "a")),
    "input and output": ({"input": "q", "output": "a"}, qa("q", "a")),
    "a whole text": ({"text": "Once upon a time."}, "Once upon a time."),
    "a text and no answer": ({"text": "q", "response": " "}, "q"),
    "a column of NaN": ({"prompt": "q", "completion": "a", "score": float("nan")}, qa("q", "a")),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_what_a_row_means_is_trained(tmp_path, read, name, kind):
    row, text = TRAINED[name]
    rows = [row, row | {"where_from": "x"}]  # one more column, which is told and drops nothing
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        if name in (
            "numbers",
            "lists of messages",
            "no tools",
            "text parts",
            "LLaMA-Factory's parts",
            "two text parts",
        ):
            return  # a column has one type
        pandas.DataFrame([row]).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    assert read(str(file)) == [text]


TOLD = {
    "tool calls": (
        {"messages": [*said(Q)["messages"], CALL, *said(A)["messages"]]},
        "tool calls: ",
    ),
    "a tool's turn": (said(Q, ("tool", "x"), A), "tool calls: "),
    "tool definitions": (said(Q, A, tools=[{"name": "f"}]), "tool definitions ('tools')"),
    "an image": (
        {"messages": [{"role": "user", "content": IMAGE}, *said(A)["messages"]]},
        "a turn holds a part that is no text: 'image_url'",
    ),
    "images beside": ({"prompt": "q", "completion": "a", "images": ["x.png"]}, "images ('images')"),
    "a context without a place": (
        {"prompt": "q", "completion": "a", "context": "c"},
        "'context' beside prompt/completion, which has no place for it: put it into the text",
    ),
    "a history without a place": (said(Q, A, history=[["x", "y"]]), "'history' beside messages"),
    "preferences": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "preferences ('rejected'): this notebook needs one answer",
    ),
    "unpaired preferences": (
        {"prompt": "q", "completion": "a", "label": False},
        "'label' is true or false: are these preferences (KTO)?",
    ),
    "unpaired preferences over turns": (said(Q, A, label=True), "'label' is true or false"),
    "preferences over turns": (said(Q, chosen="a", rejected="b"), "preferences ('rejected')"),
    "two system texts": (said(("system", "s"), Q, A, system="t"), "two system texts"),
    "a system turn in the middle": (
        said(Q, ("system", "s"), A),
        "a system turn comes after others",
    ),
    "an assistant that begins": (said(A, *LONG), "the assistant speaks first"),
    "no answer": (said(Q), "no turn is the assistant's"),
    "an answer of nothing": (said(Q, ("assistant", "")), "a turn's 'content' is empty"),
    "an unknown role": (said(Q, ("narrator", "x"), A), "a turn's 'role' is none of"),
    "half a weight": (
        {"messages": [MARKED[0][0], MARKED[0][1] | {"weight": 0.5}]},
        "a turn of the assistant has 'weight': 0.5, which cannot be done",
    ),
    "a question to train": (
        {"messages": [MARKED[0][0] | {"train": True}, MARKED[1][1]]},
        "a turn of the user has 'train': True, which cannot be done",
    ),
    "nothing to train": ({"messages": [*MARKED[0]]}, "none of the answers is to be trained"),
    "unknown keys": (
        {"ask": "q", "reply": "a"},
        "no 'prompt': its keys are 'ask', 'reply'; the nearest is prompt/completion",
    ),
    "nearly known keys": ({"instruction": "q", "answer": "a"}, "no 'output': its keys are"),
    "an image in a part of text": (
        said(("user", [PARTS[0] | {"image": "x.png"}]), A),
        "a turn holds a part that is no text: 'image'",
    ),
    "two contents": (
        {"messages": [{"role": "user", "content": "q", "value": "other"}, *said(A)["messages"]]},
        "a turn has 'content' and 'value', which differ",
    ),
    "two roles": (
        {"messages": [{"role": "user", "from": "gpt", "content": "q"}, *said(A)["messages"]]},
        "a turn has 'role' and 'from', which differ",
    ),
    "audio in a turn": (
        {"messages": [{"role": "user", "content": "q", "audio": "x"}, *said(A)["messages"]]},
        "audio: this notebook trains on text alone",
    ),
    "a talk that is nested too deeply": (
        {"messages": "[" * 100_000},
        "'messages' is broken JSON in a cell",
    ),
    "a weight that is no text at all": (
        {"messages": [MARKED[0][0], MARKED[0][1] | {"weight": "\ud800"}]},
        r"a turn of the assistant has 'weight': \ud800, which cannot be done",
    ),
    "preferences in a table's words": (
        {"prompt": "q", "completion": "a", "label": "False"},
        "'label' is true or false: are these preferences (KTO)?",
    ),
    "nothing that can be seen": (
        {"prompt": "\u200b \ufeff\0", "completion": "a"},
        "'prompt' is empty",
    ),
    "an answer beside a text": (
        {"text": "q", "Completion": "a"},
        "'Completion' stands beside 'text': if it is the answer, name the columns prompt and",
    ),
    "an answer beside turns": (
        said(*LONG[:3], response="a2"),
        "'response' stands beside 'messages': if it is the answer, make it the last turn",
    ),
    "an answer beside ShareGPT": (
        said(Q, A, key="conversations", output="b"),
        "'output' stands beside 'conversations'",
    ),
    "a truth": ({"prompt": "q", "completion": True}, "'completion' is true or false"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_cannot_be_trained_as_meant_is_told_by_name(tmp_path, read, name):
    row, words = TOLD[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError) as told:
        read(str(tmp_path / "rows.jsonl"))
    assert f"rows.jsonl:1: {words}" in str(told.value)
    known = "Known are: prompt/completion, messages, conversations, instruction/output, "
    assert (known in str(told.value)) == words.startswith("no '")


def test_a_turns_own_mark_leaves_its_answer_untrained(tmp_path, settings, smollm_tokenizer):
    marks = ({"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0, "name": "x"})
    rows = []
    for n, mark in enumerate(marks):
        plain = {"role": "assistant", "content": "a"} | mark
        first = [{"role": "user", "content": f"q{n}"}, plain]
        rows.append({"messages": [*first, *MARKED[1]]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = settings(data_files=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "out"))
    data = encode_rows(read_rows(cfg), smollm_tokenizer)
    for row in data:
        trained = [i for i in row["labels"] if i != -100]
        assert smollm_tokenizer.decode(trained) == " a2\n\n### End<|im_end|>"


def test_fields_that_nothing_is_made_of_are_counted_by_name(tmp_path, read, capsys):
    rows = [said(Q, A, id=0, source=""), said(("user", "r"), A, id=2)]
    part = {"type": "text", "text": "r", "cache_control": {"type": "ephemeral"}}
    rows[1]["messages"][0] |= {"name": "Ada", "content": [part]}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, said(*LONG, Q)])))
    read(str(tmp_path / "rows.jsonl"))
    shown = capsys.readouterr().out
    assert "3 rows (messages) from rows.jsonl. Not used: 'id' in 2, " in shown
    assert "'source' in 1" in shown and "'messages[].name' in 1" in shown
    assert "'messages[].content[].cache_control' in 1" in shown
    assert "Left out: 1 turn after a last answer" in shown


def test_rows_that_differ_in_a_field_that_is_used_are_no_duplicates(tmp_path, read, capsys):
    rows = [{"instruction": "q", "context": c, "response": "a"} for c in ("x", "y", "x")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read(str(tmp_path / "rows.jsonl"))) == 2
    assert "Dropped 1 exact duplicate." in capsys.readouterr().out
    talks = [[*MARKED[0], *MARKED[1]], [MARKED[0][0], MARKED[0][1] | {"weight": 1}, *MARKED[1]]]
    talks = [json.dumps({"messages": talk}) for talk in talks]
    (tmp_path / "rows.jsonl").write_text("\n".join(talks))
    assert len(read(str(tmp_path / "rows.jsonl"))) == 2


# -------- properties ----------------------------------------------------------------------

HEADS = {
    "jsonl": [b"", b'{"prompt": "a", "completion": "b"}\n', b"\xff\xfe", b"\xef\xbb\xbf"],
    "json": [b"[", b"{\n", b'[{"prompt": "a", "completion": "b"},', b'{\n "data": ['],
    "csv": [b"prompt,completion\n", b"prompt;completion\r\na;b\r\n", b'"prompt\t', b""],
    "parquet": [b"PAR1", b""],
    "xlsx": [b"PK\x03\x04", b""],
    "jsonl.gz": [b"\x1f\x8b", b""],
}
BITS = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from(
            [b'{"prompt": "p", "completion": "c"}', b"\n", b"},", b'"', b"'", b"]", b"}"]
        ),
    ),
    max_size=8,
).map(b"".join)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_any_bytes_under_any_name_give_rows_or_are_told(kind, tmp_path):
    @hypothesis_settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(head=st.sampled_from(HEADS[kind]), rest=BITS, pack=st.booleans())
    def check(head, rest, pack):
        file = tmp_path / f"fuzz.{kind}"
        file.write_bytes(gzip.compress(head + rest) if pack else head + rest)
        reader = RowReader([file], tmp_path / "rejected.jsonl")
        rows = list(reader)
        assert all(row["completion"].strip() for row in rows)
        assert all(row["where"].startswith(f"fuzz.{kind}:") for row in rows)
        if reader.kinds or reader.wrong:
            with pytest.raises(UserError, match=rf"fuzz\.{kind}"):
                reader.report("stop")
        else:
            reader.report("stop")

    check()


def is_plain(text):
    """Neither unseen nor, in Excel, a formula, whose value its writer does not compute."""
    return text.strip().strip(UNSEEN).strip() and not re.match("=.", text)


# What Excel's files, which are XML, can hold.
PLAIN = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"], exclude_characters="\ufffe\uffff"),
    min_size=1, max_size=12,
).filter(is_plain)  # fmt: skip
PLAIN = st.one_of(
    PLAIN, st.sampled_from(["NA", "None", "nan", "007", "1e5", "a,b;c\td", '"q"', "="])
)


def written(file, rows):
    frame = pandas.DataFrame(rows)
    text = json.dumps(rows, ensure_ascii=False)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    {
        "jsonl": lambda: file.write_text(lines),
        "jsonl.gz": lambda: file.write_bytes(gzip.compress(lines.encode())),
        "json": lambda: file.write_text(text),
        "csv": lambda: frame.to_csv(file, index=False),
        "csv.gz": lambda: frame.to_csv(file, index=False, compression="gzip"),
        "tsv": lambda: frame.to_csv(file, index=False, sep="\t"),
        "parquet": lambda: frame.to_parquet(file),
        "xlsx": lambda: frame.to_excel(file, index=False),
        "utf16.jsonl": lambda: file.write_text(lines, encoding="utf-16"),
    }[file.name.partition(".")[2]]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "tsv", "parquet", "xlsx", "utf16.jsonl"]
)
def test_what_was_written_in_any_kind_is_read(kind, tmp_path):
    @hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pairs=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=4))
    def check(pairs):
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        written(tmp_path / f"rows.{kind}", rows)
        reader = RowReader([tmp_path / f"rows.{kind}"], tmp_path / "rejected.jsonl")
        found = [{name: row[name] for name in ("prompt", "completion")} for row in reader]
        assert found == rows and not reader.kinds and not reader.wrong

    check()


# -------- files ---------------------------------------------------------------------------

ROWS = [{"prompt": f"Größe {n}?", "completion": f"{n}"} for n in range(4)]
TEXTS = [qa(row["prompt"], row["completion"]) for row in ROWS]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
JSONL = "\n".join(LINES)
CSV = "prompt,completion\n" + "\n".join(f"{r['prompt']},{r['completion']}" for r in ROWS)


def excel(**sheets):
    def write(file):
        with pandas.ExcelWriter(file, engine="openpyxl") as book:
            for name, rows in sheets.items():
                pandas.DataFrame(rows).to_excel(book, sheet_name=name, index=False)

    return write


TABLE = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]


def cells(file, rows, hidden=()):
    """A workbook of a hidden sheet, if there are rows for it, and of a visible one."""
    book = openpyxl.Workbook()
    for row in hidden:
        book.active.append(row)
    book.active.sheet_state = "hidden" if hidden else "visible"
    sheet = book.create_sheet() if hidden else book.active
    for row in rows:
        sheet.append(row)
    book.save(file)


FILES = {
    "a.jsonl": JSONL.encode(),
    "windows.jsonl": JSONL.replace("\n", "\r\n").encode("utf-8-sig"),
    "mac.jsonl": JSONL.replace("\n", "\r").encode(),
    "utf16.jsonl": JSONL.encode("utf-16"),
    "utf16be.jsonl": JSONL.encode("utf-16-be"),
    "utf16be with its mark.jsonl": f"\ufeff{JSONL}".encode("utf-16-be"),
    "utf16.json": json.dumps(ROWS, indent=1).encode("utf-16"),
    "utf16.csv": CSV.replace(",", "\t").encode("utf-16"),
    "mac.csv": CSV.replace("\n", "\r").encode(),
    "joined.jsonl": b"\n".join(line.encode("utf-8-sig") for line in LINES),
    "commas.jsonl": ",\n".join(LINES).encode() + b",",
    "blanks before commas.jsonl": " ,\n".join(LINES).encode() + b" ,",
    "python.jsonl": "\n".join(map(repr, ROWS)).encode(),
    "python with commas.jsonl": ",\n".join(map(repr, ROWS)).encode() + b" ,",
    "last comma.json": f"[{','.join(LINES)},\n]".encode(),
    "last comma in lines.json": "[\n{},\n]".format(",\n".join(LINES)).encode(),
    "last comma, held.json": f'{{"data": [{",".join(LINES)},]\n}}'.encode(),
    "arrays.json": "\n".join(f"[{line}]" for line in LINES).encode(),
    "packed.jsonl.gz": gzip.compress(JSONL.encode()),
    "packed without saying so.jsonl": gzip.compress(JSONL.encode()),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array of one line.json": json.dumps(ROWS).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "held.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "windows objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS)
    .replace("\n", "\r\n")
    .encode(),
    "a.csv": CSV.encode(),
    "excels.csv": CSV.replace(",", ";").encode("utf-8-sig"),
    "sep.csv": ("sep=;\r\n" + CSV.replace(",", ";")).encode("utf-8-sig"),
    "sep in capitals.csv": ('"SEP=;"\n' + CSV.replace(",", ";")).encode(),
    "blank lines.csv": f"\n  \n,,\n{CSV}".encode(),
    "quoted heading.csv": CSV.replace("completion", 'completion,"a;b;c;d;e"').encode(),
    "tabs.tsv": CSV.replace(",", "\t").encode(),
    "old windows.csv": CSV.encode("cp1252"),
    "packed.csv.gz": gzip.compress(CSV.encode()),
    "a.parquet": lambda file: pandas.DataFrame(ROWS).to_parquet(file),
    "a.xlsx": excel(rows=ROWS),
    "hidden.xlsx": lambda file: cells(file, TABLE, hidden=[["prompt", "completion"], ["x", "y"]]),
    "hidden alone.xlsx": lambda file: cells(file, [["notes"]], hidden=TABLE),
    "sheets.xlsx": excel(empty=[], rows=ROWS, notes=[{"a": 1}]),
}


def make(place, name, content):
    file = place / name
    content(file) if callable(content) else file.write_bytes(content)
    return file


@pytest.mark.parametrize("name", FILES)
def test_every_usual_file_gives_its_rows(tmp_path, read, name):
    assert read(str(make(tmp_path, name, FILES[name]))) == TEXTS


@pytest.mark.parametrize(
    "heading", ['"prompt";"completion"', '"";""\n"prompt";"completion"', '""\nprompt;completion']
)
def test_a_heading_in_quotes_tells_the_separator_and_not_the_commas_below_it(
    tmp_path, read, heading
):
    """As R writes it, and spreadsheets that put text into quotes."""
    rows = f'{heading}\nred, green, blue;a\n"one; two";b\n'
    expected = [qa("red, green, blue", "a"), qa("one; two", "b")]
    assert read(str(make(tmp_path, "quoted names.csv", rows.encode()))) == expected


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"


def twice_named(file):
    columns = [pyarrow.array([text]) for text in ("q", "a", "b")]
    table = pyarrow.table(columns, names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, file)


def beyond_time(file):
    when = pyarrow.array([10**7], pyarrow.date32())  # in the year 29,349
    table = pyarrow.table({"prompt": ["q"], "completion": ["a"], "when": when})
    pyarrow.parquet.write_table(table, file)


def zipped(*names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return data.getvalue()


LOCKED = b"\xd0\xcf\x11\xe0" + bytes(99_999) + "EncryptedPackage".encode("utf-16-le")
NO_DATA = {
    "a.zip.jsonl": (zipped("a.jsonl"), "a zip archive: unpack it"),
    "sheet.ods.csv": (zipped("mimetype", "content.xml"), "an OpenDocument file (.ods): save it as"),
    "sheet.xlsb.xlsx": (zipped("xl/workbook.bin"), "a binary Excel file (.xlsb): save it as .xlsx"),
    "locked.xlsx": (LOCKED, "protected by a password"),
    "pointer.jsonl": (LFS, "a Git LFS pointer, not the data"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>" * 500, "a web page, not data"),
    "notes.jsonl": (b"Dear diary,\n" * 500, 'no JSONL: it begins with "Dear diary,"'),
    "paper.jsonl": (b"%PDF-1.7\n" * 9, "a PDF, not data"),
    "cut.jsonl.gz": (gzip.compress(JSONL.encode())[:40], "a gzip file that is cut short"),
    "cut.json": (json.dumps(ROWS, indent=1).encode()[:60], "broken JSON: "),
    "old.xlsx": (b"\xd0\xcf\x11\xe0" * 9, "an old Excel file: save it as .xlsx"),
    "archive.jsonl": (b"PK\x03\x04" + bytes(99), "a zip archive, or an Excel file that cannot"),
    "cut.parquet": (b"PAR1" + bytes(99), "a Parquet file that cannot be read"),
    "quote.csv": (b'prompt,completion\nq1,a1\nq2,"a2\nq3,a3', "broken CSV at line 4: unexpected"),
    "inner.csv": (b'prompt,completion\n"say "hi" now",a', "broken CSV at line 2: ',' expected"),
    "slash.csv": (b'prompt,completion\n"say \\"hi\\" now","a"', "broken CSV at line 2"),
    "heading.csv": (b'prompt,"completion\nq,a\nq2,a2', "broken CSV at line 3"),
    "russian.csv": (
        "prompt,completion\nЁлка,ёлка\n".encode("cp1251"),
        "not UTF-8 at byte 19: save it as UTF-8",
    ),
    "chinese.csv": ("prompt,completion\n问题,答案\n".encode("gbk"), "not UTF-8 at byte 19"),
    "late.csv": (
        b"prompt,completion\n" + b"q,a\n" * 20_000 + b"caf\xe9,a\n",
        "not utf-8 ('utf-8' codec can't decode byte 0xe9",
    ),
    "mostly.csv": ("prompt,completion\né,".encode() + b"caf\xe9\n", "not UTF-8 at byte 25"),
    "twice.parquet": (twice_named, "two columns are called 'completion'"),
    "late.parquet": (beyond_time, "a Parquet file that cannot be read"),
    "damaged.jsonl.gz": (
        b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 40,
        "a gzip file that is cut short",
    ),
    "wide.jsonl": (b"\xff\xfe\x00\xd8\x00\xd8", "neither UTF-8 nor whole UTF-16"),
}


@pytest.mark.parametrize("first", range(0, len(NO_DATA), 10))  # as many are told at once
def test_what_is_no_data_is_told_once_for_what_it_is(tmp_path, read, first):
    some = dict([*NO_DATA.items()][first : first + 10])
    for name, (content, _) in some.items():
        make(tmp_path, name, content)
    make(tmp_path, "good.jsonl", JSONL.encode())
    with pytest.raises(UserError) as told:
        read(str(tmp_path / "*"))
    lines = str(told.value).splitlines()
    assert len(lines) == 1 + len(some)
    for name, (_, words) in some.items():
        assert any(f"• {name}: {words}" in line for line in lines), (name, lines)


@pytest.mark.parametrize(
    "text", ["“Beyoncé’s”", "„Spaß“ im café\xa0!", "Größe – né en hiver, Œufs frais…"]
)
def test_what_windows_writes_is_no_utf8(text):
    assert encoding_of(f"prompt,completion\n{text},a\n{text}".encode("cp1252")) == "cp1252"


def test_a_file_that_windows_wrote_is_told(tmp_path, read, capsys):
    make(tmp_path, "old.csv", CSV.encode("cp1252"))
    assert read(str(tmp_path / "old.csv")) == TEXTS
    assert "! old.csv is not UTF-8, and is read as Windows-1252" in capsys.readouterr().out


EMPTY = {"empty.jsonl": b"", "none.json": b"[]", "bare.csv": b"prompt,completion\n"}


def test_a_file_of_no_rows_is_told_beside_good_ones(tmp_path, read, capsys):
    for name, content in EMPTY.items():
        make(tmp_path, name, content)
    make(tmp_path, "good.jsonl", JSONL.encode())
    make(tmp_path, "table.csv.json", json.dumps(ROWS).encode())  # its last name counts
    assert len(read(str(tmp_path))) == len(ROWS)
    out = capsys.readouterr().out
    assert all(f"! {name} holds no rows" in out for name in EMPTY)
    assert "Dropped 4 exact duplicates" in out and "! table" not in out
    assert read([str(tmp_path / name) for name in ("bare.csv", "good.jsonl")]) == TEXTS
    assert "! bare.csv holds no rows" in capsys.readouterr().out


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_that_an_object_holds_are_found_however_it_is_written(tmp_path, read, indent):
    def written_as(name, held):
        return str(make(tmp_path, name, json.dumps(held, indent=indent).encode()))

    assert read(written_as("held.json", {"version": 1, "data": ROWS})) == TEXTS
    lines = ",\n".join(LINES)
    make(tmp_path, "lines.json", f'{{"data": [\n{lines}\n]}}'.encode())
    assert read(str(tmp_path / "lines.json")) == TEXTS
    row = {"instruction": "q2", "output": "a2", "history": said(Q, A)["messages"]}
    assert read(written_as("row.json", row)) == [TWO]
    with pytest.raises(UserError, match="'system'"):
        read(written_as("told.json", {"system": "Be brief.", "data": ROWS}))


def test_rows_that_hold_lists_of_objects_stay_lines(tmp_path, read, settings):
    """So that they are read one by one, and named by their lines."""
    row = {"prompt": "q", "completion": "a", "seen": [{"by": "me"}]}
    lines = [json.dumps({"seen": [{"by": n}]} | row) for n in range(3)] + ['{"prompt": "q"}']
    make(tmp_path, "a.jsonl", "\n".join(lines).encode())
    with pytest.raises(UserError, match=r"a\.jsonl:4: no 'completion'"):
        read(str(tmp_path / "a.jsonl"))


def test_a_table_that_was_put_together_has_its_heading_in_it(tmp_path, read):
    make(tmp_path, "a.csv", f"{CSV}\n{CSV}".encode())
    assert read(str(tmp_path / "a.csv")) == TEXTS


def test_numbers_are_trained_as_they_stand_in_the_file(tmp_path, read):
    make(tmp_path, "a.jsonl", b'{"prompt": 12.50, "completion": -0}')
    assert read(str(tmp_path / "a.jsonl")) == [qa("12.50", "-0")]


@pytest.mark.parametrize(("number", "told"), [(float("nan"), "NaN"), (float("inf"), "Infinity")])
def test_a_number_of_a_table_that_is_none_is_told_by_its_name(tmp_path, read, number, told):
    table = pyarrow.table({"prompt": ["q"], "completion": [number]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"'completion' is {told}: it must be text in quotes"):
        read(str(tmp_path / "a.parquet"))


def test_a_pattern_that_python_refuses_matches_nothing(tmp_path, read):
    make(tmp_path, "rows.jsonl", JSONL.encode())
    with pytest.raises(UserError, match=r"No file matches(.|\n)*rows\.jsonl"):
        read(str(tmp_path / "**.json"))


def test_questions_in_several_turns_are_one_whatever_their_marks(read, tmp_path):
    first, second = {"role": "user", "content": "q", "weight": 0}, {"role": "user", "content": "r"}
    answer = {"role": "assistant", "content": "a"}
    for row in (
        {"messages": [first, second, answer]},
        {"prompt": [first], "completion": [second, answer]},
    ):
        make(tmp_path, "rows.jsonl", json.dumps(row).encode())
        assert read(str(tmp_path / "rows.jsonl")) == [qa("q\n\nr", "a")]


def test_what_was_shortened_to_the_same_question_stays_on_one_side(
    tmp_path, settings, smollm_tokenizer, capsys
):
    """60 long talks of which only a last, common question is left."""
    asked = [("user", "Now?")]
    talks = [
        said(("user", f"{n} " * 80), ("assistant", "ok"), *asked, ("assistant", f"Oui {n % 3}"))
        for n in range(60)
    ]
    talks += [said(("user", f"q{n}"), ("assistant", "a")) for n in range(40)]
    make(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, talks)).encode())
    cfg = settings(
        data_files=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "out"),
        max_length=64, too_long="truncate",
    )  # fmt: skip
    data = fit_length(encode_rows(read_rows(cfg), smollm_tokenizer), smollm_tokenizer, cfg)
    assert "Dropped 57 exact duplicates" in capsys.readouterr().out and len(data) == 43
    for fraction in (0.1, 0.3, 0.5):
        train, held = split_rows(data, fraction)
        assert not {*train["prompt"]} & {*held["prompt"]}
    # A conversation that is cut in one row and whole in another is still one.
    assert keys_together(["a", "a", "b", "c"], ["a", "x", "x", "c"]) == ["a", "a", "a", "c"]
    assert keys_together(["a", "b"], ["b", "b"]) == ["b", "b"]  # one that was not cut keeps its own


def test_rows_of_a_table_are_named_by_number(tmp_path, read, settings):
    broken = [*ROWS[:2], {"prompt": "", "completion": "x"}, ROWS[3]]
    for name, content in {
        "a.json": json.dumps(broken).encode(),
        "a.csv": (CSV + "\n,x\na,b,c").encode(),
        "a.parquet": lambda file: pandas.DataFrame(broken).to_parquet(file),
        "a.xlsx": excel(rows=broken),
    }.items():
        file = make(tmp_path, name, content)
        with pytest.raises(UserError) as told:
            read(str(file))
        row = {"a.csv": 6, "a.xlsx": 4}.get(name, 3)  # a sheet's heading is its row 1
        assert f"{name}:row {row}: 'prompt' is empty" in str(told.value), told.value
        many = "a.csv:row 7: too many cells: 3 under a heading of 2: put texts that hold a comma in"
        assert (f"{many} quotes   a, b, c" in str(told.value)) == (name == "a.csv")


def test_a_cell_may_hold_a_conversation(tmp_path, read):
    talk = json.dumps(said(*LONG)["messages"]).replace('"', '""')
    make(tmp_path, "a.csv", f'id,messages\n1,"{talk}"\n'.encode())
    assert read(str(tmp_path / "a.csv")) == [TWO]


NAMES = ["rows [1] *.jsonl", "a#b ?.jsonl", "two  blanks .jsonl", "Größe 日本.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_there_is_taken_as_it_is(tmp_path, read, name):
    make(tmp_path, name, LINES[0].encode())
    make(tmp_path, "rows 1 x.jsonl", LINES[1].encode())
    assert read(str(tmp_path / name)) == TEXTS[:1]


def test_names_that_are_no_utf8_are_read_and_shown(tmp_path, read):
    name = os.fsencode(tmp_path) + b"/gr\xfc\xdfe.jsonl"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write(b"\n".join([*(line.encode() for line in LINES), b"{"]))
    with pytest.raises(UserError, match=r"gr\ufffd\ufffde\.jsonl:5: broken JSON"):
        read(str(tmp_path / "*.jsonl"))


def test_a_hidden_folder_is_read_where_its_name_is_given(tmp_path, read):
    (tmp_path / ".rows").mkdir()
    make(tmp_path / ".rows", "a.jsonl", JSONL.encode())
    with pytest.raises(UserError, match="No file matches"):
        read(str(tmp_path / "*" / "*.jsonl"))
    assert read(str(tmp_path / ".r*" / "*.jsonl")) == TEXTS


def test_a_file_with_two_names_is_read_once_by_the_first(tmp_path, read):
    make(tmp_path, "b.jsonl", JSONL.encode() + b"\n{")
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    with pytest.raises(UserError, match=r"1 line cannot be used(.|\n)*a\.jsonl:5: broken JSON"):
        read(str(tmp_path))


def test_several_names_a_folder_and_a_file_twice(tmp_path, read):
    (tmp_path / "more").mkdir()
    for place, line in (("a.jsonl", 0), ("more/b.jsonl", 1), ("more/notes.txt", 2)):
        (tmp_path / place).write_text(LINES[line])
    names = [str(tmp_path / name) for name in ("a.jsonl", "*.jsonl", "more")]
    assert sorted(read(names)) == TEXTS[:2]
    with pytest.raises(
        UserError, match=r"No file matches data_files = '.*none/\*'(.|\n)*nothing\.x"
    ):
        read([*names, str(tmp_path / "none/*"), str(tmp_path / "nothing.x")])


def test_no_file_names_what_is_there(tmp_path, read):
    for n in range(12):
        (tmp_path / f"rows{n:02}.JSONL").write_text(LINES[0])
    with pytest.raises(UserError) as told:
        read(str(tmp_path / "*.jsonl"))
    assert re.search(r"there is: out/, rows00\.JSONL.*rows08\.JSONL and 3 more", str(told.value))


@pytest.mark.slow
def test_a_wide_pattern_finds_no_outputs_hidden_files_or_circles(tmp_path, read, settings):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "rows.jsonl").write_text(JSONL)
    (tmp_path / "data" / ".hidden.jsonl").write_text("{")
    for name in ("loop", "deep/loop", "deep/other"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    cfg = settings(data_files=str(tmp_path / "**/*.jsonl"), output_dir=str(tmp_path / "outputs"))
    assert len(read_rows(cfg)) == 4
    for name in ("answers.jsonl", "data.rejected.jsonl", "final_model/x.jsonl"):
        (cfg.run_dir / name).parent.mkdir(exist_ok=True)
        (cfg.run_dir / name).write_text("{")
    found = find_files(cfg)
    assert [file.name for file in found] == ["rows.jsonl"]
    assert find_files(settings(data_files=str(cfg.run_dir / "answers.jsonl"))) != []


def test_on_colab_somebody_without_data_is_offered_an_upload(tmp_path, read, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = types.SimpleNamespace(upload=lambda: {"mine.jsonl": JSONL.encode()})
    colab = types.SimpleNamespace(files=files)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google.colab.files", files)
    monkeypatch.setattr("qlora_helpers.content_root", lambda: tmp_path / "content")
    assert read("/content/data/*.jsonl") == TEXTS
    assert (tmp_path / "content" / "data" / "mine.jsonl").read_text() == JSONL


def test_a_sheet_in_the_notebooks_own_folder_is_read_without_a_setting(
    tmp_path, read, monkeypatch, capsys
):
    monkeypatch.setattr("qlora_helpers.content_root", lambda: tmp_path / "content")
    data = tmp_path / "content" / "data"
    data.mkdir(parents=True)
    for name in ("~$Kunden.xlsx", ".hidden.csv", "._Kunden.xlsx", "notes.txt"):
        (data / name).write_text("prompt,completion\nno,no\n")
    with pytest.raises(UserError, match="No file matches"):
        read("/content/data/*.jsonl")
    excel(rows=ROWS)(data / "Kunden.XLSX")
    assert read("/content/data/*.jsonl") == read("/content/data") == TEXTS
    with pytest.raises(UserError, match=r"To read Kunden\.XLSX: data_files = .*Kunden.XLSX"):
        read("/content/data/train*.jsonl")
    (data / "rows.jsonl").write_text(LINES[0])
    capsys.readouterr()
    assert read("/content/data/*.jsonl") == TEXTS[:1]
    assert f"! In {data}, not read: Kunden.XLSX, notes.txt\n" in capsys.readouterr().out


HEADED = [["Prompt ", "COMPLETION", None, "Note", None], ["q1", "a1", None, None, None]]
HEADED += [[None] * 5, ["q2", "a2", None, "late", None], [None] * 5]


@pytest.mark.parametrize("kind", ["xlsx", "csv"])
def test_a_sheet_as_people_keep_it(tmp_path, settings, capsys, kind):
    """Headings in capitals, blank rows between and after, columns in which nothing stands."""
    file, table = tmp_path / f"a.{kind}", pandas.DataFrame(HEADED)
    if kind == "xlsx":
        table.to_excel(file, index=False, header=False)
    else:
        table.to_csv(file, index=False, header=False)
    rows = read_rows(settings(data_files=str(file), output_dir=str(tmp_path / "out")))
    assert rows["prompt"] == ["q1", "q2"] and rows["completion"] == ["a1", "a2"]
    assert rows["where"] == [f"a.{kind}:row 2", f"a.{kind}:row 4"]
    assert f"2 rows (prompt/completion) from a.{kind}. Not used: 'Note' in 1\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("kind", ["xlsx", "csv"])
@pytest.mark.parametrize(
    ("table", "told"),
    [
        ([["prompt", "Prompt", "completion"], ["a", "b", "c"]], "the same key stands twice"),
        ([["prompt", "completion"], ["a", "b", "", "c"]], "too many cells: 4 under a heading"),
        ([["prompt", "completion"], ["", "b"]], "row 2: 'prompt' is empty"),
        ([["Frage", "Antwort"], ["a", "b"]], "rename the columns to prompt and completion"),
    ],
)
def test_a_sheet_that_cannot_be_meant_is_refused(tmp_path, read, kind, table, told):
    file = tmp_path / f"a.{kind}"
    if kind == "csv":
        file.write_text("\n".join(map(",".join, table)))
    elif len({*map(len, table)}) > 1:
        pytest.skip("a sheet's rows are all as wide as its widest")
    else:
        pandas.DataFrame(table).to_excel(file, index=False, header=False)
    with pytest.raises(UserError, match=told):
        read(str(file))


def test_truncate_keeps_the_instruction_and_newest_turns(tmp_path, settings, smollm_tokenizer):
    words = " ".join(f"w{n}" for n in range(200))
    rows = [
        {"instruction": "Sum up.", "input": words, "output": "a"},
        {"instruction": "Sum up. " * 40, "input": "w", "output": "a"},
    ]
    talk = [("system", "s"), *LONG[:1], ("assistant", words), *LONG[2:]]
    texts = {}
    for kind, lines in (("alpaca", rows), ("talk", [said(*talk), said(*LONG)])):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
        cfg = settings(
            data_files=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / kind),
            max_length=60, too_long="truncate",
        )  # fmt: skip
        data = encode_rows(read_rows(cfg), smollm_tokenizer)
        kept = fit_length(data, smollm_tokenizer, cfg)
        assert max(kept["length"]) <= 60
        texts[kind] = [training_text(row) for row in kept]
    (first,) = texts["alpaca"]
    assert re.fullmatch(r"(?s)### Question: Sum up\.\n\n(\S+ )+w199\n\n### Answer: a.*", first)
    assert sorted(texts["talk"]) == sorted([TWO, qa("q2", "a2", "s")])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub, with a cache of its own."""
    import huggingface_hub.constants
    from hub import Hub, take_for_the_hub

    with Hub() as server:
        take_for_the_hub(server, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def offer(hub, name, files):
    """Put a private data set onto the Hub."""
    hub.repos[f"datasets/{name}"] = {"private": True}
    hub.files[f"datasets/{name}"] = {file: text.encode() for file, text in files.items()}


def test_a_data_set_of_the_hub_gives_its_training_split(read, hub):
    files = {"data/train-00000.jsonl": JSONL, "data/test-00000.jsonl": "{", "big.bin": "x"}
    offer(hub, "ada/rows", files)
    assert read("hf:ada/rows") == TEXTS
    assert not hub.asked("big.bin")
    with pytest.raises(UserError, match="the Hub's data set cannot be had"):
        read("hf:ada/none")


PARTS = """---
configs:
- config_name: english
  data_files: [{split: train, path: en/*.jsonl}]
- config_name: german
  data_files: [{split: train, path: de/*.jsonl}]
---
"""


def test_a_data_set_of_several_parts_asks_for_one(read, hub):
    english = '{"prompt": "Yes?", "completion": "No."}\n'
    files = {"README.md": PARTS, "en/rows.jsonl": english, "de/rows.jsonl": JSONL}
    offer(hub, "ada/rows", files)
    assert read("hf:ada/rows/german") == TEXTS
    for name in ("hf:ada/rows", "hf:ada/rows/french"):
        with pytest.raises(UserError, match="name one of its parts:") as told:
            read(name)
        assert "'hf:ada/rows/english'\n" in str(told.value)
        assert str(told.value).endswith("data_files = 'hf:ada/rows/german'")
    first = PARTS.replace("english\n", "english\n  default: true\n")
    offer(hub, "ada/more", files | {"README.md": first})
    assert read("hf:ada/more") == [qa("Yes?", "No.")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ({"system_message": "Always German", "data": ROWS, "none": []}, "not 'system_message'"),
        ({"data": ROWS, "extra": [1], "more": "x"}, "not 'extra', 'more'"),
    ],
)
def test_what_stands_beside_the_rows_of_an_object_is_told(tmp_path, read, capsys, text, told):
    make(tmp_path, "x.json", json.dumps(text, indent=1).encode())
    assert read(str(tmp_path / "x.json")) == TEXTS
    assert f"! x.json: only 'data' is read, {told}\n" in capsys.readouterr().out


PART = '{"type": "text", "text": "q", "text": "LOST"}'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f'{{"data": [{LINES[0]}], "data": [{LINES[1]}]}}', "the key 'data' stands twice: "),
        ("{'prompt': 'q', 'completion': 'a', 3: 'x'}", "a key that is no text: 3; put it in"),
        ("{'prompt': 'q', 'completion': 'a', 'prompt': 'b'}", "the same key stands twice: 'pro"),
        ("{'prompt': 'q', 'completion': ('a',)}", "Python's spelling with a tuple or a set: "),
        ("{'prompt': 'q', 'completion': {'a'}}", "Python's spelling with a tuple or a set: "),
        (
            '{"messages": [{"role": "user", "content": [' + PART + "]}]}",
            "the same key stands twice in a turn's part: 'text'",
        ),
    ],
)
def test_what_would_lose_a_value_is_refused(tmp_path, read, line, told):
    make(tmp_path, "x.jsonl", line.encode())
    with pytest.raises(UserError, match=f"x.jsonl(:1)?: {told}"):
        read(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("#N/A", "'completion' is #N/A, an error of Excel: "),
        ("#REF!", "'completion' is #REF!, an error of Excel: "),
        (True, "'completion' is TRUE, a Boolean: format the column as text"),
        (datetime.time(9, 30), "'completion' is a time of day: it must be text"),
        (datetime.timedelta(3), "'completion' is a length of time: it must be text"),
        ("[{'role': 'assistant', 'content': 'a'}]", "'completion' is a conversation in Python's "),
    ],
)
def test_a_cell_that_is_no_text_is_told_for_what_it_is(tmp_path, read, cell, told):
    cells(tmp_path / "a.xlsx", [["prompt", "completion"], ["q", cell]])
    with pytest.raises(UserError, match=f"a.xlsx:row 2: {re.escape(told)}"):
        read(str(tmp_path / "a.xlsx"))
    cells(tmp_path / "a.xlsx", [["instruction", "input", "output"], ["q", "#N/A", "a"]])
    with pytest.raises(UserError, match=r"a\.xlsx:row 2: 'input' is #N/A, an error of Excel"):
        read(str(tmp_path / "a.xlsx"))


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (datetime.datetime(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 9, 30), "2024-05-01 09:30:00"),
        ("one_x000D_\ntwo_x000D_three", "one\ntwo\nthree"),
        (2.0, "2"),
        (0, "0"),
    ],
)
def test_a_cell_of_excel_is_read_as_it_is_shown(tmp_path, read, cell, text):
    cells(tmp_path / "a.xlsx", [[None], ["prompt", "completion"], ["q", cell]])
    assert read(str(tmp_path / "a.xlsx")) == [qa("q", text)]


@pytest.mark.parametrize("kind", ["csv", "xlsx", "parquet"])
def test_a_conversation_in_a_cell_of_a_pair_is_read_as_one(tmp_path, read, kind):
    talk = said(*LONG)["messages"]
    row = {"prompt": json.dumps(talk[:3]), "completion": json.dumps(talk[3:])}
    written(tmp_path / f"a.{kind}", [row])
    assert read(str(tmp_path / f"a.{kind}")) == [TWO]
    written(tmp_path / f"a.{kind}", [row | {"prompt": str(talk[:3])}])
    with pytest.raises(UserError, match=r"'prompt' is a conversation in Python's spelling: export"):
        read(str(tmp_path / f"a.{kind}"))
    plain = {"prompt": '[{"name": "x"}]', "completion": "[]"}
    written(tmp_path / f"a.{kind}", [plain])
    assert read(str(tmp_path / f"a.{kind}")) == [qa(*plain.values())]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "completion": [2, 3]}, "'completion' is a list: it must be text"),
        ({"prompt": "q", "completion": ["a", "b"]}, "'completion' is a list: it must be text"),
        (
            {"prompt": {"0": "q", "1": "r"}, "completion": {"0": "a", "1": "b"}},
            r"'prompt' is an object: written by pandas\? Use to_json\(orient='records', lines",
        ),
        ({"messages": {"3": []}}, r"'messages' is no conversation: written by pandas\?"),
    ],
)
def test_what_is_no_text_is_told_with_what_to_do(tmp_path, read, row, told):
    make(tmp_path, "a.json", json.dumps(row).encode())
    with pytest.raises(UserError, match=told):
        read(str(tmp_path / "a.json"))


def test_what_is_left_out_of_a_folder_is_told(tmp_path, read, capsys):
    for name in ("a.jsonl", "b.jsonl.txt", "c", "old.xls", "README.md", "LICENSE", ".hidden"):
        make(tmp_path, name, JSONL.encode())
    make(tmp_path, "data.rejected.jsonl", b"{")  # another run's
    (tmp_path / "more").mkdir()
    for _ in range(2):  # the second time, there is a run's folder beside them
        assert read(str(tmp_path)) == TEXTS
        told = f"! In {tmp_path}, not read: b.jsonl.txt, c, more/, old.xls\n"
        assert told in capsys.readouterr().out
    for name in ("b.jsonl.txt", "c", "old.xls"):
        (tmp_path / name).unlink()
    (tmp_path / "more").rmdir()
    read(str(tmp_path))
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mark", "call"),
    [("state.json", r"'\).to_json"), ("dataset_dict.json", r"'\)\['train'\].to_json")],
)
def test_a_folder_that_datasets_saved_is_told(tmp_path, read, mark, call):
    make(tmp_path, mark, b"{}")
    with pytest.raises(UserError, match=rf"was written by save_to_disk(.|\n)*{call}"):
        read(str(tmp_path))


def test_truncate_shortens_a_question_behind_a_system_text(tmp_path, settings, smollm_tokenizer):
    words = " ".join(f"w{n}" for n in range(200))
    rows = {
        "talk": said(("system", "Be brief."), ("user", words), A),
        "pair": {"prompt": words, "completion": "a", "system": "Be brief."},
        "alpaca": {"instruction": "Sum up.", "input": words, "output": "a", "system": "Be brief."},
    }
    for name, row in rows.items():
        lines = [row, {**row, "system": "s " * 80}] if "system" in row else [row]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        cfg = settings(
            data_files=str(tmp_path / f"{name}.jsonl"), output_dir=str(tmp_path / name),
            max_length=60, too_long="truncate",
        )  # fmt: skip
        data = encode_rows(read_rows(cfg), smollm_tokenizer)
        (kept,) = fit_length(data, smollm_tokenizer, cfg)
        first = r"Sum up\.\n\n" if name == "alpaca" else ""
        asked = rf"### System: Be brief\.\n\n### Question: {first}(\S+ )+w199"
        assert re.fullmatch(rf"{asked}\n\n### Answer: a\n\n### End", training_text(kept))
        assert 50 < kept["length"] <= 60
