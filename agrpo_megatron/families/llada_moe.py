"""LLaDA-MoE-7B-A1B: full bidirectional attention, experts by an unnormalised softmax.

Its config.json has LLaDA-8B's model_type `llada`, and keys of experts.

Source: config.json and model.safetensors.index.json of LLaDA-MoE-7B-A1B, and its modelling code.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.config_json import shown
from agrpo_megatron.families.tensors import (
    STANDARD,
    UNSCALED_ROPE,
    Family,
    mask_or,
    mlp_names,
    standard_names,
)

MASK = 156895  # the published files lack it
FREQUENCY, SHARED = "moe_layer_freq", "shared_expert_intermediate_size"

_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    # The modelling code adds this bias to the weights too, as no other family does.
    "moe_router_enable_expert_bias": False,
}
_KEYS = {
    **STANDARD,
    "ffn_hidden_size": "dense_intermediate_size",
    "vocab_size": "vocab_size",
    "eos_token_id": "eos_token_id",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "rotary_fraction": "partial_rotary_factor",
    "qk_norm": "qk_layernorm",
    "moe.experts": "num_experts",
    "moe.topk": "num_experts_per_tok",
    "moe.ffn_hidden_size": "expert_intermediate_size",
}
# The modelling code reads none of the last two lines, whatever they say of the router.
_OTHER_KEYS = f"""
mask_token_id {FREQUENCY} {SHARED}
moe_router_score_function norm_topk_prob output_router_logits routed_scaling_factor
router_aux_loss_coef router_num_group router_topk_group
"""
_FIXED = {
    "qkv_bias": False,
    "shift": False,
    "attention": "full",
    "moe.score": "softmax",
    "moe.normalise": False,
    "moe.scaling_factor": 1.0,
    "moe.expert_bias": False,
    "moe.groups": None,
    "moe.block_experts": None,
}
_FIXED |= UNSCALED_ROPE


def _other_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    return {
        "mask_token_id": mask_or(config, MASK),
        "moe.dense_layers": (FREQUENCY, _dense_layers(config)),
        "moe.shared_ffn_hidden_size": (SHARED, config.get(SHARED)),
    }


def _dense_layers(config: Mapping[str, Any]) -> int:
    """Return how many first layers have no experts; the others have to have them."""
    given = config[FREQUENCY]
    if type(given) is int and given == 1:
        return 0
    if isinstance(given, list) and len(given) == config["num_hidden_layers"]:
        dense = given.count(0)
        if given == [0] * dense + [1] * (len(given) - dense):
            return dense
    raise ValueError(
        f"{shown(FREQUENCY, given)}: the llada_moe family needs one 0 or 1 for each layer, 0 for "
        "the first layers only"
    )


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    dense = model.moe.dense_layers
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "mask_token_id": model.mask_token_id,
        "pad_token_id": model.eos_token_id,
        FREQUENCY: [0] * dense + [1] * (model.num_layers - dense),
        SHARED: model.moe.shared_ffn_hidden_size,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "output_router_logits": False,
        "routed_scaling_factor": 1.0,
        "router_num_group": None,
        "router_topk_group": None,
        "use_cache": False,
    }


def _mappings(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    names = mlp_names(model, "model.layers.{i}.", shared="shared_expert.")
    return {**standard_names(model), **names}


FAMILY = Family(
    "llada_moe",
    _REQUIRED,
    _KEYS,
    _other_settings,
    _other_keys,
    _mappings,
    frozenset(_OTHER_KEYS.split()),
    _FIXED,
)
