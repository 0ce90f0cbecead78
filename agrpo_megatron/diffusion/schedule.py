"""How many tokens each denoising step fixes, known before the first one."""

import functools

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings

EPSILON = 1e-3  # time at which Dream's schedule ends


def transfer_schedule(block_length: int, steps_per_block: int) -> list[int]:
    """Return how many tokens each step of a block fixes; the first steps take the remainder.

    Source: LLaDA, generate.py, get_num_transfer_tokens.
    """
    base, more = divmod(block_length, steps_per_block)
    return [base + (step < more) for step in range(steps_per_block)]


def dream_schedule(length: int, steps: int) -> list[int]:
    """Return how many tokens each step fixes; a step that would fix none does not run.

    Source: Dream, generation_utils.py, diffusion_generate: of n masked tokens, n * (1 - s / t),
    rounded down, in float32; all remaining tokens at the last step.
    """
    counts, left = [], length
    for chance in dream_chances(steps):
        count = int(torch.tensor(float(left)) * chance)
        counts.append(count)
        left -= count
    return [count for count in counts if count]


def dream_chances(steps: int) -> Tensor:
    """Return the chance of each step [steps] that a masked token is fixed; the last one is 1."""
    time = torch.linspace(1, EPSILON, steps + 1)
    chances = 1 - time[1:] / time[:-1]
    chances[-1] = 1.0
    return chances


@functools.cache
def step_counts(sampling: SamplingSettings) -> tuple[int, ...]:
    """Return how many tokens each step of a block fixes."""
    if sampling.schedule == "dream":
        return tuple(dream_schedule(sampling.completion_length, sampling.denoising_steps))
    blocks = sampling.completion_length // sampling.block_length
    return tuple(transfer_schedule(sampling.block_length, sampling.denoising_steps // blocks))


def bernoulli_plan(uniforms: Tensor) -> Tensor:
    """Return the denoising step [R, C] that fixes each token, given one number per step and token.

    A masked token is fixed when its number is below the step's chance. Steps of a row that fix
    none do not run and are not counted. Source: Dream, generation_utils.py, alg `origin`.

    Args:
        uniforms: [steps, R, C] in [0, 1).
    """
    chances = dream_chances(len(uniforms)).to(uniforms.device)[:, None, None]
    fixed = (uniforms < chances).to(torch.int64).argmax(0)
    ran = torch.zeros(len(fixed), len(uniforms), dtype=torch.int64, device=fixed.device)
    ran.scatter_(1, fixed, 1)
    return ran.cumsum(1).gather(1, fixed) - 1
