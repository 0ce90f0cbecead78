"""The exponent of a growth, from made-up seconds."""

import pytest

from tools.benchmark_growth import exponent


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert exponent({size: 3.0 * size for size in (2, 4, 8)}) == pytest.approx(1)
    assert exponent({size: 0.5 * size**2 for size in (2, 8, 16)}) == pytest.approx(2)
    assert 0 < exponent({2: 1 + 2.0, 4: 1 + 4.0, 8: 1 + 8.0}) < 1  # a constant on top
