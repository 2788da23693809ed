"""Rows written by the base model's own chat template: its ids, its masks, and what is refused."""

import copy
import json

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from finetune.answers import AnswerStreamer, draw_sample, read_answer
from finetune.audit import audit_labels
from finetune.card import how_to_ask
from finetune.chat import control_ids, encode_asked, encode_talks
from finetune.lengths import fit_length
from finetune.save import write_for_others
from finetune.template import usable
from finetune.tokens import encode_example, encode_prompt, encode_rows, training_text
from qlora_helpers import Settings, UserError

# Of mistralai/Mistral-7B-Instruct-v0.3's tokenizer_config.json, as vLLM's and llama.cpp's users
# quote it in public repositories; without its tool calls.
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}
    {%- endif %}
{%- endfor %}"""  # noqa: E501
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + BODY }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BODY = "message['content']"
LAST = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"


def tuned(tokenizer, template):
    """The tokenizer with another template; they share the back end, which copying takes long."""
    tokenizer, own = copy.copy(tokenizer), dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs = own
    tokenizer.chat_template = template or tokenizer.chat_template
    return usable(tokenizer, ".", "/nowhere", "chat")


@pytest.fixture(scope="module", params=["mistral", "smollm"])
def tokenizer(request):
    """Mistral's with its template; SmolLM2's with its own, which begins with a system text."""
    own = request.getfixturevalue(f"{request.param}_tokenizer")
    return tuned(own, MISTRAL if request.param == "mistral" else None)


@pytest.fixture
def cfg(defaults):
    """Makes checked settings; `settings` is hypothesis's here."""
    return lambda **changes: Settings.from_cell(defaults | changes)


def messages(turns):
    return [{"role": turn[0], "content": turn[1]} for turn in turns]


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co", "Cc"]), max_size=12).filter(
    str.strip
)
TALKS = st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(talk=TALKS)
@example(talk=[("Hi", "Hello", True), ("Bye\n", "Bye. ", False), (" d", "### End", True)])
@example(talk=[("日本", "🙂 é", False), ("x", "y", True)])
def test_ids_are_the_templates_and_the_answers_with_their_ends_are_trained(tokenizer, talk):
    turns = []
    for question, answer, trained in talk:
        turns += [("user", question, True), ("assistant", answer, trained)]
    assume(all(turn[1][0].strip() for turn in turns))  # blanks that are joined are refused
    row = encode_example(tokenizer, "", "", json.dumps(turns))
    rendered = tokenizer.apply_chat_template(messages(turns), return_dict=True)["input_ids"]
    eos, place = tokenizer.eos_token_id, 0
    assert row["input_ids"] == rendered[: len(row["input_ids"])]
    assert tokenizer.decode(rendered[len(row["input_ids"]) :]).strip() == ""
    for number, (role, text, trained) in enumerate(turns):
        if role != "assistant":
            continue
        asked = [turn[:2] for turn in turns[:number]]
        start = len(encode_prompt(tokenizer, asked))
        end = row["input_ids"].index(eos, start) + 1
        assert row["labels"][place:start] == [-100] * (start - place)
        wanted = row["input_ids"][start:end] if trained else [-100] * (end - start)
        assert row["labels"][start:end] == wanted
        assert (
            "▁" in text or read_answer(tokenizer, row["input_ids"][start:end]).text == text.strip()
        )
        place = end
    assert place == len(row["labels"]) and row["input_ids"][-1] == eos


def test_mistrals_ids_are_mistral_commons(mistral_tokenizer):
    tokenizer = tuned(mistral_tokenizer, MISTRAL)
    talk = [UserMessage(content="Capital of France?"), AssistantMessage(content="Paris.")]
    talk.append(UserMessage(content="And of Spain?"))
    wanted = MistralTokenizer.v3().encode_chat_completion(ChatCompletionRequest(messages=talk))
    turns = [("user", "Capital of France?"), ("assistant", "Paris."), ("user", "And of Spain?")]
    assert encode_prompt(tokenizer, turns) == wanted.tokens
    row = encode_example(tokenizer, "Capital of France?", "Paris.")
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[-4:] == [
        "[/INST]",
        "▁Paris",
        ".",
        "</s>",
    ]
    assert [label != -100 for label in row["labels"]][-4:] == [False, True, True, True]


