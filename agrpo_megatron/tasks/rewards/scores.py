"""Rewards that are plain numbers."""

import numbers
from typing import Any

from agrpo_megatron.types import Reward

RIGHT = 1.0  # a plain score from which on a completion counts as correct


def as_reward(made: Any) -> Reward:
    """Return a `Reward`, or the one that a number stands for, also a number of numpy or torch.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(made, Reward):
        return made
    number = made.item() if callable(getattr(made, "item", None)) else made
    if not isinstance(number, numbers.Real):
        raise TypeError(f"the reward is of type {type(made).__name__}, not Reward or a number")
    return Reward(float(number), float(number) >= RIGHT)
