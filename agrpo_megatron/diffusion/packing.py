"""Packed rows: rows of different length laid end to end, filled to a token budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.types import PackedRows


def make_canvas(prompts: Sequence[Tensor], completions: Tensor) -> tuple[Tensor, Tensor]:
    """Lay prompts and completions [R, C] side by side on a canvas [R, longest].

    Returns the canvas and the prompt lengths [R]; row r is its first `prompt + C` columns.
    """
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64, device=completions.device)
    width = completions.shape[1]
    longest = int(lengths.max()) + width if len(prompts) else width
    canvas = completions.new_zeros(len(prompts), longest)
    for row, prompt in enumerate(prompts):
        canvas[row, : len(prompt)] = prompt
    return canvas.scatter(1, completion_columns(lengths, width), completions), lengths


def completion_columns(prompt_lengths: Tensor, width: int) -> Tensor:
    """Return the canvas columns [R, width] of the completions."""
    return prompt_lengths[:, None] + torch.arange(width, device=prompt_lengths.device)


def pack(canvas: Tensor, lengths: Tensor, scored: Tensor) -> PackedRows:
    """Pack canvas rows [R, L] of these lengths [R]; `scored` [R, L] marks what the head sees.

    Scored indices come out row by row, in column order.
    """
    valid = torch.arange(canvas.shape[1], device=canvas.device) < lengths[:, None]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=canvas.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return PackedRows(canvas[valid], cu_seqlens, scored[valid].nonzero().squeeze(1))


def unscored_row(mask_id: int, device: torch.device) -> PackedRows:
    """Return one row of one mask token with nothing to score: a forward that weighs nothing."""
    return PackedRows(
        tokens=torch.tensor([mask_id], device=device),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        scored=torch.zeros(0, dtype=torch.int64, device=device),
    )


def split_by_budget(lengths: Tensor, budget: int) -> list[Tensor]:
    """Split rows into micro-batches of at most `budget` tokens; returns the row indices of each.

    Rows are taken longest first, so that rows of equal length are neighbours: attention then
    runs once per length instead of once per row. A row longer than the budget is alone.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    batches, start, total = [], 0, 0
    for end, length in enumerate(lengths[order].tolist()):
        if total + length > budget and end > start:
            batches.append(order[start:end])
            start, total = end, 0
        total += length
    if start < len(order):
        batches.append(order[start:])
    return batches
