"""Seconds of measured work, as a sum of what each kind of it takes."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class Work:
    """What a rank computes and sends, by kind."""

    flops: float
    numbers: float = 0.0  # that operations without products write
    drawn: float = 0.0  # logits
    layers: float = 0.0  # that are launched one after another
    passes: float = 0.0
    messages: float = 0.0  # collectives, and sends to another stage
    sent: float = 0.0  # bytes

    def times(self, count: float) -> "Work":
        """Return so many times the work."""
        return Work(*(count * number for number in astuple(self)))

    def plus(self, other: "Work") -> "Work":
        """Return this work and other work."""
        return Work(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def alone(self) -> "Work":
        """Return the work without what is sent."""
        return replace(self, messages=0.0, sent=0.0)


@dataclass(frozen=True)
class Fit:
    """Seconds of one unit of each kind of work."""

    flops: float
    numbers: float = 0.0
    drawn: float = 0.0
    layers: float = 0.0
    passes: float = 0.0
    messages: float = 0.0
    sent: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return the seconds of some work."""
        return sum(a * b for a, b in zip(astuple(self), astuple(work), strict=True))


@dataclass(frozen=True)
class Measured:
    """What runs or benchmarks measured."""

    rollout: Fit
    update: Fit
    rollout_share: float  # of the counted FLOPs, which ran
    update_share: float
    rest: float  # seconds of each completion outside rollout and update
    text: str
    has_exchange: bool = False  # what is sent is part of the fit; else the links' rates count


def fit(points: Sequence[tuple[Work, float]]) -> Fit:
    """Return the seconds of each kind of work that fit measured ones best, none negative.

    One measurement gives a rate of FLOPs alone; n of them have n - 1 kinds at most. Errors are
    relative, and all choices of kinds are compared.

    Args:
        points: work, and its seconds.
    """
    rows = np.array([[*astuple(work)] for work, _ in points]) / [[took] for _, took in points]
    kinds, best = len(fields(Work)), None
    most = max(1, min(kinds, len(points) - 1))
    for size in range(1, most + 1):
        for chosen in itertools.combinations(range(kinds), size):
            if 0 not in chosen:
                continue
            part = rows[:, chosen]
            scale = np.abs(part).max(axis=0)
            scale[scale == 0] = 1.0
            found = np.linalg.lstsq(part / scale, np.ones(len(points)), rcond=None)[0] / scale
            if (found < 0).any():
                continue
            error = float(np.square(part @ found - 1).sum())
            if best is None or error < best[0]:
                best = error, dict(zip(chosen, found.tolist(), strict=True))
    assert best is not None
    return Fit(*(best[1].get(kind, 0.0) for kind in range(kinds)))
