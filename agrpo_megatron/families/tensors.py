"""How a family is described: settings, one mapping for each Megatron parameter, tensor shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.settings import ModelSettings

type Shapes = dict[str, tuple[tuple[int, ...], str]]  # shape and transform by Hugging Face name


@dataclass(frozen=True)
class WeightMapping:
    """One Megatron parameter and its Hugging Face tensors; `{i}` is the layer number."""

    megatron: str
    parts: tuple[str, ...]  # Hugging Face names
    transform: str  # layout and split, see `families.transforms`


@dataclass(frozen=True)
class Family:
    """A model family: how its configuration and its tensors are named."""

    name: str
    settings: Callable[[Mapping[str, Any]], ModelSettings]  # from config.json
    config: Callable[[ModelSettings], dict[str, Any]]  # to config.json
    mappings: Callable[[ModelSettings], list[WeightMapping]]


def check_required(config: Mapping[str, Any], required: Mapping[str, Any], family: str) -> None:
    """Raise a ValueError if config.json has another value for one of the `required` keys."""
    for key, value in required.items():
        if config.get(key) not in (None, value):
            raise ValueError(
                f"config.json: {key}={config[key]!r}; the {family} family needs {value}"
            )


def expand(mappings: Sequence[WeightMapping], num_layers: int) -> list[WeightMapping]:
    """Return one mapping per parameter: those with `{i}` once per layer."""
    result = []
    for mapping in mappings:
        numbers = range(num_layers) if "{i}" in mapping.megatron else range(1)
        result += [
            WeightMapping(
                mapping.megatron.replace("{i}", str(i)),
                tuple(part.replace("{i}", str(i)) for part in mapping.parts),
                mapping.transform,
            )
            for i in numbers
        ]
    return result


def part_shapes(mappings: Sequence[WeightMapping], model: ModelSettings) -> Shapes:
    """Return the shape and transform of every Hugging Face tensor of some mappings."""
    hidden, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    assert model.vocab_size is not None
    heights = {"q": hidden, "k": groups * head, "v": groups * head}
    matrices = {
        "vocab": (model.vocab_size, hidden),
        "gate_up": (model.ffn_hidden_size, hidden),
        "row": (hidden, hidden),
    }
    result: Shapes = {}
    for mapping in mappings:
        for number, name in enumerate(mapping.parts):
            if mapping.transform == "qkv":
                rows = heights["qkv"[number]]
                shape = (rows, hidden) if name.endswith("weight") else (rows,)
            elif mapping.transform == "copy":
                per_head = "q_layernorm" in mapping.megatron or "k_layernorm" in mapping.megatron
                shape = (head if per_head else hidden,)
            elif mapping.megatron.endswith("linear_fc2.weight"):
                shape = (hidden, model.ffn_hidden_size)
            else:
                shape = matrices[mapping.transform]
            result[name] = (shape, mapping.transform)
    return result


def megatron_shape(mapping: WeightMapping, shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of a mapping's whole Megatron parameter."""
    parts = [shapes[name][0] for name in mapping.parts]
    return (sum(part[0] for part in parts), *parts[0][1:])
