"""The sampler: one forward of every live row per denoising step.

Blocks are decoded left to right. Inside a block, each denoising step draws tokens for masked
positions and fixes some of them; only a step's scored positions reach the output layer.
Batching is continuous: a finished row is replaced by a waiting one. Returns the `Trajectory`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.config.settings import MODEL_FREE, ModelSettings, SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.admission import (
    Slots,
    admit,
    make_slots,
    pack_step,
    step_length,
    step_order,
)
from agrpo_megatron.diffusion.draw import Draw, Forward, draw_tokens
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.packing import on_device
from agrpo_megatron.diffusion.sampler_state import (
    SamplerState,
    advance,
    block_positions,
    commit,
    commit_edits,
    end_rows,
    start,
    trajectory,
)
from agrpo_megatron.diffusion.schedule import bernoulli_plan
from agrpo_megatron.diffusion.turns import best, places_of, position_scores, turn_logprobs
from agrpo_megatron.types import KeyStore, Trajectory


@dataclass(frozen=True)
class SamplerContext:
    """The inputs of the sampler besides prompts; one per run."""

    forward: Forward
    vocab: Vocabulary
    mask_id: int
    eos_id: int | None  # None: text never ends early
    seed: int
    token_budget: int  # packed tokens per forward
    model: ModelSettings = ModelSettings()  # its shift, and its attention
    stop_ids: Sequence[int] = ()  # for `sampling.end_at_stop`
    store: KeyStore | None = None  # caches what blocks before the open one have computed
    uniforms: Tensor | None = None  # [steps, R, C] replaces the sampler's noise, for `bernoulli`
    gumbels: Tensor | None = None  # [steps, R, C, vocabulary] replaces the noise of tokens
    most_rows: int | None = None  # maximum rows in one forward; None: only the budget limits


class SamplingStopped(Exception):
    """Sampling was asked to stop and left rows incomplete."""


@dataclass(frozen=True)
class SamplerHooks:
    """Optional callbacks of a rollout."""

    # Called with complete rows and their trajectory; once for each row.
    on_complete: Callable[[list[int], Trajectory], None] | None = None
    # Called between denoising steps; returns the same on all ranks of a replica.
    should_stop: Callable[[], bool] = lambda: False
    # Called after a denoising step with the rows that took it. Returns the rows that end there:
    # the same on all ranks of a replica.
    on_step: Callable[[SamplerState, list[int]], Sequence[int]] = lambda state, rows: ()


@dataclass(frozen=True)
class _Group:
    """Rows that share a forward pass: one denoising step of each."""

    numbers: list[int]  # n rows
    rows: Tensor  # [n] the same, on the device
    positions: Tensor  # [n, block length] of their blocks, in the completion
    wanted: Tensor  # [n, block length] whether this step may fix the position
    spots: tuple[Tensor, ...]  # [S] and [S]: `wanted` positions, and those that it may edit
    draws: Callable[[], Draw]  # waits for the draws


def sample(
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
    hooks: SamplerHooks | None = None,
) -> Trajectory:
    """Sample as `modules.sampling.sample` does, without its checks; every rank of a replica.

    Raises:
        SamplingStopped: `hooks.should_stop` returned true.
    """
    hooks = hooks or SamplerHooks()
    state = start(tuple(prompts), rollout_ids, mask_id=context.mask_id, sampling=sampling)
    if sampling.unmasking == "bernoulli":
        state.plan = bernoulli_plan(_step_uniforms(state, context))
    model, slots = context.model, None
    if context.store is not None:
        slots = make_slots(context.store, state.prompts, sampling)
    admission = admit(state, model, slots, budget=context.token_budget, most=context.most_rows)
    in_flight, most, is_stalled = deque[_Group](), context.forward.in_flight, False
    while admission.waiting or in_flight:
        if hooks.should_stop():
            for group in in_flight:
                group.draws()  # receive what other pipeline stages still send
            context.forward.close()
            raise SamplingStopped
        live: list[int] = []
        if len(in_flight) == most or is_stalled or not admission.waiting:
            group = in_flight.popleft()
            live = _finish(state, group, context, slots)
            live = end_rows(state, live, hooks.on_step(state, group.numbers), context.eos_id)
            complete = sorted(set(group.numbers) - set(live))
            if complete and hooks.on_complete is not None:
                hooks.on_complete(complete, trajectory(state, complete))
            if complete and slots is not None:
                slots.end(complete)
        lengths = {row: step_length(state, row, slots, model) for row in live}
        live = admission.hold(live, list(lengths.values()))
        used = sum(lengths[row] for row in live)
        live += admission.fill(live, used=used, free=most - len(in_flight))
        is_stalled = not live
        if live:
            # Equal lengths share one attention call.
            live.sort(key=lambda row: step_order(state, row, slots, model))
            in_flight.append(_launch(state, live, context, slots))
    context.forward.close()
    return trajectory(state, list(range(len(state.lengths))))


def _launch(
    state: SamplerState, numbers: list[int], context: SamplerContext, slots: Slots | None
) -> _Group:
    """Send rows into their next denoising step.

    The host waits for the GPU once here, for the number of scored tokens, and once in `_finish`,
    for which rows are over. Each wait costs tens of microseconds, in which the GPU has no work.
    """
    rows = on_device(numbers, state.rollout_ids.device)
    positions, exists = block_positions(state, rows)
    wanted = _wanted(state, rows, positions, exists, context)
    scored = wanted
    if state.sampling.edit_threshold is not None:
        scored = wanted | ((state.unmask_step[rows].gather(1, positions) >= 0) & exists)
    spots = row, _ = scored.nonzero(as_tuple=True)
    owners, scored = rows[row], positions[spots]
    if context.gumbels is None:
        keys = noise.noise_key(
            context.seed, noise.TOKENS, state.rollout_ids[owners], state.step[owners], scored
        )
    else:
        keys = context.gumbels[state.step[owners], owners, scored]

    def draw_at(logits: Tensor, part: slice) -> Draw:
        return draw_tokens(logits, keys[part], vocab=context.vocab, sampling=state.sampling)

    packed = pack_step(
        state, numbers, row, state.columns[owners, scored], model=context.model, slots=slots
    )
    return _Group(numbers, rows, positions, wanted, spots, context.forward(packed, draw_at))


def _finish(
    state: SamplerState, group: _Group, context: SamplerContext, slots: Slots | None
) -> list[int]:
    """Fix the best of a group's draws and end its step; returns the rows still live."""
    draw, spots = group.draws(), group.spots
    if slots is not None:
        slots.ran(group.numbers)
    is_fixed, turns = _fixed(state, group, draw, context)
    rows, positions = group.rows[spots[0]], group.positions[spots]
    commit(state, rows, positions, draw, is_fixed[spots], {n: v[spots] for n, v in turns.items()})
    has_edited = None
    if state.sampling.edit_threshold is not None:
        is_edit = draw.confidences.exp() >= state.sampling.edit_threshold
        is_edit &= draw.tokens != state.canvas[rows, state.columns[rows, positions]]
        is_edit &= ~group.wanted[spots]
        commit_edits(state, rows, positions, draw, is_edit)
        has_edited = torch.zeros_like(group.wanted).index_put_(spots, is_edit).any(1)
    return advance(
        state,
        group.numbers,
        group.rows,
        eos_id=context.eos_id,
        stop_ids=context.stop_ids,
        has_edited=has_edited,
    )


