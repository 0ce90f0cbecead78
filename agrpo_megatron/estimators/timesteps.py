"""Draw denoising steps: proposals over a rollout's live steps, and low-discrepancy draws."""

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.types import Trajectory

PUBLISHED_ENTROPY_FLOOR = 1e-8  # nats, added to every live step's entropy


def live_steps(trajectory: Trajectory, *, eos_id: int | None, rule: str) -> Tensor:
    """Return how many leading denoising steps of each rollout are scored, [R] int64.

    `sampled` counts every forward pass that ran. `text` (published) stops at the step that fixed
    the last token other than end-of-text: 0 steps for an empty completion.
    """
    if rule == "sampled" or eos_id is None:
        return trajectory.num_steps
    text = trajectory.tokens != eos_id
    return (trajectory.unmask_step.masked_fill(~text, -1).amax(1) + 1).clamp(min=0)


def step_entropies(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return the summed entropy of the tokens fixed at each step, [R, num_steps] float64, nats."""
    ran = trajectory.unmask_step < trajectory.num_steps[:, None]
    steps = trajectory.unmask_step.masked_fill(~ran, num_steps).clamp(max=num_steps)
    # On the CPU: a GPU adds the tokens of a step in any order, and all ranks of a replica, and a
    # resumed run, must draw the same steps.
    entropies = trajectory.entropies.double().cpu()
    sums = entropies.new_zeros(len(entropies), num_steps + 1)
    return sums.scatter_add_(1, steps.cpu(), entropies)[:, :num_steps].to(steps.device)


def uniform_steps(live: Tensor, count: int) -> Tensor:
    """Return the uniform distribution over the live steps [R] of `count` steps, [R, count]."""
    alive = torch.arange(count, device=live.device) < live[:, None]
    return alive / live.clamp(min=1)[:, None].double()


def step_proposal(live: Tensor, entropies: Tensor, *, proposal: str, uniform_mix: float) -> Tensor:
    """Return the distribution from which steps are drawn, [R, M] float64.

    It is zero beyond the live steps and, for a rollout without live steps, everywhere. Mixing
    in the uniform distribution bounds every step weight by 1 / uniform_mix.

    Args:
        live: [R] numbers of live steps.
        entropies: [R, M] from `step_entropies`.
    """
    uniform = uniform_steps(live, entropies.shape[1])
    if proposal == "uniform":
        return uniform
    scores = (entropies + PUBLISHED_ENTROPY_FLOOR) * (uniform > 0)
    scores = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (1 - uniform_mix) * scores + uniform_mix * uniform


def draw_uniforms(
    rollout_ids: Tensor, count: int, *, sampler: str, seed: int, group_size: int
) -> Tensor:
    """Return [R, count] float64 numbers in (0, 1): each is uniform, together they are spread.

    `independent` draws each separately; `stratified` one from each of `count` equal parts, per
    rollout; `systematic` shifts one regular grid, per rollout; `batch` (published) shuffles
    group_size * count parts over the whole group, so that a rollout gets a random subset.
    """
    rows = rollout_ids[:, None]
    places = torch.arange(count, device=rollout_ids.device)
    own = noise.uniform(noise.noise_key(seed, noise.STEPS, rows, places))
    if sampler == "independent":
        return own
    if sampler == "stratified":
        return (places + own) / count
    if sampler == "systematic":
        return (places + own[:, :1]) / count
    parts = group_size * count
    order = noise.uniform(noise.noise_key(seed, noise.STEPS, rows, places + count))
    shuffled = order.view(-1, parts).argsort(1).argsort(1).view(-1, count)
    return (shuffled + own) / parts


def invert(proposal: Tensor, uniforms: Tensor) -> Tensor:
    """Return the steps [R, k] of uniform numbers [R, k], by inverse CDF.

    Rounding never gives a step past the last live one, nor a step of zero probability. Rows without
    live steps give step 0, which carries no weight.
    """
    last = (proposal > 0).long().cumsum(1).argmax(1)
    cdf = proposal.cumsum(1)
    total = cdf.gather(1, last[:, None]).clamp(min=torch.finfo(torch.float64).tiny)
    steps = torch.searchsorted(cdf / total, uniforms.contiguous(), right=True)
    return torch.minimum(steps, last[:, None])
