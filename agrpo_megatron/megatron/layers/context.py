"""Context parallelism: each rank holds a contiguous part of the packed tokens.

Attention is bidirectional, so contiguous parts cost the same and need no reordering. Only rows that
cross from one part into the next need keys and values of other ranks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.diffusion.patterns import full
from agrpo_megatron.megatron.parallel import Axis, Ranks
from agrpo_megatron.types import CachedRows, PackedRows, SftBatch, TimestepBatch


def padded_rows(rows: PackedRows, ranks: Ranks, *, tokens: int = 0) -> PackedRows:
    """Append a row of padding if parallelism needs an even split, or FP8 whole blocks.

    Args:
        tokens: minimum of packed tokens in the result.
    """
    missing = _padded(max(tokens, len(rows.tokens)), ranks) - len(rows.tokens)
    if not missing:
        return rows
    end = rows.cu_seqlens[-1:] + missing
    bounds = None if rows.host_bounds is None else (*rows.host_bounds, len(rows.tokens) + missing)
    experts = rows.experts
    if experts is not None:
        experts = F.pad(experts, (0, 0, 0, 0, 0, missing), value=-1)
    return replace(
        rows,
        tokens=F.pad(rows.tokens, (0, missing)),
        cu_seqlens=torch.cat([rows.cu_seqlens, end]),
        host_bounds=bounds,
        patterns=None if rows.patterns is None else (*rows.patterns, full(missing)),
        cached=None if rows.cached is None else _with_filler(rows.cached),
        experts=experts,
    )


def _with_filler(cached: CachedRows) -> CachedRows:
    """Add a row that neither reads nor writes the cache."""
    parts = {name: (*getattr(cached, name), 0) for name in ("slots", "before", "keep", "after")}
    return replace(cached, **parts)


def for_schedule(batches: Sequence[PackedRows], ranks: Ranks) -> tuple[list[PackedRows], int]:
    """Return micro-batches for Megatron's schedule, and the tokens of each.

    The interleaved schedule needs equal lengths: two stages exchange the lengths of both directions
    through one channel, which would mix them up. Without virtual stages lengths are free, and the
    returned number has no meaning.
    """
    if ranks.parallel.virtual == 1:
        return list(batches), 1
    most = max(len(rows.tokens) for rows in batches)
    padded = [padded_rows(rows, ranks, tokens=most) for rows in batches]
    return padded, len(padded[0].tokens)


def hidden_tokens(rows: PackedRows, ranks: Ranks) -> int:
    """Return how many tokens of these rows a rank's hidden state holds."""
    return _padded(len(rows.tokens), ranks) // _shares(ranks)


def part_of(count: int, context: Axis, rank: int) -> tuple[int, int]:
    """Return the token range of a context-parallel rank; `count` was padded to divide evenly."""
    width = count // context.size
    return rank * width, (rank + 1) * width


def scored_slices(rows: PackedRows, ranks: Ranks) -> list[slice]:
    """Return which of the scored tokens each context-parallel rank holds."""
    context = ranks.context
    if context.size == 1:
        return [slice(0, len(rows.scored))]
    count = len(padded_rows(rows, ranks).tokens)
    starts = torch.tensor([part_of(count, context, r)[0] for r in range(context.size)])
    bounds = torch.searchsorted(rows.scored.cpu(), starts).tolist() + [len(rows.scored)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def local_part[Batch: (SftBatch, TimestepBatch)](batch: Batch, ranks: Ranks) -> Batch:
    """Keep only values of this rank's scored tokens; the rows stay whole."""
    if ranks.context.size == 1:
        return batch
    mine = scored_slices(batch.rows, ranks)[ranks.context.rank]
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "rows"}
    return replace(batch, **{n: v[mine] if v is not None else None for n, v in values.items()})


class GatherTokens(torch.autograd.Function):
    """Concatenate the parts of all ranks [T / ranks, ...]; gradients are summed back."""

    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        part = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.group)
        return part, None


def gather_keys(
    key: Tensor, value: Tensor, wanted: slice, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return keys and values of the wanted tokens, gathered from all ranks' [T, groups, dim]."""
    both = GatherTokens.apply(torch.stack([key, value], 1), group)
    key, value = both[wanted].unbind(1)  # type: ignore[index]
    # Separate tensors, as fused kernels expect.
    return key.contiguous(), value.contiguous()


def _padded(count: int, ranks: Ranks) -> int:
    return count + -count % (_shares(ranks) * ranks.token_multiple)


def _shares(ranks: Ranks) -> int:
    """Return how many ranks share the tokens of a hidden state."""
    return ranks.context.size * (ranks.tensor.size if ranks.parallel.sequence else 1)
