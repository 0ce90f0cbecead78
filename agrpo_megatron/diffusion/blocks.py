"""Blocks of completions: where they begin, and the rows of their partially masked states."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.packing import make_canvas, on_device
from agrpo_megatron.diffusion.patterns import block_causal, full, replay, row_length
from agrpo_megatron.types import PackedRows, Rollout, Row, ScoredRows, Span, Trajectory


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
    is_from_row = sampling.block_origin == "row"
    return [
        _open_row(length, 0 if is_from_row else prompt, model)
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


def _open_row(length: int, origin: int, model: ModelSettings) -> Row:
    block = model.block_length
    assert block is not None
    if model.attention == "block_causal":
        return block_causal(length, block, origin=origin % block)
    start = max(0, (length - 1 - origin) // block * block + origin)
    if start == 0:
        return full(length)
    return Span(start, block=1), Span(length - start, start, is_copy=True)


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
    first = numbers.masked_fill(~scored.scored, numbers.shape[1]).amin(1).tolist()
    last = numbers.masked_fill(~scored.scored, 0).amax(1).tolist()
    owners, found = scored.rollout.tolist(), list[ReplayRow]()
    level, counts = [], Counter[tuple[int, int]]()
    for owner, block in zip(owners, first, strict=True):
        level.append(counts[owner, block])
        counts[owner, block] += 1
    states, parts, needs = list[int](), dict[int, tuple[int, int]](), dict[int, int]()
    for number in sorted(range(len(owners)), key=lambda n: (owners[n], level[n], first[n])):
        prompt = len(trajectory.prompts[owners[number]])
        start, _ = open_block(prompt, min(first[number], last[number]), trajectory.sampling)
        needs[number], end = open_block(prompt, last[number], trajectory.sampling)
        parts[number] = start, end
        tokens = max(needs[n] for n in [*states, number])
        tokens += sum(parts[n][1] - parts[n][0] for n in [*states, number])
        is_other = states and owners[states[0]] != owners[number]
        if states and (is_other or tokens > budget or scored.hidden_prompt is not None):
            found.append(_replay_row(states, parts, needs, rollout, scored, model))
            states = []
        states.append(number)
    if states:
        found.append(_replay_row(states, parts, needs, rollout, scored, model))
    return found


def _replay_row(
    states: Sequence[int],
    parts: Mapping[int, tuple[int, int]],
    needs: Mapping[int, int],
    rollout: Rollout,
    scored: ScoredRows,
    model: ModelSettings,
) -> ReplayRow:
    """Return a row of some states.

    Args:
        parts: first token of each state in the whole row, and its end.
        needs: tokens of finished text before the last block of each state.
    """
    copies = list[tuple[int, int]]()  # neighbouring parts that follow each other are one copy
    for start, end in (parts[number] for number in states):
        if copies and sum(copies[-1]) == start:
            copies[-1] = copies[-1][0], end - copies[-1][0]
        else:
            copies.append((start, end - start))
    trajectory, context = rollout.trajectory, max(needs[number] for number in states)
    owner = int(scored.rollout[states[0]])
    prompt = len(trajectory.prompts[owner])
    pattern = context_row(context, prompt, model, trajectory.sampling, copies=copies)
    return ReplayRow(owner, context, tuple(states), tuple(parts[n] for n in states), pattern)


def pack_replay(
    rows: Sequence[ReplayRow], rollout: Rollout, scored: ScoredRows, *, mask_id: int
) -> PackedRows:
    """Pack rows of finished text and states; scored tokens come out state by state."""
    trajectory, device = rollout.trajectory, rollout.trajectory.tokens.device
    states = torch.tensor([state for row in rows for state in row.states], device=device)
    masked = trajectory.tokens[scored.rollout[states]].masked_fill(scored.hidden[states], mask_id)
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
