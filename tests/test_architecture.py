"""Section 4: what a base model's config says of it; section 7: how much of it is in 4 bits."""

import json

import pytest
import torch
import transformers
from architectures import random_model
from computing import in_nf4, tiny
from tiny import tiny_base, tiny_nf4

from finetune.architecture import check_architecture
from finetune.base_model import compute_in, linear_4bit, weights_held
from qlora_helpers import UserError

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}


@pytest.fixture
def told(settings, tmp_path):
    """Saves a config and gives what is said of it."""

    def ask(config, changes=None, **more):
        if not isinstance(config, dict):
            config = config.to_dict() | {"model_type": config.model_type}
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        return [*check_architecture(settings(base_model=str(tmp_path), **changes or {}), None)]

    return ask


def mistral(**changes):
    return transformers.MistralConfig(**SMALL | HEADS | changes)


def test_of_a_model_that_can_be_trained_nothing_is_said(told):
    assert told(mistral()) == []
    assert told(mistral(), {"target_modules": "all-linear"}) == []
    assert told(mistral(), {"target_modules": ["self_attn.q_proj", "down_proj"]}) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "has an encoder and"),
        (
            transformers.BartConfig(architectures=["BartForCausalLM"]),
            "has an encoder and a decoder",
        ),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "not write text from left to"),
        (transformers.CLIPTextConfig(), "is no causal language model"),
        (transformers.LlavaConfig(architectures=["LlavaForX"]), "also sees or hears (LlavaForX)"),
        (transformers.Gemma3Config(), "also sees or hears"),
        (transformers.WhisperConfig(), "has an encoder and a decoder"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_is_no_causal_model_of_text_is_refused_by_its_kind(told, config, words):
    ((mark, text),) = told(config)
    assert mark == "✗" and words in text


@pytest.mark.parametrize(
    ("done", "words"),
    [
        ({"quant_method": "fp8"}, "is quantised already (fp8)"),
        ({"quant_method": "gptq", "bits": 4}, "is quantised already (gptq)"),
        ({"quant_method": "awq", "bits": 4}, "is quantised already (awq)"),
        ({"quant_method": "mxfp4"}, "is quantised already (mxfp4)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "(bitsandbytes 8-bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ""),
    ],
    ids=str,
)
def test_a_base_that_is_quantised_otherwise_is_refused_before_it_is_fetched(told, done, words):
    lines = told(mistral(), quantization_config=done)
    assert [mark for mark, _ in lines] == ["✗"] * bool(words)
    assert not words or (words in lines[0][1] and "16-bit weights" in lines[0][1])


def test_a_model_that_would_need_its_own_code_is_never_run(told):
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    ((mark, text),) = told(own)
    assert mark == "✗" and "Python code of its own, which is never run here" in text


def test_a_kind_of_model_that_is_not_known_is_told_as_that(told):
    ((mark, text),) = told({"model_type": "mistral9"})
    assert mark == "✗" and "this version of transformers does not know" in text


@pytest.mark.parametrize("ends", [512, 4095, 4096])
def test_positions_that_end_before_the_longest_row_are_told(told, ends):
    lines = told(mistral(max_position_embeddings=ends))
    assert [mark for mark, _ in lines] == ["!"] * (ends < 4096)
    assert ends == 4096 or f"end at {ends:,}" in lines[0][1]
    assert ends == 4096 or f"set max_length = {ends}" in lines[0][1]


def test_positions_of_older_models_have_another_name(told):
    lines = told(transformers.GPT2Config(n_layer=1), {"target_modules": ["c_attn"]})
    assert [mark for mark, _ in lines] == ["!"] and "end at 1,024" in lines[0][1]


def test_targets_that_a_model_has_under_other_names_are_told_with_those(told):
    phi = transformers.Phi3Config(**SMALL | HEADS, pad_token_id=0)
    ((mark, text),) = told(phi)
    assert mark == "✗" and "phi3 has no q_proj, k_proj, v_proj;" in text
    assert text.endswith("its layers have down_proj, gate_up_proj, o_proj, qkv_proj")
    assert told(phi, {"target_modules": ["qkv_proj", "o_proj"]}) == []
    ((_, text),) = told(mistral(), {"target_modules": ["proj", "q_proj"]})  # no part of a name
    assert "mistral has no proj;" in text


def test_of_what_cannot_be_read_nothing_is_said_here(settings, tmp_path):
    assert [*check_architecture(settings(base_model=str(tmp_path / "none")), None)] == []
    assert [*check_architecture(settings(base_model="embedded"), None)] == []


# -------- section 7 -----------------------------------------------------------------------


def test_weights_in_4_bits_are_counted_and_what_stays_in_16_is_said():
    model = tiny().unload()  # 3 layers of 64 × (64 + 32 + 32 + 64 + 3 × 128), 512 tokens twice
    four, whole = 3 * 64 * (64 + 32 + 32 + 64 + 3 * 128), 2 * 512 * 64 + 7 * 64
    said = weights_held(model)
    assert f"{four / (four + whole):.0%} of 0 million weights are in 4 bits;" in said
    assert said.endswith("embeddings and output head stay in 16")
    model.config.output_router_logits = True
    assert weights_held(model).endswith("its router gets no auxiliary loss")


def test_a_mixture_whose_experts_stay_in_16_bits_is_refused():
    model = in_nf4(random_model("Mixtral"))
    experts = [n for n, p in model.named_parameters() if "expert" in n and p.ndim == 3]
    if not experts:  # before transformers 5 each is a linear layer
        assert "million weights are in 4 bits" in weights_held(model)
        return
    with pytest.raises(UserError, match=r"Only \d+% of this model's layers .* Choose another"):
        weights_held(model)


def test_what_would_stay_in_16_bits_is_told_in_gb():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig())
    # 46.4 of its 46.7 billion weights are no embeddings, and none is in 4 bits here.
    with pytest.raises(UserError, match=r"Only 0% of .* and take 87 GB in 16 bits\."):
        weights_held(model)


def test_a_base_saved_in_4_bits_computes_as_this_gpu_can(tmp_path, mistral_tokenizer):
    base = tiny_nf4(tiny_base(tmp_path / "whole", mistral_tokenizer))
    base.save_pretrained(tmp_path / "four")
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(
        tmp_path / "four", quantization_config=nf4, dtype=torch.float16, device_map={"": "cpu"}
    )
    compute_in(model, torch.float16)
    layers = linear_4bit(model)
    assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {torch.float16}
    assert all(layer.weight.quant_state.nested for layer in layers)  # as it was saved
    compute_in(model, torch.bfloat16)
    assert layers[0](torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layers[1](torch.ones(1, 64))
    assert layers[1].compute_dtype == torch.bfloat16  # whatever comes in
