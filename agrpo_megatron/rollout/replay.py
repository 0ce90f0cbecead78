"""Replay: the rollouts that another run stored, read in place of sampling; nothing is written."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.rollout.cache import find_round
from agrpo_megatron.runs.directory import digests_so_far
from agrpo_megatron.runs.stored_rollouts import ROLLOUTS, round_path, stored_run
from agrpo_megatron.types import GradedRollouts


@dataclass(frozen=True)
class Replay:
    """The run whose rollouts are replayed."""

    source: Path  # its directory
    runs: frozenset[str]  # digests that its rollouts may name

    def note(self) -> str:
        """Describe the replay on one line."""
        return f"replays the rollouts of {self.source} (train.from_rollouts); nothing is sampled"


def open_replay(settings: Settings) -> Replay | None:
    """Return the replay of `train.from_rollouts`; None for a run that samples.

    Raises:
        ValueError: the directory holds no run.
    """
    if settings.train.from_rollouts is None:
        return None
    source = Path(settings.train.from_rollouts)
    return Replay(source, frozenset(digests_so_far(source, *stored_run(source))))


def replayed_round(
    replay: Replay, number: int, rollout_ids: Tensor, ranks: Ranks, settings: Settings
) -> GradedRollouts:
    """Return a stored round, without the work and the time of its sampling; every rank.

    Raises:
        RuntimeError: a rank cannot read the round.
    """
    started, path = time.perf_counter(), round_path(replay.source / ROLLOUTS, number)
    found = find_round(path, rollout_ids, ranks, runs=replay.runs, sampling=settings.sampling)
    if found is None:
        raise RuntimeError(
            f"train.from_rollouts={replay.source}: {path} is missing, damaged, or of another run "
            "on at least one rank; restore it and run the same command again"
        )
    seconds = {"timing/rollout": time.perf_counter() - started, "timing/reward": 0.0}
    return replace(found, tokens=0, bubble=0.0, seconds=seconds, passes=0)