def _wanted(
    state: SamplerState, rows: Tensor, positions: Tensor, exists: Tensor, context: SamplerContext
) -> Tensor:
    """Mark the existing positions [n, block length] of each row's block that a step may fix.

    Where the positions that it fixes are known before the forward, there are no others.
    """
    if state.plan is not None:
        return state.plan[rows] == state.step[rows, None]
    masked = (state.unmask_step[rows].gather(1, positions) < 0) & exists
    if not state.sampling.foresees_positions:
        return masked
    rank = _model_free_rank(state, rows, positions, masked, context)
    return best(rank, _scheduled(state, rows)) & masked


def _fixed(
    state: SamplerState, group: _Group, draw: Draw, context: SamplerContext
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return which wanted positions [n, block length] this step fixes.

    Where it draws them, also their turns and the log-probs of these.
    """
    rows, wanted, spots, sampling = group.rows, group.wanted, group.spots, state.sampling
    if sampling.foresees_positions:
        return wanted, {}
    if sampling.unmasking in MODEL_FREE:
        rank = _model_free_rank(state, rows, group.positions, wanted, context)
    else:
        by_entropy = sampling.unmasking == "entropy"
        rank = torch.full(wanted.shape, float("-inf"), dtype=torch.float64, device=rows.device)
        rank[spots] = (-draw.entropies if by_entropy else draw.confidences).double()
        rank = rank.masked_fill(~wanted, float("-inf"))
    if sampling.position_temperature is not None:
        scores = position_scores(-rank, sampling.position_temperature)
        return _drawn_positions(state, group, scores, context)
    fixed = best(rank, _scheduled(state, rows))
    if sampling.threshold is not None:
        sure = torch.zeros_like(wanted)
        sure[spots] = draw.confidences.exp() >= sampling.threshold
        fixed = fixed | sure
    return fixed & wanted, {}


def _drawn_positions(
    state: SamplerState, group: _Group, scores: Tensor, context: SamplerContext
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw the positions that a step fixes: the highest of scores [n, block length] and noise."""
    wanted = group.wanted
    noisy = scores + noise.gumbel(_position_keys(state, group.rows, group.positions, context))
    places = places_of(noisy.masked_fill(~wanted, float("-inf")))
    fixed = (places < _scheduled(state, group.rows)) & wanted
    turns = places.masked_fill(~fixed, -1)
    return fixed, {"turns": turns, "turn_logprobs": turn_logprobs(scores, turns, wanted)}


def _scheduled(state: SamplerState, rows: Tensor) -> Tensor:
    """Return how many tokens the schedule fixes in this step, [n, 1]; after its end, any."""
    step = state.step_in_block[rows].clamp(max=len(state.schedule) - 1)
    return state.schedule[step][:, None]


def _model_free_rank(
    state: SamplerState, rows: Tensor, positions: Tensor, masked: Tensor, context: SamplerContext
) -> Tensor:
    """Rank masked positions [n, block length], best highest: from left to right, or by noise."""
    if state.sampling.unmasking == "leftmost":
        rank = -positions.double()
    else:
        rank = noise.uniform(_position_keys(state, rows, positions, context))
    return rank.masked_fill(~masked, float("-inf"))


def _position_keys(
    state: SamplerState, rows: Tensor, positions: Tensor, context: SamplerContext
) -> Tensor:
    """Return the noise keys [n, block length] of a step's positions."""
    rollouts, steps = state.rollout_ids[rows, None], state.step[rows, None]
    return noise.noise_key(context.seed, noise.POSITIONS, rollouts, steps, positions)


def _step_uniforms(state: SamplerState, context: SamplerContext) -> Tensor:
    """Return a number for every step, row and position [steps, R, C]."""
    if context.uniforms is not None:
        return context.uniforms
    device = state.rollout_ids.device
    steps = torch.arange(state.sampling.denoising_steps, device=device)[:, None, None]
    positions = torch.arange(state.sampling.completion_length, device=device)
    rollouts = state.rollout_ids[None, :, None]
    return noise.uniform(noise.noise_key(context.seed, noise.POSITIONS, rollouts, steps, positions))
