"""Trajectories of several ranks made one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.types import Trajectory

_PER_TOKEN = ("tokens", "unmask_step", "logprobs", "entropies")
_PER_ROLLOUT = ("num_steps", "rollout_ids")


def join(parts: Sequence[Trajectory], order: Tensor) -> Trajectory:
    """Concatenate trajectories of one sampler and weights, then reorder their rollouts.

    Args:
        order: [R] which of the concatenated rollouts comes at each place.
    """
    prompts = [prompt for part in parts for prompt in part.prompts]
    values = {
        n: torch.cat([getattr(p, n) for p in parts])[order] for n in _PER_TOKEN + _PER_ROLLOUT
    }
    support = [part.support_ids for part in parts if part.support_ids is not None]
    if support:
        width = max(ids.shape[-1] for ids in support)
        padded = [_support(part, width) for part in parts]
        values["support_ids"] = torch.cat(padded)[order]
    return replace(parts[0], prompts=tuple(prompts[i] for i in order.tolist()), **values)


def moved(trajectory: Trajectory, device: torch.device | str) -> Trajectory:
    """Return the trajectory with its tensors on a device."""
    names = (*_PER_TOKEN, *_PER_ROLLOUT, "support_ids")
    values = {name: getattr(trajectory, name) for name in names}
    values = {name: t.to(device) if t is not None else None for name, t in values.items()}
    prompts = tuple(prompt.to(device) for prompt in trajectory.prompts)
    return replace(trajectory, prompts=prompts, **values)


def _support(part: Trajectory, width: int) -> Tensor:
    """Return candidates [R, C, width], padded with -1; a rank without rollouts knows none."""
    if part.support_ids is None:
        return torch.full((*part.tokens.shape, width), -1, dtype=torch.int32)
    missing = width - part.support_ids.shape[-1]
    return F.pad(part.support_ids, (0, missing), value=-1)
