"""Micro-batches of one rank, as the training loop plans them."""

from torch import Tensor

from agrpo_megatron.diffusion.batches import row_lengths, timestep_batch
from agrpo_megatron.diffusion.packing import assign_rows
from agrpo_megatron.types import Rollout, StepDraws, TimestepBatch


def plan(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Return the micro-batches of a single rank: indices of rows."""
    (mine,) = assign_rows(lengths, budget=token_budget, ranks=1, attention=0.01)
    return mine


def batches_of(
    rollout: Rollout, draws: StepDraws, *, mask_id: int, token_budget: int
) -> list[TimestepBatch]:
    """Return the packed micro-batches of drawn rows."""
    micro_batches = plan(row_lengths(rollout, draws), token_budget)
    return [timestep_batch(rollout, draws, rows, mask_id=mask_id) for rows in micro_batches]
