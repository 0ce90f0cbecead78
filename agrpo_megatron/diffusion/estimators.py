"""Policy-gradient estimators: choose the scored states of a trajectory, and their weights.

An estimator is a view of the trajectory, `(trajectory, settings) -> StepDraws`. `ESTIMATORS`
lists them by their `algorithm.name`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.diffusion import timesteps
from agrpo_megatron.types import StepDraws, Trajectory


@dataclass(frozen=True)
class DrawContext:
    """The inputs of an estimator besides the trajectory."""

    algorithm: AlgorithmSettings
    eos_id: int | None
    seed: int


def agrpo(trajectory: Trajectory, context: DrawContext) -> StepDraws:
    """Draw `mc_samples` live steps of every rollout: an unbiased estimate of `full_trajectory`.

    Draws of the same step share a row. If a rollout has at most `mc_samples` live steps, each is
    scored once (`enumerate_short`), which is exact.

    Source: arXiv 2510.04019, with its sampler as `step_sampler: batch`.
    """
    settings = context.algorithm
    uniforms = timesteps.draw_uniforms(
        trajectory.rollout_ids,
        settings.mc_samples,
        sampler=settings.step_sampler,
        seed=context.seed,
        group_size=settings.group_size,
    )
    return draws_at(trajectory, uniforms, context)


def draws_at(trajectory: Trajectory, uniforms: Tensor, context: DrawContext) -> StepDraws:
    """Draw rows from the proposal at uniform numbers [R, k], by inverse CDF."""
    settings, count = context.algorithm, uniforms.shape[1]
    live, most = _live(trajectory, context)
    entropies = timesteps.step_entropies(trajectory, most)
    proposal = timesteps.step_proposal(
        live, entropies, proposal=settings.proposal, uniform_mix=settings.uniform_mix
    )
    steps = timesteps.invert(proposal, uniforms)
    weights = step_weights(proposal, live, steps) / count
    table = torch.zeros_like(proposal).scatter_add_(1, steps, weights)
    if settings.enumerate_short:
        is_short = (live <= count)[:, None]
        table = torch.where(is_short, timesteps.uniform_steps(live, most), table)
    return _draws(table, live, trajectory, settings)


def full_trajectory(trajectory: Trajectory, context: DrawContext) -> StepDraws:
    """Score every live step of every rollout: the exact gradient, at the cost of all states."""
    live, most = _live(trajectory, context)
    table = timesteps.uniform_steps(live, most)
    return _draws(table, live, trajectory, context.algorithm)


ESTIMATORS: dict[str, Callable[[Trajectory, DrawContext], StepDraws]] = {
    "agrpo": agrpo,
    "full_trajectory": full_trajectory,
}


def step_weights(proposal: Tensor, live: Tensor, steps: Tensor) -> Tensor:
    """Return the step weights [R, k]: uniform over proposal, 0 for rollouts without live steps.

    Their mean under the proposal is 1.
    """
    drawn = proposal.gather(1, steps)
    uniform = 1 / live.clamp(min=1)[:, None].double()
    return torch.where(drawn > 0, uniform / drawn.clamp(min=1e-300), 0.0)


def advantages(
    rewards: Tensor, *, group_size: int, baseline: str = "mean", scale_by_std: bool = False
) -> Tensor:
    """Return rewards [R] relative to their groups of `group_size` neighbours.

    `leave_one_out` subtracts the mean of the others, which keeps the gradient unbiased; `mean`
    (published) shrinks it by (group_size - 1) / group_size.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    result = {
        "none": groups,
        "mean": centred,
        "leave_one_out": centred * (group_size / (group_size - 1)),
    }[baseline]
    if scale_by_std:
        result = result / (groups.std(1, keepdim=True) + 1e-6)
    return result.reshape(-1)


def _live(trajectory: Trajectory, context: DrawContext) -> tuple[Tensor, int]:
    """Return the live steps of each rollout [R], and the most of any rollout, at least 1."""
    rule = context.algorithm.live_steps
    live = timesteps.live_steps(trajectory, eos_id=context.eos_id, rule=rule)
    return live, max([1, *live.tolist()])


def _draws(
    table: Tensor, live: Tensor, trajectory: Trajectory, settings: AlgorithmSettings
) -> StepDraws:
    """Turn relative weights [R, M] into rows, in the normaliser's units."""
    if settings.normaliser == "constant":
        constant = settings.normaliser_constant or trajectory.sampling.denoising_steps
        table = table * (live / constant)[:, None]
    rollout, step = table.nonzero(as_tuple=True)
    return StepDraws(rollout, step, table[rollout, step])
