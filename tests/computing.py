"""What tests of sections 8, 10 and 11 share: tiny random models in real NF4, rows, gradients."""

import random
import tempfile

import datasets
import peft
import torch
import transformers
from architectures import KEPT_WHOLE

from finetune.base_model import mend_cpu_gradients
from finetune.batches import Cut

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny(dropout=0.0, layers=3, **lora):
    """A model of Mistral's architecture with random weights, in real NF4 and fp32 compute, with
    LoRA.
    """
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
    )
    plain = transformers.MistralForCausalLM(config)
    return with_lora(in_nf4(plain), dropout, **lora)


def in_nf4(plain, dtype=torch.float32):
    """A random model saved, and loaded in NF4; it computes in `dtype`."""
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT_WHOLE,
    )
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        model = type(plain).from_pretrained(
            folder, quantization_config=nf4, dtype=dtype, device_map={"": "cpu"}
        )
    mend_cpu_gradients(model)
    return model


def with_lora(model, dropout=0.0, **lora):
    """LoRA as PEFT attaches it, but for weights that are not zero."""
    recipe = {
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": dropout,
        "target_modules": TARGETS,
    }
    config = peft.LoraConfig(**recipe | lora)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def rows(n=37, seed=1, longest=60):
    """Encoded rows of random ids: prompts untrained, lengths from 5 to `longest`."""
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        ids = [chance.randrange(3, 500) for _ in range(chance.randrange(5, longest))]
        start = chance.randrange(1, len(ids) - 1)
        found.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return datasets.Dataset.from_list(found)


def gradients(model, batch, **kwargs):
    model.zero_grad()
    model.train()
    loss = model(**batch, num_items_in_batch=50, **kwargs).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    norm = sum((a - other[n]).norm() ** 2 for n, a in one.items()) ** 0.5
    assert norm <= tolerance * sum(a.norm() ** 2 for a in one.values()) ** 0.5


PADDED, FLAT = Cut(4, False, "sdpa"), Cut(4, True, "sdpa")
