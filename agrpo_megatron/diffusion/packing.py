"""Packed rows: rows of different length laid end to end, filled to a token budget."""

import heapq
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.types import CachedRows, PackedRows, Row


def make_canvas(prompts: Sequence[Tensor], completions: Tensor) -> tuple[Tensor, Tensor]:
    """Lay prompts and completions [R, C] side by side on a canvas [R, longest].

    Returns the canvas and the prompt lengths [R]; row r is its first `prompt + C` columns.
    """
    sizes, width = [len(prompt) for prompt in prompts], completions.shape[1]
    lengths = on_device(sizes, completions.device)
    canvas = completions.new_zeros(len(prompts), max(sizes, default=0) + width)
    for row, prompt in enumerate(prompts):
        canvas[row, : len(prompt)] = prompt
    return canvas.scatter(1, completion_columns(lengths, width), completions), lengths


def completion_columns(prompt_lengths: Tensor, width: int) -> Tensor:
    """Return the canvas columns [R, width] of the completions."""
    return prompt_lengths[:, None] + torch.arange(width, device=prompt_lengths.device)


def pack(
    canvas: Tensor,
    lengths: Tensor,
    scored: Tensor,
    *,
    shift: bool = False,
    patterns: Sequence[Row] | None = None,
) -> PackedRows:
    """Pack canvas rows [R, L] of these lengths [R]; `scored` [R, L] marks predicted tokens.

    Scored indices come out row by row, in column order. With `shift` a token is predicted from
    the state before it, and the first token of a row from its own state.
    """
    valid = torch.arange(canvas.shape[1], device=canvas.device) < lengths[:, None]
    row, column = (scored & valid).nonzero(as_tuple=True)
    return pack_scored(canvas, lengths.tolist(), row, column, shift=shift, patterns=patterns)


def pack_scored(
    canvas: Tensor,
    lengths: Sequence[int],
    row: Tensor,
    column: Tensor,
    *,
    shift: bool = False,
    patterns: Sequence[Row] | None = None,
    cached: CachedRows | None = None,
) -> PackedRows:
    """Pack as `pack` does, given the scored tokens' canvas rows [S] and columns [S], in order.

    The host knows the lengths, so it need not wait for a GPU.

    Args:
        lengths: tokens of each row that are packed: its first ones, or those after cached ones.
    """
    bounds = (0, *itertools.accumulate(lengths))
    cu_seqlens = on_device(bounds, canvas.device, dtype=torch.int32)
    owner = torch.arange(len(lengths), device=canvas.device)
    owner = owner.repeat_interleave(cu_seqlens.diff(), output_size=bounds[-1])
    places = positions_in_rows(cu_seqlens, bounds[-1])
    if shift:
        column = (column - 1).clamp(min=0)
    if cached is not None:
        before = on_device(cached.before, canvas.device)
        places, column = places + before[owner], column - before[row]
    tokens, scored = canvas[owner, places], cu_seqlens[row].long() + column
    return PackedRows(tokens, cu_seqlens, scored, bounds, patterns, cached)


def positions_in_rows(cu_seqlens: Tensor, count: int) -> Tensor:
    """Return each token's position in its row, [count]; `count` is the last boundary."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=count)
    return torch.arange(count, device=cu_seqlens.device) - starts


def on_device(
    numbers: Sequence[int], device: torch.device, *, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Copy numbers to a device without waiting for its work: a GPU reads them from pinned memory.

    `torch.tensor(numbers, device=...)` waits until the GPU has done all that it was given before.
    """
    numbers_here = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return numbers_here.to(device, non_blocking=True)


def unscored_row(mask_id: int, device: torch.device) -> PackedRows:
    """Return one row of one mask token with nothing to score: a forward of weight 0."""
    return PackedRows(
        tokens=on_device([mask_id], device),
        cu_seqlens=on_device([0, 1], device, dtype=torch.int32),
        scored=torch.zeros(0, dtype=torch.int64, device=device),
        host_bounds=(0, 1),
    )


def assign_rows(
    lengths: Tensor, *, budget: int, ranks: int, attention: float, multiple: int = 1
) -> list[list[Tensor]]:
    """Plan the micro-batches of all data-parallel ranks; returns the row indices of each.

    Every rank gets the same number, a multiple of `multiple` and at least one; some may be empty.
    A micro-batch holds at most `budget` tokens; a longer row gets its own. In descending cost,
    rows go to the cheapest micro-batch with room, then micro-batches to the cheapest rank.

    Args:
        lengths: [N] tokens of each row; a row of s tokens costs s + attention * s^2.
    """
    sizes = lengths.tolist()
    order = sorted(range(len(sizes)), key=lambda row: -sizes[row])  # stable: ties by index
    step = ranks * multiple
    count = -(-max(1, _first_fit(order, sizes, budget)) // step) * step
    while (bins := _spread(order, sizes, count, budget, attention)) is None:
        count += step
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]
    for cost, rows in sorted(bins, key=lambda b: -b[0]):
        total, rank = heapq.heappop(heap)
        shares[rank].append(rows)
        if len(shares[rank]) < count // ranks:
            heapq.heappush(heap, (total + cost, rank))
    return [[torch.tensor(rows, dtype=torch.int64) for rows in share] for share in shares]


def _first_fit(order: list[int], sizes: list[int], budget: int) -> int:
    """Return how many micro-batches first-fit decreasing needs."""
    free: list[int] = []
    for row in order:
        place = next((i for i, room in enumerate(free) if room >= sizes[row]), None)
        if place is None:
            free.append(budget - sizes[row])
        else:
            free[place] -= sizes[row]
    return len(free)


def _spread(
    order: list[int], sizes: list[int], count: int, budget: int, attention: float
) -> list[tuple[float, list[int]]] | None:
    """Spread rows over `count` micro-batches of equal cost; None where they do not fit."""
    heap: list[tuple[float, int, int, list[int]]] = [(0.0, n, 0, []) for n in range(count)]
    for row in order:
        full = []
        while heap and heap[0][3] and heap[0][2] + sizes[row] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, number, used, rows = heap[0]
        cost += sizes[row] * (1 + attention * sizes[row])
        heapq.heapreplace(heap, (cost, number, used + sizes[row], [*rows, row]))
        for entry in full:
            heapq.heappush(heap, entry)
    return [(cost, rows) for cost, _, _, rows in sorted(heap, key=lambda entry: entry[1])]
