"""Shares, means and pass@k with their intervals, against enumeration and simulation."""

import itertools
import math
import random

import numpy as np
import pytest

from agrpo_megatron.evaluation.statistics import (
    bootstrap_interval,
    mean_interval,
    pass_at,
    powers_of_two,
    share_interval,
    t_interval,
    t_quantile,
    wilson,
)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_correct_one():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            verdicts = [place < correct for place in range(samples)]
            for k in range(1, samples + 1):
                chosen = list(itertools.combinations(verdicts, k))
                expected = sum(map(any, chosen)) / len(chosen)
                assert pass_at(k, samples=samples, correct=correct) == pytest.approx(expected)


def test_pass_at_k_is_unbiased_over_samplings():
    """Exactly: its mean over all outcomes of 5 samples, each right by 0.3, is 1 - 0.7^k."""
    for k in (1, 2, 4):
        mean = sum(
            np.prod([0.3 if right else 0.7 for right in outcome])
            * pass_at(k, samples=5, correct=sum(outcome))
            for outcome in itertools.product((False, True), repeat=5)
        )
        assert mean == pytest.approx(1 - 0.7**k)


def test_ks_are_powers_of_two_and_the_number_of_samples():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]


def test_wilson_interval_of_published_examples():
    low, high = wilson(0.1, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert wilson(0.0, 10)[0] == 0.0 and wilson(1.0, 10)[1] == 1.0
    assert wilson(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-4)


def test_one_sample_of_each_problem_gives_wilson_s_own_interval():
    for right in range(21):
        rates = [float(place < right) for place in range(20)]
        assert share_interval(rates, 1) == wilson(right / 20, 20)


def test_samples_of_a_problem_count_by_how_much_they_tell():
    """All alike: as many trials as problems. As if independent: as many as samples."""
    alike = [float(place < 8) for place in range(20)]
    assert share_interval(alike, 16) == pytest.approx(wilson(0.4, 20), abs=0.02)
    apart = [0.4] * 20
    assert share_interval([0.35, 0.45] * 10, 16) == wilson(0.4, 320)
    low, high = share_interval(apart, 16)  # no spread says nothing of how far it could go
    assert low < 0.4 < high


def coverage(interval, *, samples, problems=40, trials=400):
    """Return how often intervals of simulated evaluations hold the true mean, 0.5."""
    chance, hits = random.Random(0), 0
    for _ in range(trials):
        rates = []
        for _ in range(problems):
            skill = chance.betavariate(0.5, 0.5)  # problems are easy or hard
            rates.append(sum(chance.random() < skill for _ in range(samples)) / samples)
        low, high = interval(rates)
        hits += low <= 0.5 <= high
    return hits / trials


def test_intervals_hold_the_truth_as_often_as_they_say():
    for samples in (1, 4):
        assert coverage(lambda r, n=samples: share_interval(r, n), samples=samples) > 0.92
        assert coverage(mean_interval, samples=samples) > 0.92
    assert coverage(bootstrap_interval, samples=4, trials=60) > 0.88
    naive = coverage(lambda r: wilson(float(np.mean(r)), 16 * len(r)), samples=16)
    assert naive < 0.8, "samples of a problem are not independent trials"


def test_the_bootstrap_is_repeatable_and_near_the_normal_interval():
    values = [random.Random(place).random() for place in range(200)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) == pytest.approx(mean_interval(values), abs=0.01)
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def test_students_interval_of_few_values():
    """Quantiles of a table: Abramowitz and Stegun, table 26.10."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}
    for freedom, quantile in table.items():
        assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert t_interval([1.0]) == (-math.inf, math.inf)