def test_a_system_text_stands_where_the_template_puts_it(smollm_tokenizer):
    talk = [("system", "Rhyme.", True), ("user", "Hi", True), ("assistant", "Bye", True)]
    row = {"prompt": "p", "completion": "Bye", "turns": json.dumps(talk)}
    text = training_text(row, tuned(smollm_tokenizer, None))
    assert text == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nBye<|im_end|>"
    )
    assert "### Question" in training_text(row, smollm_tokenizer)


def rows_of(*turns):
    """Two good rows and one of `turns`, which stands in line 7."""
    good = [{"prompt": f"q{n}", "completion": "a", "where": f"r.jsonl:{n}"} for n in (1, 2)]
    told = {"prompt": "q", "completion": turns[-1][1], "where": "r.jsonl:7"}
    every = [row | {"turns": None} for row in good]
    return [*every, told | {"turns": json.dumps([(*turn, True) for turn in turns])}]


CONTROL = "holds {}, a control token of this model"
OTHERWISE = "it writes earlier turns otherwise when others follow"
REFUSED = {
    "a control token asked": (MISTRAL, [("user", "a [/INST] b"), ("assistant", "c")], "[/INST]"),
    "one answered": (MISTRAL, [("user", "a"), ("assistant", "c</s>")], "</s>"),
    "one in the second turn": (
        MISTRAL,
        [("user", "a"), ("assistant", "c"), ("user", "<s>"), ("assistant", "d")],
        "<s>",
    ),
    "a system text that moves": (
        MISTRAL,
        [("system", "s"), ("user", "a"), ("assistant", "c"), ("user", "b"), ("assistant", "d")],
        OTHERWISE,
    ),
    "a system text that goes when the answer comes": (
        MISTRAL,
        [("system", "s"), ("user", "a"), ("assistant", "c")],
        OTHERWISE,
    ),
    "two answers in a row": (
        MISTRAL,
        [("user", "a"), ("assistant", "c"), ("assistant", "d")],
        "it does not take these turns (After the optional system message",
    ),
    "thinking that is dropped": (
        CHATML.replace("BODY", LAST),
        [("user", "a"), ("assistant", "<think>x</think>c"), ("user", "b"), ("assistant", "d")],
        OTHERWISE,
    ),
    "a text that is changed": (
        CHATML.replace("BODY", BODY + ".replace('x', 'y')"),
        [("user", "x"), ("assistant", "c")],
        "it leaves out or changes a text of the user",
    ),
    "a system text left out": (
        CHATML.replace("BODY", f"({BODY} if message['role'] != 'system' else '')"),
        [("system", "s!"), ("user", "a"), ("assistant", "c")],
        "it leaves out or changes a text of the system",
    ),
    "blanks that are joined": (
        CHATML.replace("BODY", BODY),
        [("user", "a"), ("assistant", "\n\nc")],
        "an answer starts with blanks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_the_template_cannot_write_are_named(mistral_tokenizer, smollm_tokenizer, case):
    template, turns, reason = REFUSED[case]
    tokenizer = tuned(mistral_tokenizer if template == MISTRAL else smollm_tokenizer, template)
    with pytest.raises(UserError) as error:
        encode_rows(rows_of(*turns), tokenizer)
    reason = CONTROL.format(reason) if reason[0] in "[<" else reason
    assert "1 of 3 rows cannot be written" in str(error.value)
    assert "r.jsonl:7: " in str(error.value) and reason in str(error.value)
    assert "prompt_format = 'question-answer'" in str(error.value)
    assert "r.jsonl:1" not in str(error.value)


TEMPLATES = {
    "none": ("", "it has none"),
    "a date": (
        "{{ strftime_now('%d %b %Y') }}" + CHATML.replace("BODY", BODY),
        "it writes today's date",
    ),
    "another end": (
        CHATML.replace("BODY", BODY).replace("<|im_end|>", "<|endoftext|>"),
        "does not end an answer in the tokenizer's EOS, <|im_end|>",
    ),
    "broken": ("{% for", "it does not take these turns"),
    "what follows all": (CHATML.replace("BODY", BODY) + "{{ 'Go on.' }}", OTHERWISE),
    "what follows an end": (
        CHATML.replace("BODY", BODY).replace(
            "{% endfor %}", "{{ 'Go on.' if message['role'] == 'assistant' }}{% endfor %}"
        ),
        "does not end an answer in the tokenizer's EOS, <|im_end|>",
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_cannot_be_used_is_told_before_anything_is_encoded(smollm_tokenizer, case):
    template, reason = TEMPLATES[case]
    tokenizer = copy.copy(smollm_tokenizer)
    tokenizer.init_kwargs = dict(tokenizer.init_kwargs)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="prompt_format = 'chat' cannot be used") as error:
        usable(tokenizer, ".", "/nowhere", "chat")
    assert reason in str(error.value)


def test_what_is_asked_of_the_trained_model_may_hold_no_control_token(tokenizer):
    forged = tokenizer.eos_token
    with pytest.raises(UserError, match=r"cannot be asked.*control token"):
        encode_prompt(tokenizer, f"a{forged}b")
    assert encode_prompt(tokenizer, "a b")


def test_conversations_of_other_roles_have_control_tokens_of_their_own(smollm_tokenizer):
    """SmolLM2's template begins with a system text of its own where the row has none."""
    tokenizer = tuned(smollm_tokenizer, None)
    starts = [[("system", "s"), ("user", "a")], [("user", "s"), ("user", "a")]]
    for talks in (starts, starts[::-1]):
        assert len(encode_asked(tokenizer, talks)) == 2
        whole = [[*talk, ("assistant", "b", True)] for talk in talks]
        assert len(encode_talks(tokenizer, whole, whole=False)) == 2


def test_a_length_that_the_tokenizer_was_saved_with_cuts_nothing(smollm_tokenizer):
    tokenizer = tuned(smollm_tokenizer, None)
    talks = [[("user", "one two three four five six"), ("assistant", "seven eight", True)]]
    wanted = encode_talks(tokenizer, talks, whole=False)
    tokenizer.backend_tokenizer.enable_truncation(30)
    tokenizer.backend_tokenizer.enable_padding(length=90)
    assert encode_talks(tokenizer, talks, whole=False) == wanted and len(wanted[0][0]) > 30


def test_a_word_that_the_tokenizer_does_not_know_is_no_control_token():
    words = {"<unk>": 0, "</s>": 1, "u": 2, "a": 3, "know": 4}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    own = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    own.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}"
        "{{ '</s> ' if m['role'] == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
    )
    assert control_ids(own) == {1}
    assert encode_asked(own, [[("user", "know this")]]) == [[2, 4, 0, 3]]
    own.unk_token = own.eos_token  # as GPT-2 has it
    assert 1 in control_ids(own)


PLANTED = {
    "cut short": lambda ids, labels: (ids[:-1], labels[:-1]),
    "an EOS that is not trained": lambda ids, labels: (ids, [*labels[:-1], -100]),
    "a label on what is asked": lambda ids, labels: (ids, [ids[0], *labels[1:]]),
    "a first token not trained": lambda ids, labels: (
        ids,
        [*labels[: -len(trained(labels))], -100, *trained(labels)[1:]],
    ),
    "two BOS": lambda ids, labels: ([ids[0], *ids], [-100, *labels]),
    "another prompt": lambda ids, labels: ([*ids[:5], ids[5] + 1, *ids[6:]], labels),
    "another answer": lambda ids, labels: ([*ids[:-2], ids[-2] + 1, ids[-1]], labels),
    "a label that is not its token": lambda ids, labels: (
        ids,
        [*labels[:-2], labels[-2] + 1, labels[-1]],
    ),
}


def trained(labels):
    last = max(n for n, label in enumerate(labels) if label == -100)
    return labels[last + 1 :]


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("answers", [1, 2])
def test_the_audit_finds_each_planted_mistake(tokenizer, planted, answers):
    turns = [("user", "Who is it?"), ("assistant", "It is I, of course.")] * answers
    row = rows_of(*turns)[-1]
    data = encode_rows([row], tokenizer)
    assert "Audited 1 row, all of them:" in audit_labels(data, tokenizer)
    ids, labels = PLANTED[planted](data[0]["input_ids"], data[0]["labels"])
    wrong = data.map(lambda _: {"input_ids": ids, "labels": labels})
    with pytest.raises(UserError, match=r"1 of 1 rows would mis-train[^•]*• r.jsonl:7 "):
        audit_labels(wrong, tokenizer)


def test_every_token_is_trained_where_the_loss_is_on_all(tokenizer):
    rows = encode_rows(rows_of(("user", "a"), ("assistant", "b")), tokenizer, False)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert "every token trained" in audit_labels(rows, tokenizer, False)
    masked = encode_rows(rows_of(("user", "a"), ("assistant", "b")), tokenizer)
    assert masked[0]["labels"] != rows[0]["labels"]


def test_long_rows_are_shortened_by_the_template_too(tokenizer, cfg):
    long = {"prompt": " ".join(["word"] * 200) + " last", "completion": "yes", "where": "a:1"}
    data = encode_rows([long], tokenizer)
    cut = fit_length(data, tokenizer, cfg(max_length=60, too_long="truncate"))
    assert 55 <= cut[0]["length"] <= 60 and cut[0]["prompt"].endswith("word last")
    assert "Audited" in audit_labels(cut, tokenizer)


def test_another_template_is_encoded_anew(smollm_tokenizer):
    rows = rows_of(("user", "a"), ("assistant", "b"))
    own = tuned(smollm_tokenizer, None)
    other = tuned(smollm_tokenizer, CHATML.replace("BODY", BODY))
    found = [encode_rows(rows, one) for one in (own, other, smollm_tokenizer)]
    assert len({each._fingerprint for each in found}) == 3
    assert len({tuple(each[0]["input_ids"]) for each in found}) == 3


def test_the_saved_tokenizer_keeps_its_template_and_knows_its_format(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    write_for_others(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert encode_prompt(again, "Hi") == encode_prompt(tokenizer, "Hi")
    assert control_ids(again) == control_ids(tokenizer)
    # "### End" is a text like another here.
    ids = again("so it goes.\n\n### End", add_special_tokens=False)["input_ids"]
    assert read_answer(again, ids).text.endswith("### End")


def test_the_end_marker_is_shown_where_it_is_a_text_like_another(tokenizer, capsys):
    streamer = AnswerStreamer(tokenizer)
    for piece in (" See", " ### ", "End", ""):
        streamer.on_finalized_text(piece, piece == "")
    assert capsys.readouterr().out.strip() == "See ### End"


def test_a_reference_takes_no_room_for_an_end_marker(tokenizer, cfg, capsys):
    data = encode_rows(rows_of(("user", "a"), ("assistant", "so it goes")), tokenizer)
    end = len(tokenizer("so it goes", add_special_tokens=False)["input_ids"]) + 1
    for most in (end, end - 1):
        draw_sample(data, tokenizer, cfg(max_new_tokens=most, sample_rows=1))
        assert ("1 of the 1 references is longer" in capsys.readouterr().out) == (most < end)


def test_the_card_asks_without_the_end_marker(cfg):
    run = {"base_revision": None}
    assert "removesuffix" not in how_to_ask(cfg(prompt_format="chat"), run, merged=True)
    assert 'removesuffix("### End")' in how_to_ask(cfg(), run, merged=True)
