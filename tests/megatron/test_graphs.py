"""Which bucket packed rows fall into, and how they are filled up to it."""

import random

import pytest

from agrpo_megatron.megatron.graphs import Bucket, bucket_bounds, bucket_of


def bounds_of(lengths):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ([1], Bucket(tokens=128, rows=4, longest=64)),
        ([64, 64], Bucket(tokens=128, rows=2, longest=64)),
        ([100] * 10, Bucket(tokens=1024, rows=16, longest=128)),
        ([512] * 16, Bucket(tokens=8192, rows=16, longest=512)),
        ([512] * 15 + [1], Bucket(tokens=8192, rows=32, longest=512)),
    ],
)
def test_a_bucket_by_hand(lengths, bucket):
    assert bucket_of(bounds_of(lengths)) == bucket


def test_rows_stay_as_they_are_and_padding_is_no_longer_than_the_longest():
    random.seed(0)
    for _ in range(300):
        lengths = [random.randint(1, 700) for _ in range(random.randint(1, 40))]
        bounds = bounds_of(lengths)
        bucket = bucket_of(bounds)
        filled = bucket_bounds(bounds, bucket)
        assert filled[: len(bounds)] == bounds and filled[-1] == bucket.tokens
        assert len(filled) == bucket.rows + 1
        steps = [b - a for a, b in zip(filled, filled[1:], strict=False)]
        assert min(steps) >= 0 and max(steps) <= bucket.longest
        assert bounds[-1] <= bucket.tokens <= max(bounds[-1] * 9 / 8, bounds[-1] + 127)
        assert bucket.tokens % 128 == 0


def test_rows_that_leave_one_by_one_share_buckets():
    """While 64 rows of 300 tokens end one after another, half as many buckets serve."""
    buckets = {bucket_of(bounds_of([300] * count)) for count in range(1, 65)}
    assert len(buckets) < 32
