"""Nemotron-Labs-Diffusion (3B, 8B, 14B): Ministral 3's shapes, causal context, no shift.

Before the open block a token sees those before it, one by one; in the block all see each other.
`dlm_paradigm` names the mask of the modelling code's forward pass without a cache; its `generate`
has a causal context whatever it says, with the same weights, and so has this family.

Source: config.json and the modelling code of nvidia/Nemotron-Labs-Diffusion-3B, Ministral 3 in
transformers, and the conversion of Megatron-Bridge for names and tensors. Not read at the source:
config.json of 8B and 14B (as other programs repeat them, 14B has rope_theta 1e9, and 8B a
rope factor of 8 or 16), and any file of weights.
"""

import math
from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.config_json import check_number, shown
from agrpo_megatron.families.tensors import NO_EXPERTS, STANDARD, Family, standard_names

_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_KEYS = {
    **STANDARD,
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "norm_epsilon": "rms_norm_eps",
    "block_length": "block_size",
}
_PARADIGMS = ("bidirectional", "block_diff", "sbd_block_diff", "autoregressive")
# The first line is read below; the second is about losses, and how the modelling code runs.
_OTHER_KEYS = """
dlm_paradigm rope_parameters rope_scaling rope_theta
ar_loss_weight attn_implementation dlm_loss_weight dp_varying_mask_ratio
"""
_OTHERS = frozenset(_OTHER_KEYS.split())
_FIXED = {"qkv_bias": False, "qk_norm": False, "shift": False, "attention": "causal_context"}
_FIXED |= {"rotary_fraction": 1.0, "rope_scaling": "yarn", **NO_EXPERTS}
# Keys of `rope_parameters` by setting; those of YaRN do nothing without it.
_YARN = {"rope_factor": "factor", "rope_beta_fast": "beta_fast", "rope_beta_slow": "beta_slow"}
_LENGTH, _BETA = "original_max_position_embeddings", "llama_4_scaling_beta"
_NUMBERS = {*_YARN.values(), _LENGTH, _BETA, "rope_theta"}
_NUMBERS |= {"attention_factor", "mscale", "mscale_all_dim"}
# The type may stand under both names, and the longest row is not read there.
_OTHER_ROPE = {"rope_type", "type", "max_position_embeddings", "truncate"}


def _other_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    paradigm = config.get("dlm_paradigm", _PARADIGMS[0])
    if paradigm not in _PARADIGMS:
        known = f"the nemotron_diffusion family knows {', '.join(_PARADIGMS)}"
        raise ValueError(f"{shown('dlm_paradigm', paradigm)}; {known}")
    rope = _rope_of(config)
    values = {"rope_theta": rope["rope_theta"], "query_scale_beta": rope.get(_BETA, 0.0)}
    if rope["rope_type"] == "yarn":
        values["rope_attention_factor"] = _attention_factor(rope)
        if rope["factor"] != 1:
            values |= {ours: rope[theirs] for ours, theirs in _YARN.items() if theirs in rope}
    if "rope_factor" in values or values["query_scale_beta"] != 0:
        values["rope_original_length"] = rope[_LENGTH]
    names = {**_YARN, "query_scale_beta": _BETA, "rope_original_length": _LENGTH}
    return {ours: (f"rope_parameters.{names.get(ours, ours)}", v) for ours, v in values.items()}


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` without nulls; copies of it under older names have to agree."""
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    given = config.get(key)
    if not isinstance(given, dict):
        raise KeyError("rope_parameters")
    rope = {name: value for name, value in given.items() if value is not None}
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn") or rope.get("type", kind) != kind:
        known = "the nemotron_diffusion family has default and yarn"
        raise ValueError(f"{shown(f'{key}.rope_type', kind)}; {known}")
    for name in sorted(rope):
        said = shown(f"{key}.{name}", rope[name])
        if name not in _NUMBERS | _OTHER_ROPE or (name == "truncate" and rope[name] is not True):
            raise ValueError(f"{said}: the nemotron_diffusion family has no such rotary embedding")
        if name in _NUMBERS:
            check_number(said, rope[name])
    if "rope_theta" not in rope:
        rope["rope_theta"] = config["rope_theta"]
    for name, value in (("rope_scaling", given), ("rope_theta", rope["rope_theta"])):
        if config.get(name, value) != value:
            raise ValueError(f"{shown(name, config[name])} differs from {key}; correct one of them")
    return rope


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """Return YaRN's factor of rotated queries and keys, which other keys give if it has none."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    grown = 0.1 * math.log(max(1, rope["factor"]))
    scale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and of_all:
        return (scale * grown + 1) / (of_all * grown + 1)
    return grown + 1


def _other_keys(model: ModelSettings) -> dict[str, Any]:
    factor = model.rope_attention_factor
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_factor != 1 or factor != 1:
        rope |= {theirs: getattr(model, ours) for ours, theirs in _YARN.items()}
        # As published: two equal scales give a factor of 1.
        rope |= (
            {"mscale": 1.0, "mscale_all_dim": 1.0} if factor == 1 else {"attention_factor": factor}
        )
        rope["rope_type"] = "yarn"
    # The modelling code reads both in any case.
    rope[_BETA] = model.query_scale_beta
    rope[_LENGTH] = model.rope_original_length or model.max_sequence_length
    return {
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_width,
        "rope_parameters": rope,
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "bos_token_id": model.eos_token_id,
        "dlm_paradigm": _PARADIGMS[0],
        "use_cache": False,
    }


def _mappings(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    names = {
        ours: tuple(part.replace("model.", "encoder.", 1) for part in parts)
        for ours, parts in standard_names(model).items()
    }
    return {**names, "output_layer.weight": ("diffusion_head.weight",)}


FAMILY = Family(
    "nemotron_diffusion",
    _REQUIRED,
    _KEYS,
    _other_settings,
    _other_keys,
    _mappings,
    _OTHERS,
    _FIXED,
    "nemotron_labs_diffusion",
)
