"""Estimators that draw denoising steps of the rollout itself: AGRPO and the full trajectory."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.diffusion.blocks import block_numbers
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.weights import (
    by_rollout,
    by_row,
    kl_weights,
    needs_every_rollout,
    share_of_rollouts,
)
from agrpo_megatron.trajectories import tokens_before
from agrpo_megatron.types import Rollout, ScoredRows, StepDraws, Trajectory


def agrpo(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score drawn steps: an unbiased estimate of `full_trajectory`.

    Exact for orders of unmasking that do not depend on the weights, such as `random`, and for
    others with the `scoring` that docs/estimators.md names. Forward passes: `mc_samples` with
    gradient. Source: arXiv 2510.04019, probablyabot/agrpo.
    """
    counts = draw_counts(rollout, context)
    return at_level(drawn_steps(rollout.trajectory, context, counts), rollout, context)


def full_trajectory(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score every live step of every rollout: the exact gradient, at the cost of all states.

    Forward passes: the live steps, with gradient.
    """
    return at_level(all_steps(rollout.trajectory, context), rollout, context)


def draw_counts(rollout: Rollout, context: DrawContext) -> Tensor:
    """Return the draws of each rollout, [R] int64; their mean over drawn rollouts is `mc_samples`.

    `allocation: advantage` gives more draws to rollouts of a large advantage and of long gradients:
    Neyman's allocation, see `timesteps.allocate`.
    """
    settings, trajectory = context.algorithm.filled, rollout.trajectory
    live, most = live_of(trajectory, context)
    if settings.allocation == "equal":
        return torch.full_like(live, settings.draws)
    scale = _normaliser(rollout, context) * rollout.advantages / live.clamp(min=1)
    lengths = _step_lengths(trajectory, most, settings) * scale[:, None]
    is_drawn = torch.ones_like(rollout.advantages, dtype=torch.bool)
    if not needs_every_rollout(settings):
        is_drawn = rollout.advantages != 0
    return timesteps.allocate(
        proposal_of(trajectory, context),
        lengths.square(),
        is_drawn=is_drawn,
        mean=settings.draws,
    )


def drawn_steps(
    trajectory: Trajectory, context: DrawContext, counts: Tensor | None = None
) -> StepDraws:
    """Draw live steps of every rollout: `counts` [R], or `mc_samples` of each.

    Draws of the same step share a row. If a rollout has no more usable steps than draws, each is
    scored once (`enumerate_short`, and always with `distinct`), which is exact.
    """
    settings = context.algorithm.filled
    if counts is None:
        counts = torch.full_like(trajectory.num_steps, settings.draws)
    counts = timesteps.unit_counts(counts, trajectory, settings.step_sampler)
    uniforms = timesteps.draw_uniforms(
        trajectory.rollout_ids,
        counts,
        sampler=settings.step_sampler,
        seed=context.seed,
        group_size=settings.group_size,
    )
    return draws_at(trajectory, uniforms, context, counts)


def draws_at(
    trajectory: Trajectory, uniforms: Tensor, context: DrawContext, counts: Tensor | None = None
) -> StepDraws:
    """Draw rows from the proposal at uniform numbers [R, k], by inverse CDF.

    Args:
        counts: [R] how many of the numbers count, see `timesteps.unit_counts`; None: all.
    """
    settings, places = context.algorithm, torch.arange(uniforms.shape[1], device=uniforms.device)
    live, _ = live_of(trajectory, context)
    counts = torch.full_like(live, len(places)) if counts is None else counts
    of_steps = proposal_of(trajectory, context)
    proposal, unit = timesteps.in_units(of_steps, trajectory, settings.step_sampler)
    usable = proposal > 0
    is_distinct = settings.step_sampler in ("distinct", "blocks")
    if is_distinct:
        # A grid of k points hits a step whose share is at most 1 / k at most once.
        proposal = timesteps.inclusion(proposal, counts) / counts.clamp(min=1)[:, None]
    steps = timesteps.invert(proposal, uniforms)
    weights = step_weights(proposal, live, steps) / counts.clamp(min=1)[:, None]
    weights = weights * (places < counts[:, None])
    table = torch.zeros_like(proposal).scatter_add_(1, steps, weights)
    if settings.enumerate_short or is_distinct:
        is_short = (usable.sum(1) <= counts)[:, None]
        table = torch.where(is_short, usable / live.clamp(min=1)[:, None].double(), table)
    return _draws(table if unit is None else table.gather(1, unit) * (of_steps > 0))


def proposal_of(trajectory: Trajectory, context: DrawContext) -> Tensor:
    """Return the distribution [R, M] over the denoising steps of each rollout.

    `gradient` is proportional to the length of a step's gradient by its logits. It leaves out steps
    whose tokens had no alternative. The plain model has alternatives even there, and a token that
    was put back may have had some.
    """
    settings = context.algorithm.filled
    live, most = live_of(trajectory, context)
    usable = None
    if settings.proposal == "gradient":
        scores = _step_lengths(trajectory, most, settings)
        if settings.scored_policy == "sampler" and settings.scoring == "token":
            usable = timesteps.has_gradient(trajectory, most)
    else:
        scores = timesteps.step_entropies(trajectory, most)
    if usable is None:
        usable = _has_target(trajectory, context, most)
    return timesteps.step_proposal(
        live, scores, proposal=settings.proposal, uniform_mix=settings.uniform_mix, usable=usable
    )


def _step_lengths(trajectory: Trajectory, most: int, settings: AlgorithmSettings) -> Tensor:
    """Return the length of the gradient [R, most] of what is scored of each step."""
    if settings.scoring == "augmented":
        return timesteps.drawn_lengths(trajectory, most)
    return timesteps.step_lengths(trajectory, most)


def all_steps(trajectory: Trajectory, context: DrawContext) -> StepDraws:
    """Return every live step of every rollout that has something to score, once."""
    live, most = live_of(trajectory, context)
    table = timesteps.uniform_steps(live, most)
    usable = _has_target(trajectory, context, most)
    return _draws(table if usable is None else table * usable)


def _has_target(trajectory: Trajectory, context: DrawContext, most: int) -> Tensor | None:
    """Return which steps have something to score, [R, most]; None: all of them.

    A step that may only edit may change nothing; then what it drew is all that it did.
    """
    if trajectory.edit_step is None or context.algorithm.scoring == "augmented":
        return None
    return timesteps.step_actions(trajectory, most) > 0


def rows_at(trajectory: Trajectory, draws: StepDraws, *, scoring: str = "token") -> ScoredRows:
    """Return the state before each drawn step, and the tokens that it fixed, or put by an edit.

    With `scoring: augmented`, also those that it drew and put back. Which tokens a step keeps is a
    step function of all that it drew, so the log-probs of these are the step's whole gradient,
    whatever the order of unmasking. With `positions`, the turns of the positions that it drew.
    """
    fixed, step = trajectory.unmask_step[draws.rollout], draws.step[:, None]
    weight = draws.weight[:, None].expand_as(fixed)
    rows = ScoredRows(
        draws.rollout, fixed >= step, fixed == step, weight, is_sampled=True, step=draws.step
    )
    if trajectory.edit_step is not None:
        rows = _with_edits(rows, trajectory.edit_step, trajectory)
    if scoring == "augmented":
        rows = _with_drawn(rows, draws, trajectory)
    elif scoring == "positions":
        rows = _with_turns(rows, draws, trajectory)
    return replace(rows, weight=weight * rows.has_token)


def _with_edits(rows: ScoredRows, made: Tensor, trajectory: Trajectory) -> ScoredRows:
    """Score the first tokens of positions, and the new tokens of edits, in place of the final ones.

    Args:
        made: [R, E] the step of each edit.
    """
    assert rows.step is not None
    assert trajectory.edit_position is not None
    assert trajectory.edit_logprob is not None
    owner, width = rows.rollout, rows.scored.shape[1]
    is_mine = made[owner] == rows.step[:, None]
    place = trajectory.edit_position[owner].masked_fill(~is_mine, width)
    scored = F.pad(rows.scored, (0, 1)).scatter(1, place, value=True)[:, :width]
    logprobs = F.pad(trajectory.logprobs[owner], (0, 1))
    logprobs = logprobs.scatter(1, place, trajectory.edit_logprob[owner])[:, :width]
    targets = tokens_before(trajectory, owner, rows.step + 1)
    return replace(rows, scored=scored, targets=targets, target_logprobs=logprobs)


def _with_drawn(rows: ScoredRows, draws: StepDraws, trajectory: Trajectory) -> ScoredRows:
    """Score all that each step drew, in place of the tokens that it fixed, at least one each."""
    assert trajectory.drawn_tokens is not None
    assert trajectory.drawn_logprobs is not None
    _, place = block_numbers(trajectory)
    tokens, logprobs = (
        record[draws.rollout, draws.step].gather(1, place[draws.rollout])
        for record in (trajectory.drawn_tokens, trajectory.drawn_logprobs)
    )
    return replace(
        rows,
        scored=_drawn_in_block(rows, draws, trajectory),
        targets=tokens.long(),
        target_logprobs=logprobs,
    )


def _with_turns(rows: ScoredRows, draws: StepDraws, trajectory: Trajectory) -> ScoredRows:
    """Score the positions of each step's block for its draw of some of them."""
    assert trajectory.turns is not None
    assert trajectory.turn_logprobs is not None
    return replace(
        rows,
        scored=_drawn_in_block(rows, draws, trajectory),
        turns=trajectory.turns[draws.rollout].long().masked_fill(~rows.scored, -1),
        turn_logprobs=trajectory.turn_logprobs[draws.rollout],
    )


def _drawn_in_block(rows: ScoredRows, draws: StepDraws, trajectory: Trajectory) -> Tensor:
    """Mark the positions [N, C] of the open block at which steps drew: masked ones, or any to edit.

    The open block is the last one that has a token, once the step is done.
    """
    blocks = block_numbers(trajectory)[0][rows.rollout]
    is_later = trajectory.unmask_step[rows.rollout] > draws.step[:, None]
    is_open = blocks == blocks.masked_fill(is_later, -1).amax(1, keepdim=True)
    return is_open if trajectory.edit_step is not None else is_open & rows.hidden


def at_level(draws: StepDraws, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Return the rows of drawn steps with one ratio per token, step or rollout."""
    trajectory, settings = rollout.trajectory, context.algorithm.filled
    per_rollout, weight = _normaliser(rollout, context), draws.weight
    draws = replace(draws, weight=draws.weight * per_rollout[draws.rollout])
    rows = rows_at(trajectory, draws, scoring=settings.scoring)
    if settings.level == "row":
        return by_row(rows, torch.ones_like(draws.weight), context)
    if settings.level == "sequence":
        live, _ = live_of(trajectory, context)
        return by_rollout(rows, weight * live[draws.rollout], rollout, context)
    return replace(rows, kl_weight=kl_weights(rows, context))


def step_weights(proposal: Tensor, live: Tensor, steps: Tensor) -> Tensor:
    """Return the step weights [R, k]: uniform over proposal, 0 for rollouts without live steps.

    Their mean under the proposal is 1.
    """
    drawn = proposal.gather(1, steps)
    uniform = 1 / live.clamp(min=1)[:, None].double()
    return torch.where(drawn > 0, uniform / drawn.clamp(min=1e-300), 0.0)


def live_of(trajectory: Trajectory, context: DrawContext) -> tuple[Tensor, int]:
    """Return the live steps of each rollout [R], and the most of any rollout, at least 1."""
    rule = context.algorithm.live_steps
    live = timesteps.live_steps(trajectory, eos_id=context.eos_id, rule=rule)
    return live, max([1, *live.tolist()])


def _normaliser(rollout: Rollout, context: DrawContext) -> Tensor:
    """Return the factor [R] from a mean over each rollout's live steps to `normaliser`."""
    settings, trajectory = context.algorithm.filled, rollout.trajectory
    live, _ = live_of(trajectory, context)
    steps, share = live.double(), share_of_rollouts(rollout, context)
    if settings.normaliser == "live_steps":
        return torch.full_like(steps, share)
    if settings.normaliser == "constant":
        return steps * share / (settings.normaliser_constant or trajectory.sampling.denoising_steps)
    total = steps.sum()
    if settings.normaliser == "tokens":
        rows = rows_at(trajectory, all_steps(trajectory, context), scoring=settings.scoring)
        total = rows.has_token.sum()
    return steps * len(steps) * share / total.clamp(min=1)


def _draws(table: Tensor) -> StepDraws:
    """Turn weights [R, M] into rows."""
    rollout, step = table.nonzero(as_tuple=True)
    return StepDraws(rollout, step, table[rollout, step])
