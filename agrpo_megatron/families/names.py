"""How a family is described: its settings, and one line for each Megatron parameter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.settings import ModelSettings


@dataclass(frozen=True)
class Line:
    """One Megatron parameter; `{i}` stands for the layer number in both names."""

    megatron: str
    parts: tuple[str, ...]  # Hugging Face names
    transform: str  # layout and split, see `families.transforms`


@dataclass(frozen=True)
class Family:
    """A model family: how its configuration and its tensors are named."""

    name: str
    settings: Callable[[Mapping[str, Any]], ModelSettings]  # from config.json
    config: Callable[[ModelSettings], dict[str, Any]]  # to config.json
    lines: Callable[[ModelSettings], list[Line]]


def expand(lines: list[Line], num_layers: int) -> list[Line]:
    """Return one line per parameter: those with `{i}` once per layer."""
    result = []
    for line in lines:
        numbers = range(num_layers) if "{i}" in line.megatron else range(1)
        result += [
            Line(
                line.megatron.replace("{i}", str(i)),
                tuple(part.replace("{i}", str(i)) for part in line.parts),
                line.transform,
            )
            for i in numbers
        ]
    return result
