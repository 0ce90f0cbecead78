"""Blocks of completions: where they begin, and who sees whom in rows that end with one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.patterns import replay
from agrpo_megatron.types import Row, Trajectory


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


def step_blocks(trajectory: Trajectory, num_steps: int) -> Tensor:
    """Return the block of each denoising step [R, num_steps]; of steps that fix nothing, the last.

    Steps of blocks follow each other, so a step's block is the last one that it has begun.
    """
    begins = block_begins(trajectory)
    places = torch.arange(num_steps, device=begins.device).expand(len(begins), -1)
    return torch.searchsorted(begins, places.contiguous(), right=True) - 1


def block_begins(trajectory: Trajectory) -> Tensor:
    """Return the first step of each block [R, most blocks]; of those that never ran, the end."""
    begins = trajectory.num_steps[:, None].repeat(1, trajectory.sampling.most_blocks)
    numbers = block_numbers(trajectory)[0]
    return begins.scatter_reduce(1, numbers, trajectory.unmask_step, "amin")


def open_block(prompt: int, block: int, sampling: SamplingSettings) -> tuple[int, int]:
    """Return the first token of a completion's block, in its row, and the token after the last.

    Args:
        prompt: tokens of the prompt.
    """
    length = sampling.block_length
    offset = prompt % length if sampling.block_origin == "row" else 0
    start = prompt - offset + block * length
    return start, min(start + length, prompt + sampling.completion_length)


def open_part(
    prompt: int, block: int, sampling: SamplingSettings, *, shift: bool
) -> tuple[int, int]:
    """Return what the later steps of a block compute under a cached policy: first token and end.

    It is the block. A model that predicts a token from the one before needs that one, too.
    """
    start, end = open_block(prompt, block, sampling)
    return max(0, start - shift), end


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
