"""Bytes that a run writes to its directory, at most at one time."""

import math
from dataclasses import dataclass

from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.scaling.parameters import stage_parameters, trained_parameters, weight_spec

ALONE = ParallelSettings()
STATES = 12  # bytes of a weight: float32, with both moments; moments are saved as float32
SHORT_WEIGHT = 2  # of the weight itself, where the float32 one is the optimizer's copy
UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
TEXT_TOKEN = 4  # bytes of an id of raw texts
SAMPLE = 20  # bytes of a token in samples.jsonl: its text and its step; measured


@dataclass(frozen=True)
class Disk:
    """Bytes of the parts of a run directory."""

    checkpoint: int  # each
    checkpoints: int  # how many there are at one time, the one that is being written included
    rollouts: int
    samples: int
    texts: int = 0  # ids of raw texts

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return self.checkpoint * self.checkpoints + self.rollouts + self.samples + self.texts


def parameters(settings: Settings) -> tuple[int, int]:
    """Return the parameters of the model without adapters, and how many numbers are trained."""
    spec = weight_spec(settings)
    whole = stage_parameters(spec, ALONE, stage=0)
    return sum(whole), sum(trained_parameters(spec, ALONE, stage=0))


def disk(settings: Settings, *, rollout_bytes: int, text_tokens: int = 0) -> Disk:
    """Return what a run writes.

    Rollouts are removed by the checkpoint that has their update, unless all are kept.

    Args:
        rollout_bytes: of the stored rollouts of an iteration.
        text_tokens: ids of raw texts.
    """
    kept, iterations = settings.checkpoint, settings.train.iterations
    between = min(iterations, kept.interval or iterations)
    stored = iterations if kept.keep_rollouts else between * kept.rollouts
    tokens = settings.sampling.completion_length * settings.logging.samples
    return Disk(
        checkpoint=parameters(settings)[1] * _bytes(settings),
        checkpoints=_checkpoints(settings),
        rollouts=0 if settings.train.from_rollouts else stored * rollout_bytes,
        samples=SAMPLE * tokens * (iterations + evaluations_of(settings)),
        texts=TEXT_TOKEN * text_tokens,
    )


def _checkpoints(settings: Settings) -> int:
    """Return how many checkpoints there are at one time, if every evaluation is the best so far.

    Kept are the newest ones of each phase, and the best one; the oldest one of a phase is removed
    after a new one of this phase is complete. So those of the supervised phase stay during RL.
    """
    kept, iterations = settings.checkpoint, settings.train.iterations
    supervised = _saves(settings.sft.iterations, kept.interval)
    best = settings.evaluation.interval if kept.best is not None else 0
    saves = _saves(iterations, kept.interval, best)
    newest = min(saves, kept.keep + 1)
    is_best = best > 0 and saves > newest
    return max(
        min(supervised, kept.keep + 1),
        min(supervised, kept.keep) + newest + is_best,
    )


def _saves(iterations: int, *intervals: int) -> int:
    """Return after how many iterations a phase saves: those at the intervals, and the last one.

    Args:
        intervals: one or two; 0: never.
    """
    every = [interval for interval in intervals if interval]
    counts = [iterations // interval for interval in every]
    both = iterations // math.lcm(*every) if len(every) == 2 else 0
    at_last = iterations > 0 and all(iterations % interval for interval in every)
    return sum(counts) - both + at_last


def evaluations_of(settings: Settings) -> int:
    """Return how many held-out evaluations a run makes: before, at intervals, and at the end."""
    iterations, every = settings.train.iterations, settings.evaluation.interval
    if not iterations:
        return 1
    return 2 + ((iterations - 1) // every if every else 0)


def _bytes(settings: Settings) -> int:
    return STATES + (0 if settings.precision == "fp32" else SHORT_WEIGHT)


def size(count: float) -> str:
    """Return bytes as `2.5 GB`, in powers of 1000."""
    name, unit = next((pair for pair in UNITS if count >= pair[1]), ("bytes", 1))
    return f"{count / unit:.3g} {name}"
