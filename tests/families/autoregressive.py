"""Tiny Llama, Qwen2.5 and Qwen3 folders, made by transformers."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_autoregressive(
    family: str, *, tied: bool, seed: int = 0, **keys: object
) -> PreTrainedModel:
    """Return a model of transformers with random weights, norms and biases included."""
    config_class, model_class = KINDS[family]
    values = {
        "vocab_size": 83,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "pad_token_id": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }
    if family == "qwen3":
        values["head_dim"] = 16
    torch.manual_seed(seed)
    model = model_class(config_class(**{**values, **keys}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def write_autoregressive(
    folder: Path, family: str, *, tied: bool, seed: int = 0, **keys: object
) -> PreTrainedModel:
    """Write such a folder, without a tokenizer; return the model."""
    model = make_autoregressive(family, tied=tied, seed=seed, **keys)
    model.save_pretrained(folder)
    return model
