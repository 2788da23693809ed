"""A tiny model of Mistral's real architecture, in real NF4, with an adapter that changes what it
says; other stacks.
"""

import importlib.metadata
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_base(folder: Path, tokenizer, seed: int = 0, **changes) -> str:
    """Save a 2-layer Mistral (hidden 64) and the tokenizer; its random weights are large enough to
    say something.
    """
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "sliding_window": None,
    }
    config = transformers.MistralConfig(vocab_size=len(tokenizer), **shape | heads | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_nf4(base: str):
    """The base in NF4 with nested quantisation, computing in fp32, as the notebook loads it."""
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(base, quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"})


def tiny_tuned(base: str, seed: int = 0, **lora):
    """The base in NF4 with a random adapter on it."""
    from finetune.base_model import mend_cpu_gradients

    targets = lora.pop("target_modules", ["q_proj", "k_proj", "v_proj", "o_proj"])
    shape = {"r": 4, "lora_alpha": 8} | lora
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **shape)
    model = peft.get_peft_model(tiny_nf4(base), config)
    mend_cpu_gradients(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def pythons() -> list[str]:
    """This stack's Python, and one of the other major version of transformers where it is
    installed.
    """
    major = importlib.metadata.version("transformers")[0]
    other = (
        Path(__file__).parents[1]
        / ".venv"
        / ("newest" if major == "4" else "transformers4")
        / "bin"
        / "python"
    )
    return [sys.executable] + [str(other)] * other.exists()
