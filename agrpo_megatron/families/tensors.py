"""How a family is described: settings, the tensors of each Megatron parameter, their shapes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from agrpo_megatron.config.rules.model import validate_model
from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.config.values import text
from agrpo_megatron.families.config_json import HARMLESS, OFF, end_ids, shown

type Shapes = dict[str, tuple[int, ...]]  # by Hugging Face name
# Layout and split by Megatron module, see `families.transforms`; other modules are copied.
TRANSFORMS = {
    "word_embeddings": "vocab",
    "output_layer": "vocab",
    "linear_qkv": "qkv",
    "linear_proj": "row",
    "linear_fc1": "gate_up",
    "linear_fc2": "row",
}
# Transformer Engine fuses each norm of a layer into the product after it. Megatron's checkpoints
# have its names, whichever specification built the layer; all other code has the local names.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Sizes as transformers' own code names them; a family with other names may have these too.
STANDARD = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
}
# Settings of a family whose modelling code has plain rotary embeddings; of one without experts.
UNSCALED_ROPE = {"rope_factor": 1.0, "rope_attention_factor": 1.0, "query_scale_beta": 0.0}
PLAIN_ROPE = {**UNSCALED_ROPE, "rotary_fraction": 1.0}
NO_EXPERTS = {"moe.experts": None}
HEAD_WEIGHT, EMBEDDING_WEIGHT = "output_layer.weight", "embedding.word_embeddings.weight"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Experts as Megatron's loop of experts names them, with their numbers in the whole layer.
EXPERT = re.compile(r"(.+\.mlp\.experts\.)local_experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class WeightMapping:
    """One Megatron parameter and its Hugging Face tensors."""

    megatron: str
    parts: tuple[str, ...]  # Hugging Face names

    @property
    def module(self) -> str:
        """Return the Megatron module that holds the parameter."""
        return self.megatron.split(".")[-2]

    @property
    def transform(self) -> str:
        """Return the transform's name: how the parts are laid out and split over ranks."""
        found = TRANSFORMS.get(self.module, "copy")
        return "fused_qkv" if found == "qkv" and len(self.parts) == 1 else found

    @property
    def expert(self) -> int | None:
        """Return the number of the expert that holds the parameter; None: no expert does."""
        found = EXPERT.match(self.megatron)
        return int(found[2]) if found else None


@dataclass(frozen=True)
class Family:
    """A model family: how its configuration and its tensors are named."""

    name: str
    required: Mapping[str, Any]  # config.json: features of the modelling code that this model lacks
    keys: Mapping[str, str]  # settings with equal values: our key -> key of config.json
    # From config.json without its nulls: by setting, the key that gives it, and the value.
    other_settings: Callable[[Mapping[str, Any]], dict[str, tuple[str, Any]]]
    other_keys: Callable[[ModelSettings], dict[str, Any]]  # of config.json
    # Hugging Face names by Megatron's; `{i}` is the layer number.
    mappings: Callable[[ModelSettings], dict[str, tuple[str, ...]]]
    others: frozenset[str]  # keys of config.json that `other_settings` reads, or that are harmless
    fixed: Mapping[str, Any]  # settings with one value in every model of the family
    model_type: str | None = None  # of config.json, in lower case; None: the family's name
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that files may lack

    def settings(self, config: Mapping[str, Any]) -> ModelSettings:
        """Translate config.json; null means that a key is not set.

        Raises:
            ValueError: a key is missing or unknown, contradicts another, or has a value that the
                family does not support.
        """
        first = (*end_ids(config), None)[0]  # of several, it fills completions
        there = {**config, "eos_token_id": first}
        given = {**self.defaults, **{k: v for k, v in there.items() if v is not None}}
        try:
            same = {ours: (theirs, given[theirs]) for ours, theirs in self.keys.items()}
            found = {**same, **self.other_settings(given)}
        except KeyError as error:
            missing = f"{error.args[0]} is missing"
            raise ValueError(f"{missing}; the {self.name} family needs it") from None
        values: dict[str, Any] = {"family": self.name, **self.fixed}
        for ours, (theirs, value) in found.items():
            *section, key = ours.split(".")
            tree = {section[0]: {key: value}} if section else {key: value}
            built = build(ModelSettings, tree, f"{theirs} as model.")
            values[ours] = attrgetter(ours)(built)
        model = with_values(ModelSettings(), values)
        validate_model(model)
        self._check_others(given, model)
        return model

    def _check_others(self, given: Mapping[str, Any], model: ModelSettings) -> None:
        """Check the keys that give no setting."""
        wanted = _by_their_keys(model, STANDARD)
        wanted["head_dim"] = model.head_width
        wanted["rope_parameters"] = {"rope_theta": model.rope_theta, "rope_type": "default"}
        wanted |= {**dict.fromkeys(OFF, False), **self.required}
        known = {*HARMLESS, *self.keys.values(), *self.others}
        fix = f" is no key of the {self.name} family; remove it if logits are the same without it"
        for key in sorted(given.keys() - known):
            if given[key] != wanted.get(key):
                if key in wanted:
                    fix = f"; the {self.name} family needs {wanted[key]} here"
                raise ValueError(shown(key, given[key]) + fix)

    def config(self, model: ModelSettings) -> dict[str, Any]:
        """Return config.json for a model without one.

        Raises:
            ValueError: the modelling code does not support this model.
        """
        for ours, value in self.fixed.items():
            if (found := attrgetter(ours)(model)) != value:
                said = f"model.{ours}={text(found)}: the {self.name} family's modelling code needs "
                raise ValueError(said + text(value))
        if "head_dim" not in self.keys and model.query_width != model.hidden_size:
            raise ValueError(
                f"model.head_dim={model.head_dim}: the {self.name} family's modelling code needs "
                "null, hidden_size / num_attention_heads"
            )
        same = _by_their_keys(model, self.keys)
        return {**self.required, **same, **self.other_keys(model)}


