"""Choose the number of drawn steps: noise from independent draws, candidates, running averages.

Pure functions of tensors and numbers. The gradient of half a batch, at some number of draws, is the
gradient of all steps of its rollouts plus noise of the draws. The draws of two entries are
independent, so inner products of three entries give the noise of each, and inner products of two
halves the noise of the rollouts: both without bias, and without the gradient of all steps.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

KEPT = 0.8  # weight of earlier measurements of a candidate at each further one
NEAR = 4  # candidates of a measurement after the first: half, own, double, and a precise reference
MARGIN = 1.05  # of nearly equal candidates, up to this factor, the one with fewest draws is taken


@dataclass(frozen=True)
class Candidate:
    """Running sums over the measurements of a number of draws; later ones weigh more."""

    draws: float = 0.0  # variance of a gradient by drawn steps
    rollouts: float = 0.0  # its variance by sampled completions
    work: float = 0.0  # of an iteration, rollouts included, in tokens of a forward pass
    weight: float = 0.0  # of the measurements together

    def after(self, draws: float, rollouts: float, work: float) -> "Candidate":
        """Return the sums after a further measurement."""
        old = (self.draws, self.rollouts, self.work, self.weight)
        new = (draws, rollouts, work, 1.0)
        return Candidate(*(KEPT * a + b for a, b in zip(old, new, strict=True)))

    @property
    def is_known(self) -> bool:
        """Return whether noise and cost are known: an estimate of a variance may be negative."""
        return self.rollouts > 0

    @property
    def noise(self) -> float:
        """Return the variance by drawn steps over that by completions."""
        return max(0.0, self.draws) / self.rollouts

    @property
    def cost(self) -> float:
        """Return the work for a unit of signal to noise, up to a factor that all share."""
        return (1 + self.noise) * self.work / self.weight


@dataclass(frozen=True)
class State:
    """All that later choices depend on; checkpoints contain it. Work is in forward tokens."""

    chosen: int  # draws per rollout
    spent: float = 0.0  # work of all measurements
    made: float = 0.0  # work of all iterations, rollouts included
    each: float = 0.0  # work of the latest measurement, over the tokens of its draws
    candidates: dict[int, Candidate] = field(default_factory=dict)  # by draws


def from_record(record: Mapping[str, Any]) -> State:
    """Return the state that `asdict` and JSON made a record of."""
    found = {int(draws): Candidate(**sums) for draws, sums in record["candidates"].items()}
    return State(**{**record, "candidates": found})


def learned(
    state: State,
    counts: Sequence[int],
    noise: Sequence[float],
    rollouts: float,
    works: Sequence[float],
) -> State:
    """Add a measurement to the running averages, and choose among the measured numbers of draws.

    Args:
        counts: draws of each entry; entries of equal draws become their mean.
        noise: variance by the draws of each entry.
        rollouts: variance by completions.
        works: work of an iteration with the draws of each entry.
    """
    candidates = dict(state.candidates)
    for count in set(counts):
        own = [entry for entry, other in enumerate(counts) if other == count]
        mean = sum(noise[entry] for entry in own) / len(own)
        old = candidates.get(count, Candidate())
        candidates[count] = old.after(mean, rollouts, works[own[0]])
    chosen = best({count: candidates[count] for count in counts}, state.chosen)
    return replace(state, candidates=candidates, chosen=chosen)


def components(sketches: Tensor, *, is_exact: bool) -> tuple[list[float], float]:
    """Return the variance of a batch's gradient by the draws of each entry, and by its rollouts.

    For entries i, j, k the expected value of <g_i - g_j, g_i - g_k> on the same rollouts is the
    noise of i. As j and k serve the two entries of the most draws, whose noise is least; or twice
    the last one, where it is exact.

    Args:
        sketches: [entries >= 3, 2, SIZE] of the halves of a batch, in order of the draws.
        is_exact: the last entry scored all steps.
    """
    places, halves = range(len(sketches)), sketches[:, 0] - sketches[:, 1]
    draws = []
    for entry in places:
        pair = [other for other in places if other != entry][-2:]
        first, second = (sketches[entry] - sketches[-1 if is_exact else j] for j in pair)
        draws.append(float((first * second).sum()) / 4)
    return draws, float((halves[-1] * halves[-1 if is_exact else -2]).sum()) / 4


def ladder(steps: int, most: int) -> list[int]:
    """Return the candidates: powers of two below the live steps, and all steps.

    Args:
        steps: denoising steps of the sampler, which no rollout exceeds.
        most: the most live steps of any rollout.
    """
    powers = [2**exponent for exponent in range(most.bit_length()) if 2**exponent < most]
    return [*powers, steps]


def window(rungs: Sequence[int], chosen: int) -> list[int]:
    """Return the rungs from the one below the chosen number of draws on; `NEAR` if there are."""
    place = bisect_right(rungs, chosen) - 1
    first = max(0, min(place - 1, len(rungs) - NEAR))
    return list(rungs[first : first + NEAR])


def best(candidates: Mapping[int, Candidate], chosen: int) -> int:
    """Return the number of draws with the most signal for the work; `chosen` if none is known."""
    known = {draws: each.cost for draws, each in candidates.items() if each.is_known}
    least = min(known.values(), default=0.0)
    return min((draws for draws, cost in known.items() if cost <= MARGIN * least), default=chosen)
