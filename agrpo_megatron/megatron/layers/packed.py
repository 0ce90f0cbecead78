"""The layout of packed rows for attention: boundaries, positions, batched runs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from agrpo_megatron.diffusion.packing import positions_in_rows
from agrpo_megatron.megatron.layers.context import part_of
from agrpo_megatron.megatron.parallel import Axis
from agrpo_megatron.types import PackedRows


@dataclass(frozen=True)
class Run:
    """Attention in one batched call: queries of neighbouring rows of equal length."""

    rows: int
    queries: int  # per row; fewer than keys if the row continues on another rank
    keys: int  # per row
    start: int  # of the first row's keys, among this rank's keys


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence record, with values that our attention computes once a forward."""

    qkv_format: str = "thd"
    pad_between_seqs: bool = False
    runs: list[Run] = field(default_factory=list)
    keys: slice | None = None  # of all ranks' tokens; None: no row crosses parts
    angles: Tensor | None = None  # [T, 1, head_dim] float32, of this rank's tokens
    cosines: Tensor | None = None  # of the angles
    sines: Tensor | None = None


def packed_layout(
    rows: PackedRows, *, angles: Callable[[Tensor], Tensor], context: Axis
) -> PackedLayout:
    """Describe packed rows: positions restart at every row.

    Args:
        rows: of all context-parallel ranks together.
        angles: positions [T] -> rotary angles [T, 1, head_dim] float32.
    """
    cu_seqlens, bounds = rows.cu_seqlens, rows.bounds
    first, last = part_of(bounds[-1], context, context.rank)
    turns = angles(positions_in_rows(cu_seqlens, bounds[-1])[first:last])
    cuts = {part_of(bounds[-1], context, rank)[0] for rank in range(context.size)}
    keys = None if cuts <= set(bounds) else _rows_around(bounds, first, last)
    origin = keys.start if keys else first
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    # Rows of other ranks are empty here.
    mine = cu_seqlens if context.size == 1 else cu_seqlens.clamp(first, last) - first
    theirs = cu_seqlens.clamp(keys.start, keys.stop) - keys.start if keys else mine
    return PackedLayout(
        cu_seqlens_q=mine,
        cu_seqlens_kv=theirs,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=_runs(bounds, first, last, origin=origin),
        keys=keys,
        angles=turns,
        cosines=turns.cos(),
        sines=turns.sin(),
    )


def rotary_angles(positions: Tensor, *, head_dim: int, rope_theta: float) -> Tensor:
    """Return the rotary angles of positions [T], [T, 1, head_dim] float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None].float() * (1.0 / rope_theta**exponents)
    return torch.cat([angles, angles], dim=-1)[:, None]


def _rows_around(bounds: Sequence[int], first: int, last: int) -> slice:
    """Return the token range of all rows that overlap `first` to `last`."""
    return slice(max(b for b in bounds if b <= first), min(b for b in bounds if b >= last))


def _runs(bounds: Sequence[int], first: int, last: int, *, origin: int) -> list[Run]:
    """Join neighbouring rows of equal length that lie completely in `first` to `last`."""
    runs: list[Run] = []
    for start, end in itertools.pairwise(bounds):
        queries = min(end, last) - max(start, first)
        if queries <= 0:
            continue
        before = runs[-1] if runs else None
        if before and queries == end - start == before.queries == before.keys:
            runs[-1] = replace(before, rows=before.rows + 1)
        else:
            runs.append(Run(1, queries, end - start, start - origin))
    return runs
