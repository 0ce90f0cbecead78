"""The state of the sampler: its rows, and their current blocks and steps."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.blocks import block_offsets
from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, on_device
from agrpo_megatron.diffusion.schedule import step_counts
from agrpo_megatron.trajectories import SUPPORT, concatenate, tensors
from agrpo_megatron.types import Trajectory

_DRAWN = {field.name for field in fields(Draw)} - {"tokens", SUPPORT}
# Fields of a draw that a trajectory keeps as float32, besides its token and its support.
RECORDED = tuple(field.name for field in fields(Trajectory) if field.name in _DRAWN)
DRAWN = ("tokens", "logprobs", "spreads")  # of all tokens that a step draws: `drawn_*`


@dataclass(frozen=True)
class Edits:
    """Edits [n] of any rows; those of a row are in the order of its steps."""

    row: Tensor  # of the sampler
    step: Tensor
    position: Tensor
    old: Tensor
    new: Tensor
    logprob: Tensor
    entropy: Tensor
    spread: Tensor
    support_ids: Tensor | None  # [n, K]


@dataclass
class SamplerState:
    """R rows under construction; changed in place, step by step."""

    sampling: SamplingSettings
    prompts: tuple[Tensor, ...]
    canvas: Tensor  # [R, longest] prompts and completions
    lengths: list[int]  # R: tokens of each row, prompt and completion
    opened: list[int]  # R: block being decoded, on the host
    columns: Tensor  # [R, C] canvas columns of the completion
    rollout_ids: Tensor  # [R]
    unmask_step: Tensor  # [R, C]; -1 where still masked
    recorded: dict[str, Tensor]  # `RECORDED` and turns, each [R, C]; 0 where nothing was drawn
    support_ids: Tensor  # [R, C, K]; K grows to the widest support seen
    step: Tensor  # [R] denoising steps done
    block: Tensor  # [R] block being decoded
    offsets: Tensor  # [R] prompt tokens in the first block
    step_in_block: Tensor  # [R]
    schedule: Tensor  # [steps of a block] tokens that each fixes
    drawn: dict[str, Tensor]  # `DRAWN`, each [R, steps, block]; empty: not recorded
    edits: list[Edits]  # parts of the record
    plan: Tensor | None = None  # [R, C] step that fixes each position, where known beforehand


def start(
    prompts: tuple[Tensor, ...], rollout_ids: Tensor, *, mask_id: int, sampling: SamplingSettings
) -> SamplerState:
    """Lay out the prompts with fully masked completions."""
    rows, width, device = len(prompts), sampling.completion_length, rollout_ids.device
    masks = torch.full((rows, width), mask_id, dtype=torch.int64, device=device)
    canvas, prompt_lengths = make_canvas(prompts, masks)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    recorded = {name: torch.zeros(rows, width, device=device) for name in RECORDED}
    if sampling.position_temperature is not None:
        recorded["turns"] = torch.zeros(rows, width, dtype=torch.int32, device=device)
        recorded["turn_logprobs"] = torch.zeros(rows, width, device=device)
    return SamplerState(
        sampling=sampling,
        prompts=prompts,
        canvas=canvas,
        lengths=[len(prompt) + width for prompt in prompts],
        opened=[0] * rows,
        columns=completion_columns(prompt_lengths, width),
        rollout_ids=rollout_ids,
        unmask_step=torch.full((rows, width), -1, dtype=torch.int64, device=device),
        recorded=recorded,
        support_ids=torch.zeros(rows, width, 0, dtype=torch.int32, device=device),
        step=zeros,
        block=zeros.clone(),
        offsets=block_offsets(prompt_lengths, sampling),
        step_in_block=zeros.clone(),
        schedule=on_device(step_counts(sampling), device),
        drawn=_no_draws(rows, sampling, device) if sampling.record_drawn else {},
        edits=[_no_edits(device)],
    )


def _no_draws(rows: int, sampling: SamplingSettings, device: torch.device) -> dict[str, Tensor]:
    """Return the record of all drawn tokens before the first step."""
    shape = (rows, sampling.most_steps, sampling.block_length)
    record = {name: torch.zeros(shape, device=device) for name in DRAWN}
    return record | {"tokens": torch.full(shape, -1, dtype=torch.int32, device=device)}


def _no_edits(device: torch.device) -> Edits:
    """Return the record of edits before the first step."""
    id_, value = (torch.zeros(0, dtype=d, device=device) for d in (torch.int64, torch.float32))
    return Edits(id_, id_, id_, id_, id_, value, value, value, None)


def block_positions(state: SamplerState, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the completion positions [n, block length] of the rows' current blocks.

    With them comes whether each exists: the first block may begin in the prompt, and the last one
    may end after the completion. In place of a position that does not exist stands another.
    """
    sampling = state.sampling
    places = torch.arange(sampling.block_length, device=rows.device)
    first = state.block[rows] * sampling.block_length - state.offsets[rows]
    positions = first[:, None] + places
    exists = (positions >= 0) & (positions < sampling.completion_length)
    return positions.clamp(0, sampling.completion_length - 1), exists


