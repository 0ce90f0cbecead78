"""Dream-7B (Dream-v0-Base/Instruct, DiffuCoder): Qwen2.5's shapes, bidirectional, shifted.

The hidden state at position i - 1 predicts the token at i, as in its autoregressive origin.
Source: config.json, model.safetensors.index.json and the modelling code of
Dream-org/Dream-v0-Instruct-7B.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import Family, WeightMapping, check_required

# Required values: features of the modelling code that this model lacks.
_REQUIRED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_SAME = {  # ours: theirs
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "max_sequence_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}


def _settings(config: Mapping[str, Any]) -> ModelSettings:
    """Translate config.json.

    Raises:
        ValueError: a key is missing, or this family does not support its value.
    """
    check_required(config, _REQUIRED, "dream")
    missing = [key for key in _SAME.values() if key not in config]
    if missing:
        raise ValueError(f"config.json: {missing[0]} is missing; the dream family needs it")
    values = {ours: config[theirs] for ours, theirs in _SAME.items()}
    # Query, key and value always have biases, the output projection has none.
    values |= {"family": "dream", "qkv_bias": True, "shift": True}
    return build(ModelSettings, values, "config.json as model.")


def _config(model: ModelSettings) -> dict[str, Any]:
    """Return config.json for a model without one.

    Raises:
        ValueError: the modelling code does not support this model.
    """
    if model.qk_norm or not (model.qkv_bias and model.shift):
        raise ValueError(
            "model.qk_norm, qkv_bias, shift: Dream's modelling code needs false, true, true"
        )
    values = {theirs: getattr(model, ours) for ours, theirs in _SAME.items()}
    values["num_key_value_heads"] = model.num_query_groups or model.num_attention_heads
    return {
        **_REQUIRED,
        **values,
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "bos_token_id": model.eos_token_id,
        "pad_token_id": model.eos_token_id,
        "use_cache": False,
    }


def _mappings(_model: ModelSettings) -> list[WeightMapping]:
    block, layer = "model.layers.{i}.", "decoder.layers.{i}."
    attention = block + "self_attn."
    return [
        WeightMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
        WeightMapping(
            layer + "input_layernorm.weight", (block + "input_layernorm.weight",), "copy"
        ),
        WeightMapping(
            layer + "self_attention.linear_qkv.weight",
            tuple(attention + f"{part}_proj.weight" for part in "qkv"),
            "qkv",
        ),
        # Biases are interleaved by query group like the rows of their weights.
        WeightMapping(
            layer + "self_attention.linear_qkv.bias",
            tuple(attention + f"{part}_proj.bias" for part in "qkv"),
            "qkv",
        ),
        WeightMapping(
            layer + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), "row"
        ),
        # The norm after the attention and before the MLP.
        WeightMapping(
            layer + "pre_mlp_layernorm.weight", (block + "post_attention_layernorm.weight",), "copy"
        ),
        WeightMapping(
            layer + "mlp.linear_fc1.weight",
            (block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"),
            "gate_up",
        ),
        WeightMapping(layer + "mlp.linear_fc2.weight", (block + "mlp.down_proj.weight",), "row"),
        WeightMapping("decoder.final_layernorm.weight", ("model.norm.weight",), "copy"),
        WeightMapping("output_layer.weight", ("lm_head.weight",), "vocab"),
    ]


FAMILY = Family("dream", _settings, _config, _mappings)
