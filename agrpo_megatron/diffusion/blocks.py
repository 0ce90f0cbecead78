"""Blocks of completions: where they begin, and the rows of their partially masked states."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.packing import make_canvas, on_device
from agrpo_megatron.diffusion.patterns import replay, row_length
from agrpo_megatron.trajectories import state_tokens
from agrpo_megatron.types import PackedRows, Rollout, Row, ScoredRows, Trajectory


def block_offsets(prompt_lengths: Tensor, sampling: SamplingSettings) -> Tensor:
    """Return how many prompt tokens [R] the first block of a completion holds.

    None, unless blocks are counted from the start of the row, as block-diffusion models do.
    """
    if sampling.block_origin == "completion":
        return torch.zeros_like(prompt_lengths)
    return prompt_lengths % sampling.block_length


def block_numbers(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return the block of each completion token [R, C], and its place in the block [R, C]."""
    sampling, device = trajectory.sampling, trajectory.tokens.device
    prompts = torch.tensor([len(prompt) for prompt in trajectory.prompts], device=device)
    offsets = block_offsets(prompts, sampling)[:, None]
    places = torch.arange(trajectory.tokens.shape[1], device=device) + offsets
    return places // sampling.block_length, places % sampling.block_length


def open_block(prompt: int, block: int, sampling: SamplingSettings) -> tuple[int, int]:
    """Return the first token of a completion's block, in its row, and the token after the last.

    Args:
        prompt: tokens of the prompt.
    """
    length = sampling.block_length
    offset = prompt % length if sampling.block_origin == "row" else 0
    start = prompt - offset + block * length
    return start, min(start + length, prompt + sampling.completion_length)


def state_rows(
    lengths: Sequence[int],
    prompts: Sequence[int],
    model: ModelSettings,
    sampling: SamplingSettings,
) -> list[Row] | None:
    """Return the patterns of rows whose last block is open; None: all tokens see each other.

    A block model sees nothing after the open block, so the rows end there.

    Args:
        lengths: tokens of each row.
        prompts: of which so many are its prompt.
    """
    if not model.has_blocks:
        return None
    pairs = zip(lengths, prompts, strict=True)
    return [state_row(length, prompt, model, sampling) for length, prompt in pairs]


def state_row(length: int, prompt: int, model: ModelSettings, sampling: SamplingSettings) -> Row:
    """Return the pattern of a block model's row whose last block is open."""
    if model.attention == "block_causal":  # an open block sees what a finished one sees
        return context_row(length, prompt, model, sampling)
    first = open_block(prompt, 0, sampling)[0]
    start = first + (length - 1 - first) // sampling.block_length * sampling.block_length
    return context_row(start, prompt, model, sampling, copies=[(start, length - start)])


def context_row(
    length: int,
    prompt: int,
    model: ModelSettings,
    sampling: SamplingSettings,
    *,
    copies: Sequence[tuple[int, int]] = (),
) -> Row:
    """Return the row of finished text, and of partially masked copies of parts of it.

    Args:
        length: tokens of the text.
        prompt: tokens of the prompt.
        copies: first token and number of tokens of each; it begins where a block begins.
    """
    block = model.block_length
    assert block is not None
    origin = 0 if sampling.block_origin == "row" else prompt % block
    is_causal = model.attention == "causal_context"
    return replay(length, block, copies, causal=is_causal, origin=origin)


def doubled_row(prompt: int, length: int, model: ModelSettings, sampling: SamplingSettings) -> Row:
    """Return the row of an example and a partially masked copy of its completion.

    The copy begins where a block begins, so with the end of the prompt if a block holds both.

    Args:
        prompt: tokens of the prompt.
        length: tokens of the example.
    """
    start, _ = open_block(prompt, 0, sampling)
    return context_row(length, prompt, model, sampling, copies=[(start, length - start)])


class _State(NamedTuple):
    """A scored row, by its place in the whole row of its rollout."""

    number: int
    start: int  # of its first block
    before: int  # tokens of finished text that its last block sees
    end: int


@dataclass(frozen=True)
class ReplayRow:
    """A packed row: finished text of a rollout, and partially masked states of its blocks."""

    rollout: int
    context: int  # tokens of the finished text
    states: tuple[int, ...]  # scored rows, in order
    parts: tuple[tuple[int, int], ...]  # of each: its first token in the whole row, and its end
    pattern: Row

    @property
    def length(self) -> int:
        """Return the tokens of the row."""
        return row_length(self.pattern)


