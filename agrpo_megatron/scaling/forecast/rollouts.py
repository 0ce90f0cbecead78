"""Rollouts as the sampler would record them if every step ran: to count their work."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.blocks import block_numbers
from agrpo_megatron.diffusion.schedule import step_counts
from agrpo_megatron.trajectories import given_texts
from agrpo_megatron.types import Rollout, Trajectory


def whole_rollout(
    lengths: Sequence[int], model: ModelSettings, sampling: SamplingSettings, *, group_size: int
) -> Rollout:
    """Return a group of completions of each prompt that ran all steps; rewards alternate.

    Args:
        lengths: tokens of each prompt.
    """
    count, length = len(lengths) * group_size, sampling.completion_length
    special = {model.mask_token_id, model.eos_token_id}
    filler = next(token for token in itertools.count() if token not in special)
    tokens = torch.full((count, length), filler)
    # A group shares its prompt; other prompts of the same length are not the same text.
    texts = [torch.arange(number, number + size) for number, size in enumerate(lengths)]
    some = torch.full((count, length), 0.5)
    prompts = [text for text in texts for _ in range(group_size)]
    trajectory = replace(
        given_texts(prompts, tokens, torch.arange(count), sampling),
        logprobs=-some,
        entropies=some,
        spreads=some,
        support_ids=_support(count, sampling, model) if sampling.is_cut else None,
        sampling=sampling,
        **_records(count, sampling),
    )
    steps, ends = _steps(trajectory)
    rewards = torch.arange(count) % 2
    return Rollout(
        replace(trajectory, unmask_step=steps, num_steps=ends),
        rewards.float(),
        rewards == 1,
        2.0 * rewards - 1,
    )


def _steps(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return the step that fixes each token [R, C], left to right in blocks, and all steps [R]."""
    sampling, (blocks, places) = trajectory.sampling, block_numbers(trajectory)
    counts = torch.tensor(step_counts(sampling))
    edits = sampling.edit_steps if sampling.edit_threshold is not None else 0
    offset = places[:, :1] * (blocks == 0)  # tokens of the prompt in the first block
    own = torch.searchsorted(counts.cumsum(0), places - offset, right=True)
    ran = torch.zeros(len(own), sampling.most_blocks, dtype=own.dtype)
    ran = ran.scatter_reduce(1, blocks, own + 1, "amax")  # fewer in a block that the prompt shares
    ends = (ran + edits * (ran > 0)).cumsum(1)
    return own + F.pad(ends, (1, 0)).gather(1, blocks), ends[:, -1]


def _support(count: int, sampling: SamplingSettings, model: ModelSettings) -> Tensor:
    """Return candidates [R, C, K]; how many top-p keeps is not known, so top-k is taken."""
    kept = min(sampling.top_k or 1, model.vocab_size or 1)
    return torch.zeros(1, dtype=torch.int32).expand(count, sampling.completion_length, kept)


def _records(count: int, sampling: SamplingSettings) -> dict[str, Any]:
    """Return what else the sampler records, by its settings; see `Trajectory`."""
    found, length = {}, sampling.completion_length
    if sampling.record_drawn:
        shape = (count, sampling.most_steps, sampling.block_length)
        found["drawn_tokens"] = torch.ones(shape, dtype=torch.int32)
        found["drawn_logprobs"], found["drawn_spreads"] = -torch.ones(shape), torch.ones(shape)
    if sampling.position_temperature is not None:
        found["turns"] = torch.zeros(count, length, dtype=torch.int32)
        found["turn_logprobs"] = torch.zeros(count, length)
    return found
