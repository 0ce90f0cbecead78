"""FLOPs of completions and updates, counted from what ran; 2 per multiply-add.

Matrices, attention and head are counted.

Norms, rotations, activations, sampling, the padding of the vocabulary and activations that are
recomputed are not, so the count is the same under every layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from agrpo_megatron.config.parallel import layer_matrices
from agrpo_megatron.config.settings import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor

    from agrpo_megatron.types import Trajectory

WITH_GRADIENT = 3  # a forward and a backward pass, in forward passes


def completion_flops(trajectory: Trajectory, model: ModelSettings) -> list[int]:
    """Return the FLOPs [R] of each completion, over all its denoising steps.

    Every denoising step runs the whole row, prompt and completion; the head runs at the positions
    that the step scored. Rows that only fill up a small head product are not counted.
    """
    width, steps = trajectory.tokens.shape[1], trajectory.num_steps.tolist()
    scored = scored_positions(trajectory).tolist()
    return [
        count * row_flops(len(prompt) + width, model) + head_flops(positions, model)
        for prompt, count, positions in zip(trajectory.prompts, steps, scored, strict=True)
    ]


def scored_flops(lengths: Iterable[int], scored: int, model: ModelSettings) -> int:
    """Return the FLOPs of one forward pass over rows that an estimator scores.

    Args:
        lengths: tokens of each row, prompt and completion.
        scored: tokens of all rows that reach the head.
    """
    return sum(row_flops(length, model) for length in lengths) + head_flops(scored, model)


def head_flops(positions: int, model: ModelSettings) -> int:
    """Return the FLOPs of the head at some positions."""
    assert model.vocab_size is not None
    return 2 * positions * model.hidden_size * model.vocab_size


def row_flops(length: int, model: ModelSettings) -> int:
    """Return the FLOPs of one row through all layers, without the head."""
    attention = 4 * length**2 * model.query_width  # scores, and the weighted values
    return model.num_layers * (2 * length * layer_matrices(model) + attention)


def scored_positions(trajectory: Trajectory) -> Tensor:
    """Return how many positions [R] the head scored, over all denoising steps.

    A position is scored in every step of its block up to the step that fixes it; only in that step
    if the sampler chooses positions before the forward.
    """
    sampling, fixed_at = trajectory.sampling, trajectory.unmask_step
    ran = fixed_at < trajectory.num_steps[:, None]
    if sampling.foresees_positions:
        return ran.sum(1)
    blocks = fixed_at.unflatten(1, (-1, sampling.block_length))  # [R, blocks, block length]
    begins = (blocks.amax(2) + 1).roll(1, dims=1)
    begins[:, 0] = 0
    times = blocks - begins[:, :, None] + 1
    return (times.flatten(1) * ran).sum(1)