def replay_rows(
    scored: ScoredRows, rollout: Rollout, model: ModelSettings, *, budget: int
) -> list[ReplayRow]:
    """Put scored rows of a rollout into as few packed rows as hold them, for a block model.

    A state runs from the first to the last block in which it is scored. Each of its blocks sees the
    finished text before it, so one copy of that serves all states, and a row is always cheaper than
    several. `budget` limits its tokens, as far as a state allows.
    """
    trajectory = rollout.trajectory
    numbers = block_numbers(trajectory)[0][scored.rollout]
    last = numbers.masked_fill(~scored.scored, 0).amax(1)
    first = torch.minimum(numbers.masked_fill(~scored.scored, numbers.shape[1]).amin(1), last)
    blocks = list(zip(first.tolist(), last.tolist(), strict=True))
    owners, rows, states = scored.rollout.tolist(), list[ReplayRow](), list[_State]()
    counts, levels = Counter[tuple[int, int]](), list[int]()
    for owner, (block, _) in zip(owners, blocks, strict=True):
        levels.append(counts[owner, block])  # states of different blocks of a level are one copy
        counts[owner, block] += 1
    context = copied = 0
    for number in sorted(range(len(owners)), key=lambda n: (owners[n], levels[n], blocks[n])):
        prompt = len(trajectory.prompts[owners[number]])
        start, _ = open_block(prompt, blocks[number][0], trajectory.sampling)
        before, end = open_block(prompt, blocks[number][1], trajectory.sampling)
        context, copied = max(context, before), copied + end - start
        is_other = states and owners[states[0].number] != owners[number]
        is_full = context + copied > budget or scored.hidden_prompt is not None
        if states and (is_other or is_full):
            rows.append(_replay_row(states, owners[states[0].number], trajectory, model))
            states, context, copied = [], before, end - start
        states.append(_State(number, start, before, end))
    if states:
        rows.append(_replay_row(states, owners[states[0].number], trajectory, model))
    return rows


def _replay_row(
    states: Sequence[_State], owner: int, trajectory: Trajectory, model: ModelSettings
) -> ReplayRow:
    copies = list[tuple[int, int]]()  # neighbouring states that follow each other are one copy
    for state in states:
        if copies and sum(copies[-1]) == state.start:
            copies[-1] = copies[-1][0], state.end - copies[-1][0]
        else:
            copies.append((state.start, state.end - state.start))
    context, prompt = max(state.before for state in states), len(trajectory.prompts[owner])
    pattern = context_row(context, prompt, model, trajectory.sampling, copies=copies)
    numbers, parts = zip(*((s.number, (s.start, s.end)) for s in states), strict=True)
    return ReplayRow(owner, context, numbers, parts, pattern)


def pack_replay(
    rows: Sequence[ReplayRow], rollout: Rollout, scored: ScoredRows, *, mask_id: int
) -> PackedRows:
    """Pack rows of finished text and states; scored tokens come out state by state."""
    trajectory, device = rollout.trajectory, rollout.trajectory.tokens.device
    states = torch.tensor([state for row in rows for state in row.states], device=device)
    masked = state_tokens(trajectory, scored, states, mask_id=mask_id)
    owners = [row.rollout for row in rows]
    prompts = [_prompt_of(row, trajectory, scored, mask_id) for row in rows]
    whole, _ = make_canvas(prompts, trajectory.tokens[torch.tensor(owners, device=device)])
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
            begins.append(filled - start)
            filled, number = filled + end - start, number + 1
        bounds.append(filled)
    tokens = canvas[torch.cat(source).to(device), torch.cat(place).to(device)]
    state, position = scored.scored[states].nonzero(as_tuple=True)
    columns = position + sizes[state] + on_device(begins, device)[state]
    cu_seqlens = on_device(bounds, device, dtype=torch.int32)
    return PackedRows(tokens, cu_seqlens, columns, bounds, [row.pattern for row in rows])


def _prompt_of(row: ReplayRow, trajectory: Trajectory, scored: ScoredRows, mask_id: int) -> Tensor:
    """Return the prompt of a row, with the mask token where its state hides it."""
    prompt = trajectory.prompts[row.rollout]
    if scored.hidden_prompt is None:
        return prompt
    (state,) = row.states
    return prompt.masked_fill(scored.hidden_prompt[state], mask_id)
