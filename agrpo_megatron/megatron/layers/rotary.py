"""Rotary embeddings beyond the length of training: scaled frequencies, and scaled queries.

YaRN leaves frequencies that turn often within the original length, divides slow ones by the factor,
and goes from one to the other by a ramp over the pairs of a head; in Llama 3.1 the ramp is over the
turns. All in float32, operation by operation as the reference, so the frequencies are equal in
every bit.

Source: YaRN (arXiv 2309.00071); `yarn` and `llama3` of transformers' rotary embeddings; the
attention of its Ministral 3 for the scaled queries, which Llama 4 had first.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings


class Scaling(NamedTuple):
    """Frequencies for positions up to `factor` times the original length."""

    kind: str  # yarn or llama3
    factor: float
    original_length: int
    beta_fast: float  # turns within the original length: a pair with more keeps its frequency
    beta_slow: float  # a pair with fewer has it divided by the factor


def scaling_of(model: ModelSettings) -> Scaling | None:
    """Return the scaling of a model's frequencies; None: plain rotary embeddings."""
    if model.rope_factor == 1:
        return None
    length = model.rope_original_length
    assert length is not None
    betas = model.rope_beta_fast, model.rope_beta_slow
    return Scaling(model.rope_scaling, model.rope_factor, length, *betas)


def frequencies(
    head_dim: int, rope_theta: float, scaling: Scaling | None, *, device: torch.device
) -> Tensor:
    """Return the angle per position of each pair of a head, [head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    periods = rope_theta**exponents
    kept = 1.0 / periods
    if scaling is None:
        return kept
    length, fast, slow = scaling.original_length, scaling.beta_fast, scaling.beta_slow
    if scaling.kind == "llama3":
        share = (length / (2 * math.pi / kept) - slow) / (fast - slow)
        between = (1 - share) * kept / scaling.factor + share * kept
        divided = torch.where(share < 0, kept / scaling.factor, between)
        return torch.where(share > 1, kept, divided)
    low, high = (
        head_dim * math.log(length / (turns * 2 * math.pi)) / 2 / math.log(rope_theta)
        for turns in (fast, slow)
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
    width = last - first or 0.001  # no division by zero
    pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    share = 1 - ((pairs - first) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - share) + kept * share


def query_scale(
    positions: Tensor, *, beta: float, original_length: int | None, attention_factor: float
) -> Tensor | None:
    """Return what queries at positions [T] are multiplied by, [T, 1, 1] float32; None: by 1.

    YaRN multiplies rotated queries and keys by the attention factor. Scores are the same if queries
    take its square, and one kernel can rotate both.

    Args:
        beta: queries grow by 1 + beta log(1 + floor(position / original length)).
    """
    if beta == 0 and attention_factor == 1:
        return None
    scale = torch.full(positions.shape, attention_factor**2, device=positions.device)
    if beta:
        assert original_length is not None
        scale = scale * (1 + beta * torch.log(1 + torch.floor(positions / original_length)))
    return scale[:, None, None]


def scaled(query: Tensor, scale: Tensor | None) -> Tensor:
    """Scale rotated queries [T, heads, head_dim] in their own dtype, as the reference does."""
    return query if scale is None else query * scale.to(query.dtype)
