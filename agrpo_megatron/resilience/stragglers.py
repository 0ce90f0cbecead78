"""Which rank is slow, and in which section of a run.

A rank's time in a section is its work plus its waits for other ranks. Ranks that share tokens
(tensor, context and pipeline parallelism) or sum their gradients (data parallelism, in an update)
wait for each other and so look equally slow. Rollouts and rewards are separate for each replica,
so they show which replica is slow. Only kernel times show which rank of a replica is slow.
"""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.sections import NAMES

LEAST = 0.01  # seconds; shorter sections are not compared
SLOW = 1.5  # a straggler takes over this multiple of the median
STREAK = 5  # reports in a row after which a straggler is reported


class Stragglers:
    """Compares ranks, report by report; every rank makes every call."""

    def __init__(self) -> None:
        self._streaks: dict[str, tuple[int, int]] = {}  # section: rank, and reports in a row

    def report(
        self, seconds: dict[str, float], ranks: Ranks, *, warn: Callable[[str], None]
    ) -> dict[str, float]:
        """Compare the ranks.

        Args:
            seconds: time in each section since the last report, on this rank.
            warn: receives a sentence on each rank that was a straggler STREAK times in a row.

        Returns:
            Metrics, the same on every rank, none for one rank: `section/NAME` (seconds of the
            slowest rank), `straggler/NAME` (these over the median; 1 if all ranks are equal),
            `straggler/NAME_rank` (the slowest rank).
        """
        if ranks.world_size == 1:
            return {}
        mine = torch.tensor([seconds.get(name, 0.0) for name in NAMES], device=ranks.device)
        gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
        dist.all_gather(gathered, mine)
        columns = torch.stack(gathered, dim=1).tolist()  # [sections, ranks]
        metrics: dict[str, float] = {}
        for name, times in zip(NAMES, columns, strict=True):
            slowest = max(times)
            if slowest < LEAST:
                continue
            rank = times.index(slowest)
            ratio = slowest / max(LEAST, statistics.median(times))
            metrics[f"section/{name}"] = slowest
            metrics[f"straggler/{name}"] = ratio
            metrics[f"straggler/{name}_rank"] = float(rank)
            if self._is_straggler(name, rank, ratio):
                warn(
                    f"rank {rank} was the slowest in section {name} {STREAK} times in a row, "
                    f"now {slowest:.1f} s, {ratio:.1f} times the median"
                )
        return metrics

    def _is_straggler(self, name: str, rank: int, ratio: float) -> bool:
        """Return whether a rank has just been slow STREAK times in a row."""
        last, count = self._streaks.get(name, (rank, 0))
        count = count + 1 if rank == last else 1
        self._streaks[name] = (rank, count if ratio > SLOW else 0)
        return ratio > SLOW and count == STREAK
