"""The exact sampler: one full forward of every live row per denoising step.

Blocks are decoded left to right; inside a block each denoising step draws tokens for masked
positions and fixes some of them. Only the positions a step looks at reach the output layer, and
rows that ended leave the batch. What was done is the `Trajectory`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import Draw, draw_tokens
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack, split_by_budget
from agrpo_megatron.settings import SamplingSettings
from agrpo_megatron.types import PackedRows, Trajectory

Score = Callable[[PackedRows], Tensor]  # packed rows -> logits shard [S, V / tensor parallel]


@dataclass(frozen=True)
class SamplerContext:
    """What the sampler needs beside prompts; one per run."""

    score: Score
    vocab: Vocabulary
    mask_id: int
    eos_id: int | None  # None: text never ends early
    seed: int
    token_budget: int  # packed tokens per forward


@dataclass
class _Canvas:
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


def sample(
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
    weights_version: int = 0,
) -> Trajectory:
    """Sample one completion per prompt; called by every rank of the tensor-parallel group.

    A completion depends on its prompt, its rollout id, the seed and the weights alone.

    Args:
        prompts: R tensors of token ids, int64.
        rollout_ids: [R] int64, unique within a run.
    """
    prompts = tuple(prompts)
    state = _start(prompts, rollout_ids, context=context, sampling=sampling)
    blocks = sampling.completion_length // sampling.block_length
    live = torch.arange(len(prompts), device=rollout_ids.device)
    while len(live):
        wanted = _wanted_positions(state, live, context=context, sampling=sampling)
        lengths = state.prompt_lengths[live] + sampling.completion_length
        for chunk in split_by_budget(lengths, context.token_budget):
            _denoise(state, live[chunk], wanted[chunk], context=context, sampling=sampling)
        live = _advance(state, live, blocks=blocks, context=context, sampling=sampling)
    support = state.support_ids
    return Trajectory(
        prompts=prompts,
        tokens=state.canvas.gather(1, state.columns),
        unmask_step=state.unmask_step,
        logprobs=state.logprobs,
        entropies=state.entropies,
        support_ids=support if support.shape[-1] else None,
        num_steps=state.step,
        rollout_ids=rollout_ids,
        sampling=sampling,
        weights_version=weights_version,
    )


def transfer_schedule(block_length: int, steps_per_block: int) -> list[int]:
    """Return how many tokens each step of a block fixes; the first steps take the remainder.

    Source: LLaDA, generate.py, get_num_transfer_tokens.
    """
    base, more = divmod(block_length, steps_per_block)
    return [base + (step < more) for step in range(steps_per_block)]


def _start(
    prompts: tuple[Tensor, ...],
    rollout_ids: Tensor,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
) -> _Canvas:
    rows, width, device = len(prompts), sampling.completion_length, rollout_ids.device
    masks = torch.full((rows, width), context.mask_id, dtype=torch.int64, device=device)
    canvas, prompt_lengths = make_canvas(prompts, masks)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    return _Canvas(
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


def _block_positions(state: _Canvas, rows: Tensor, sampling: SamplingSettings) -> Tensor:
    """Return the completion positions [n, block length] of the rows' current blocks."""
    offsets = torch.arange(sampling.block_length, device=rows.device)
    return state.block[rows, None] * sampling.block_length + offsets


