"""Tiny random models of the architectures that people fine-tune, each with what could be missed.

Windows shorter than the rows, caps low enough to bite, multipliers far from 1, biases, experts,
sinks: a replacement that leaves one of them out computes something else.
"""

import torch
import transformers

SIZE = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = SIZE | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAPS = {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRIFFIN = {"lru_width": 64, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}
MATFORMER = {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]}
QV = ["q_proj", "v_proj"]
# Architecture: its configuration, and the modules that get an adapter.
MODELS = {
    "Mistral": (GQA | {"sliding_window": 8}, "all-linear"),
    "Llama": (GQA | {"attention_bias": True}, "all-linear"),
    "Qwen2": (GQA, "all-linear"),  # it has biases on q, k and v
    "Qwen3": (GQA, "all-linear"),
    "Gemma2": (GQA | CAPS | MIXED | {"attn_logit_softcapping": 0.5}, "all-linear"),
    "Gemma3": (GQA | CAPS | MIXED, "all-linear"),
    "Phi3": (GQA | PAD | {"sliding_window": 8, "resid_pdrop": 0.0}, ["qkv_proj", "o_proj"]),
    "GPTNeoX": (SIZE | {"intermediate_size": 128, "rotary_pct": 0.5}, ["query_key_value"]),
    "Falcon": (SIZE | {"new_decoder_architecture": True, "num_kv_heads": 2}, ["query_key_value"]),
    "Granite": (
        GQA | {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 6.0},
        "all-linear",
    ),
    "Mixtral": (GQA | EXPERTS, QV),
    "GptOss": (GQA | MIXED | EXPERTS, QV),  # sinks
    "Gemma3n": (GQA | CAPS | MIXED | PER_LAYER | MATFORMER, QV),
    "Gemma4": (GQA | CAPS | MIXED | PER_LAYER, QV),
    "RecurrentGemma": (
        SIZE
        | GRIFFIN
        | {"num_key_value_heads": 1, "intermediate_size": 128, "logits_soft_cap": 0.5},
        QV,
    ),
    "Llama4": (
        GQA | {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 128},
        QV,
    ),
    "Bloom": (SIZE, ["query_key_value"]),  # distances in place of positions
    "Lfm2": (GQA | {"layer_types": ["conv", "full_attention"]}, QV),
}
KEPT_WHOLE = ["lm_head", "altup", "prediction_coefs", "correction_coefs"]  # Gemma 3n clamps these


def known() -> list[str]:
    """The architectures that the installed transformers has."""
    return [name for name in MODELS if hasattr(transformers, f"{name}ForCausalLM")]


def random_model(name: str, **changes):
    """A model of that architecture with random weights, large enough to say something."""
    kind = getattr(transformers, f"{name}ForCausalLM")
    settings, _ = MODELS[name]
    torch.manual_seed(0)
    config = kind.config_class(**settings | {"initializer_range": 0.1} | changes)
    return kind(config)
