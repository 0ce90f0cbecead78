"""Micro-batches of one rank, as the training loop plans them."""

import torch
from torch import Tensor

from agrpo_megatron.diffusion.batches import row_lengths, timestep_batch
from agrpo_megatron.diffusion.packing import assign_rows
from agrpo_megatron.estimators.steps import rows_at
from agrpo_megatron.trajectories import state_tokens
from agrpo_megatron.types import Rollout, ScoredRows, StepDraws, TimestepBatch, Trajectory


def rebuild_state(trajectory: Trajectory, rollout: Tensor, step: Tensor, mask_id: int) -> Tensor:
    """Return the completions [N, C] as the estimators see them before the given steps [N]."""
    rows = rows_at(trajectory, StepDraws(rollout, step, torch.ones(len(step))))
    return state_tokens(trajectory, rows, torch.arange(len(step)), mask_id=mask_id)


def plan(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Return the micro-batches of a single rank: indices of rows."""
    (mine,) = assign_rows(lengths, budget=token_budget, ranks=1, attention=0.01)
    return mine


def batches_of(
    rollout: Rollout, scored: ScoredRows, *, mask_id: int, token_budget: int
) -> list[TimestepBatch]:
    """Return the packed micro-batches of scored rows."""
    micro_batches = plan(row_lengths(rollout, scored), token_budget)
    return [timestep_batch(rollout, scored, rows, mask_id=mask_id) for rows in micro_batches]