def _scheduled(state: _Canvas, rows: Tensor, sampling: SamplingSettings) -> Tensor:
    """Return how many tokens the schedule fixes in this step, [n, 1]."""
    blocks = sampling.completion_length // sampling.block_length
    schedule = transfer_schedule(sampling.block_length, sampling.denoising_steps // blocks)
    table = torch.tensor(schedule, device=rows.device)
    return table[state.step_in_block[rows]][:, None]


def _wanted_positions(
    state: _Canvas, rows: Tensor, *, context: SamplerContext, sampling: SamplingSettings
) -> Tensor:
    """Mark the positions [n, block length] of each row's block that this step must score.

    Random unmasking knows beforehand what it will fix, so it scores nothing else.
    """
    positions = _block_positions(state, rows, sampling)
    masked = state.unmask_step[rows].gather(1, positions) < 0
    if sampling.unmasking != "random" or sampling.threshold is not None:
        return masked
    chance = _position_noise(state, rows, positions, context)
    return _best(chance.masked_fill(~masked, -1.0), _scheduled(state, rows, sampling)) & masked


def _position_noise(
    state: _Canvas, rows: Tensor, positions: Tensor, context: SamplerContext
) -> Tensor:
    rollouts, steps = state.rollout_ids[rows, None], state.step[rows, None]
    key = noise.noise_key(context.seed, noise.POSITIONS, rollouts, steps, positions)
    return noise.uniform(key)


def _denoise(
    state: _Canvas,
    rows: Tensor,
    wanted: Tensor,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
) -> None:
    """Score the wanted positions of these rows, draw tokens there, and fix the best of them."""
    positions = _block_positions(state, rows, sampling)
    scored = torch.zeros_like(state.canvas[rows], dtype=torch.bool)
    scored.scatter_(1, state.columns[rows].gather(1, positions), wanted)
    lengths = state.prompt_lengths[rows] + sampling.completion_length
    logits = context.score(pack(state.canvas[rows], lengths, scored))
    where = wanted.nonzero(as_tuple=True)
    owners = rows[where[0]]
    keys = noise.noise_key(
        context.seed, noise.TOKENS, state.rollout_ids[owners], state.step[owners], positions[where]
    )
    draw = draw_tokens(logits, keys, vocab=context.vocab, sampling=sampling)
    fixed = _select(state, rows, positions, wanted, draw, context=context, sampling=sampling)
    kept = fixed[where]
    _commit(state, owners[kept], positions[where][kept], _keep(draw, kept))


def _select(
    state: _Canvas,
    rows: Tensor,
    positions: Tensor,
    wanted: Tensor,
    draw: Draw,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
) -> Tensor:
    """Return which wanted positions [n, block length] this step fixes."""
    if sampling.unmasking == "random" and sampling.threshold is None:
        return wanted
    rank = torch.full(wanted.shape, float("-inf"), dtype=torch.float64, device=rows.device)
    if sampling.unmasking == "random":
        rank[wanted] = _position_noise(state, rows, positions, context)[wanted]
    else:
        by_entropy = sampling.unmasking == "entropy"
        rank[wanted] = (-draw.entropies if by_entropy else draw.confidences).double()
    fixed = _best(rank, _scheduled(state, rows, sampling))
    if sampling.threshold is not None:
        sure = torch.zeros_like(wanted)
        sure[wanted] = draw.confidences.exp() >= sampling.threshold
        fixed = fixed | sure
    return fixed & wanted


def _best(rank: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` [n, 1] highest of each row of `rank` [n, B]; the leftmost wins a tie."""
    order = torch.argsort(rank, dim=1, descending=True, stable=True)
    places = torch.empty_like(order)
    places.scatter_(1, order, torch.arange(rank.shape[1], device=rank.device).expand_as(order))
    return places < counts


def _keep(draw: Draw, kept: Tensor) -> Draw:
    support = draw.support_ids
    return replace(
        draw,
        tokens=draw.tokens[kept],
        logprobs=draw.logprobs[kept],
        entropies=draw.entropies[kept],
        support_ids=support[kept] if support is not None else None,
    )


def _commit(state: _Canvas, rows: Tensor, positions: Tensor, draw: Draw) -> None:
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


def _advance(
    state: _Canvas,
    rows: Tensor,
    *,
    blocks: int,
    context: SamplerContext,
    sampling: SamplingSettings,
) -> Tensor:
    """Count the step, move finished blocks on, end rows, and return the rows still live."""
    state.step[rows] += 1
    state.step_in_block[rows] += 1
    positions = _block_positions(state, rows, sampling)
    done = (state.unmask_step[rows].gather(1, positions) >= 0).all(1)
    finished = rows[done]
    state.block[finished] += 1
    state.step_in_block[finished] = 0
    over = state.block[rows] == blocks
    if sampling.early_end and context.eos_id is not None:
        tokens = state.canvas[rows].gather(1, state.columns[rows].gather(1, positions))
        ended = done & ~over & (tokens == context.eos_id).all(1)
        _fill_tail(state, rows[ended], context.eos_id)
        over = over | ended
    return rows[~over]


def _fill_tail(state: _Canvas, rows: Tensor, eos_id: int) -> None:
    """End rows: what is still masked becomes end-of-text, at a step that never ran."""
    tail = state.unmask_step[rows] < 0
    owners = rows[:, None].expand_as(tail)[tail]
    state.canvas[owners, state.columns[rows][tail]] = eos_id
    state.unmask_step[owners, tail.nonzero()[:, 1]] = state.step[owners]
