"""A rollout in the middle of its sampling, as tensors: it goes on from there bit for bit.

A denoising step follows from the rows as they are and from who shares a forward pass, so both are
kept: which rows are under way together, in order, and which wait.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from agrpo_megatron.diffusion.sampler_state import Canvas

WRITTEN = ("canvas", "unmask_step", "logprobs", "entropies", "support_ids")
WRITTEN += ("step", "block", "step_in_block")
Snapshot = dict[str, Tensor]


class Interrupted(Exception):
    """Sampling ended before all rows were complete; what there is was handed to `keep`."""


class Interruption(Protocol):
    """Who may end a rollout early, and keeps what was sampled; the same on all ranks of a replica.

    A rollout asks once in each turn of the sampler's loop.
    """

    def begun(self) -> Snapshot | None:
        """Return what an earlier attempt at the same rollout left."""
        ...

    def is_asked(self) -> bool:
        """Say whether to end here."""
        ...

    def keep(self, snapshot: Snapshot, *, is_last: bool) -> None:
        """Keep what is there; called when rows are complete, and last when the rollout ends."""
        ...


class _Never:
    """Let every rollout come to its end."""

    def begun(self) -> None:
        """Know of no earlier attempt."""

    def is_asked(self) -> bool:
        """Say no."""
        return False

    def keep(self, snapshot: Snapshot, *, is_last: bool) -> None:
        """Keep nothing."""


NEVER = _Never()


def take(state: Canvas, under_way: Sequence[Tensor], waiting: Sequence[int]) -> Snapshot:
    """Return all that sampling goes on from; refers to the rows as they are, copies nothing.

    Args:
        under_way: rows [n] of each group whose draws are not known yet, oldest first.
    """
    device = state.step.device
    groups = torch.cat([*under_way, torch.zeros(0, dtype=torch.int64, device=device)])
    return {
        **{name: getattr(state, name) for name in WRITTEN},
        "rollout_ids": state.rollout_ids,
        "groups": groups,
        "group_sizes": torch.tensor([len(rows) for rows in under_way], dtype=torch.int64),
        "waiting": torch.tensor(list(waiting), dtype=torch.int64),
    }


def put_back(state: Canvas, snapshot: Snapshot) -> tuple[list[Tensor], deque[int]]:
    """Fill the rows; returns the groups that were under way, and the rows that wait."""
    device = state.step.device
    for name in WRITTEN:
        setattr(state, name, snapshot[name].to(device))
    groups = snapshot["groups"].to(device).split(snapshot["group_sizes"].tolist())
    return list(groups), deque(snapshot["waiting"].tolist())


def complete_rows(snapshot: Snapshot) -> list[int]:
    """Return the rows that neither wait nor are under way."""
    open_rows = {*snapshot["groups"].tolist(), *snapshot["waiting"].tolist()}
    return [row for row in range(len(snapshot["rollout_ids"])) if row not in open_rows]
