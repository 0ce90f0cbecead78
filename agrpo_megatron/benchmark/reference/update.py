"""The published update: k forward and backward passes over all rows, one after another.

Each pass has one denoising step of every rollout, also of those without an advantage: the state
before it, the logits of all positions, and the clipped ratio of the tokens that the step fixed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.benchmark.reference.model import Reference, logits_of
from agrpo_megatron.benchmark.reference.rollout import Rollouts, logprobs_of, tempered
from agrpo_megatron.config.settings import AlgorithmSettings, OptimizerSettings, SamplingSettings

LEAST = 1e-8  # added to the entropy of each step, so that every step may be drawn


class Pass(NamedTuple):
    """One denoising step of every rollout."""

    hidden: Tensor  # [B, C] bool, positions that hold the mask token
    scored: Tensor  # [B, C] bool, positions whose token is in the loss
    weight: Tensor  # [B, C] float32 weight of each


def drawn_passes(rollouts: Rollouts, draws: int, *, eos_id: int | None) -> list[Pass]:
    """Draw `draws` steps of every rollout, at numbers spread evenly over the whole batch."""
    count, device = len(rollouts.tokens), rollouts.tokens.device
    total = count * draws
    grid = torch.randperm(total, device=device) + torch.rand(total, device=device)
    return passes_at(rollouts, (grid / total).view(count, draws), eos_id=eos_id)


def passes_at(rollouts: Rollouts, uniforms: Tensor, *, eos_id: int | None) -> list[Pass]:
    """Draw steps of every rollout by their summed entropies, at uniform numbers [B, k].

    Steps after the last one that fixed a token of text are not drawn.
    """
    live = _live_steps(rollouts, eos_id)
    count, draws = uniforms.shape
    width = int(rollouts.num_steps.max())
    is_fixed = rollouts.unmask_step < rollouts.num_steps[:, None]
    at = rollouts.unmask_step.clamp(max=width - 1)
    sums = torch.zeros(count, width, device=uniforms.device)
    sums = sums.scatter_add(1, at, rollouts.entropies * is_fixed) + LEAST
    sums = sums * (torch.arange(width, device=sums.device) < live[:, None])
    proposal = sums / sums.sum(1, keepdim=True)
    steps = torch.searchsorted(proposal.cumsum(1), uniforms)
    steps = steps.minimum(live[:, None] - 1)  # the sum of all may round to less than 1
    weights = 1 / (live[:, None] * proposal.gather(1, steps) * draws)
    return [
        Pass(
            hidden=rollouts.unmask_step >= step[:, None],
            scored=rollouts.unmask_step == step[:, None],
            weight=weight[:, None].expand_as(rollouts.logprobs),
        )
        for step, weight in zip(steps.T, weights.T, strict=True)
    ]


def _live_steps(rollouts: Rollouts, eos_id: int | None) -> Tensor:
    """Return how many steps [B] there are up to the last one that fixed a token of text, from 1."""
    if eos_id is None:
        return rollouts.num_steps
    of_text = rollouts.unmask_step.masked_fill(rollouts.tokens == eos_id, 0)
    return of_text.amax(1) + 1


def accumulate(
    reference: Reference,
    rollouts: Rollouts,
    advantages: Tensor,
    passes: Sequence[Pass],
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> None:
    """Add the gradient of the mean over rollouts to the weights' `grad`, pass by pass.

    Args:
        advantages: [B].
    """
    mask_id, width = reference.model.mask_token_id, rollouts.prompts.shape[1]
    assert mask_id is not None
    for each in passes:
        ids = torch.cat(
            [rollouts.prompts, rollouts.tokens.masked_fill(each.hidden, mask_id)], dim=1
        )
        logits = logits_of(reference, ids)[:, width:][each.scored]  # [n, V]
        policy = tempered(logits.float(), sampling, mask_id)
        policy = policy.masked_fill(~rollouts.support[each.scored], float("-inf"))
        logprobs = logprobs_of(policy, rollouts.tokens[each.scored])
        ratio = (logprobs - rollouts.logprobs[each.scored]).exp()
        gain = advantages[:, None].expand_as(each.scored)[each.scored]
        limited = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        terms = torch.minimum(ratio * gain, limited * gain) * each.weight[each.scored]
        (-terms.sum() / len(advantages)).backward()


def make_optimizer(reference: Reference, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return AdamW over the weights."""
    return torch.optim.AdamW(
        reference.weights.values(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )


def step(
    reference: Reference, optimizer: torch.optim.Optimizer, settings: OptimizerSettings
) -> None:
    """Clip the gradient, update the weights, and set the gradient to zero."""
    if settings.clip_grad > 0:
        torch.nn.utils.clip_grad_norm_(reference.weights.values(), settings.clip_grad)
    optimizer.step()
    # The gradients keep their memory, as Megatron's do.
    optimizer.zero_grad(set_to_none=False)
