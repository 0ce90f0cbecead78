"""Build micro-batches: drawn steps of rollouts, and masked examples, as packed rows."""

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack, split_by_budget
from agrpo_megatron.types import Rollout, SftBatch, StepDraws, TimestepBatch, Trajectory


def rebuild_state(trajectory: Trajectory, rollout: Tensor, step: Tensor, mask_id: int) -> Tensor:
    """Return the completions [N, C] as the sampler saw them before the given steps [N]."""
    unseen = trajectory.unmask_step[rollout] >= step[:, None]
    return trajectory.tokens[rollout].masked_fill(unseen, mask_id)


def timestep_batches(
    rollout: Rollout, draws: StepDraws, *, mask_id: int, token_budget: int
) -> list[TimestepBatch]:
    """Pack drawn rows into micro-batches; rows of zero-advantage rollouts are the caller's."""
    trajectory = rollout.trajectory
    states = rebuild_state(trajectory, draws.rollout, draws.step, mask_id)
    prompts = [trajectory.prompts[r] for r in draws.rollout.tolist()]
    canvas, prompt_lengths = make_canvas(prompts, states)
    target = trajectory.unmask_step[draws.rollout] == draws.step[:, None]
    columns = completion_columns(prompt_lengths, states.shape[1])
    scored = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, target)
    lengths = prompt_lengths + states.shape[1]
    batches = []
    for chunk in split_by_budget(lengths, token_budget):
        row, position = target[chunk].nonzero(as_tuple=True)
        draw = chunk[row]
        source = draws.rollout[draw]
        support = trajectory.support_ids
        batches.append(
            TimestepBatch(
                rows=pack(canvas[chunk], lengths[chunk], scored[chunk]),
                targets=trajectory.tokens[source, position],
                old_logprobs=trajectory.logprobs[source, position],
                reference_logprobs=None,
                support_ids=support[source, position] if support is not None else None,
                advantages=rollout.advantages[source],
                weights=draws.weight[draw].to(rollout.advantages.dtype),
            )
        )
    return batches


def sft_batches(
    prompts: list[Tensor],
    responses: Tensor,
    example_ids: Tensor,
    *,
    mask_id: int,
    mask_epsilon: float,
    seed: int,
    token_budget: int,
) -> list[SftBatch]:
    """Mask responses [B, C] at a rate t ~ U(mask_epsilon, 1) each, and pack them.

    Each response token is masked with probability t and weighs 1 / (t * C). End-of-text padding
    is part of the response. Source: LLaDA (arXiv 2502.09992), section 2.3.

    Args:
        example_ids: [B] noise indices: the same example in the same place is masked alike under
            any layout.
    """
    places = torch.arange(responses.shape[1], device=responses.device)
    row_key = noise.noise_key(seed, noise.MASKS, example_ids)
    rate = mask_epsilon + (1 - mask_epsilon) * noise.uniform(row_key)
    chance = noise.uniform(noise.fold(row_key[:, None], places))
    masked = chance < rate[:, None]
    canvas, prompt_lengths = make_canvas(prompts, responses.masked_fill(masked, mask_id))
    columns = completion_columns(prompt_lengths, responses.shape[1])
    scored = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, masked)
    lengths = prompt_lengths + responses.shape[1]
    weight = (1 / (rate * responses.shape[1]))[:, None].expand_as(masked)
    return [
        SftBatch(
            rows=pack(canvas[chunk], lengths[chunk], scored[chunk]),
            targets=responses[chunk][masked[chunk]],
            weights=weight[chunk][masked[chunk]].float(),
        )
        for chunk in split_by_budget(lengths, token_budget)
    ]
