"""Advantages relative to the group: divisors and the softmax form, with numbers written out."""

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.estimators.advantages import advantages

REWARDS = [0.0, 2.0, 0.1, 0.1]


def _of(rewards, **settings):
    return advantages(torch.tensor(rewards), AlgorithmSettings(group_size=2, **settings)).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"baseline": "none"}, [0.0, 2.0, 0.1, 0.1]),
        ({}, [-1.0, 1.0, 0.0, 0.0]),
        ({"baseline": "leave_one_out"}, [-2.0, 2.0, 0.0, 0.0]),
        ({"scale_by_std": True, "std_epsilon": 0.0}, [-(0.5**0.5), 0.5**0.5, 0.0, 0.0]),
        ({"scale_by_std": True, "std_epsilon": 0.0, "std_degrees": 0}, [-1.0, 1.0, 0.0, 0.0]),
        ({"scale_by_std": True, "std_floor": 4.0}, [-0.25, 0.25, 0.0, 0.0]),
        # e / (e + 1/e) = 0.880797
        ({"softmax": "group"}, [-0.761594, 0.761594, 0.0, 0.0]),
        ({"softmax": "group", "softmax_negative": False}, [0.119203, 0.880797, 0.5, 0.5]),
    ],
)
def test_an_advantage_is_of_the_group(settings, expected):
    assert _of(REWARDS, **settings) == pytest.approx(expected, abs=1e-6)


def test_equal_rewards_have_no_advantage_whatever_their_rounding():
    """The mean of three times 0.1 is not 0.1 in float32, and a deviation may be that error."""
    settings = {"scale_by_std": True, "std_epsilon": 0.0}
    for reward in (0.1, 0.7, 1e-3, 123.456):
        gains = advantages(torch.full((7,), reward), AlgorithmSettings(group_size=7, **settings))
        assert gains.tolist() == [0.0] * 7
