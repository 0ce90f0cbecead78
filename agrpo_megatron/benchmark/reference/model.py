"""LLaDA's transformer on padded batches: plain torch functions of a table of weights."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings


class Reference(NamedTuple):
    """A model: its settings, and its weights by their Hugging Face names."""

    model: ModelSettings
    weights: Mapping[str, Tensor]

    def of(self, name: str) -> Tensor:
        """Return a weight by the part of its name after `model.transformer.`."""
        return self.weights[f"model.transformer.{name}.weight"]


def logits_of(reference: Reference, ids: Tensor) -> Tensor:
    """Return the logits [B, S, V] of ids [B, S] at every position; all tokens see each other."""
    model = reference.model
    hidden = F.embedding(ids, reference.of("wte"))
    turns = _rotations(model, ids.shape[1], ids.device)
    for number in range(model.num_layers):
        hidden = hidden + _attention(reference, number, hidden, turns)
        hidden = hidden + _feed_forward(reference, number, hidden)
    return F.linear(_norm(reference, "ln_f", hidden), reference.of("ff_out"))


def _attention(
    reference: Reference, number: int, hidden: Tensor, turns: tuple[Tensor, Tensor]
) -> Tensor:
    model, block = reference.model, f"blocks.{number}"
    normed = _norm(reference, f"{block}.attn_norm", hidden)
    query, key, value = (
        F.linear(normed, reference.of(f"{block}.{part}_proj"), _bias(reference, block, part))
        .unflatten(-1, (-1, model.head_width))
        .transpose(1, 2)  # [B, heads, S, width of a head]
        for part in "qkv"
    )
    mixed = F.scaled_dot_product_attention(
        _rotate(query, turns), _rotate(key, turns), value, enable_gqa=key.shape[1] < query.shape[1]
    )
    return F.linear(mixed.transpose(1, 2).flatten(2), reference.of(f"{block}.attn_out"))


def _bias(reference: Reference, block: str, part: str) -> Tensor | None:
    return reference.weights.get(f"model.transformer.{block}.{part}_proj.bias")


def _feed_forward(reference: Reference, number: int, hidden: Tensor) -> Tensor:
    block = f"blocks.{number}"
    normed = _norm(reference, f"{block}.ff_norm", hidden)
    gate = F.silu(F.linear(normed, reference.of(f"{block}.ff_proj")))
    up = F.linear(normed, reference.of(f"{block}.up_proj"))
    return F.linear(gate * up, reference.of(f"{block}.ff_out"))


def _norm(reference: Reference, name: str, hidden: Tensor) -> Tensor:
    weight = reference.of(name)
    normed = F.rms_norm(hidden.float(), weight.shape, eps=reference.model.norm_epsilon)
    return weight * normed.to(hidden.dtype)


def _rotations(model: ModelSettings, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [S, width of a head] of the positions' rotations."""
    width = model.head_width
    pairs = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / model.rope_theta**pairs).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(values: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of each head, in float32."""
    first, second = values.float().chunk(2, dim=-1)
    turned = values.float() * turns[0] + torch.cat([-second, first], dim=-1) * turns[1]
    return turned.to(values.dtype)
