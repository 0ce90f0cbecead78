"""LLaDA-8B (Base, Instruct, 1.5): full bidirectional attention, no shift, untied head.

Source: config.json and model.safetensors.index.json of GSAI-ML/LLaDA-8B-Instruct, and its
modelling code for the order of operations.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import NO_EXPERTS, PLAIN_ROPE, Family

_REQUIRED = {
    "alibi": False,
    "rope": True,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "include_bias": False,
    "weight_tying": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
    "rope_full_precision": True,
    "multi_query_attention": False,
    "block_group_size": 1,
    # The modelling code's own default is 0.1.
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}
_KEYS = {
    "num_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "max_sequence_length": "max_sequence_length",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}
_SIZES = ("embedding_size", "mlp_hidden_size", "mlp_ratio", "n_kv_heads", "vocab_size")
# About parts that this model lacks, how weights begin, and how the modelling code runs; it reads
# `weight_tying` in place of transformers' `tie_word_embeddings`.
_HARMLESS = """
alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor init_device
init_fn init_std precision tie_word_embeddings train_max_sequence_length
"""
_OTHERS = frozenset((*_SIZES, "include_qkv_bias", *_HARMLESS.split()))

_FIXED = {"qk_norm": False, "shift": False, "attention": "full", **NO_EXPERTS, **PLAIN_ROPE}


def _other_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    # `mlp_hidden_size` overrides `mlp_ratio` in the modelling code.
    width = "mlp_hidden_size" if "mlp_hidden_size" in config else "mlp_ratio"
    given, hidden = config[width], config["d_model"]
    is_ratio = width == "mlp_ratio" and type(given) is int and type(hidden) is int
    groups = "n_kv_heads" if "n_kv_heads" in config else "n_heads"
    # `embedding_size` is the number of rows of the tensors, `vocab_size` of the used ones.
    rows = "embedding_size" if "embedding_size" in config else "vocab_size"
    return {
        "ffn_hidden_size": (width, given * hidden if is_ratio else given),
        "num_query_groups": (groups, config[groups]),
        "vocab_size": (rows, config[rows]),
        "qkv_bias": ("include_qkv_bias", config.get("include_qkv_bias", False)),
    }


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "mlp_hidden_size": model.ffn_hidden_size,
        "n_kv_heads": model.num_query_groups or model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "embedding_size": model.vocab_size,
        "pad_token_id": model.eos_token_id,
        "include_qkv_bias": model.qkv_bias,
        "init_device": "cpu",
        "flash_attention": False,
        "use_cache": False,
    }


def _mappings(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    block, layer = "model.transformer.blocks.{i}.", "decoder.layers.{i}."
    qkv = [f"{block}{part}_proj" for part in "qkv"]
    names: dict[str, tuple[str, ...]] = {
        "embedding.word_embeddings.weight": ("model.transformer.wte.weight",),
        layer + "input_layernorm.weight": (block + "attn_norm.weight",),
        layer + "self_attention.linear_qkv.weight": tuple(f"{name}.weight" for name in qkv),
        layer + "self_attention.linear_proj.weight": (block + "attn_out.weight",),
        layer + "pre_mlp_layernorm.weight": (block + "ff_norm.weight",),
        # `ff_proj` is the gate: the modelling code applies SiLU to it.
        layer + "mlp.linear_fc1.weight": (block + "ff_proj.weight", block + "up_proj.weight"),
        layer + "mlp.linear_fc2.weight": (block + "ff_out.weight",),
        "decoder.final_layernorm.weight": ("model.transformer.ln_f.weight",),
        # The head has the name of the blocks' down projections, one level up.
        "output_layer.weight": ("model.transformer.ff_out.weight",),
    }
    if model.qkv_bias:
        names[layer + "self_attention.linear_qkv.bias"] = tuple(f"{name}.bias" for name in qkv)
    if model.qk_norm:
        for part in "qk":
            norm = f"self_attention.{part}_layernorm.weight"
            names[layer + norm] = (f"{block}{part}_norm.weight",)
    return names


FAMILY = Family("llada", _REQUIRED, _KEYS, _other_settings, _other_keys, _mappings, _OTHERS, _FIXED)
