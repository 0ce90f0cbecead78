"""The exact sampler: one full forward of every live row per denoising step.

Blocks are decoded left to right; inside a block each denoising step draws tokens for masked
positions and fixes some of them. Only the positions a step looks at reach the output layer. Rows
travel in groups; one that ended leaves its group, and a row that waits takes its place. What was
done is the `Trajectory`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import Draw, Forward, draw_tokens
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.sampler_state import Canvas, advance, block_positions, commit, start
from agrpo_megatron.diffusion.schedule import bernoulli_plan, step_counts
from agrpo_megatron.diffusion.snapshot import (
    NEVER,
    Interrupted,
    Interruption,
    complete_rows,
    put_back,
    take,
)
from agrpo_megatron.types import Trajectory


@dataclass(frozen=True)
class SamplerContext:
    """What the sampler needs beside prompts; one per run."""

    forward: Forward
    vocab: Vocabulary
    mask_id: int
    eos_id: int | None  # None: text never ends early
    seed: int
    token_budget: int  # packed tokens per forward
    shift: bool = False  # a token is predicted from the state before it
    uniforms: Tensor | None = None  # [steps, R, C] in place of own noise, for `bernoulli`
    most_rows: int | None = None  # in one forward, however many the budget would allow


@dataclass(frozen=True)
class _Group:
    """Rows under way: one denoising step of each."""

    rows: Tensor  # [n]
    wanted: Tensor  # [n, block length] positions that this step scores
    owners: Tensor  # [S] row of each scored token
    draws: Callable[[], Draw]  # waits for them


def sample(
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
    weights_version: int = 0,
    ended: Callable[[list[int], Tensor], None] | None = None,
    interruption: Interruption = NEVER,
) -> Trajectory:
    """Sample one completion per prompt; called by every rank of a replica.

    A completion depends on its prompt, its rollout id, the seed and the weights alone.

    Args:
        prompts: R tensors of token ids, int64.
        rollout_ids: [R] int64, unique within a run.
        ended: called once for every row, as soon as it is complete: with some rows and their
            tokens [n, C].
        interruption: may end it early, and brings back what an earlier attempt sampled.

    Raises:
        Interrupted: it was ended early.
    """
    prompts = tuple(prompts)
    state = start(prompts, rollout_ids, mask_id=context.mask_id, sampling=sampling)
    if sampling.unmasking == "bernoulli":
        state.plan = bernoulli_plan(_step_uniforms(state, context, sampling))
    lengths = (state.prompt_lengths + sampling.completion_length).tolist()
    waiting = deque(sorted(range(len(lengths)), key=lambda row: -lengths[row]))
    under_way: deque[_Group] = deque()
    launch = partial(_launch, state, context=context, sampling=sampling)
    if (begun := interruption.begun()) is not None:
        groups, waiting = put_back(state, begun)
        under_way.extend(launch(rows) for rows in groups)
        _tell(ended, state, complete_rows(begun))
    most = context.forward.in_flight
    while waiting or under_way:
        if interruption.is_asked():
            interruption.keep(take(state, [g.rows for g in under_way], waiting), is_last=True)
            for group in under_way:
                group.draws()
            context.forward.close()
            raise Interrupted
        live: list[int] = []
        over: list[int] = []
        if len(under_way) == most or not waiting:
            group = under_way.popleft()
            live = _finish(state, group, context=context, sampling=sampling)
            over = sorted(set(group.rows.tolist()) - set(live))
            _tell(ended, state, over)
        live += _fill(live, waiting, lengths, free=most - len(under_way), context=context)
        if live:
            live.sort(key=lambda row: -lengths[row])  # equal lengths are attended to together
            under_way.append(launch(torch.tensor(live, device=rollout_ids.device)))
        if over:
            rows, is_last = [group.rows for group in under_way], not (waiting or under_way)
            interruption.keep(take(state, rows, waiting), is_last=is_last)
    context.forward.close()
    return _trajectory(prompts, state, sampling=sampling, weights_version=weights_version)


def _trajectory(
    prompts: tuple[Tensor, ...], state: Canvas, *, sampling: SamplingSettings, weights_version: int
) -> Trajectory:
    support = state.support_ids
    return Trajectory(
        prompts=prompts,
        tokens=state.canvas.gather(1, state.columns),
        unmask_step=state.unmask_step,
        logprobs=state.logprobs,
        entropies=state.entropies,
        support_ids=support if support.shape[-1] else None,
        num_steps=state.step,
        rollout_ids=state.rollout_ids,
        sampling=sampling,
        weights_version=weights_version,
    )


def _tell(
    ended: Callable[[list[int], Tensor], None] | None, state: Canvas, rows: list[int]
) -> None:
    if ended is not None and rows:
        ended(rows, state.canvas[rows].gather(1, state.columns[rows]))


def _fill(
    live: list[int],
    waiting: deque[int],
    lengths: list[int],
    *,
    free: int,
    context: SamplerContext,
) -> list[int]:
    """Take rows that wait: a fair share for each of the `free` groups, within the budget."""
    most = len(lengths) if context.most_rows is None else context.most_rows
    share = sum(lengths[row] for row in waiting) / free
    used, taken = sum(lengths[row] for row in live), 0
    rows: list[int] = []
    while waiting and (taken < share or not rows):
        length = lengths[waiting[0]]
        if (live or rows) and used + taken + length > context.token_budget:
            break
        if len(live) + len(rows) >= most:
            break
        taken += length
        rows.append(waiting.popleft())
    return rows


def _scheduled(state: Canvas, rows: Tensor, sampling: SamplingSettings) -> Tensor:
    """Return how many tokens the schedule fixes in this step, [n, 1]."""
    table = torch.tensor(step_counts(sampling), device=rows.device)
    return table[state.step_in_block[rows]][:, None]


def _wanted_positions(
    state: Canvas, rows: Tensor, *, context: SamplerContext, sampling: SamplingSettings
) -> Tensor:
    """Mark the positions [n, block length] of each row's block that this step must score.

    Random unmasking knows beforehand what it will fix, so it scores nothing else.
    """
    positions = block_positions(state, rows, sampling)
    if state.plan is not None:
        return state.plan[rows] == state.step[rows, None]
    masked = state.unmask_step[rows].gather(1, positions) < 0
    if sampling.unmasking != "random" or sampling.threshold is not None:
        return masked
    chance = _position_noise(state, rows, positions, context)
    return _best(chance.masked_fill(~masked, -1.0), _scheduled(state, rows, sampling)) & masked


def _step_uniforms(state: Canvas, context: SamplerContext, sampling: SamplingSettings) -> Tensor:
    """Return a number for every step, row and position [steps, R, C]."""
    if context.uniforms is not None:
        return context.uniforms
    device = state.rollout_ids.device
    steps = torch.arange(sampling.denoising_steps, device=device)[:, None, None]
    positions = torch.arange(sampling.completion_length, device=device)
    rollouts = state.rollout_ids[None, :, None]
    return noise.uniform(noise.noise_key(context.seed, noise.POSITIONS, rollouts, steps, positions))


def _position_noise(
    state: Canvas, rows: Tensor, positions: Tensor, context: SamplerContext
) -> Tensor:
    rollouts, steps = state.rollout_ids[rows, None], state.step[rows, None]
    key = noise.noise_key(context.seed, noise.POSITIONS, rollouts, steps, positions)
    return noise.uniform(key)


def _launch(
    state: Canvas, rows: Tensor, *, context: SamplerContext, sampling: SamplingSettings
) -> _Group:
    """Send rows into their next denoising step."""
    wanted = _wanted_positions(state, rows, context=context, sampling=sampling)
    positions = block_positions(state, rows, sampling)
    scored = torch.zeros_like(state.canvas[rows], dtype=torch.bool)
    scored.scatter_(1, state.columns[rows].gather(1, positions), wanted)
    lengths = state.prompt_lengths[rows] + sampling.completion_length
    owners = rows[wanted.nonzero(as_tuple=True)[0]]
    keys = noise.noise_key(
        context.seed, noise.TOKENS, state.rollout_ids[owners], state.step[owners], positions[wanted]
    )

    def draw_at(logits: Tensor, part: slice) -> Draw:
        return draw_tokens(logits, keys[part], vocab=context.vocab, sampling=sampling)

    packed = pack(state.canvas[rows], lengths, scored, shift=context.shift)
    draws = context.forward(packed, draw_at)
    return _Group(rows, wanted, owners, draws)


def _finish(
    state: Canvas, group: _Group, *, context: SamplerContext, sampling: SamplingSettings
) -> list[int]:
    """Fix the best of a group's draws and end its step; returns the rows that go on."""
    rows, wanted, draw = group.rows, group.wanted, group.draws()
    positions = block_positions(state, rows, sampling)
    fixed = _select(state, rows, positions, wanted, draw, context=context, sampling=sampling)
    kept = fixed[wanted]
    commit(state, group.owners[kept], positions[wanted][kept], _keep(draw, kept))
    return advance(state, rows, eos_id=context.eos_id, sampling=sampling)


def _select(
    state: Canvas,
    rows: Tensor,
    positions: Tensor,
    wanted: Tensor,
    draw: Draw,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
) -> Tensor:
    """Return which wanted positions [n, block length] this step fixes."""
    if state.plan is not None or (sampling.unmasking == "random" and sampling.threshold is None):
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
