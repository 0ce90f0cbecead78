"""The layout of packed rows for attention: boundaries, positions, batched runs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from agrpo_megatron.diffusion.packing import on_device, positions_in_rows
from agrpo_megatron.diffusion.patterns import Places, places_of
from agrpo_megatron.megatron.layers.context import part_of
from agrpo_megatron.megatron.layers.flex import make_block_mask
from agrpo_megatron.megatron.layers.rotary import Scaling, frequencies
from agrpo_megatron.megatron.layers.router import Routing
from agrpo_megatron.megatron.parallel import Axis
from agrpo_megatron.types import CachedRows, PackedRows, Row


@dataclass(frozen=True)
class Run:
    """Attention in one batched call: queries of neighbouring rows of equal length and pattern."""

    rows: int
    queries: int  # per row; fewer than keys if the row continues on another rank
    keys: int  # per row
    start: int  # of the first row's keys, among this rank's keys
    pattern: Row | None = None  # None: all tokens of a row see each other
    before: int = 0  # cached tokens of each row before the queries
    after: int = 0  # and after them
    keep: int = 0  # first queries of each row whose keys are to be cached
    slots: tuple[int, ...] = ()  # of the rows; empty: no cache


@dataclass(frozen=True)
class Queries:
    """Scored tokens as the only queries of a layer, in calls of rows with equally many."""

    runs: list[Run]
    grids: list[Tensor]  # of each run, [rows, queries]: indices into the S tokens
    order: Tensor  # [S] of each token, its place among the entries of all grids


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence record, with values that our attention computes once a forward."""

    qkv_format: str = "thd"
    pad_between_seqs: bool = False
    runs: list[Run] = field(default_factory=list)
    keys: slice | None = None  # of all ranks' tokens; None: no row crosses parts
    block_mask: BlockMask | None = None  # of FlexAttention; None: SDPA, run by run
    cached: CachedRows | None = None
    slots: list[Tensor] = field(default_factory=list)  # of each run, [rows]; with a cache
    angles: Tensor | None = None  # [T, 1, rotated width] float32, of this rank's tokens
    cosines: Tensor | None = None  # of the angles
    sines: Tensor | None = None
    query_scale: Tensor | None = None  # [T, 1, 1] float32, of rotated queries; None: 1
    places: Places | None = None  # of all tokens; None: without patterns
    routing: Routing = Routing()
    # Tokens that the last layer returns, [S]; None: all. Set by the model.
    scored: Tensor | None = None
    queries: Queries | None = None  # of them; None: all tokens are queries of the last layer


def packed_layout(
    rows: PackedRows,
    *,
    angles: Callable[[Tensor], Tensor],
    context: Axis,
    query_scale: Callable[[Tensor], Tensor | None] = lambda _: None,
    use_flex: bool = False,
) -> PackedLayout:
    """Describe packed rows: positions restart at every row.

    Args:
        rows: of all context-parallel ranks together.
        angles: positions [T] -> rotary angles [T, 1, rotated width] float32.
        query_scale: positions [T] -> factors of rotated queries [T, 1, 1] float32; None: 1.
        use_flex: whether rows with patterns go through FlexAttention.
    """
    cu_seqlens, bounds, places = rows.cu_seqlens, rows.bounds, None
    if rows.patterns is not None:
        assert context.size == 1
        cached = rows.cached
        left_out = {} if cached is None else {"before": cached.before, "after": cached.after}
        places = places_of(rows.patterns, rows.tokens.device, **left_out)
    first, last = part_of(bounds[-1], context, context.rank)
    positions = positions_in_rows(cu_seqlens, bounds[-1]) if places is None else places.position
    positions = positions[first:last]
    turns = angles(positions)
    cuts = {part_of(bounds[-1], context, rank)[0] for rank in range(context.size)}
    keys = None if cuts <= set(bounds) else _rows_around(bounds, first, last)
    origin = keys.start if keys else first
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    runs = _runs(rows, first, last, origin=origin)
    slots = [on_device(run.slots, rows.tokens.device) for run in runs] if rows.cached else []
    # Rows of other ranks are empty here.
    mine = cu_seqlens if context.size == 1 else cu_seqlens.clamp(first, last) - first
    theirs = cu_seqlens.clamp(keys.start, keys.stop) - keys.start if keys else mine
    return PackedLayout(
        cu_seqlens_q=mine,
        cu_seqlens_kv=theirs,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=runs,
        cached=rows.cached,
        slots=slots,
        keys=keys,
        block_mask=make_block_mask(places)
        if use_flex and not (places is None or rows.cached)
        else None,
        angles=turns,
        cosines=turns.cos(),
        sines=turns.sin(),
        query_scale=query_scale(positions),
        places=places,
    )


def rotary_angles(
    positions: Tensor, *, head_dim: int, rope_theta: float, scaling: Scaling | None = None
) -> Tensor:
    """Return the rotary angles of positions [T], [T, 1, head_dim] float32.

    Args:
        head_dim: the numbers of a head that rotate.
    """
    turns = frequencies(head_dim, rope_theta, scaling, device=positions.device)
    angles = positions[:, None].float() * turns
    return torch.cat([angles, angles], dim=-1)[:, None]


def _rows_around(bounds: Sequence[int], first: int, last: int) -> slice:
    """Return the token range of all rows that overlap `first` to `last`."""
    return slice(max(b for b in bounds if b <= first), min(b for b in bounds if b >= last))


def _runs(rows: PackedRows, first: int, last: int, *, origin: int) -> list[Run]:
    """Join neighbouring rows of equal length and pattern that lie completely in `first` to `last`.

    Rows with cached tokens are alike if as many are cached, and as many will be.
    """
    runs: list[Run] = []
    for number, (start, end) in enumerate(itertools.pairwise(rows.bounds)):
        queries = min(end, last) - max(start, first)
        if queries <= 0:
            continue
        run = _run_of(rows, number, queries, start - origin)
        before = runs[-1] if runs else None
        is_whole = queries == end - start
        if before and is_whole and replace(before, rows=1, start=run.start, slots=run.slots) == run:
            runs[-1] = replace(before, rows=before.rows + 1, slots=before.slots + run.slots)
        else:
            runs.append(run)
    return runs


def _run_of(rows: PackedRows, number: int, queries: int, start: int) -> Run:
    bounds, cached = rows.bounds, rows.cached
    pattern = None if rows.patterns is None else rows.patterns[number]
    run = Run(1, queries, bounds[number + 1] - bounds[number], start, pattern)
    if cached is None:
        return run
    before, keep, after = cached.before[number], cached.keep[number], cached.after[number]
    if not before + keep + after:
        return run
    slots = (cached.slots[number],)
    return replace(run, before=before, keep=keep, after=after, slots=slots)
