"""Blocks of completions: where they begin, and the rows of their partially masked states."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.patterns import block_causal, full, replay
from agrpo_megatron.types import Rollout, Row, ScoredRows, Span, Trajectory


def block_offsets(prompt_lengths: Tensor, sampling: SamplingSettings) -> Tensor:
    """Return how many prompt tokens [R] the first block of a completion holds.

    None, unless blocks are counted from the start of the row, as block-diffusion models do.
    """
    if sampling.block_origin == "completion":
        return torch.zeros_like(prompt_lengths)
    return prompt_lengths % sampling.block_length


def first_blocks(trajectory: Trajectory) -> Tensor:
    """Return the position [R] at which the first whole block of each row begins."""
    prompts = torch.tensor([len(prompt) for prompt in trajectory.prompts])
    return (
        prompts - block_offsets(prompts, trajectory.sampling)
    ) % trajectory.sampling.block_length


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


def doubled_row(prompt: int, length: int, model: ModelSettings, sampling: SamplingSettings) -> Row:
    """Return the row of an example and a partially masked copy of its completion.

    The copy begins where a block begins, so with the end of the prompt if a block holds both.

    Args:
        prompt: tokens of the prompt.
        length: tokens of the example.
    """
    block = model.block_length
    assert block is not None
    is_from_row = sampling.block_origin == "row"
    origin, start = (0, prompt - prompt % block) if is_from_row else (prompt % block, prompt)
    is_causal = model.attention == "causal_context"
    return replay(length, block, [(start, length - start)], causal=is_causal, origin=origin)


def with_open_blocks(scored: ScoredRows, rollout: Rollout, model: ModelSettings) -> ScoredRows:
    """End the rows of a block model after the block that they score; the tokens of each are in one.

    Tokens after the block do not change the scored ones.
    """
    if not model.has_blocks:
        return scored
    trajectory, sampling = rollout.trajectory, rollout.trajectory.sampling
    number = block_numbers(trajectory)[0][scored.rollout]
    last = number.masked_fill(~scored.scored, -1).amax(1)
    if not torch.equal((scored.scored & (number == last[:, None])), scored.scored):
        raise ValueError(
            "algorithm.name: its rows score tokens of several blocks, and model.attention="
            f"{model.attention} has rows of one open block; score each block in a row of its own"
        )
    prompts = [len(trajectory.prompts[number]) for number in scored.rollout.tolist()]
    ends = [
        open_block(prompt, block, sampling)[1] - prompt
        for prompt, block in zip(prompts, last.tolist(), strict=True)
    ]
    return replace(scored, length=torch.tensor(ends, device=scored.rollout.device))
