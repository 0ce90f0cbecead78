"""Pack rows of contexts and states."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.diffusion.packing import make_canvas, on_device
from agrpo_megatron.diffusion.replays.rows import ReplayRow
from agrpo_megatron.trajectories import state_tokens
from agrpo_megatron.types import PackedRows, Rollout, ScoredRows, Trajectory


def pack_replay(
    rows: Sequence[ReplayRow],
    rollout: Rollout,
    scored: ScoredRows,
    *,
    mask_id: int,
    shift: bool = False,
) -> PackedRows:
    """Pack rows of contexts and states; scored tokens come out state by state.

    Args:
        shift: whether a token is predicted from the one before.
    """
    trajectory, device = rollout.trajectory, rollout.trajectory.tokens.device
    states = torch.tensor([state for row in rows for state in row.states], device=device)
    masked = state_tokens(trajectory, scored, states, mask_id=mask_id)
    owners = [row.rollout for row in rows]
    prompts = [_prompt_of(row, trajectory, scored, mask_id) for row in rows]
    texts = trajectory.tokens[torch.tensor(owners, device=device)]
    width = texts.shape[1]
    shown = on_device([width if row.shown is None else row.shown for row in rows], device)
    places = torch.arange(width, device=device)
    whole, _ = make_canvas(prompts, texts.masked_fill(places >= shown[:, None], mask_id))
    repeated = [prompt for row, prompt in zip(rows, prompts, strict=True) for _ in row.states]
    canvas, sizes = make_canvas(repeated, masked)
    canvas = torch.cat([F.pad(whole, (0, canvas.shape[1] - whole.shape[1])), canvas])
    source, place, begins, bounds, number = [], [], [], [0], len(rows)
    for at, row in enumerate(rows):
        source.append(torch.full((row.context,), at))
        place.append(torch.arange(row.context))
        filled = bounds[-1] + row.context
        for start, end in row.parts:
            source.append(torch.full((end - start,), number))
            place.append(torch.arange(start, end))
            begins.append(filled - start if start < end else bounds[-1])
            filled, number = filled + end - start, number + 1
        bounds.append(filled)
    tokens = canvas[torch.cat(source).to(device), torch.cat(place).to(device)]
    state, position = scored.scored[states].nonzero(as_tuple=True)
    columns = (position + sizes[state] - int(shift)).clamp(min=0) + on_device(begins, device)[state]
    cu_seqlens = on_device(bounds, device, dtype=torch.int32)
    return PackedRows(tokens, cu_seqlens, columns, bounds, [row.pattern for row in rows])


def _prompt_of(row: ReplayRow, trajectory: Trajectory, scored: ScoredRows, mask_id: int) -> Tensor:
    """Return the prompt of a row, with the mask token where its state hides it."""
    prompt = trajectory.prompts[row.rollout]
    if scored.hidden_prompt is None:
        return prompt
    (state,) = row.states
    return prompt.masked_fill(scored.hidden_prompt[state], mask_id)
