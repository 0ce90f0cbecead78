"""Packed rows in which partially masked states of a rollout share a context."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.diffusion.blocks import block_numbers, context_row, open_block, open_part
from agrpo_megatron.diffusion.patterns import inside, row_length
from agrpo_megatron.types import Rollout, Row, ScoredRows, Trajectory


class _State(NamedTuple):
    """A scored row, by its place in the whole row of its rollout."""

    number: int
    start: int  # of its first block
    before: int  # tokens of finished text that its last block sees
    end: int


@dataclass(frozen=True)
class ReplayRow:
    """A packed row: a context, which is text of a rollout, and partially masked states."""

    rollout: int
    context: int  # tokens of the context
    states: tuple[int, ...]  # scored rows, in order
    # Of each: its first token in the whole row, and its end; equal: the context is the state.
    parts: tuple[tuple[int, int], ...]
    pattern: Row
    shown: int | None = None  # completion tokens that the context shows; None: all

    @property
    def length(self) -> int:
        """Return the tokens of the row."""
        return row_length(self.pattern)


def replayed_rows(
    scored: ScoredRows, rollout: Rollout, model: ModelSettings, *, budget: int
) -> list[ReplayRow] | None:
    """Return packed rows in which scored rows share a context; None: each has its own tokens.

    Args:
        budget: tokens of a packed row, as far as its states allow.
    """
    if model.has_blocks:
        return _block_rows(scored, rollout, model, budget=budget)
    if rollout.trajectory.sampling.policy == "cached":
        return _cached_rows(scored, rollout, model, budget=budget)
    return None


def _cached_rows(
    scored: ScoredRows, rollout: Rollout, model: ModelSettings, *, budget: int
) -> list[ReplayRow]:
    """Put the states of each block after the state in which its first step saw the whole row.

    That state is the context of the cached policy: later states see it all but their own block.

    Raises:
        ValueError: a row is not a state of the sampler in one block.
    """
    trajectory = rollout.trajectory
    sampling, rows = trajectory.sampling, list[ReplayRow]()
    blocks = block_numbers(trajectory)[0][scored.rollout]
    most = sampling.most_blocks
    block = blocks.masked_fill(~scored.scored, most).amin(1, keepdim=True)
    is_other = (scored.scored & (blocks != block)) | (scored.hidden & (blocks < block))
    if bool((is_other | ((blocks > block) & ~scored.hidden)).any()):
        raise ValueError(
            "sampling.policy=cached scores states that the sampler had, each in its open block, "
            "and the estimator has others; use sampling.policy=exact"
        )
    is_first = (scored.hidden | (blocks != block)).all(1).tolist()
    shown = (blocks < block).sum(1).tolist()
    groups = defaultdict[tuple[int, int], list[int]](list)
    for number, key in enumerate(zip(scored.rollout.tolist(), block[:, 0].tolist(), strict=True)):
        groups[key].append(number)
    for (owner, number), states in groups.items():
        prompt = len(trajectory.prompts[owner])
        part = open_part(prompt, number, sampling, shift=model.shift)
        length = prompt + sampling.completion_length
        states.sort(key=lambda state: not is_first[state])
        room = max(1, (budget - length) // (part[1] - part[0]))
        for at in range(0, len(states), room):
            some = states[at : at + room]
            copies = sum(not is_first[state] for state in some)
            parts = tuple((0, 0) if is_first[state] else part for state in some)
            pattern = inside(length, part, copies)
            rows.append(ReplayRow(owner, length, tuple(some), parts, pattern, shown[some[0]]))
    return rows


def _block_rows(
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
