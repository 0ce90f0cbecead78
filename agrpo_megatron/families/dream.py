"""Dream-7B (Dream-v0-Base/Instruct, DiffuCoder): Qwen2.5's shapes, bidirectional, shifted.

The hidden state at position i - 1 predicts the token at i, as in its autoregressive origin.
Source: config.json, model.safetensors.index.json and the modelling code of
Dream-org/Dream-v0-Instruct-7B.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import STANDARD, Family

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


def _other_settings(_config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    # Query, key and value always have biases, the output projection has none.
    return {"qkv_bias": ("model_type", True), "shift": ("model_type", True)}


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    if model.qk_norm or not (model.qkv_bias and model.shift):
        raise ValueError(
            "model.qk_norm, qkv_bias, shift: Dream's modelling code needs false, true, true"
        )
    return {
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "bos_token_id": model.eos_token_id,
        "pad_token_id": model.eos_token_id,
        "use_cache": False,
    }


def _mappings(_model: ModelSettings) -> dict[str, tuple[str, ...]]:
    block, layer = "model.layers.{i}.", "decoder.layers.{i}."
    qkv = [f"{block}self_attn.{part}_proj" for part in "qkv"]
    return {
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
        layer + "input_layernorm.weight": (block + "input_layernorm.weight",),
        layer + "self_attention.linear_qkv.weight": tuple(f"{name}.weight" for name in qkv),
        # Biases are interleaved by query group like the rows of their weights.
        layer + "self_attention.linear_qkv.bias": tuple(f"{name}.bias" for name in qkv),
        layer + "self_attention.linear_proj.weight": (block + "self_attn.o_proj.weight",),
        # The norm after the attention and before the MLP.
        layer + "pre_mlp_layernorm.weight": (block + "post_attention_layernorm.weight",),
        layer + "mlp.linear_fc1.weight": (
            block + "mlp.gate_proj.weight",
            block + "mlp.up_proj.weight",
        ),
        layer + "mlp.linear_fc2.weight": (block + "mlp.down_proj.weight",),
        "decoder.final_layernorm.weight": ("model.norm.weight",),
        "output_layer.weight": ("lm_head.weight",),
    }


FAMILY = Family("dream", _REQUIRED, _KEYS, _other_settings, _other_keys, _mappings, _OTHERS)
