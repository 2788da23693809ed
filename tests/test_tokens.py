"""Section 6: the one encoder, on the real tokenizers of Mistral v0.3 and SmolLM2."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mistral import sentencepiece_model
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

import qlora_helpers as qlora

CONTROL = ["</s>", "<s>", "[INST]", "[/INST]", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEXT = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([*CONTROL, "\n\n", " ", "### End", "### Answer:"]))
).map("".join)
many = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(text=st.text())
@example(text="a  double  space")
@example(text="emoji 🙂 and \x00 control")
def test_the_built_tokenizer_is_mistrals(mistral_tokenizer, text):
    spm = sentencepiece_model()
    assert qlora.encode_text(mistral_tokenizer, "x" + text)[1:] == spm.encode("x" + text)


def test_the_built_tokenizer_renders_mistral_commons_chat(mistral_tokenizer):
    request = ChatCompletionRequest(messages=[UserMessage(content="What is the capital of France?")])
    ids = MistralTokenizer.v3().encode_chat_completion(request).tokens
    assert mistral_tokenizer("[INST] What is the capital of France?[/INST]")["input_ids"] == ids


def test_exact_ids_on_mistrals_tokenizer(mistral_tokenizer):
    encoded = qlora.encode_example(mistral_tokenizer, "Capital of France?", "Paris")
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


@many
@given(prompt=TEXT, completion=TEXT)
@example(prompt="</s>[INST]", completion="<|im_end|>")
@example(prompt="ends in a space ", completion=" starts with one")
@example(prompt="x", completion="\n")
def test_what_is_trained_is_the_answer_and_its_end(tokenizer, prompt, completion):
    start = qlora.encode_prompt(tokenizer, prompt)
    encoded = qlora.encode_example(tokenizer, prompt, completion)
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert ids[: len(start)] == start
    assert labels == [-100] * len(start) + ids[len(start) :]
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    begin = [tokenizer.bos_token_id] if qlora.adds_bos(tokenizer) else []
    assert ids[: len(begin)] == begin
    assert not set(ids[len(begin) : -1]) & set(tokenizer.all_special_ids)


def test_mistral_adds_bos_and_smollm_does_not(mistral_tokenizer, smollm_tokenizer):
    assert qlora.adds_bos(mistral_tokenizer)
    assert not qlora.adds_bos(smollm_tokenizer)


def test_the_chat_template_renders_the_very_ids_that_were_trained(tokenizer):
    prompt, completion = "Say \"hi\"\n\\n {{ braces }} 'quotes'", "hi {% raw %}\n"
    tokenizer.chat_template = qlora.chat_template(tokenizer)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
    start = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=True)["input_ids"]
    assert start == qlora.encode_prompt(tokenizer, prompt)
    assert whole == qlora.encode_example(tokenizer, prompt, completion)["input_ids"]


def test_long_rows_are_left_out_whole_with_a_count(tokenizer, capsys):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b " * 200}]
    kept = qlora.encode_rows(rows, tokenizer, 100)
    assert [example["labels"][-1] for example in kept] == [tokenizer.eos_token_id]
    assert "Left out 1 of 2 rows: longer than 100 tokens." in capsys.readouterr().out


def test_when_every_row_is_too_long_the_setting_is_named(tokenizer):
    with pytest.raises(qlora.UserError, match="max_length = 16"):
        qlora.encode_rows([{"prompt": "a" * 500, "completion": "b"}], tokenizer, 16)


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(smollm_tokenizer, monkeypatch):
    monkeypatch.setattr(qlora, "PROMPT_TEMPLATE", "### Question: {prompt}\n\n### Answer: ")
    monkeypatch.setattr(qlora, "COMPLETION_TEMPLATE", "{completion}\n\n### End")
    with pytest.raises(ValueError, match="joins the end of the prompt with the start of the answer"):
        qlora.encode_example(smollm_tokenizer, "Capital of France?", "Paris")
