"""Estimators on states of the rollout itself that choose or merge denoising steps by a rule."""

from dataclasses import replace

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.blocks import block_numbers
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.masks import hidden_prompts
from agrpo_megatron.estimators.steps import all_steps, at_level, live_of, rows_at
from agrpo_megatron.estimators.weights import counted_tokens, kl_weights, token_weights
from agrpo_megatron.types import Rollout, ScoredRows, StepDraws, Trajectory


def just_grpo(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score every token from the tokens on its left: exact for the left-to-right policy.

    The sampler must decode so (`sampling.unmasking=leftmost`, one token a step). Forward passes:
    the completion length, with gradient. Source: JustGRPO (arXiv 2601.15165, LeapLabTHU/JustGRPO),
    its loss over all tokens divided by a constant.
    """
    return at_level(all_steps(rollout.trajectory, context), rollout, context)


def block_just_grpo(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score `merge_steps` tokens of every block from those on their left in the block.

    For block models, whose blocks see the finished text before them. Exact for the sampler that
    decodes so: `sampling.unmasking=leftmost`, as many tokens a step. Forward passes: the block
    length over `merge_steps`, with gradient, whatever the completion length. Source: BlockJustGRPO
    (NVIDIA-NeMo/RL, pull request 3167).
    """
    trajectory, width = rollout.trajectory, context.algorithm.filled.merge_steps or 1
    level = block_numbers(trajectory)[1] // width
    numbers = torch.arange(-(-trajectory.sampling.block_length // width), device=level.device)
    mine = (level[:, None] == numbers[:, None]) & _drawn_and_counted(rollout, context)[:, None]
    owner, number = mine.any(2).nonzero(as_tuple=True)
    scored = mine[owner, number]
    rows = ScoredRows(
        rollout=owner,
        hidden=level[owner] >= number[:, None],
        scored=scored,
        weight=token_weights(scored, owner, rollout, context, step=number),
        is_sampled=False,
    )
    return replace(rows, kl_weight=kl_weights(rows, context))


def cj_grpo(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score every step of the sampler; its mean over a step's tokens of all rollouts.

    Unbiased for that weighting, at temperature 1. Forward passes: the denoising steps, with
    gradient. Source: CJ-GRPO (arXiv 2509.23924, yjyddq/DARE).
    """
    trajectory = rollout.trajectory
    draws = all_steps(trajectory, context)
    rows = rows_at(trajectory, draws, scoring=context.algorithm.scoring)
    rows = _counted(rows, rollout, context)
    weight = token_weights(rows.scored, rows.rollout, rollout, context, step=draws.step)
    rows = replace(rows, weight=weight)
    return replace(rows, kl_weight=kl_weights(rows, context))


def step_merge(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Cut the steps into `mc_samples` segments and score each from its first state.

    Biased: tokens fixed later in a segment are scored without those fixed before in it. Forward
    passes: `mc_samples`, with gradient. Source: d2 (arXiv 2509.21474, diffu-GRPO's code).
    """
    trajectory, settings = rollout.trajectory, context.algorithm.filled
    steps, segments = trajectory.sampling.most_steps, settings.draws
    first = torch.tensor([int(n * (steps / segments)) for n in range(segments)])
    first = first.to(trajectory.tokens.device)
    segment = torch.searchsorted(first, trajectory.unmask_step, right=True) - 1
    return _merged(first[segment], segment, rollout, context)


def tracerl(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Merge `merge_steps` neighbouring steps of a rollout and score them from the first state.

    Biased as `step_merge` is. Forward passes: the steps over `merge_steps`, with gradient. Source:
    TraceRL (arXiv 2509.06949, Gen-Verse/dLLM-RL).
    """
    trajectory, width = rollout.trajectory, context.algorithm.filled.merge_steps or 1
    place = _place_of_step(trajectory)
    group = place // width
    return _merged(_first_step(trajectory, place, group * width), group, rollout, context)


def egspo(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score the `mc_samples` live steps of the largest mean entropy, with one ratio per step.

    Biased: steps are chosen without a weight for their chance. Forward passes: `mc_samples`, with
    gradient. Source: EGSPO (arXiv 2603.12554), without its stepwise returns.
    """
    trajectory = rollout.trajectory
    live, most = live_of(trajectory, context)
    actions = timesteps.step_actions(trajectory, most)
    mean = timesteps.step_entropies(trajectory, most) / actions.clamp(min=1)
    is_live = torch.arange(most, device=mean.device) < live[:, None]
    mean = mean.masked_fill(~is_live | (actions == 0), -1.0)
    count = min(context.algorithm.draws, most)
    best = mean.sort(dim=1, descending=True, stable=True)
    steps, is_usable = best.indices[:, :count], best.values[:, :count] >= 0
    return at_level(steps_as_draws(steps, is_usable), rollout, context)


def steps_as_draws(steps: Tensor, is_usable: Tensor) -> StepDraws:
    """Weigh chosen steps [R, K] equally; those that are not usable [R, K] are left out."""
    rollout, place = is_usable.nonzero(as_tuple=True)
    chosen = torch.bincount(rollout, minlength=len(is_usable))
    return StepDraws(rollout, steps[rollout, place], 1 / chosen[rollout].double())


def rldf(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Draw `mc_samples` steps by surprisal; score the step's and other probable masked tokens.

    Biased: steps have no weight for their chance, and tokens that the step put back are trained
    (`least_probability`, in the loss). Forward passes: `mc_samples` with gradient, and without for
    the policy that sampled. Source: RLDF, the loss in its public code.
    """
    count = context.algorithm.draws
    steps, valid = surprising_steps(rollout, context, count)
    return masked_tail_rows(steps, valid, rollout, context)


def surprising_steps(rollout: Rollout, context: DrawContext, count: int) -> tuple[Tensor, Tensor]:
    """Draw steps [R, count] without replacement, likelier where tokens were improbable.

    Returns the steps, and whether each exists [R, count]: a rollout may have fewer.
    """
    trajectory = rollout.trajectory
    _, most = live_of(trajectory, context)
    counted = counted_tokens(trajectory, context)
    tokens = _per_step(trajectory, torch.ones_like(trajectory.logprobs), most)
    has_live = _per_step(trajectory, counted.to(trajectory.logprobs.dtype), most) > 0
    surprise = -_per_step(trajectory, trajectory.logprobs, most) / tokens.clamp(min=1)
    ids, places = trajectory.rollout_ids[:, None], torch.arange(most, device=tokens.device)
    score = surprise + noise.gumbel(noise.noise_key(context.seed, noise.STEPS, ids, -1 - places))
    score = score.masked_fill(~has_live, float("-inf"))
    best = score.sort(dim=1, descending=True, stable=True)
    return best.indices[:, :count], best.values[:, :count] > float("-inf")


def masked_tail_rows(
    steps: Tensor, valid: Tensor, rollout: Rollout, context: DrawContext
) -> ScoredRows:
    """Return the states before steps [R, K]; targets are all masked, counted tokens.

    The step's own tokens have a weight; the others weigh 0, for the loss to decide. Units are the
    groups of the mean: the number of the draw, or with `normaliser=rows` the row.
    """
    trajectory, rollouts = rollout.trajectory, len(rollout.advantages)
    place, owner = valid.T.nonzero(as_tuple=True)
    step = steps[owner, place, None]
    hidden = trajectory.unmask_step[owner] >= step
    scored = hidden & counted_tokens(trajectory, context)[owner]
    is_row = context.algorithm.filled.normaliser == "rows"
    share = (1 if is_row else rollouts) / steps.shape[1]
    unit = torch.arange(len(owner), device=owner.device) if is_row else place
    own = (trajectory.unmask_step[owner] == step) & scored
    return ScoredRows(
        rollout=owner,
        hidden=hidden,
        scored=scored,
        weight=share * own.double(),
        is_sampled=False,
        unit=unit[:, None].expand_as(scored),
        step=step[:, 0],
    )


def _merged(first: Tensor, segment: Tensor, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score each segment [R, C] of steps from the state before its first step [R, C]."""
    trajectory = rollout.trajectory
    counted = _drawn_and_counted(rollout, context)
    segments = torch.arange(int(segment.max()) + 1, device=segment.device)
    mine = (segment[:, None] == segments[:, None]) & counted[:, None]
    owner, number = mine.any(2).nonzero(as_tuple=True)
    scored = mine[owner, number]
    start = first[owner].masked_fill(~scored, -1).amax(1)
    rows = ScoredRows(
        rollout=owner,
        hidden=trajectory.unmask_step[owner] >= start[:, None],
        scored=scored,
        weight=token_weights(scored, owner, rollout, context, step=number),
        is_sampled=False,
        hidden_prompt=hidden_prompts(rollout, owner, torch.zeros_like(owner), context),
        step=start,
    )
    return replace(rows, kl_weight=kl_weights(rows, context))


def _drawn_and_counted(rollout: Rollout, context: DrawContext) -> Tensor:
    """Mark the tokens [R, C] that `algorithm.tail` counts and that were drawn."""
    trajectory = rollout.trajectory
    return counted_tokens(trajectory, context) & trajectory.is_sampled


def _counted(rows: ScoredRows, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Score only what `algorithm.tail` counts."""
    counted = counted_tokens(rollout.trajectory, context)[rows.rollout]
    return replace(rows, scored=rows.scored & counted)


def _place_of_step(trajectory: Trajectory) -> Tensor:
    """Return for each token the number of distinct earlier steps of its rollout, [R, C]."""
    ordered = trajectory.unmask_step.sort(1).values
    is_new = torch.ones_like(ordered)
    is_new[:, 1:] = (ordered.diff(dim=1) > 0).long()
    places = is_new.cumsum(1) - 1
    found = torch.searchsorted(ordered, trajectory.unmask_step.contiguous())
    return places.gather(1, found)


def _first_step(trajectory: Trajectory, place: Tensor, wanted: Tensor) -> Tensor:
    """Return the denoising step that is the `wanted` [R, C] distinct one of its rollout."""
    steps = torch.zeros_like(place).scatter_(1, place, trajectory.unmask_step)
    return steps.gather(1, wanted)


def _per_step(trajectory: Trajectory, values: Tensor, count: int) -> Tensor:
    """Return the sums of token values [R, C] over the tokens of each step, [R, count] float64."""
    sums = values.new_zeros(len(values), count + 1, dtype=torch.float64)
    step = trajectory.unmask_step.clamp(max=count)
    step = step.masked_fill(~trajectory.is_sampled, count)
    return sums.scatter_add_(1, step, values.double())[:, :count]
