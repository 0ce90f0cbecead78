"""Counted work: what a measurement computed, whatever the machine."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from agrpo_megatron.scaling.flops import completion_flops, scored_positions

if TYPE_CHECKING:
    from agrpo_megatron.config.settings import ModelSettings, Settings
    from agrpo_megatron.megatron.forward import RolloutForward
    from agrpo_megatron.training.update import Part
    from agrpo_megatron.types import Trajectory


@dataclass(frozen=True)
class Counted:
    """The work of a rollout, an update, or both; an update's forwards include their backward."""

    forwards: int  # forward passes
    token_forwards: int  # tokens of all of them
    scored_rows: int  # rows of the head's product
    flops: int  # of forward and backward passes

    def __add__(self, other: Counted) -> Counted:
        """Return the work of both."""
        return Counted(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def rollout_work(trajectory: Trajectory, forward: RolloutForward, settings: Settings) -> Counted:
    """Return the work of a rollout of ours, on one rank."""
    scored, flops = int(scored_positions(trajectory).sum()), completion_flops(trajectory, settings)
    return Counted(forward.slots.busy, forward.tokens, scored, sum(flops))


def update_work(part: Part) -> Counted:
    """Return the work of an update of ours, on one rank."""
    scored = sum(len(batch.targets) for batch in part.batches)
    return Counted(len(part.batches), int(part.lengths.sum()), scored, part.flops)


def body_flops(counted: Counted, model: ModelSettings) -> int:
    """Return the FLOPs of forward passes without the head."""
    assert model.vocab_size is not None
    return counted.flops - 2 * counted.scored_rows * model.hidden_size * model.vocab_size
