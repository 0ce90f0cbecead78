"""Build micro-batches: drawn steps of rollouts as packed rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack, unscored_row
from agrpo_megatron.trajectories import state_tokens, weights_of_kl
from agrpo_megatron.types import (
    PackedRows,
    Rollout,
    ScoredRows,
    TimestepBatch,
    Trajectory,
)


def row_lengths(rollout: Rollout, scored: ScoredRows) -> Tensor:
    """Return the number of tokens of each row [N]: prompt and completion."""
    trajectory = rollout.trajectory
    prompts = torch.tensor([len(p) for p in trajectory.prompts], dtype=torch.int64)
    width = trajectory.tokens.shape[1] if scored.length is None else scored.length.cpu()
    return prompts[scored.rollout.cpu()] + width


def timestep_batch(
    rollout: Rollout,
    scored: ScoredRows,
    rows: Tensor,
    *,
    mask_id: int,
    shift: bool = False,
    packed: PackedRows | None = None,
) -> TimestepBatch:
    """Pack one micro-batch: some of the scored rows.

    Args:
        rows: [n] indices of scored rows; without any, the batch has weight 0.
        packed: their tokens, for a block model; None: each row has all of its own.
    """
    trajectory, rows = rollout.trajectory, rows.to(scored.rollout.device)
    source, target = scored.rollout[rows], scored.scored[rows]
    row, position = target.nonzero(as_tuple=True)
    owner, number = source[row], rows[row]
    gains = rollout.advantages[owner]
    if scored.advantage is not None:
        gains = scored.advantage[number].to(gains.dtype)
    targets = trajectory.tokens[source] if scored.targets is None else scored.targets[rows]
    old = recorded_logprobs(rollout, scored, rows)
    if packed is None:
        prompts = _states_of_prompts(rollout, scored, rows, mask_id)
        length = None if scored.length is None else scored.length[rows]
        states = state_tokens(trajectory, scored, rows, mask_id=mask_id)
        packed = packed_states(prompts, states, target, length=length, mask_id=mask_id, shift=shift)
    return TimestepBatch(
        rows=packed,
        targets=targets[row, position],
        support_ids=_supports(trajectory, scored, number, position),
        old_logprobs=None if old is None else old[row, position],
        reference_logprobs=None,
        advantages=gains,
        **weights_of(scored, number, position, dtype=gains.dtype),
        sources=owner,
        row=number,
        position=position,
    )


def weights_of(
    scored: ScoredRows, number: Tensor, position: Tensor, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the weights [S] of scored tokens, and of their KL: fields of a micro-batch.

    Args:
        number, position: [S] of the tokens, the scored row and the place in the completion.
        dtype: of the micro-batch's advantages.
    """
    spots = number, position
    of_kl = weights_of_kl(scored)[spots]
    if scored.coefficient is not None:  # there, it is of a single token in an exact KL only
        of_kl = of_kl * scored.coefficient[spots]
    return {"weights": scored.weight[spots].to(dtype), "kl_weights": of_kl.to(dtype)}


def recorded_logprobs(
    rollout: Rollout, scored: ScoredRows, rows: Tensor | slice = slice(None)
) -> Tensor | None:
    """Return the log-probs with which the sampler drew the targets, [n, C]; None: not known.

    Args:
        rows: [n] indices of scored rows; by default all.
    """
    if not scored.is_sampled:
        return None
    if scored.target_logprobs is not None:
        return scored.target_logprobs[rows]
    return rollout.trajectory.logprobs[scored.rollout[rows]]


def _supports(
    trajectory: Trajectory, scored: ScoredRows, number: Tensor, position: Tensor
) -> Tensor | None:
    """Return the candidates [S, K] from which the sampler drew targets; None: all ids.

    Args:
        number, position: [S] of the targets, the scored row and the place in the completion.
    """
    if not scored.is_sampled or trajectory.support_ids is None:
        return None
    owner = scored.rollout[number]
    support = trajectory.support_ids[owner, position]
    edited = trajectory.edit_support_ids
    if scored.step is None or edited is None:
        return support
    assert trajectory.edit_step is not None
    assert trajectory.edit_position is not None
    is_mine = trajectory.edit_step[owner] == scored.step[number, None]
    is_mine &= trajectory.edit_position[owner] == position[:, None]
    found = edited[owner, is_mine.long().argmax(1)]
    missing = support.shape[1] - found.shape[1]
    support, found = (
        F.pad(ids, (0, max(0, more)), value=-1)
        for ids, more in ((support, -missing), (found, missing))
    )
    return found.where(is_mine.any(1, keepdim=True), support)


def _states_of_prompts(
    rollout: Rollout, scored: ScoredRows, rows: Tensor, mask_id: int
) -> list[Tensor]:
    """Return the prompts of rows, with the mask token at their hidden positions."""
    prompts = [rollout.trajectory.prompts[r] for r in scored.rollout[rows].tolist()]
    if scored.hidden_prompt is None:
        return prompts
    hidden = [scored.hidden_prompt[row] for row in rows.tolist()]
    return [p.masked_fill(h, mask_id) for p, h in zip(prompts, hidden, strict=True)]


def packed_states(
    prompts: Sequence[Tensor],
    completions: Tensor,
    scored: Tensor,
    *,
    length: Tensor | None = None,
    mask_id: int,
    shift: bool,
) -> PackedRows:
    """Pack prompts with completions [n, C]; `scored` [n, C] marks tokens that reach the head.

    Args:
        length: [n] tokens that are kept of each completion; None keeps all.
    """
    if not len(completions):
        return unscored_row(mask_id, completions.device)
    canvas, prompt_lengths = make_canvas(prompts, completions)
    columns = completion_columns(prompt_lengths, completions.shape[1])
    marks = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, scored)
    kept = completions.shape[1] if length is None else length
    return pack(canvas, prompt_lengths + kept, marks, shift=shift)
