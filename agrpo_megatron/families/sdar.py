"""SDAR (1.7B, 4B, 8B) and TraDo: Qwen3's shapes, attention by blocks, no shift, untied head.

Source: config.json, model.safetensors.index.json and the modelling code of JetAstra/SDAR.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import PLAIN_ROPE, STANDARD, Family, standard_names

# Of a config.json that lacks them, as the published ones do.
# Source: the tables of block diffusion models in SGLang and LMDeploy.
BLOCK_SIZE, MASK = 4, 151669

_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_KEYS = {
    **STANDARD,
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "eos_token_id": "eos_token_id",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}
# A window is not used without `use_sliding_window`; the last two lines are about how the
# modelling code runs.
_OTHER_KEYS = """
block_size mask_token_id
max_window_layers sliding_window
attn_implementation debug ep_size fuse_cross_entropy
micro_forward skip_checkpoint use_deepep
"""
_FIXED = {"qkv_bias": False, "qk_norm": True, "shift": False, "attention": "block_causal"}
_FIXED |= PLAIN_ROPE


def _other_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    rows, mask = config["vocab_size"], config.get("mask_token_id", MASK)
    if "mask_token_id" not in config and type(rows) is int and rows <= MASK:
        raise ValueError(
            f"mask_token_id is missing, and vocab_size={rows} has no row for the published {MASK}; "
            "add mask_token_id and block_size"
        )
    return {
        "mask_token_id": ("mask_token_id", mask),
        "block_length": ("block_size", config.get("block_size", BLOCK_SIZE)),
    }


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    return {
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_width,
        "block_size": model.block_length,
        "mask_token_id": model.mask_token_id,
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "bos_token_id": model.eos_token_id,
        "fuse_cross_entropy": True,  # the modelling code reads it, also without a loss
        "use_cache": False,
    }


_OTHERS = frozenset(_OTHER_KEYS.split())
FAMILY = Family(
    "sdar", _REQUIRED, _KEYS, _other_settings, _other_keys, standard_names, _OTHERS, _FIXED
)
