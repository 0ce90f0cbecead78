"""FLOPs of completions, counted from what ran: matrices, attention and head; 2 per multiply-add.

Norms, rotations, activations, sampling and the padding of the vocabulary are not counted, so the
count is the same under every layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agrpo_megatron.config.parallel import layer_matrices
from agrpo_megatron.config.settings import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor

    from agrpo_megatron.types import Trajectory


def completion_flops(trajectory: Trajectory, model: ModelSettings) -> list[int]:
    """Return the FLOPs [R] of each completion, over all its denoising steps.

    Every denoising step runs the whole row, prompt and completion; the head runs at the positions
    that the step scored. Rows that only fill up a small head product are not counted.
    """
    assert model.vocab_size is not None
    width, steps = trajectory.tokens.shape[1], trajectory.num_steps.tolist()
    scored = scored_positions(trajectory).tolist()
    head = 2 * model.hidden_size * model.vocab_size
    return [
        count * row_flops(len(prompt) + width, model) + positions * head
        for prompt, count, positions in zip(trajectory.prompts, steps, scored, strict=True)
    ]


def row_flops(length: int, model: ModelSettings) -> int:
    """Return the FLOPs of one row through all layers, without the head."""
    attention = 4 * length**2 * model.hidden_size  # scores, and the weighted values
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
