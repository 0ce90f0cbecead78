"""Advantages of completions relative to their group."""

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings


def advantages(rewards: Tensor, algorithm: AlgorithmSettings) -> Tensor:
    """Return rewards [R] relative to their groups of `group_size` neighbours.

    `baseline=leave_one_out` subtracts the mean of the others, which keeps the gradient unbiased;
    `mean` (published) shrinks it by (group_size - 1) / group_size.
    """
    size = algorithm.group_size
    groups = rewards.view(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    result = {
        "none": groups,
        "mean": centred,
        "leave_one_out": centred * (size / (size - 1)),
    }[algorithm.baseline]
    if algorithm.scale_by_std:
        deviation = groups.std(1, correction=algorithm.std_degrees, keepdim=True)
        result = result / (deviation + algorithm.std_epsilon).clamp(min=algorithm.std_floor)
        # Equal numbers may have a deviation of rounding.
        is_equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
        result = result.masked_fill(is_equal, 0.0)
    kind = algorithm.filled.softmax
    if kind != "none":
        pool = result if kind == "group" else result.view(1, -1)
        worst = (-pool).softmax(1) if algorithm.softmax_negative else 0
        result = pool.softmax(1) - worst
    return result.reshape(-1)


def pairs(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the best and the worst completion of each group whose rewards differ, [pairs] each.

    Of equal rewards the first is taken.
    """
    groups = rewards.view(-1, group_size)
    best, worst = groups.argmax(1), groups.argmin(1)
    starts = torch.arange(len(groups), device=rewards.device) * group_size
    differ = groups.amax(1) > groups.amin(1)
    return (starts + best)[differ], (starts + worst)[differ]
