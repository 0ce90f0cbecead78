"""Join Hugging Face tensors into a rank's shard of a Megatron parameter, and take them apart.

copy     the same on every rank
column   split along the rows of the matrix (its outputs)
row      split along the columns of the matrix (its inputs)
vocab    split along the vocabulary, padded as far as an even split needs
qkv      for each query group its queries, its key, its value; split by groups
gate_up  gate above up on every rank, each split along its rows
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.settings import ModelSettings


@dataclass(frozen=True)
class Split:
    """This rank's share of every tensor."""

    rank: int = 0
    size: int = 1
    vocab_rows: int | None = None  # padded, all ranks together; None: what an even split needs


def to_megatron(parts: list[Tensor], transform: str, model: ModelSettings, split: Split) -> Tensor:
    """Join whole Hugging Face tensors into this rank's shard of a Megatron parameter."""
    if transform == "qkv":
        return _chunk(_interleave(parts, model), 0, split)
    if transform == "gate_up":
        return torch.cat([_chunk(part, 0, split) for part in parts])
    if transform == "vocab":
        rows = split.vocab_rows or len(parts[0]) + -len(parts[0]) % split.size
        missing = rows - len(parts[0])
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
