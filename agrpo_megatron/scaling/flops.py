"""FLOPs of completions and updates, counted from what ran; 2 per multiply-add.

Matrices, attention and head are counted.

Norms, rotations, activations, sampling, the padding of the vocabulary and activations that are
recomputed are not, so the count is the same under every layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agrpo_megatron.config.parallel import layer_matrices
from agrpo_megatron.config.settings import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor

    from agrpo_megatron.types import Trajectory

WITH_GRADIENT = 3  # a forward and a backward pass, in forward passes


def completion_flops(
    trajectory: Trajectory, model: ModelSettings, *, cached: bool | None = None
) -> list[int]:
    """Return the FLOPs [R] of each completion, over all its denoising steps.

    Every denoising step runs the whole row, prompt and completion. A block model's row ends after
    the open block; with a cache, a step runs the open block alone, each finished block runs once
    more, and a prompt runs in the first of its completions. The head runs at the positions that the
    step scored. Rows that only fill up a small head product are not counted.

    Args:
        cached: `rollout.cached`.
    """
    width, heads = trajectory.tokens.shape[1], scored_positions(trajectory).tolist()
    if not model.has_blocks:
        steps = trajectory.num_steps.tolist()
        layers = [
            count * row_flops(len(prompt) + width, model)
            for prompt, count in zip(trajectory.prompts, steps, strict=True)
        ]
    else:
        layers = _block_flops(trajectory, model, is_cached=cached is not False)
    return [flops + head_flops(count, model) for flops, count in zip(layers, heads, strict=True)]


def _block_flops(trajectory: Trajectory, model: ModelSettings, *, is_cached: bool) -> list[int]:
    """Return the FLOPs [R] of the layers in all steps of a block model's completions."""
    from agrpo_megatron.diffusion.blocks import open_block

    result, known = [], set[bytes]()
    begins, ends = _steps_of_blocks(trajectory)
    for prompt, counts in zip(trajectory.prompts, (ends - begins).tolist(), strict=True):
        first, key, total = len(prompt) % trajectory.sampling.block_length, bytes(prompt.cpu()), 0
        first = first if trajectory.sampling.block_origin == "completion" else 0
        parts = [
            open_block(len(prompt), block, trajectory.sampling) for block in range(len(counts))
        ]
        ran = [(part, count) for part, count in zip(parts, counts, strict=True) if count]
        for number, ((start, end), count) in enumerate(ran):
            if not is_cached:
                total += count * row_flops(end, model, first=first)
                continue
            count += number < len(ran) - 1  # the finished block runs once more
            total += count * _token_flops(end - start, (end - start) * end, model)
        if is_cached and ran and key not in known:
            total += row_flops(ran[0][0][0], model, first=first)
            known.add(key)
        result.append(total)
    return result


def scored_flops(
    lengths: Iterable[int],
    scored: int,
    model: ModelSettings,
    *,
    firsts: Iterable[int] | None = None,
) -> int:
    """Return the FLOPs of one forward pass over rows that an estimator scores.

    Args:
        lengths: tokens of each row, prompt and completion.
        scored: tokens of all rows that reach the head.
        firsts: of each row, as `row_flops` takes it; None: 0.
    """
    firsts = itertools.repeat(0) if firsts is None else firsts
    layers = sum(
        row_flops(n, model, first=first) for n, first in zip(lengths, firsts, strict=False)
    )
    return layers + head_flops(scored, model)


def head_flops(positions: int, model: ModelSettings) -> int:
    """Return the FLOPs of the head at some positions."""
    assert model.vocab_size is not None
    return 2 * positions * model.hidden_size * model.vocab_size


def row_flops(length: int, model: ModelSettings, *, first: int = 0) -> int:
    """Return the FLOPs of one row through all layers, without the head.

    Args:
        first: the position at which the second block of a block model begins, if not its length.
    """
    return _token_flops(length, _visible_pairs(length, model, first), model)


def _token_flops(tokens: int, pairs: int, model: ModelSettings) -> int:
    """Return the FLOPs of some tokens through all layers; `pairs` of tokens see each other."""
    attention = 4 * pairs * model.query_width  # scores, and the weighted values
    return model.num_layers * (2 * tokens * layer_matrices(model) + attention)


def _visible_pairs(length: int, model: ModelSettings, first: int) -> int:
    """Return how many pairs of tokens of a row see each other.

    The open block of a model with a causal context is counted as if it were causal.
    """
    if not model.has_blocks:
        return length**2
    block = model.block_length if model.attention == "block_causal" else 1
    assert block is not None
    first = min(first % block, length)
    blocks, rest = divmod(length - first, block)
    whole = block * (blocks * first + block * blocks * (blocks + 1) // 2)
    return first**2 + whole + rest * length


def scored_positions(trajectory: Trajectory) -> Tensor:
    """Return how many positions [R] the head scored, over all denoising steps.

    A position is scored in every step of its block up to the step that fixes it; only in that step
    if the sampler chooses positions before the forward.
    """
    from agrpo_megatron.diffusion.blocks import block_numbers

    fixed_at = trajectory.unmask_step
    ran = fixed_at < trajectory.num_steps[:, None]
    if trajectory.sampling.foresees_positions:
        return ran.sum(1)
    begins, _ = _steps_of_blocks(trajectory)
    times = fixed_at - begins.gather(1, block_numbers(trajectory)[0]) + 1
    return (times * ran).sum(1)


def _steps_of_blocks(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return the first step of each block, and the step after its last, [R, most blocks] each."""
    from agrpo_megatron.diffusion.blocks import block_numbers

    numbers, blocks = block_numbers(trajectory)[0], trajectory.sampling.most_blocks
    after = trajectory.unmask_step + 1
    ends = after.new_zeros(len(after), blocks).scatter_reduce(1, numbers, after, "amax")
    ends = ends.cummax(1).values.clamp(max=trajectory.num_steps[:, None])
    begins = ends.roll(1, dims=1)
    begins[:, 0] = 0
    return begins, ends