def with_values(model: ModelSettings, values: Mapping[str, Any]) -> ModelSettings:
    """Return a model with other values, some of them of its experts: `moe.topk`."""
    own = {name: value for name, value in values.items() if "." not in name}
    moe = {name.removeprefix("moe."): values[name] for name in values.keys() - own.keys()}
    return replace(model, **own, moe=replace(model.moe, **moe))


def _by_their_keys(model: ModelSettings, keys: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: attrgetter(ours)(model) for ours, theirs in keys.items()}


def standard_names(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    """Return the tensors of each Megatron parameter as transformers' own code names them.

    Source: modelling code of Qwen2 and Qwen3 in transformers.
    """
    block, layer = "model.layers.{i}.", "decoder.layers.{i}."
    qkv = [f"{block}self_attn.{part}_proj" for part in "qkv"]
    names: dict[str, tuple[str, ...]] = {
        EMBEDDING_WEIGHT: ("model.embed_tokens.weight",),
        layer + "input_layernorm.weight": (block + "input_layernorm.weight",),
        layer + "self_attention.linear_qkv.weight": tuple(f"{name}.weight" for name in qkv),
        layer + "self_attention.linear_proj.weight": (block + "self_attn.o_proj.weight",),
        # The norm after the attention and before the MLP.
        layer + "pre_mlp_layernorm.weight": (block + "post_attention_layernorm.weight",),
        **mlp_names(model, block),
        "decoder.final_layernorm.weight": ("model.norm.weight",),
        HEAD_WEIGHT: ("lm_head.weight",),
    }
    if model.qkv_bias:
        # Biases are interleaved by query group like the rows of their weights.
        names[layer + "self_attention.linear_qkv.bias"] = tuple(f"{name}.bias" for name in qkv)
    if model.qk_norm:
        for part in "qk":
            norm = f"self_attention.{part}_layernorm.weight"
            names[layer + norm] = (f"{block}self_attn.{part}_norm.weight",)
    return names


def mask_or(config: Mapping[str, Any], published: int) -> tuple[str, Any]:
    """Return the key and the value of a mask token that the published files of a family lack.

    Where the embedding has no row for the published one, it is the tokenizer's: null.
    """
    rows = config["vocab_size"]
    has_row = type(rows) is int and rows > published
    return "mask_token_id", config.get("mask_token_id", published if has_row else None)


def mlp_names(
    model: ModelSettings, block: str, *, shared: str = "mlp.shared_experts."
) -> dict[str, tuple[str, ...]]:
    """Return the tensors of SwiGLUs and experts as transformers' own code names them.

    Args:
        block: their prefix of a layer.
        shared: their name of the shared experts.
    """

    def swiglu(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
        """Return the tensors of one SwiGLU of each layer."""
        parts = [f"{block}{theirs}{part}_proj.weight" for part in ("gate", "up", "down")]
        prefix = f"decoder.layers.{{i}}.mlp.{ours}"
        return {
            prefix + "linear_fc1.weight": (parts[0], parts[1]),
            prefix + "linear_fc2.weight": (parts[2],),
        }

    moe, router = model.moe, "decoder.layers.{i}.mlp.router."
    names = swiglu("", "mlp.") if model.moe_layers < model.num_layers else {}
    if moe.experts is None:
        return names
    names[router + "weight"] = (block + "mlp.gate.weight",)
    if moe.expert_bias:
        names[router + "expert_bias"] = (block + "mlp.gate.expert_bias",)
    if moe.shared_ffn_hidden_size is not None:
        names |= swiglu("shared_experts.", shared)
    return names | swiglu("experts.local_experts.{e}.", "mlp.experts.{e}.")


def expand(names: Mapping[str, tuple[str, ...]], model: ModelSettings) -> list[WeightMapping]:
    """Return one mapping per parameter: names with `{i}` once per layer, `{e}` once per expert."""
    experts = range(model.moe.experts or 0)
    return [
        WeightMapping(
            megatron.replace("{i}", str(i)).replace("{e}", str(e)),
            tuple(part.replace("{i}", str(i)).replace("{e}", str(e)) for part in parts),
        )
        for megatron, parts in names.items()
        for i in _layers_with(megatron, model)
        for e in (experts if "{e}" in megatron else [0])
    ]


def _layers_with(megatron: str, model: ModelSettings) -> Iterable[int]:
    """Return the layers that have a parameter."""
    dense = model.num_layers - model.moe_layers
    if "{i}" not in megatron:
        return [0]
    if any(part in megatron for part in (".router.", "experts.")):
        return range(dense, model.num_layers)
    return range(dense if ".mlp.linear_fc" in megatron else model.num_layers)


def part_shapes(mappings: Sequence[WeightMapping], model: ModelSettings) -> Shapes:
    """Return the shape of every Hugging Face tensor of some mappings."""
    hidden, moe = model.hidden_size, model.moe
    queries, keys, head = model.query_width, model.key_width, model.head_width
    assert model.vocab_size is not None
    vocab = (model.vocab_size, hidden)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "word_embeddings": [vocab],
        "output_layer": [vocab],
        "linear_qkv": [(queries, hidden), (keys, hidden), (keys, hidden)],
        "linear_proj": [(hidden, queries)],
        "q_layernorm": [(head,)],
        "k_layernorm": [(head,)],
        "router": [(moe.experts or 0, hidden)],
    }
    result: Shapes = {}
    for mapping in mappings:
        found = shapes.get(mapping.module, [(hidden,)])
        if mapping.module.startswith("linear_fc"):
            ffn = _ffn_width(mapping, model)
            found = [(ffn, hidden)] * 2 if mapping.module == "linear_fc1" else [(hidden, ffn)]
        if mapping.transform == "fused_qkv":
            found = [(queries + 2 * keys, hidden)]
        if mapping.megatron.endswith("bias"):
            found = [shape[:1] for shape in found]
        result.update(zip(mapping.parts, found, strict=True))
    return result


def _ffn_width(mapping: WeightMapping, model: ModelSettings) -> int:
    """Return the hidden width of the SwiGLU that holds a parameter."""
    width: int | None = model.ffn_hidden_size
    if ".shared_experts." in mapping.megatron:
        width = model.moe.shared_ffn_hidden_size
    elif mapping.expert is not None:
        width = model.moe.ffn_hidden_size
    assert width is not None
    return width


def megatron_shape(mapping: WeightMapping, shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of a mapping's whole Megatron parameter."""
    parts = [shapes[name] for name in mapping.parts]
    return (sum(part[0] for part in parts), *parts[0][1:])
