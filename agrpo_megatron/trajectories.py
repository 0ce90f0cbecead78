"""Join, select, move and name the tensors of records such as `Trajectory` and `Draw`.

These functions read the fields from the record's dataclass, so a new field is joined, selected,
moved, sent and stored without a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from agrpo_megatron.types import Trajectory

SUPPORT = "support_ids"  # the one field whose last dimension differs; None where nothing is cut


def tensors(record: Any) -> dict[str, Tensor]:
    """Return a record's fields that hold a tensor, by name."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def map_tensors[Record](record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return the record with each of its tensors changed."""
    changed = {name: change(tensor) for name, tensor in tensors(record).items()}
    return replace(record, **changed)  # type: ignore[type-var]


def concatenate[Record](parts: Sequence[Record]) -> Record:
    """Concatenate each tensor of records of one type along the first dimension.

    Support ids are padded with -1 to the widest; a part without support ids gets only -1.
    """
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in tensors(part))
    joined = {name: [getattr(part, name) for part in parts] for name in names}
    if SUPPORT in joined:
        joined[SUPPORT] = _padded(joined[SUPPORT], [part.tokens for part in parts])  # type: ignore[attr-defined]
    return replace(parts[0], **{name: torch.cat(of_parts) for name, of_parts in joined.items()})  # type: ignore[type-var]


def join(parts: Sequence[Trajectory]) -> Trajectory:
    """Concatenate trajectories of one sampler and weights."""
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return replace(concatenate(parts), prompts=prompts)


def select(trajectory: Trajectory, rows: Tensor) -> Trajectory:
    """Return some rollouts of a trajectory, in the order of `rows` [n]."""
    prompts = tuple(trajectory.prompts[row] for row in rows.tolist())
    return replace(map_tensors(trajectory, lambda tensor: tensor[rows]), prompts=prompts)


def moved(trajectory: Trajectory, device: torch.device | str) -> Trajectory:
    """Return the trajectory with its tensors on a device."""
    prompts = tuple(prompt.to(device) for prompt in trajectory.prompts)
    return replace(map_tensors(trajectory, lambda tensor: tensor.to(device)), prompts=prompts)


def _padded(supports: Sequence[Tensor | None], tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return supports [..., K] of one width; -1 for a part that has none."""
    found = [support for support in supports if support is not None]
    width = max(support.shape[-1] for support in found)
    return [
        F.pad(support, (0, width - support.shape[-1]), value=-1)
        if support is not None
        else found[0].new_full((*of_part.shape, width), -1)
        for support, of_part in zip(supports, tokens, strict=True)
    ]
