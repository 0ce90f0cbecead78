"""Draw denoising steps: proposals over a rollout's live steps, and low-discrepancy draws."""

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.blocks import step_blocks
from agrpo_megatron.types import Trajectory

PUBLISHED_ENTROPY_FLOOR = 1e-8  # nats, added to every live step's entropy; and to its length
TINY = torch.finfo(torch.float64).tiny


def live_steps(trajectory: Trajectory, *, eos_id: int | None, rule: str) -> Tensor:
    """Return how many leading denoising steps of each rollout are scored, [R] int64.

    `sampled` counts every forward pass that ran. `text` (published) stops at the step that fixed
    the last token other than end-of-text, or edited it: 0 steps for an empty completion.
    """
    if rule == "sampled" or eos_id is None:
        return trajectory.num_steps
    last = trajectory.unmask_step
    if trajectory.edit_step is not None:
        assert trajectory.edit_position is not None
        places = trajectory.edit_position.clamp(min=0)
        last = last.scatter_reduce(1, places, trajectory.edit_step, "amax")
    text = trajectory.tokens != eos_id
    return (last.masked_fill(~text, -1).amax(1) + 1).clamp(min=0)


def step_actions(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return how many tokens each step fixed or edited, [R, num_steps] float64."""
    ones = torch.ones_like
    edited = None if trajectory.edit_step is None else ones(trajectory.edit_step)
    return _step_sums(trajectory, ones(trajectory.unmask_step), edited, num_steps)


def step_entropies(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return the summed entropy of each step's tokens, [R, num_steps] float64, nats."""
    return _step_sums(trajectory, trajectory.entropies, trajectory.edit_entropy, num_steps)


def step_lengths(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return the length of each step's gradient by its logits, [R, num_steps] float64.

    The gradient of a token's log-prob by its logits is (one at the token) - p, of squared length
    2 (1 - p(token)) - (1 - sum p^2). It lies between one and two times (1 - p(token))^2, which
    bounds the rounding of the two recorded numbers.
    """
    squares, edited = _squares(trajectory.logprobs, trajectory.spreads), None
    if trajectory.edit_logprob is not None:
        assert trajectory.edit_spread is not None
        edited = _squares(trajectory.edit_logprob, trajectory.edit_spread)
    return _step_sums(trajectory, squares, edited, num_steps).sqrt()


def drawn_lengths(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return `step_lengths` of all tokens that a step drew, kept or put back."""
    assert trajectory.drawn_logprobs is not None
    assert trajectory.drawn_spreads is not None
    squares = _squares(trajectory.drawn_logprobs, trajectory.drawn_spreads)
    return _on_cpu(squares).sum(2)[:, :num_steps].sqrt().to(squares.device)


def has_gradient(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return whether a step drew a token that could have been another, [R, num_steps] bool.

    Where top-k and top-p left one candidate to each of its tokens, the step's log-probs are 0
    whatever the weights: it has no gradient, no KL and no entropy.
    """
    return _step_sums(trajectory, trajectory.spreads, trajectory.edit_spread, num_steps) > 0


def uniform_steps(live: Tensor, count: int) -> Tensor:
    """Return the uniform distribution over the live steps [R] of `count` steps, [R, count]."""
    alive = torch.arange(count, device=live.device) < live[:, None]
    return alive / live.clamp(min=1)[:, None].double()


def step_proposal(
    live: Tensor,
    scores: Tensor,
    *,
    proposal: str,
    uniform_mix: float,
    usable: Tensor | None = None,
) -> Tensor:
    """Return the distribution from which steps are drawn, [R, M] float64.

    It is zero beyond the live steps and, for a rollout without live steps, everywhere. Mixing
    in the uniform distribution bounds every step weight by 1 / uniform_mix.

    Args:
        live: [R] numbers of live steps.
        scores: [R, M] from `step_entropies` or `step_lengths`; unused by `uniform`.
        usable: [R, M] the steps that may be drawn; None: all live ones. The others must have no
            gradient.
    """
    uniform = uniform_steps(live, scores.shape[1])
    if usable is not None:
        uniform = _normalised(uniform * usable)
    if proposal == "uniform":
        return uniform
    scores = _normalised((scores + PUBLISHED_ENTROPY_FLOOR) * (uniform > 0))
    return (1 - uniform_mix) * scores + uniform_mix * uniform


def inclusion(proposal: Tensor, counts: Tensor) -> Tensor:
    """Return the chance of each step to be among `counts` [R] different steps, [R, M].

    It is min(1, c q) with the c that makes the sum `counts`, or 1 for all steps of a non-zero
    proposal where these are no more.
    """
    ordered, order = proposal.sort(dim=1, descending=True, stable=True)
    certain = _certain(ordered, counts[:, None])
    rest = _tails(ordered).gather(1, certain)
    chances = (counts[:, None] - certain) * proposal / rest.clamp(min=TINY)
    return torch.where(order.argsort(1) < certain, 1.0, chances.clamp(max=1))


def allocate(proposal: Tensor, squares: Tensor, *, is_drawn: Tensor, mean: int) -> Tensor:
    """Split `mean` draws per drawn rollout so that their variance is least, [R] int64.

    If the gradients of steps were orthogonal, the part of the variance that depends on a rollout's
    draws k would be F(k) = sum over steps of squares / inclusion(k). The loss of F by a further
    draw falls with k, so the draws with the largest losses are the best split. Every drawn rollout
    gets one, and none gets more than it has usable steps: the split depends on the rollouts but not
    on the noise of the draws, and each rollout's estimate stays unbiased.

    Args:
        proposal: [R, M].
        squares: [R, M] squared length of each step's share of the full gradient.
        is_drawn: [R] rollouts that get draws.
    """
    ordered, order = proposal.sort(dim=1, descending=True, stable=True)
    usable = (proposal > 0).sum(1)
    is_drawn = is_drawn & (usable > 0)
    squares = squares.gather(1, order)
    counts = torch.arange(1, proposal.shape[1] + 1, device=proposal.device).expand_as(order)
    certain = _certain(ordered, counts)
    costs = torch.where(ordered > 0, squares / ordered.clamp(min=TINY), 0.0)
    tails = (_tails(values).gather(1, certain) for values in (ordered, costs, squares))
    rest, cost, left = tails
    variance = rest * cost / (counts - certain).clamp(min=1) - left
    gains = variance[:, :-1] - variance[:, 1:]
    can_grow = is_drawn[:, None] & (counts[:, :-1] < usable[:, None])
    gains = gains.masked_fill(~can_grow, float("-inf")).flatten()
    drawn = int(is_drawn.sum())
    best = gains.sort(descending=True, stable=True)
    extra = best.indices[: (mean - 1) * drawn][best.values[: (mean - 1) * drawn] > float("-inf")]
    owner = extra // max(1, counts.shape[1] - 1)
    return is_drawn.long() + torch.bincount(owner, minlength=len(usable))


def draw_uniforms(
    rollout_ids: Tensor, counts: Tensor, *, sampler: str, seed: int, group_size: int
) -> Tensor:
    """Return [R, most] float64 numbers in (0, 1): each is uniform, together they are spread.

    `independent` draws each separately; `stratified` one from each of a rollout's equal parts;
    `systematic` shifts one regular grid, per rollout, and so do `distinct` and `blocks`; `batch`
    (published) shuffles the parts of a whole group, so that a rollout gets a random subset.

    Args:
        counts: [R] draws of each rollout; numbers in later columns mean nothing.
    """
    rows = rollout_ids[:, None]
    places = torch.arange(int(counts.max()), device=rollout_ids.device)
    own = noise.uniform(noise.noise_key(seed, noise.STEPS, rows, places))
    counts = counts[:, None]
    if sampler == "independent":
        return own
    if sampler == "stratified":
        return (places + own) / counts.clamp(min=1)
    if sampler in ("systematic", "distinct", "blocks"):
        return (places + own[:, :1]) / counts.clamp(min=1)
    order = noise.uniform(noise.noise_key(seed, noise.STEPS, rows, places + len(places)))
    order = order.masked_fill(places >= counts, float("inf"))
    parts = counts.view(-1, group_size).sum(1).clamp(min=1).repeat_interleave(group_size)
    shuffled = order.view(len(counts) // group_size, -1).argsort(1).argsort(1).view_as(order)
    return (shuffled + own) / parts[:, None]


def unit_counts(counts: Tensor, trajectory: Trajectory, sampler: str) -> Tensor:
    """Return the draws [R] of steps, or of whole blocks for as many steps; any get at least one."""
    if sampler != "blocks":
        return counts
    sampling = trajectory.sampling
    steps = sampling.denoising_steps * sampling.block_length / sampling.completion_length
    return (counts / steps).round().long().clamp(min=1) * (counts > 0)


def in_units(
    proposal: Tensor, trajectory: Trajectory, sampler: str
) -> tuple[Tensor, Tensor | None]:
    """Return the proposal of what is drawn, and the unit of each step [R, M]; None: itself.

    Args:
        proposal: [R, M] of steps.
    """
    if sampler != "blocks":
        return proposal, None
    unit = step_blocks(trajectory, proposal.shape[1])
    blocks = proposal.new_zeros(len(proposal), trajectory.sampling.most_blocks)
    return blocks.scatter_add_(1, unit, proposal), unit


def invert(proposal: Tensor, uniforms: Tensor) -> Tensor:
    """Return the steps [R, k] of uniform numbers [R, k], by inverse CDF.

    Rounding never gives a step past the last live one, nor a step of zero probability. Rows without
    live steps give step 0, which carries no weight.
    """
    last = (proposal > 0).long().cumsum(1).argmax(1)
    cdf = proposal.cumsum(1)
    total = cdf.gather(1, last[:, None]).clamp(min=TINY)
    steps = torch.searchsorted(cdf / total, uniforms.contiguous(), right=True)
    return torch.minimum(steps, last[:, None])


def _step_sums(
    trajectory: Trajectory, values: Tensor, edited: Tensor | None, num_steps: int
) -> Tensor:
    """Return the sum of values over the tokens that each step fixed or edited, [R, num_steps].

    Args:
        values: [R, C] of the first tokens.
        edited: [R, E] of the edits' new tokens; None without edits.
    """
    steps = trajectory.unmask_step.masked_fill(~trajectory.is_sampled, num_steps)
    steps = steps.clamp(max=num_steps)
    if trajectory.edit_step is not None and edited is not None:
        made = trajectory.edit_step
        steps = torch.cat([steps, made.masked_fill(made < 0, num_steps).clamp(max=num_steps)], 1)
        values = torch.cat([values, edited], 1)
    values = _on_cpu(values)
    sums = values.new_zeros(len(values), num_steps + 1)
    return sums.scatter_add_(1, steps.cpu(), values)[:, :num_steps].to(steps.device)


def _on_cpu(values: Tensor) -> Tensor:
    """Return values in float64 where they are added up, without those that are not finite.

    A GPU adds the tokens of a step in any order, and all ranks of a replica, and a resumed run,
    must draw the same steps. A value that is not finite keeps its step: the loss must meet it and
    name the rollout.
    """
    return values.double().cpu().nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _squares(logprobs: Tensor, spreads: Tensor) -> Tensor:
    """Return the squared length of the gradient of each token's log-prob by its logits."""
    missed = -torch.expm1(logprobs.double())
    squares = 2 * missed - spreads.double()
    return torch.clamp(squares, min=missed.square(), max=2 * missed.square())


def _normalised(scores: Tensor) -> Tensor:
    """Return scores [R, M] over the sum of their row; rows of zeros stay."""
    return scores / scores.sum(1, keepdim=True).clamp(min=TINY)


def _tails(values: Tensor) -> Tensor:
    """Return the sum of values [R, M] from each column on, and 0 past the last, [R, M + 1]."""
    sums = values.flip(1).cumsum(1).flip(1)
    return torch.cat([sums, torch.zeros_like(sums[:, :1])], 1)


def _certain(ordered: Tensor, counts: Tensor) -> Tensor:
    """Return how many of the likeliest steps are always among `counts` [R, K] steps, [R, K].

    Args:
        ordered: [R, M] proposal in descending order.
    """
    places = torch.arange(ordered.shape[1], device=ordered.device)
    shares = places + _tails(ordered)[:, :-1] / ordered.clamp(min=TINY)
    needed = torch.where(ordered > 0, shares, float("inf"))  # draws from which a step is certain
    usable = (ordered > 0).sum(1, keepdim=True)
    found = torch.searchsorted(needed, counts.double().contiguous(), right=True)
    return torch.where(counts >= usable, usable, found)
