"""How Hugging Face tensors become Megatron's, and back: the transforms and the sharding.

A `Line` ties one Megatron parameter to the Hugging Face tensors it is made of. The transform
says how the parts are laid out and which dimension tensor parallelism splits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.settings import ModelSettings


@dataclass(frozen=True)
class Line:
    """One Megatron parameter; `{i}` stands for the layer number in both names."""

    megatron: str
    parts: tuple[str, ...]  # Hugging Face names
    transform: str  # a key of TRANSFORMS


@dataclass(frozen=True)
class Family:
    """A model family: how its configuration and its tensors are named."""

    name: str
    settings: Callable[[Mapping[str, Any]], ModelSettings]  # from config.json
    lines: Callable[[ModelSettings], list[Line]]


@dataclass(frozen=True)
class Split:
    """This rank's share of every tensor."""

    rank: int = 0
    size: int = 1


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


def to_megatron(parts: list[Tensor], transform: str, model: ModelSettings, split: Split) -> Tensor:
    """Join whole Hugging Face tensors into this rank's shard of a Megatron parameter."""
    if transform == "qkv":
        return _chunk(_interleave(parts, model), 0, split)
    if transform == "gate_up":
        return torch.cat([_chunk(part, 0, split) for part in parts])
    if transform == "vocab":
        missing = -len(parts[0]) % split.size
        padding = parts[0].new_zeros(missing, *parts[0].shape[1:])
        return _chunk(torch.cat([parts[0], padding]), 0, split)
    return _chunk(parts[0], {"copy": None, "column": 0, "row": 1}[transform], split)


def from_megatron(shards: list[Tensor], transform: str, model: ModelSettings) -> list[Tensor]:
    """Undo `to_megatron`, given the shards of all ranks in order."""
    if transform == "qkv":
        return _separate(torch.cat(shards), model)
    if transform == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in range(2)]
    if transform == "vocab":
        return [torch.cat(shards)[: model.vocab_size]]
    if transform == "copy":
        return [shards[0]]
    return [torch.cat(shards, dim={"column": 0, "row": 1}[transform])]


def _chunk(tensor: Tensor, dim: int | None, split: Split) -> Tensor:
    return tensor if dim is None else tensor.chunk(split.size, dim)[split.rank]


def _interleave(parts: list[Tensor], model: ModelSettings) -> Tensor:
    """Lay q, k, v out as Megatron does: for each query group its queries, its key, its value."""
    groups = model.num_query_groups or model.num_attention_heads
    grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _separate(fused: Tensor, model: ModelSettings) -> list[Tensor]:
    groups = model.num_query_groups or model.num_attention_heads
    head = model.hidden_size // model.num_attention_heads
    sizes = [model.num_attention_heads // groups * head, head, head]
    parts = fused.view(groups, sum(sizes), *fused.shape[1:]).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]
