"""Attention by patterns as one FlexAttention call over all packed rows, for GPUs.

FlexAttention takes the definition itself as its mask (`patterns.visible`), and skips tiles in which
no token sees another. Variable-length kernels know causal rows and full ones alone: for blocks,
the keys of the context would have to be laid out once for every block that sees them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from agrpo_megatron.diffusion.patterns import Places, visible


def make_block_mask(places: Places) -> BlockMask:
    """Return FlexAttention's table of tiles for packed tokens."""

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(places, query, key)

    count, device = len(places.row), places.row.device
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, None, None, count, count, device=str(device))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float | None
) -> Tensor:
    """Attend, [T, heads, head_dim] with keys and values [T, groups, head_dim]: [T, width]."""
    run = _compiled(flex_attention) if query.is_cuda else flex_attention
    shared = query.shape[1] != key.shape[1]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = run(query, key, value, block_mask=mask, scale=scale, enable_gqa=shared)
    return out[0].transpose(0, 1).flatten(1)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for any number of tokens; without it, FlexAttention computes every score."""
    return torch.compile(function, dynamic=True)
