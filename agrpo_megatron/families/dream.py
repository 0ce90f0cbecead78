"""Dream-7B (Dream-v0-Base/Instruct, DiffuCoder): Qwen2.5's shapes, bidirectional, shifted.

The hidden state at position i - 1 predicts the token at i, as in its autoregressive origin.
Source: config.json, model.safetensors.index.json and the modelling code of
Dream-org/Dream-v0-Instruct-7B.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import (
    NO_EXPERTS,
    PLAIN_ROPE,
    STANDARD,
    Family,
    standard_names,
)

_REQUIRED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_KEYS = {
    **STANDARD,
    "vocab_size": "vocab_size",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}
# A window is not used without `use_sliding_window`.
_OTHERS = frozenset(("max_window_layers", "sliding_window"))


# Query, key and value always have biases, the output projection has none.
_FIXED = {"qkv_bias": True, "qk_norm": False, "shift": True, "attention": "full"}
_FIXED |= {**NO_EXPERTS, **PLAIN_ROPE}


def _other_settings(_config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    return {}


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    return {
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "bos_token_id": model.eos_token_id,
        "pad_token_id": model.eos_token_id,
        "use_cache": False,
    }


FAMILY = Family(
    "dream", _REQUIRED, _KEYS, _other_settings, _other_keys, standard_names, _OTHERS, _FIXED
)
