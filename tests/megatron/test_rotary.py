"""YaRN's frequencies are transformers' to the last bit; queries grow as in Ministral 3."""

import math

import pytest
import torch
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.megatron.layers.packed import rotary_angles
from agrpo_megatron.megatron.layers.rotary import (
    Scaling,
    frequencies,
    query_scale,
    scaled,
    scaling_of,
)

CPU = torch.device("cpu")
CASES = {
    "3B": (128, 1e6, Scaling("yarn", 16.0, 16384, 32.0, 1.0)),
    "14B": (128, 1e9, Scaling("yarn", 16.0, 16384, 32.0, 1.0)),
    "a factor of 8": (128, 1e6, Scaling("yarn", 8.0, 16384, 32.0, 1.0)),
    "small": (16, 1e4, Scaling("yarn", 16.0, 16, 32.0, 1.0)),
    "a ramp without width": (16, 1e4, Scaling("yarn", 2.0, 64, 8.0, 8.0)),
    "nothing turns once": (8, 100.0, Scaling("yarn", 4.0, 4, 32.0, 1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name):
    head, theta, yarn = CASES[name]
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": yarn.factor}
    rope |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
    rope |= {"original_max_position_embeddings": yarn.original_length, "mscale": 1.0}
    config = Ministral3Config(head_dim=head, rope_parameters={**rope, "mscale_all_dim": 1.0})
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    assert factor == 1.0
    assert torch.equal(frequencies(head, theta, yarn, device=CPU), expected)


def test_frequencies_by_hand():
    """Head 128, base 10000, factor 10, length 2048: the ramp goes from pair 16 to 41.

    64 log(2048 / 64 pi) / log 10000 = 16.1, and with 1 turn in place of 32, 40.2.
    """
    found = frequencies(128, 1e4, Scaling("yarn", 10.0, 2048, 32.0, 1.0), device=CPU)
    plain = 1e4 ** (-torch.arange(64) / 64)
    ramp = ((torch.arange(64) - 16) / 25).clamp(0, 1)
    torch.testing.assert_close(found, plain * (1 - ramp + ramp / 10), rtol=1e-5, atol=0)
    assert found[:17].tolist() == pytest.approx(plain[:17].tolist())
    assert found[41:].tolist() == pytest.approx((plain / 10)[41:].tolist())


def test_without_yarn_angles_are_plain():
    assert scaling_of(ModelSettings()) is None
    angles = rotary_angles(torch.tensor([0, 3]), head_dim=4, rope_theta=100.0)
    assert angles[:, 0].tolist() == [[0.0] * 4, pytest.approx([3, 0.3, 3, 0.3])]


def test_yarn_is_of_the_settings():
    model = ModelSettings(rope_factor=4.0, rope_original_length=64, rope_beta_fast=16.0)
    assert scaling_of(model) == Scaling("yarn", 4.0, 64, 16.0, 1.0)


def test_queries_grow_by_multiples_of_the_original_length():
    positions = torch.tensor([0, 16383, 16384, 32768, 262143])
    found = query_scale(positions, beta=0.1, original_length=16384, attention_factor=1.0)
    assert found is not None and found.shape == (5, 1, 1) and found.dtype == torch.float32
    expected = [1.0, 1.0, *(1 + 0.1 * math.log(count) for count in (2, 3, 16))]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_the_attention_factor_counts_twice():
    found = query_scale(torch.tensor([5]), beta=0.0, original_length=None, attention_factor=1.5)
    assert found is not None and found.item() == 2.25


def test_queries_stay_as_they_are_without_either():
    positions = torch.tensor([5])
    scale = query_scale(positions, beta=0.0, original_length=None, attention_factor=1.0)
    query = torch.randn(1, 2, 4)
    assert scale is None and scaled(query, scale) is query


def test_scaled_queries_keep_their_dtype():
    query = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    found = scaled(query, torch.full((1, 1, 1), 1.25))
    assert found.dtype == torch.bfloat16 and found.unique().tolist() == [1.25]
