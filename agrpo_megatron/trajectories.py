"""Join, select, move and name the tensors of records such as `Trajectory` and `Draw`.

Also the text of a trajectory as its sampler saw it, which edits changed, and the parts of its
denoising. The other functions read the fields from the record's dataclass, so a new field is
joined, selected, moved, sent and stored without a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.types import Trajectory

if TYPE_CHECKING:
    from agrpo_megatron.config.settings import SamplingSettings
    from agrpo_megatron.types import Rollout, ScoredRows

SUPPORT = "support_ids"  # None where nothing is cut
STEP_PARTS = 8  # equal parts of a completion's denoising that metrics distinguish


def weights_of_kl(scored: ScoredRows) -> Tensor:
    """Return the weights [N, C] of the KL of scored rows."""
    return scored.weight if scored.kl_weight is None else scored.kl_weight


def given_texts(
    prompts: Sequence[Tensor], tokens: Tensor, ids: Tensor, sampling: SamplingSettings
) -> Trajectory:
    """Return texts that no sampler wrote as completions of one denoising step, of the exact policy.

    Args:
        prompts: R tensors of ids.
        tokens: [R, C] the texts; the completion length is theirs.
        ids: [R] noise indices.
        sampling: where the blocks of a block model begin.
    """
    zeros = torch.zeros(tokens.shape, device=tokens.device)
    return Trajectory(
        prompts=tuple(prompts),
        tokens=tokens,
        unmask_step=torch.zeros_like(tokens),
        logprobs=zeros,
        entropies=zeros,
        spreads=zeros,
        support_ids=None,
        num_steps=torch.ones_like(ids),
        rollout_ids=ids,
        sampling=replace(sampling, completion_length=tokens.shape[1], policy="exact"),
    )


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

    The other dimensions of support ids and edits differ: they are padded with -1 to the widest. A
    part without a tensor that others have gets only -1.
    """
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in tensors(part))
    counts = [len(next(iter(tensors(part).values()))) for part in parts]
    joined = {name: _padded([getattr(part, name) for part in parts], counts) for name in names}
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


def iteration_of(rollout: Rollout) -> int:
    """Return the iteration that updates on rollouts, counted from 1."""
    return rollout.trajectory.weights_version + rollout.staleness + 1


def tokens_before(trajectory: Trajectory, rollout: Tensor, step: Tensor) -> Tensor:
    """Return the completions [N, C] with the edits made before steps [N]: what is not masked there.

    Where an edit is still to come, the token is the one that the first such edit overwrote.
    """
    tokens = trajectory.tokens[rollout]
    if trajectory.edit_step is None:
        return tokens
    assert trajectory.edit_position is not None
    assert trajectory.edit_old is not None
    most = trajectory.edit_step.shape[1]
    number = torch.arange(most, device=tokens.device)
    number = number.where(trajectory.edit_step[rollout] >= step[:, None], most)
    place = trajectory.edit_position[rollout].clamp(min=0)
    first = torch.full_like(tokens, most).scatter_reduce_(1, place, number, "amin")
    old = F.pad(trajectory.edit_old[rollout], (0, 1)).gather(1, first)
    return old.where(first < most, tokens)


def edits_of(trajectory: Trajectory, row: int) -> list[tuple[int, int, int, int]]:
    """Return (step, position, old, new) of each edit of a rollout, in the order of the steps."""
    if trajectory.edit_step is None:
        return []
    names = ("edit_step", "edit_position", "edit_old", "edit_new")
    columns = (getattr(trajectory, name)[row].tolist() for name in names)
    return [edit for edit in zip(*columns, strict=True) if edit[0] >= 0]


def state_tokens(
    trajectory: Trajectory, scored: ScoredRows, rows: Tensor, *, mask_id: int
) -> Tensor:
    """Return the completions [n, C] of partially masked states.

    Args:
        rows: [n] indices of scored rows.
    """
    rollout = scored.rollout[rows]
    if scored.step is None:
        shown = trajectory.tokens[rollout]
    else:
        shown = tokens_before(trajectory, rollout, scored.step[rows])
    return shown.masked_fill(scored.hidden[rows], mask_id)


def step_parts(trajectory: Trajectory) -> int:
    """Return into how many parts metrics divide the denoising: at most one for each step."""
    return min(STEP_PARTS, trajectory.sampling.most_steps)


def parts_of_steps(trajectory: Trajectory, scored: ScoredRows | None = None) -> Tensor:
    """Return the part of the denoising, from 0, to which the step of each token belongs.

    Returns:
        [R, C] by the step that fixed the token; with `scored` [N, C] by the step that saw the
        row's state, or, if none did, by the one that fixed the token.
    """
    step, steps, count = trajectory.unmask_step, trajectory.num_steps, step_parts(trajectory)
    if scored is not None:
        step, steps = step[scored.rollout], steps[scored.rollout]
        if scored.step is not None:
            step = scored.step[:, None].expand_as(step)
    return (step * count // steps.clamp(min=1)[:, None]).clamp(max=count - 1)


def _padded(values: Sequence[Tensor | None], counts: Sequence[int]) -> list[Tensor]:
    """Return tensors [count, ...] that agree in all other dimensions; -1 where one had nothing."""
    found = [value for value in values if value is not None]
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in found), strict=True)]
    result = []
    for value, count in zip(values, counts, strict=True):
        if value is None:
            value = found[0].new_empty(count, *[0] * len(shape))
        missing = [wanted - has for wanted, has in zip(shape, value.shape[1:], strict=True)]
        pads = [pad for size in reversed(missing) for pad in (0, size)]
        result.append(F.pad(value, pads, value=-1) if any(pads) else value)
    return result
