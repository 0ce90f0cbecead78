"""The rows that the sampler writes, and the bookkeeping of their blocks and steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas


@dataclass
class Canvas:
    """The rows being written; mutated step by step, its trajectory handed out at the end."""

    canvas: Tensor  # [R, longest] prompts and completions
    prompt_lengths: Tensor  # [R]
    columns: Tensor  # [R, C] canvas columns of the completion
    rollout_ids: Tensor  # [R]
    unmask_step: Tensor  # [R, C]; -1 where still masked
    logprobs: Tensor  # [R, C]
    entropies: Tensor  # [R, C]
    support_ids: Tensor  # [R, C, K]; K grows to the widest support seen
    step: Tensor  # [R] denoising steps done
    block: Tensor  # [R] block being decoded
    step_in_block: Tensor  # [R]
    plan: Tensor | None = None  # [R, C] step that fixes each position, where known beforehand


def start(
    prompts: tuple[Tensor, ...], rollout_ids: Tensor, *, mask_id: int, sampling: SamplingSettings
) -> Canvas:
    """Lay out the prompts with fully masked completions."""
    rows, width, device = len(prompts), sampling.completion_length, rollout_ids.device
    masks = torch.full((rows, width), mask_id, dtype=torch.int64, device=device)
    canvas, prompt_lengths = make_canvas(prompts, masks)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    return Canvas(
        canvas=canvas,
        prompt_lengths=prompt_lengths,
        columns=completion_columns(prompt_lengths, width),
        rollout_ids=rollout_ids,
        unmask_step=torch.full((rows, width), -1, dtype=torch.int64, device=device),
        logprobs=torch.zeros(rows, width, device=device),
        entropies=torch.zeros(rows, width, device=device),
        support_ids=torch.zeros(rows, width, 0, dtype=torch.int32, device=device),
        step=zeros,
        block=zeros.clone(),
        step_in_block=zeros.clone(),
    )


def block_positions(state: Canvas, rows: Tensor, sampling: SamplingSettings) -> Tensor:
    """Return the completion positions [n, block length] of the rows' current blocks."""
    offsets = torch.arange(sampling.block_length, device=rows.device)
    return state.block[rows, None] * sampling.block_length + offsets


def commit(state: Canvas, rows: Tensor, positions: Tensor, draw: Draw) -> None:
    """Write fixed tokens and what is recorded of them."""
    state.canvas[rows, state.columns[rows, positions]] = draw.tokens
    state.unmask_step[rows, positions] = state.step[rows]
    state.logprobs[rows, positions] = draw.logprobs.float()
    state.entropies[rows, positions] = draw.entropies.float()
    if draw.support_ids is None:
        return
    missing = draw.support_ids.shape[-1] - state.support_ids.shape[-1]
    if missing > 0:
        state.support_ids = torch.nn.functional.pad(state.support_ids, (0, missing), value=-1)
    ids = torch.nn.functional.pad(draw.support_ids, (0, max(0, -missing)), value=-1)
    state.support_ids[rows, positions] = ids.to(torch.int32)


def advance(
    state: Canvas, rows: Tensor, *, eos_id: int | None, sampling: SamplingSettings
) -> list[int]:
    """Count the step, move finished blocks on, end rows, and return the rows still live."""
    blocks = sampling.completion_length // sampling.block_length
    state.step[rows] += 1
    state.step_in_block[rows] += 1
    positions = block_positions(state, rows, sampling)
    done = (state.unmask_step[rows].gather(1, positions) >= 0).all(1)
    finished = rows[done]
    state.block[finished] += 1
    state.step_in_block[finished] = 0
    over = state.block[rows] == blocks
    if sampling.early_end and eos_id is not None:
        tokens = state.canvas[rows].gather(1, state.columns[rows].gather(1, positions))
        ended = done & ~over & (tokens == eos_id).all(1)
        _fill_tail(state, rows[ended], eos_id)
        over = over | ended
    return rows[~over].tolist()


def _fill_tail(state: Canvas, rows: Tensor, eos_id: int) -> None:
    """End rows: what is still masked becomes end-of-text, at a step that never ran."""
    tail = state.unmask_step[rows] < 0
    owners = rows[:, None].expand_as(tail)[tail]
    state.canvas[owners, state.columns[rows][tail]] = eos_id
    state.unmask_step[owners, tail.nonzero()[:, 1]] = state.step[owners]