def commit(
    state: SamplerState,
    rows: Tensor,
    positions: Tensor,
    draw: Draw,
    is_fixed: Tensor,
    turns: dict[str, Tensor],
) -> None:
    """Write the drawn tokens that a step fixes, and what is recorded of these and of all others.

    Args:
        rows, positions: [S] of the drawn tokens; all different.
        is_fixed: [S]. What is not fixed is written as it was: to leave it out, the host would
            have to wait for its number.
        turns: [S] of the fixed positions, if they were drawn, and log-probs [S].
    """
    places = rows, positions
    _write(state.canvas, (rows, state.columns[places]), draw.tokens, is_fixed)
    _write(state.unmask_step, places, state.step[rows], is_fixed)
    recorded = {name: getattr(draw, name) for name in RECORDED} | turns
    for name, values in state.recorded.items():
        _write(values, places, recorded[name].to(values.dtype), is_fixed)
    place = (positions + state.offsets[rows]) % state.sampling.block_length
    slots = rows, state.step[rows], place
    for name, values in state.drawn.items():
        values[slots] = getattr(draw, name).to(values.dtype)
    if draw.support_ids is None:
        return
    missing = draw.support_ids.shape[-1] - state.support_ids.shape[-1]
    if missing > 0:
        state.support_ids = F.pad(state.support_ids, (0, missing), value=-1)
    ids = F.pad(draw.support_ids, (0, max(0, -missing)), value=-1)
    _write(state.support_ids, places, ids.to(torch.int32), is_fixed[:, None])


def commit_edits(
    state: SamplerState, rows: Tensor, positions: Tensor, draw: Draw, is_edit: Tensor
) -> None:
    """Overwrite fixed tokens by drawn ones, and record it; the host waits for their number.

    Args:
        rows, positions, is_edit: [S] of the drawn tokens.
    """
    chosen = is_edit.nonzero()[:, 0]
    if not len(chosen):
        return
    rows, positions = rows[chosen], positions[chosen]
    places, support = (rows, state.columns[rows, positions]), draw.support_ids
    edits = Edits(
        row=rows,
        step=state.step[rows],
        position=positions,
        old=state.canvas[places],
        new=draw.tokens[chosen],
        logprob=draw.logprobs[chosen].float(),
        entropy=draw.entropies[chosen].float(),
        spread=draw.spreads[chosen].float(),
        support_ids=None if support is None else support[chosen].to(torch.int32),
    )
    state.canvas[places] = edits.new
    state.edits.append(edits)


