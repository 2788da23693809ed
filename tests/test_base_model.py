"""Section 7: the real embedded model in real NF4, on the CPU."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from finetune.answers import generate_answers
from finetune.base_model import base_model_path
from finetune.tokens import encode_example


@pytest.fixture(scope="module")
def batch(smollm_tokenizer):
    encoded = encode_example(smollm_tokenizer, "Capital of France?", "Paris")
    return {name: torch.tensor([ids]) for name, ids in encoded.items()}


def gradients(model, batch):
    model.zero_grad()
    model.train()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_linear_layers_are_nested_nf4_and_only_the_adapter_trains(nf4_model):
    model = nf4_model()
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 30 * 7
    assert all(
        m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers
    )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 30 * 4 * 2 and all("lora_" in name for name in trained)
    assert model.get_memory_footprint() < 200e6


def test_gradients_are_the_same_after_a_forward_pass_without_them(
    nf4_model, batch, smollm_tokenizer
):
    model = nf4_model()
    first = gradients(model, batch)
    generate_answers(model, smollm_tokenizer, ["Hello"], 4)
    second = gradients(model, batch)
    assert len(first) == len(second) == 240
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_prepared_model_knows_the_capital_of_france(smollm_path):
    from transformers import pipeline

    chat = pipeline("text-generation", smollm_path, dtype=torch.bfloat16, device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = chat(question, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"]
    assert answer == "The capital of France is Paris."


def test_both_spellings_of_the_rope_base_are_kept(smollm_path):
    config = json.loads((Path(smollm_path) / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000


def test_an_interrupted_preparation_leaves_nothing_half_made(tmp_path, monkeypatch, settings):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.base_model.convert_gguf", stop)
    cfg = settings(base_model="embedded", model_cache=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        base_model_path(cfg)
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()


def test_a_folder_is_a_base_model_and_a_hub_id_stays_one(tmp_path, settings):
    assert base_model_path(settings(base_model=str(tmp_path))) == str(tmp_path)
    assert (
        base_model_path(settings(base_model="mistralai/Mistral-7B-v0.3"))
        == "mistralai/Mistral-7B-v0.3"
    )
