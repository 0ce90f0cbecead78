"""SDAR and TraDo: Qwen3's shapes, attention by blocks, no shift, untied head.

`sdar` has 1.7B, 4B and 8B parameters; `sdar_moe`, SDAR-30B-A3B, has experts in every layer.

Source: config.json, model.safetensors.index.json and the modelling code of JetAstra/SDAR.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import (
    NO_EXPERTS,
    PLAIN_ROPE,
    STANDARD,
    Family,
    mask_or,
    standard_names,
)

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

_MOE_REQUIRED = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_MOE_KEYS = {
    "moe.experts": "num_experts",
    "moe.topk": "num_experts_per_tok",
    "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.normalise": "norm_topk_prob",
}
_MOE_FIXED = {
    "moe.dense_layers": 0,
    "moe.shared_ffn_hidden_size": None,
    "moe.score": "softmax",
    "moe.scaling_factor": 1.0,
    "moe.expert_bias": False,
    "moe.groups": None,
    "moe.block_experts": None,
}


def _other_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    return {
        "mask_token_id": mask_or(config, MASK),
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


def _moe_keys(model: ModelSettings) -> dict[str, Any]:
    own = {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}
    return {**_other_keys(model), **own, "output_router_logits": False}


_OTHERS = frozenset(_OTHER_KEYS.split())
FAMILY = Family(
    "sdar",
    _REQUIRED,
    _KEYS,
    _other_settings,
    _other_keys,
    standard_names,
    _OTHERS,
    _FIXED | NO_EXPERTS,
)
FAMILY_MOE = Family(
    "sdar_moe",
    _REQUIRED | _MOE_REQUIRED,
    _KEYS | _MOE_KEYS,
    _other_settings,
    _moe_keys,
    standard_names,
    _OTHERS | {"output_router_logits", "router_aux_loss_coef"},  # only about a loss
    _FIXED | _MOE_FIXED,
)
