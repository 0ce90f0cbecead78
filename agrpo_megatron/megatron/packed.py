"""The layout of packed rows, as attention takes it: boundaries, positions, batched runs."""

from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from agrpo_megatron.megatron.context import part_of
from agrpo_megatron.megatron.ranks import Axis


@dataclass(frozen=True)
class Run:
    """Attention in one batched call: queries of neighbouring rows of equal length."""

    rows: int
    queries: int  # per row; fewer than keys where a row goes on on another rank
    keys: int  # per row
    start: int  # of the first row's keys, among the keys at hand


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence record, with what our attention needs computed once a forward."""

    runs: list[Run] = field(default_factory=list)
    gathers: bool = False  # whether a row crosses into another rank's part
    angles: Tensor | None = None  # [T, 1, head_dim] float32, of this rank's tokens
    cosines: Tensor | None = None  # of the angles
    sines: Tensor | None = None


def packed_layout(
    cu_seqlens: Tensor, *, head_dim: int, rope_theta: float, context: Axis
) -> PackedLayout:
    """Describe packed rows: positions restart at every row, and rotate by `rope_theta`.

    Args:
        cu_seqlens: [rows + 1] int32 row boundaries, of all context-parallel ranks together.
    """
    lengths, bounds = cu_seqlens.diff(), cu_seqlens.tolist()
    first, last = part_of(bounds[-1], context, context.rank)
    starts = cu_seqlens[:-1].repeat_interleave(lengths)
    positions = (torch.arange(bounds[-1], device=cu_seqlens.device) - starts)[first:last]
    angles = rotary_angles(positions, head_dim=head_dim, rope_theta=rope_theta)
    cuts = {part_of(bounds[-1], context, rank)[0] for rank in range(context.size)}
    gathers = not cuts <= set(bounds)
    longest = max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=0)
    # Rows of other ranks have no queries here: their part of this rank is empty.
    mine = cu_seqlens if context.size == 1 else cu_seqlens.clamp(first, last) - first
    return PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=mine,
        cu_seqlens_kv=cu_seqlens if gathers else mine,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=_runs(bounds, first, last, origin=0 if gathers else first),
        gathers=gathers,
        angles=angles,
        cosines=angles.cos(),
        sines=angles.sin(),
    )


def rotary_angles(positions: Tensor, *, head_dim: int, rope_theta: float) -> Tensor:
    """Return by how much each position [T] rotates its heads, [T, 1, head_dim] float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None].float() * (1.0 / rope_theta**exponents)
    return torch.cat([angles, angles], dim=-1)[:, None]


def _runs(bounds: list[int], first: int, last: int, *, origin: int) -> list[Run]:
    """Join neighbouring rows of equal length that lie whole in `first` to `last`."""
    runs: list[Run] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        queries = min(end, last) - max(start, first)
        if queries <= 0:
            continue
        before = runs[-1] if runs else None
        if before and queries == end - start == before.queries == before.keys:
            runs[-1] = replace(before, rows=before.rows + 1)
        else:
            runs.append(Run(1, queries, end - start, start - origin))
    return runs
