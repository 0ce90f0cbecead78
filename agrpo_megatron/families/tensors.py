"""How a family is described: settings, the tensors of each Megatron parameter, their shapes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.rules_model import validate_model
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
# Settings of a family whose modelling code has plain rotary embeddings.
PLAIN_ROPE = {"rope_factor": 1.0, "rope_attention_factor": 1.0, "query_scale_beta": 0.0}
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


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
        return TRANSFORMS.get(self.module, "copy")


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

    def settings(self, config: Mapping[str, Any]) -> ModelSettings:
        """Translate config.json; null means that a key is not set.

        Raises:
            ValueError: a key is missing or unknown, contradicts another, or has a value that the
                family does not support.
        """
        first = (*end_ids(config), None)[0]  # of several, it fills completions
        given = {k: v for k, v in {**config, "eos_token_id": first}.items() if v is not None}
        try:
            same = {ours: (theirs, given[theirs]) for ours, theirs in self.keys.items()}
            found = {**same, **self.other_settings(given)}
        except KeyError as error:
            missing = f"{error.args[0]} is missing"
            raise ValueError(f"{missing}; the {self.name} family needs it") from None
        values: dict[str, Any] = {"family": self.name, **self.fixed}
        for ours, (theirs, value) in found.items():
            values[ours] = getattr(build(ModelSettings, {ours: value}, f"{theirs} as model."), ours)
        model = ModelSettings(**values)
        validate_model(model)
        self._check_others(given, model)
        return model

    def _check_others(self, given: Mapping[str, Any], model: ModelSettings) -> None:
        """Check the keys that give no setting."""
        wanted = {theirs: getattr(model, ours) for ours, theirs in STANDARD.items()}
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
            if (found := getattr(model, ours)) != value:
                said = f"model.{ours}={text(found)}: the {self.name} family's modelling code needs "
                raise ValueError(said + text(value))
        if "head_dim" not in self.keys and model.query_width != model.hidden_size:
            raise ValueError(
                f"model.head_dim={model.head_dim}: the {self.name} family's modelling code needs "
                "null, hidden_size / num_attention_heads"
            )
        same = {theirs: getattr(model, ours) for ours, theirs in self.keys.items()}
        return {**self.required, **same, **self.other_keys(model)}


def standard_names(model: ModelSettings) -> dict[str, tuple[str, ...]]:
    """Return the tensors of each Megatron parameter as transformers' own code names them.

    Source: modelling code of Qwen2 and Qwen3 in transformers.
    """
    block, layer = "model.layers.{i}.", "decoder.layers.{i}."
    qkv = [f"{block}self_attn.{part}_proj" for part in "qkv"]
    names: dict[str, tuple[str, ...]] = {
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
        layer + "input_layernorm.weight": (block + "input_layernorm.weight",),
        layer + "self_attention.linear_qkv.weight": tuple(f"{name}.weight" for name in qkv),
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
    if model.qkv_bias:
        # Biases are interleaved by query group like the rows of their weights.
        names[layer + "self_attention.linear_qkv.bias"] = tuple(f"{name}.bias" for name in qkv)
    if model.qk_norm:
        for part in "qk":
            norm = f"self_attention.{part}_layernorm.weight"
            names[layer + norm] = (f"{block}self_attn.{part}_norm.weight",)
    return names


def expand(names: Mapping[str, tuple[str, ...]], num_layers: int) -> list[WeightMapping]:
    """Return one mapping per parameter: names with `{i}` once per layer."""
    return [
        WeightMapping(
            megatron.replace("{i}", str(i)), tuple(part.replace("{i}", str(i)) for part in parts)
        )
        for megatron, parts in names.items()
        for i in range(num_layers if "{i}" in megatron else 1)
    ]


def part_shapes(mappings: Sequence[WeightMapping], model: ModelSettings) -> Shapes:
    """Return the shape of every Hugging Face tensor of some mappings."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys, head = model.query_width, model.key_width, model.head_width
    assert model.vocab_size is not None
    vocab = (model.vocab_size, hidden)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "word_embeddings": [vocab],
        "output_layer": [vocab],
        "linear_qkv": [(queries, hidden), (keys, hidden), (keys, hidden)],
        "linear_proj": [(hidden, queries)],
        "linear_fc1": [(ffn, hidden), (ffn, hidden)],
        "linear_fc2": [(hidden, ffn)],
        "q_layernorm": [(head,)],
        "k_layernorm": [(head,)],
    }
    result: Shapes = {}
    for mapping in mappings:
        found = shapes.get(mapping.module, [(hidden,)])
        if mapping.megatron.endswith("bias"):
            found = [shape[:1] for shape in found]
        result.update(zip(mapping.parts, found, strict=True))
    return result


def megatron_shape(mapping: WeightMapping, shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of a mapping's whole Megatron parameter."""
    parts = [shapes[name] for name in mapping.parts]
    return (sum(part[0] for part in parts), *parts[0][1:])
