"""LLaDA-8B (Base, Instruct, 1.5): full bidirectional attention, no shift, untied head.

Source: config.json and model.safetensors.index.json of GSAI-ML/LLaDA-8B-Instruct, and its
modelling code for the order of operations.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import Family, WeightMapping, check_required

# Required values: features of the modelling code that this model lacks.
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
}


def _settings(config: Mapping[str, Any]) -> ModelSettings:
    """Translate config.json.

    Raises:
        ValueError: a key is missing, or this family does not support its value.
    """
    check_required(config, _REQUIRED, "llada")
    try:
        # `embedding_size` is the number of rows of the tensors, `vocab_size` of the used ones.
        rows = config.get("embedding_size") or config["vocab_size"]
        values = {
            "family": "llada",
            "num_layers": config["n_layers"],
            "hidden_size": config["d_model"],
            # `mlp_hidden_size` overrides `mlp_ratio` in the modelling code.
            "ffn_hidden_size": config.get("mlp_hidden_size")
            or config["mlp_ratio"] * config["d_model"],
            "num_attention_heads": config["n_heads"],
            "num_query_groups": config.get("n_kv_heads") or config["n_heads"],
            "vocab_size": rows,
            "mask_token_id": config["mask_token_id"],
            "eos_token_id": config["eos_token_id"],
            "max_sequence_length": config["max_sequence_length"],
            "rope_theta": config["rope_theta"],
            "norm_epsilon": config["rms_norm_eps"],
            "qkv_bias": config.get("include_qkv_bias", False),
        }
    except KeyError as error:
        key = error.args[0]
        raise ValueError(f"config.json: {key} is missing; the llada family needs it") from None
    return build(ModelSettings, values, "config.json as model.")


def _config(model: ModelSettings) -> dict[str, Any]:
    """Return config.json for a model without one.

    Raises:
        ValueError: the modelling code does not support this model.
    """
    if model.qk_norm:
        raise ValueError("model.qk_norm=true: LLaDA's modelling code has no norm of q and k")
    return {
        **_REQUIRED,
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "n_layers": model.num_layers,
        "d_model": model.hidden_size,
        "mlp_hidden_size": model.ffn_hidden_size,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_query_groups or model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "embedding_size": model.vocab_size,
        "mask_token_id": model.mask_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.eos_token_id,
        "max_sequence_length": model.max_sequence_length,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "include_qkv_bias": model.qkv_bias,
        "init_device": "cpu",
        "flash_attention": False,
        "use_cache": False,
    }


def _mappings(model: ModelSettings) -> list[WeightMapping]:
    block = "model.transformer.blocks.{i}."
    layer = "decoder.layers.{i}."
    mappings = [
        WeightMapping(
            "embedding.word_embeddings.weight", ("model.transformer.wte.weight",), "vocab"
        ),
        WeightMapping(layer + "input_layernorm.weight", (block + "attn_norm.weight",), "copy"),
        WeightMapping(
            layer + "self_attention.linear_qkv.weight",
            (block + "q_proj.weight", block + "k_proj.weight", block + "v_proj.weight"),
            "qkv",
        ),
        WeightMapping(
            layer + "self_attention.linear_proj.weight", (block + "attn_out.weight",), "row"
        ),
        WeightMapping(layer + "pre_mlp_layernorm.weight", (block + "ff_norm.weight",), "copy"),
        # `ff_proj` is the gate: the modelling code applies SiLU to it.
        WeightMapping(
            layer + "mlp.linear_fc1.weight",
            (block + "ff_proj.weight", block + "up_proj.weight"),
            "gate_up",
        ),
        WeightMapping(layer + "mlp.linear_fc2.weight", (block + "ff_out.weight",), "row"),
        WeightMapping("decoder.final_layernorm.weight", ("model.transformer.ln_f.weight",), "copy"),
        # The head has the name of the blocks' down projections, one level up.
        WeightMapping("output_layer.weight", ("model.transformer.ff_out.weight",), "vocab"),
    ]
    if model.qkv_bias:
        names = tuple(block + f"{part}_proj.bias" for part in "qkv")
        mappings.append(WeightMapping(layer + "self_attention.linear_qkv.bias", names, "qkv"))
    if model.qk_norm:
        for part in "qk":
            name = f"self_attention.{part}_layernorm.weight"
            mappings.append(WeightMapping(layer + name, (block + f"{part}_norm.weight",), "copy"))
    return mappings


FAMILY = Family("llada", _settings, _config, _mappings)
