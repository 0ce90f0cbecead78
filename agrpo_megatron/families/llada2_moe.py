"""LLaDA2.0 and 2.1, mini and flash: attention by blocks, experts by groups and biased sigmoids.

Source: config.json, model.safetensors.index.json and the modelling code of LLaDA2.0-mini, and
arXiv 2512.15745; 2602.08676 for 2.1; configuration and converter of inclusionAI/dFactory.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.config_json import check_number, shown
from agrpo_megatron.families.tensors import (
    STANDARD,
    UNSCALED_ROPE,
    Family,
    mask_or,
    standard_names,
)

# The published files have neither.
MASK, BLOCK_SIZE = 156895, 32
# Of a model that dFactory trains: all experts of a layer are one tensor, see `families.files`.
MERGED_TYPE = "llada2_moe_veomni"
SHARED, ROTARY = "num_shared_experts", "rotary_dim"

_REQUIRED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "norm_head": False,
    "norm_softmax": False,
    "rope_scaling": None,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
}
_KEYS = {
    **STANDARD,
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "rotary_fraction": "partial_rotary_factor",
    "qk_norm": "use_qk_norm",
    "moe.experts": "num_experts",
    "moe.topk": "num_experts_per_tok",
    "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.normalise": "norm_topk_prob",
    "moe.scaling_factor": "routed_scaling_factor",
    "moe.expert_bias": "moe_router_enable_expert_bias",
}
# A window is not used without `use_sliding_window`. The router is float32 here in any case.
_OTHER_KEYS = f"""
block_size eos_token_id mask_token_id n_group topk_group {SHARED} {ROTARY}
max_window_layers sliding_window output_router_logits router_aux_loss_coef router_dtype
num_nextn_predict_layers mtp_loss_scaling_factor
"""
_FIXED = {
    "qkv_bias": False,
    "shift": False,
    "attention": "block_causal",
    "moe.score": "sigmoid",
    "moe.block_experts": None,
}
_FIXED |= UNSCALED_ROPE


def _other_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    keys = ("head_dim", "partial_rotary_factor", "moe_intermediate_size", SHARED)
    width, fraction, expert, shared = numbers = [{SHARED: 0, **config}[key] for key in keys]
    for key, value in zip(keys, numbers, strict=True):
        check_number(shown(key, value), value)
    for key, wanted in ((ROTARY, width * fraction), ("num_nextn_predict_layers", 0)):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{shown(key, config[key])}; the llada2_moe family needs {wanted:g}")
    groups = config["n_group"], config["topk_group"]
    has_groups = groups != (1, 1)  # one group restricts nothing
    # Padding ends a text where nothing else does, as in the published files.
    end = "eos_token_id" if "eos_token_id" in config else "pad_token_id"
    return {
        "eos_token_id": (end, config[end]),
        "mask_token_id": mask_or(config, MASK),
        "block_length": ("block_size", config.get("block_size", BLOCK_SIZE)),
        "moe.groups": ("n_group", groups[0] if has_groups else None),
        "moe.group_topk": ("topk_group", groups[1] if has_groups else None),
        "moe.shared_ffn_hidden_size": (SHARED, shared * expert or None),
    }


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    moe = model.moe
    assert moe.ffn_hidden_size is not None
    shared, rest = divmod(moe.shared_ffn_hidden_size or 0, moe.ffn_hidden_size)
    if rest:
        raise ValueError(
            f"model.moe.shared_ffn_hidden_size={moe.shared_ffn_hidden_size}: the llada2_moe "
            "family's modelling code needs a multiple of model.moe.ffn_hidden_size="
            f"{moe.ffn_hidden_size}"
        )
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_width,
        ROTARY: model.rotary_width,
        "block_size": model.block_length,
        "mask_token_id": model.mask_token_id,
        "pad_token_id": model.eos_token_id,
        "n_group": moe.groups or 1,
        "topk_group": moe.group_topk or 1,
        SHARED: shared,
        "router_dtype": "fp32",
        "output_router_logits": False,
        "use_cache": False,
    }


def _mappings(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    """Return the standard names but those of attention, whose projections are one tensor."""
    block, layer = "model.layers.{i}.attention.", "decoder.layers.{i}.self_attention."
    names = {
        **standard_names(model),
        "embedding.word_embeddings.weight": ("model.word_embeddings.weight",),
        layer + "linear_qkv.weight": (block + "query_key_value.weight",),
        layer + "linear_proj.weight": (block + "dense.weight",),
    }
    if model.qk_norm:
        names[layer + "q_layernorm.weight"] = (block + "query_layernorm.weight",)
        names[layer + "k_layernorm.weight"] = (block + "key_layernorm.weight",)
    return names


FAMILY = Family(
    "llada2_moe",
    _REQUIRED,
    _KEYS,
    _other_settings,
    _other_keys,
    _mappings,
    frozenset(_OTHER_KEYS.split()),
    _FIXED,
)