def advance(
    state: SamplerState,
    numbers: list[int],
    rows: Tensor,
    *,
    eos_id: int | None,
    stop_ids: Sequence[int],
    has_edited: Tensor | None = None,
) -> list[int]:
    """Count the step, move finished blocks on, end rows, and return the rows still live.

    The host waits once: for which rows are over, and for their blocks.

    Args:
        numbers, rows: the same rows, on the host and on the device [n].
        has_edited: [n] whether the step edited a row; None: without edits.
    """
    sampling, width = state.sampling, state.sampling.completion_length
    positions, exists = block_positions(state, rows)
    fixed_at = state.unmask_step[rows].gather(1, positions)
    done = ((fixed_at >= 0) | ~exists).all(1)
    if has_edited is not None:
        more = state.step[rows] - fixed_at.amax(1)  # steps since the block's last mask was fixed
        done &= ((more > 0) & ~has_edited) | (more >= sampling.edit_steps)
    state.step[rows] += 1
    state.step_in_block[rows] = (state.step_in_block[rows] + 1).masked_fill(done, 0)
    state.block[rows] += done.long()
    over = state.block[rows] * sampling.block_length - state.offsets[rows] >= width
    ended = torch.zeros_like(over)
    if eos_id is not None and (sampling.early_end or sampling.end_at_stop):
        tokens = state.canvas[rows].gather(1, state.columns[rows].gather(1, positions))
        if sampling.early_end:
            ended = ((tokens == eos_id) | ~exists).all(1)
        if sampling.end_at_stop:
            stops = on_device(stop_ids, tokens.device)
            ended = ended | (torch.isin(tokens, stops) & exists).any(1)
        ended = ended & done & ~over
    found = torch.stack([(over | ended).long(), ended.long(), state.block[rows]]).tolist()
    over_here, ended_here, blocks = found
    for number, block in zip(numbers, blocks, strict=True):
        state.opened[number] = block
    if any(ended_here):
        assert eos_id is not None
        _fill_tail(state, list(itertools.compress(numbers, ended_here)), eos_id)
    return [number for number, is_over in zip(numbers, over_here, strict=True) if not is_over]


def end_rows(
    state: SamplerState, live: list[int], ended: Sequence[int], eos_id: int | None
) -> list[int]:
    """End some of the live rows before their last step; returns the others."""
    if not (ending := [row for row in live if row in ended]):
        return live
    assert eos_id is not None
    _fill_tail(state, ending, eos_id)
    return [row for row in live if row not in ending]


def trajectory(state: SamplerState, rows: list[int]) -> Trajectory:
    """Return the trajectory of complete rows."""
    chosen = on_device(rows, state.step.device)
    recorded: dict[str, Any] = {name: values[chosen] for name, values in state.recorded.items()}
    drawn: dict[str, Any] = {f"drawn_{n}": values[chosen] for n, values in state.drawn.items()}
    support = state.support_ids
    return Trajectory(
        prompts=tuple(state.prompts[row] for row in rows),
        tokens=state.canvas[chosen].gather(1, state.columns[chosen]),
        unmask_step=state.unmask_step[chosen],
        support_ids=support[chosen] if support.shape[-1] else None,
        num_steps=state.step[chosen],
        rollout_ids=state.rollout_ids[chosen],
        sampling=state.sampling,
        **recorded,
        **drawn,
        **_edit_tables(state, chosen),
    )


def _edit_tables(state: SamplerState, chosen: Tensor) -> dict[str, Any]:
    """Return the edits of rows `chosen` [n] as fields [n, E] of a trajectory."""
    if state.sampling.edit_threshold is None:
        return {}
    edits = concatenate(state.edits)
    state.edits = [edits]
    places = torch.full_like(state.step, len(chosen))
    places[chosen] = torch.arange(len(chosen), device=chosen.device)
    row, order = places[edits.row].sort(stable=True)
    counts = torch.bincount(row, minlength=len(chosen) + 1)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    is_mine = row < len(chosen)
    row, column, order = row[is_mine], column[is_mine], order[is_mine]
    most, tables = max([0, *counts[:-1].tolist()]), {}
    for name, values in tensors(edits).items():
        table = values.new_full((len(chosen), most, *values.shape[1:]), -1)
        table[row, column] = values[order]
        tables[f"edit_{name}"] = table
    del tables["edit_row"]
    return tables


def _fill_tail(state: SamplerState, numbers: list[int], eos_id: int) -> None:
    """End rows: positions still masked become end-of-text, at a step that never ran."""
    rows = on_device(numbers, state.step.device)
    steps, tokens = state.unmask_step[rows], state.canvas[rows]
    tail, columns = steps < 0, state.columns[rows]
    ended = tokens.gather(1, columns).masked_fill(tail, eos_id)
    state.canvas[rows] = tokens.scatter(1, columns, ended)
    state.unmask_step[rows] = torch.where(tail, state.step[rows, None], steps)


def _write(into: Tensor, places: tuple[Tensor, ...], values: Tensor, where: Tensor) -> None:
    """Write values [S, ...] at places, which all differ, but keep those outside `where`."""
    into[places] = torch.where(where, values, into[places])
