"""Build micro-batches: drawn steps of rollouts, and masked examples, as packed rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack, unscored_row
from agrpo_megatron.types import PackedRows, Rollout, SftBatch, StepDraws, TimestepBatch, Trajectory


def rebuild_state(trajectory: Trajectory, rollout: Tensor, step: Tensor, mask_id: int) -> Tensor:
    """Return the completions [N, C] in their state before the given steps [N]."""
    unseen = trajectory.unmask_step[rollout] >= step[:, None]
    return trajectory.tokens[rollout].masked_fill(unseen, mask_id)


def row_lengths(rollout: Rollout, draws: StepDraws) -> Tensor:
    """Return the number of tokens of each drawn row [N]: prompt and completion."""
    trajectory = rollout.trajectory
    prompts = torch.tensor([len(p) for p in trajectory.prompts], dtype=torch.int64)
    return prompts[draws.rollout.cpu()] + trajectory.tokens.shape[1]


def timestep_batch(
    rollout: Rollout, draws: StepDraws, rows: Tensor, *, mask_id: int, shift: bool = False
) -> TimestepBatch:
    """Pack one micro-batch: some of the drawn rows.

    Args:
        rows: [n] indices of draws; without any, the batch has weight 0.
    """
    trajectory, rows = rollout.trajectory, rows.to(draws.rollout.device)
    source, step = draws.rollout[rows], draws.step[rows]
    states = rebuild_state(trajectory, source, step, mask_id)
    target = trajectory.unmask_step[source] == step[:, None]
    prompts = [trajectory.prompts[r] for r in source.tolist()]
    row, position = target.nonzero(as_tuple=True)
    scored, support = source[row], trajectory.support_ids
    return TimestepBatch(
        rows=_packed(prompts, states, target, mask_id=mask_id, shift=shift),
        targets=trajectory.tokens[scored, position],
        old_logprobs=trajectory.logprobs[scored, position],
        reference_logprobs=None,
        support_ids=support[scored, position] if support is not None else None,
        advantages=rollout.advantages[scored],
        weights=draws.weight[rows][row].to(rollout.advantages.dtype),
        sources=scored,
    )


def _packed(
    prompts: Sequence[Tensor], completions: Tensor, scored: Tensor, *, mask_id: int, shift: bool
) -> PackedRows:
    """Pack prompts with completions [n, C]; `scored` [n, C] marks tokens that reach the head."""
    if not len(completions):
        return unscored_row(mask_id, completions.device)
    canvas, prompt_lengths = make_canvas(prompts, completions)
    columns = completion_columns(prompt_lengths, completions.shape[1])
    marks = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, scored)
    return pack(canvas, prompt_lengths + completions.shape[1], marks, shift=shift)


def sft_batches(
    prompts: Sequence[Tensor],
    responses: Tensor,
    example_ids: Tensor,
    micro_batches: Sequence[Tensor],
    *,
    mask_id: int,
    mask_epsilon: float,
    seed: int,
    shift: bool = False,
) -> list[SftBatch]:
    """Mask responses [B, C] at a rate t ~ U(mask_epsilon, 1) each, and pack them.

    Each response token is masked with probability t and weighs 1 / (t * C). End-of-text padding
    is part of the response. Source: LLaDA (arXiv 2502.09992), section 2.3.

    Args:
        example_ids: [B] noise indices: the mask of an index is the same under any layout.
        micro_batches: indices of each batch's examples; without any, the batch has weight 0.
    """
    places = torch.arange(responses.shape[1], device=responses.device)
    row_key = noise.noise_key(seed, noise.MASKS, example_ids)
    rate = mask_epsilon + (1 - mask_epsilon) * noise.uniform(row_key)
    chance = noise.uniform(noise.fold(row_key[:, None], places))
    masked = chance < rate[:, None]
    weight = (1 / (rate * responses.shape[1]))[:, None].expand_as(masked)
    batches = []
    for chunk in micro_batches:
        mine, part = masked[chunk], [prompts[i] for i in chunk.tolist()]
        states = responses[chunk].masked_fill(mine, mask_id)
        rows = _packed(part, states, mine, mask_id=mask_id, shift=shift)
        sources = chunk.to(mine.device)[mine.nonzero()[:, 0]]
        weights = weight[chunk][mine].float()
        batches.append(SftBatch(rows, responses[chunk][mine], weights, sources))
    return batches
