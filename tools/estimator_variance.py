"""Exact variance of drawn denoising steps: the noise of a step sampler and a proposal.

Nothing is drawn. The drawn step is piecewise constant in the uniform number, with the breakpoints
of the inverse CDF, so first and second moments are finite sums.
"""

import torch
from torch import Tensor

from agrpo_megatron.estimators.steps import step_weights
from agrpo_megatron.estimators.timesteps import inclusion, invert


def estimator_variance(
    contributions: Tensor,
    proposal: Tensor,
    *,
    live: Tensor,
    counts: Tensor,
    sampler: str,
    group_size: int,
    enumerate_short: bool = True,
) -> Tensor:
    """Return the variance of sum_r (1 / k_r) sum_l w(t_l) g_r(t_l), summed over D; float64.

    Its mean is sum_r of the mean of g_r over the live steps, for every step sampler.

    Args:
        contributions: [R, M, D] g_r(t): the gradient of step t of rollout r, advantage included.
        proposal: [R, M] from `timesteps.step_proposal`.
        live: [R] numbers of live steps.
        counts: [R] k_r, the draws of each rollout. One without draws must have no gradient.
        group_size: neighbours that `batch` spreads its draws over; it divides R.
        enumerate_short: rollouts with no more usable steps than draws add no variance.
    """
    proposal, usable = proposal.double(), (proposal > 0).sum(1)
    if sampler == "distinct":
        proposal = inclusion(proposal, counts) / counts.clamp(min=1)[:, None]
    steps = torch.arange(proposal.shape[1], device=proposal.device).expand_as(proposal)
    values = step_weights(proposal, live, steps)[:, :, None] * contributions.double()
    if enumerate_short or sampler == "distinct":
        values = values * (usable > counts)[:, None, None]
    if sampler == "batch":
        return _batch(values, proposal, counts, group_size)
    of_count = {
        "independent": lambda values, proposal, k: _within(values, proposal, 1).sum() / k,
        "stratified": lambda values, proposal, k: _within(values, proposal, k).sum() / k**2,
    }.get(sampler, _systematic)
    total = values.new_zeros(())
    for count in counts[counts > 0].unique().tolist():
        rows = counts == count
        total += of_count(values[rows], proposal[rows], count)
    return total


def _parts(proposal: Tensor, parts: int) -> Tensor:
    """Return P(step | the uniform number lies in part s of the unit interval), [R, parts, M]."""
    high = proposal.cumsum(1)
    low = high - proposal
    edges = torch.arange(parts + 1, dtype=torch.float64, device=proposal.device)[:, None] / parts
    shared = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
    return parts * shared.clamp(min=0)


def _within(values: Tensor, proposal: Tensor, parts: int) -> Tensor:
    """Return the variance of one drawn value given its part, [R, parts], summed over D."""
    chances = _parts(proposal, parts)
    squares = (chances @ values.square().sum(-1, keepdim=True)).squeeze(-1)
    return (squares - (chances @ values).square().sum(-1)).clamp(min=0)


def _systematic(values: Tensor, proposal: Tensor, count: int) -> Tensor:
    """Integrate over the offset of each rollout's grid, cell by cell."""
    jumps = (count * proposal.cumsum(1)).frac()
    ends = torch.zeros_like(jumps[:, :1])
    edges = torch.cat([ends, jumps, ends + 1], 1).sort(1).values
    offsets, widths = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1)
    places = torch.arange(count, device=proposal.device)
    uniforms = (places + offsets[:, :, None]) / count
    steps = invert(proposal, uniforms.flatten(1)).view(uniforms.shape)
    shares = torch.zeros(*offsets.shape, proposal.shape[1], dtype=torch.float64)
    shares = shares.to(steps.device).scatter_add_(
        2, steps, torch.full_like(uniforms, 1 / count, dtype=torch.float64)
    )
    combs = shares @ values
    mean = (widths[:, :, None] * combs).sum(1, keepdim=True)
    return (widths * (combs - mean).square().sum(-1)).sum()


def _batch(values: Tensor, proposal: Tensor, counts: Tensor, group_size: int) -> Tensor:
    """Treat parts shuffled over a group: draws sit in different parts, hence are correlated.

    With n parts and m_r(s) the mean value of rollout r in part s, two draws of rollouts r and r'
    have covariance -sum_s (m_r(s) - m_r) (m_r'(s) - m_r') / (n (n - 1)).
    """
    total = values.new_zeros(())
    groups = (tensor.split(group_size) for tensor in (values, proposal, counts))
    for own, chances, draws in zip(*groups, strict=True):
        drawn, parts = draws > 0, int(draws.sum())
        if parts == 0:
            continue
        own, chances, draws = own[drawn], chances[drawn], draws[drawn]
        means = _parts(chances, parts) @ own
        apart = means - means.mean(1, keepdim=True)
        same = (apart.square().sum((1, 2)) / draws).sum()
        pairs = apart.sum(0).square().sum() - same
        alone = (_within(own, chances, 1)[:, 0] / draws).sum()
        total += alone - pairs / (parts * max(1, parts - 1))
    return total
