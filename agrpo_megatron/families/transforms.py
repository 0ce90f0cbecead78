"""Join Hugging Face tensors into a rank's shard of a Megatron parameter, and the inverse.

copy     the same on every rank
row      split along the columns of the matrix (its inputs)
vocab    split along the vocabulary, padded to an even split
qkv      for each query group its queries, its key, its value; split by groups
         (fused_qkv: from one tensor of all queries, all keys, all values)
gate_up  gate above up on every rank, both split along their rows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings


class Part(Protocol):
    """A tensor, or a lazy tensor in a file: only the indexed part is read."""

    @property
    def shape(self) -> Sequence[int]:
        """Return the shape of the whole tensor."""
        ...

    def __getitem__(self, index: Any, /) -> Tensor:
        """Return a slice, or a tuple of slices."""
        ...


@dataclass(frozen=True)
class Split:
    """This rank's share of every tensor."""

    rank: int = 0
    size: int = 1
    vocab_rows: int | None = None  # padded, of all ranks; None: the least for an even split

    def of(self, length: int) -> slice:
        """Return this rank's part of a dimension."""
        each = length // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def to_megatron(
    parts: Sequence[Part], transform: str, model: ModelSettings, split: Split
) -> Tensor:
    """Join whole Hugging Face tensors into this rank's shard of a Megatron parameter."""
    part = parts[0]
    if transform == "fused_qkv":
        sizes = [model.query_width, model.key_width, model.key_width]
        return _interleave(part[:].split(sizes), model, split)
    if transform == "qkv":
        return _interleave(parts, model, split)
    if transform == "gate_up":
        return torch.cat([each[split.of(each.shape[0])] for each in parts])
    if transform == "vocab":
        return _padded(part, split)
    if transform == "row":
        return part[:, split.of(part.shape[1])]
    return part[:]


def from_megatron(shards: list[Tensor], transform: str, model: ModelSettings) -> list[Tensor]:
    """Invert `to_megatron`, given the shards of all ranks in order."""
    if transform in ("qkv", "fused_qkv"):
        parts = _separate(torch.cat(shards), model)
        return [torch.cat(parts)] if transform == "fused_qkv" else parts
    if transform == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in range(2)]
    if transform == "vocab":
        return [torch.cat(shards)[: model.vocab_size]]
    if transform == "row":
        return [torch.cat(shards, dim=1)]
    return [shards[0]]


def adapter_to_megatron(whole: Part, matrix: str, transform: str, model: ModelSettings) -> Part:
    """Return an adapter's whole tensor with its outputs in the order of Megatron's layer.

    Only one published layer that holds queries, keys and values has another order.

    Args:
        matrix: lora_A or lora_B.
        transform: of the layer's weight.
    """
    if transform != "fused_qkv" or matrix != "lora_B":
        return whole
    return to_megatron([whole], transform, model, Split())


def adapter_from_megatron(
    whole: Tensor, matrix: str, transform: str, model: ModelSettings
) -> Tensor:
    """Invert `adapter_to_megatron`."""
    if transform != "fused_qkv" or matrix != "lora_B":
        return whole
    return from_megatron([whole], transform, model)[0]


def _padded(part: Part, split: Split) -> Tensor:
    """Return this rank's rows; rows beyond the vocabulary are zero."""
    true = part.shape[0]
    mine = split.of(split.vocab_rows or true + -true % split.size)
    rows = part[min(mine.start, true) : min(mine.stop, true)]
    missing = mine.stop - mine.start - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _interleave(parts: Sequence[Part], model: ModelSettings, split: Split) -> Tensor:
    """Interleave q, k, v as Megatron does: for each query group its queries, its key, its value."""
    groups = (model.num_query_groups or model.num_attention_heads) // split.size
    mine = [part[split.of(part.shape[0])] for part in parts]
    return torch.cat([m.view(groups, -1, *m.shape[1:]) for m in mine], dim=1).flatten(0, 1)


def _separate(fused: Tensor, model: ModelSettings) -> list[Tensor]:
    groups = model.num_query_groups or model.num_attention_heads
    sizes = [model.query_width // groups, model.head_width, model.head_width]
    parts = fused.view(groups, sum(sizes), *fused.shape[1:]).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]
