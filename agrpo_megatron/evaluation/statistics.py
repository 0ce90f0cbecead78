"""Shares and means of an evaluation with their 95% intervals."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of the normal distribution, 95% two-sided
RESAMPLES, SEED = 2000, 0  # of the bootstrap: the interval is reproducible

Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Return the 95% Wilson interval of a share of `count` trials.

    Source: Wilson, Probable inference, 1927.
    """
    scale = 1 + Z * Z / count
    middle = (share + Z * Z / (2 * count)) / scale
    spread = Z / scale * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    low, high = max(0.0, middle - spread), min(1.0, middle + spread)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def share_interval(per_problem: Sequence[float], samples: int) -> Interval:
    """Return the 95% interval of the mean of shares, each of `samples` trials of one problem.

    Trials of one problem are correlated, so they carry less information than as many
    independent ones. The result is Wilson's interval for the number of independent trials with
    the same spread, which is between the number of problems and the number of all trials. With
    one trial per problem it equals Wilson's.
    """
    count, share = len(per_problem), float(np.mean(per_problem))
    variance = float(np.var(per_problem, ddof=1)) / count if count > 1 else 0.0
    worth = share * (1 - share) / variance if variance > 0 else count
    return wilson(share, min(max(worth, count), count * samples))


def mean_interval(per_problem: Sequence[float]) -> Interval:
    """Return the 95% interval of a mean over problems, by the normal approximation."""
    middle, count = float(np.mean(per_problem)), len(per_problem)
    spread = Z * float(np.std(per_problem, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return middle - spread, middle + spread


def t_interval(values: Sequence[float]) -> Interval:
    """Return the 95% interval of a mean over few normal values, such as seeds, by Student's t.

    One value alone has no interval: the result is infinite.
    """
    middle, count = float(np.mean(values)), len(values)
    if count < 2:
        return -math.inf, math.inf
    spread = t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return middle - spread, middle + spread


def t_quantile(freedom: int) -> float:
    """Return what |t| exceeds with a chance of 5%, for so many degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of mathematical functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 100.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return low


def _t_within(t: float, freedom: int) -> float:
    """Return the chance that |t| is lower, by the finite series of whole degrees of freedom."""
    angle, is_odd = math.atan2(t, math.sqrt(freedom)), freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine if is_odd else 1.0), 0.0
    for number in range(2 if is_odd else 1, freedom, 2):
        total += term
        term *= number / (number + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def bootstrap_interval(per_problem: Sequence[float]) -> Interval:
    """Return the 95% percentile interval of the mean over problems, drawn with replacement."""
    values, chance = np.asarray(per_problem, dtype=float), np.random.default_rng(SEED)
    draws = (chance.integers(len(values), size=len(values)) for _ in range(RESAMPLES))
    low, high = np.percentile([values[places].mean() for places in draws], (2.5, 97.5))
    return float(low), float(high)


def pass_at(k: int, *, samples: int, correct: int) -> float:
    """Return the chance that k of the samples, drawn without replacement, hold a correct one.

    Its mean over samplings is the chance that k completions hold a correct one. Source: Chen et
    al., Evaluating large language models trained on code, 2021.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`; `most` always comes last."""
    counts = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*counts, most]
