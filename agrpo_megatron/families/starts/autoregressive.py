"""Autoregressive models to start from: Llama, Qwen2 and Qwen2.5, Qwen3; their heads may be tied.

A folder is read as it is: attention is causal, and the state at position i - 1 predicts token i. A
run gives it another attention (`runs.loaded_model`). An export of such a run has the published keys
and some of ours, which only our modelling file honours.

Source: config.json and the modelling code of Llama, Qwen2 and Qwen3 in transformers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.config_json import check_number, shown
from agrpo_megatron.families.tensors import (
    HEAD_WEIGHT,
    NO_EXPERTS,
    STANDARD,
    Family,
    standard_names,
)

# `agrpo_tied` and `agrpo_rope` repeat published keys, which transformers acts on or rewrites.
ATTENTION, SHIFT, TIED, ROPE = "agrpo_attention", "agrpo_shift", "agrpo_tied", "agrpo_rope"

_REQUIRED = {"hidden_act": "silu", "attention_dropout": 0.0}
_NO_WINDOW = {"use_sliding_window": False}
_KEYS = {**STANDARD, "vocab_size": "vocab_size", "norm_epsilon": "rms_norm_eps"}
# The first two lines are read below; a window is not used without `use_sliding_window`, and
# `pretraining_tp` cuts products into parts without another result.
_OTHER_KEYS = f"""
{ATTENTION} {SHIFT} {TIED} {ROPE} block_size eos_token_id layer_types mask_token_id
rope_parameters rope_scaling rope_theta tie_word_embeddings
max_window_layers sliding_window pretraining_tp
"""
_OTHERS = frozenset(_OTHER_KEYS.split())
_FIXED = {"rotary_fraction": 1.0, "rope_attention_factor": 1.0, "query_scale_beta": 0.0}
_FIXED |= NO_EXPERTS
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # of new files, and of older ones
LLAMA_THETA = 10000.0
# Keys of the scaling of Llama 3.1 by setting.
_LLAMA3 = {
    "rope_factor": "factor",
    "rope_beta_fast": "high_freq_factor",
    "rope_beta_slow": "low_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}


def _settings_of(config: Mapping[str, Any], name: str) -> dict[str, tuple[str, Any]]:
    """Return the settings of a family that no key gives unchanged."""
    kinds = set(config.get("layer_types", ()))
    if kinds - {"full_attention"}:
        said = shown("layer_types", sorted(map(str, kinds)))
        raise ValueError(f"{said}; the {name} family needs full_attention in all layers")
    is_tied = config.get(TIED, config.get("tie_word_embeddings", False))
    found = {
        "attention": (ATTENTION, config.get(ATTENTION, "causal")),
        "shift": (SHIFT, config.get(SHIFT, True)),
        "tie_embeddings": ("tie_word_embeddings", is_tied),
    }
    for ours, theirs in (
        ("block_length", "block_size"),
        ("mask_token_id", "mask_token_id"),
        ("eos_token_id", "eos_token_id"),
    ):
        if theirs in config:
            found[ours] = theirs, config[theirs]
    return {**found, **_rope_of(config, name)}


def _rope_of(config: Mapping[str, Any], name: str) -> dict[str, tuple[str, Any]]:
    """Return the settings of the rotary embedding, which newer files have in one object."""
    given = [_scaling(key, config[key], name) for key in _ROPE_KEYS if config.get(key)]
    for other in given[1:]:
        if (other.kind, other.values) != (given[0].kind, given[0].values):
            said = shown(other.key, config[other.key])
            raise ValueError(f"{said} differs from {given[0].key}; correct one of them")
    thetas = {f"{rope.key}.rope_theta": rope.theta for rope in given if rope.theta is not None}
    if "rope_theta" in config or not thetas:
        # Llama 2 was published without the key, and its code has a default.
        by_default = {"rope_theta": LLAMA_THETA} if name == "llama" else {}
        thetas = {"rope_theta": {**by_default, **config}["rope_theta"], **thetas}
    (first, theta), *others = thetas.items()
    for key, value in others:
        if value != theta:
            raise ValueError(f"{shown(first, theta)} differs from {key}; correct one of them")
    found: dict[str, tuple[str, Any]] = {"rope_theta": ("rope_theta", theta)}
    if given and given[0].values.get("factor", 1) != 1:
        key, kind, _, values = given[0]
        found["rope_scaling"] = f"{key}.rope_type", kind
        found |= {ours: (f"{key}.{theirs}", values[theirs]) for ours, theirs in _LLAMA3.items()}
    return found


class _Rope(NamedTuple):
    """An object of config.json on the rotary embedding."""

    key: str
    kind: str
    theta: Any
    values: dict[str, Any]  # of the scaling


def _scaling(key: str, given: Any, name: str) -> _Rope:
    """Read and check such an object."""
    if not isinstance(given, dict):
        raise ValueError(f"{shown(key, given)} is not an object")
    rope = {k: v for k, v in given.items() if v is not None}
    kind, theta = rope.pop("type", "default"), rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", kind)
    known = ("default", "llama3") if name == "llama" else ("default",)
    if kind not in known:
        said = f"{shown(f'{key}.rope_type', kind)}; the {name} family has {' and '.join(known)}"
        raise ValueError(f"{said}; start from a model with one of these")
    names = tuple(_LLAMA3.values()) if kind == "llama3" else ()
    for other in sorted(rope.keys() - set(names)):
        raise ValueError(f"{shown(f'{key}.{other}', rope[other])} is no key of {kind} embeddings")
    for value in names:
        if value not in rope:
            raise KeyError(f"{key}.{value}")
        check_number(shown(f"{key}.{value}", rope[value]), rope[value])
    return _Rope(key, kind, theta, rope)


def _keys_of(model: ModelSettings, name: str, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that are no settings unchanged.

    Raises:
        ValueError: no modelling code has this attention.
    """
    if model.attention == "causal_context":
        raise ValueError(
            f"model.attention=causal_context: no modelling code has it for the {name} family; use "
            "full or block_causal"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_factor != 1:
        rope["rope_type"] = model.rope_scaling
        rope |= {theirs: getattr(model, ours) for ours, theirs in _LLAMA3.items()}
    own: dict[str, Any] = {"head_dim": model.head_width} if name == "qwen3" else {}
    if model.attention != "causal":
        own |= {ATTENTION: model.attention, SHIFT: model.shift, TIED: model.tie_embeddings}
        own |= {"block_size": model.block_length, "mask_token_id": model.mask_token_id}
        own[ROPE] = rope if model.rope_factor != 1 else None
    return {
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "architectures": [architecture],
        "model_type": name,
        "eos_token_id": model.eos_token_id,
        "bos_token_id": model.eos_token_id,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
        **own,
    }


def _mappings(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    """Return the tensors of each parameter; a tied head is not in the files."""
    names = standard_names(model)
    if model.tie_embeddings:
        del names[HEAD_WEIGHT]
    return names


def _family(
    name: str,
    architecture: str,
    fixed: Mapping[str, Any],
    *,
    required: Mapping[str, Any],
    keys: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Family:
    return Family(
        name,
        {**_REQUIRED, **required},
        {**_KEYS, **(keys or {})},
        lambda config: _settings_of(config, name),
        lambda model: _keys_of(model, name, architecture),
        _mappings,
        _OTHERS,
        {**_FIXED, **fixed},
        defaults=defaults or {},
    )


_NO_BIAS = {"attention_bias": False}
_PLAIN = {"rope_factor": 1.0}
LLAMA = _family(
    "llama",
    "LlamaForCausalLM",
    {"qkv_bias": False, "qk_norm": False},
    required={**_NO_BIAS, "mlp_bias": False},
    keys={"head_dim": "head_dim"},
    defaults={"head_dim": None, "num_key_value_heads": None},  # what its code takes from others
)
QWEN2 = _family(
    "qwen2",
    "Qwen2ForCausalLM",
    {"qkv_bias": True, "qk_norm": False, **_PLAIN},
    required=_NO_WINDOW,
)
QWEN3 = _family(
    "qwen3",
    "Qwen3ForCausalLM",
    {"qkv_bias": False, "qk_norm": True, **_PLAIN},
    required={**_NO_WINDOW, **_NO_BIAS},
    keys={"head_dim": "head_dim"},
)
