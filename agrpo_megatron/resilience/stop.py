"""Being asked to stop, by a signal or because the job's time is nearly up; ranks agree on it.

Whatever asks reaches some ranks first. A rank only notes that it was asked; all of them stop at a
point on which they agreed: after an iteration, or in the same turn of a rollout.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.resilience.sections import NAMES, Sections

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
JOB_END = "AGRPO_JOB_END"  # seconds since the epoch at which the job is killed
SPARE = 1.5  # of the longest reward, update and checkpoint: what a learned margin is
LEAST_MARGIN = 10.0  # seconds


class Stopped(Exception):
    """The ranks agreed to stop; says why. What was done is saved by whoever catches it."""


class NoStop:
    """A run that is never asked to stop."""

    reason = None


class Stop:
    """Whether this rank was asked to stop.

    Args:
        margin: seconds before the job's end at which it counts as asked; None learns them.
    """

    def __init__(self, sections: Sections, *, margin: float | None = None):
        self._sections, self._margin = sections, margin
        self._asked: str | None = None
        end = os.environ.get(JOB_END)
        self._end = float(end) if end else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as a question; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Return why to stop; None while nobody asked."""
        if self._asked is None and self._end is not None:
            left = self._end - time.time()
            if left < self.margin:
                self._asked = f"the job's time is up in {max(0.0, left):.0f} s"
        return self._asked

    @property
    def margin(self) -> float:
        """Return how long before the job's end to stop: what cannot be cut and a save fit in."""
        if self._margin is not None:
            return self._margin
        longest = self._sections.longest
        needed = sum(longest.get(name, 0.0) for name in ("reward", "update", "checkpoint"))
        return LEAST_MARGIN + SPARE * needed

    def _hear(self, number: int, _frame: object) -> None:
        self._asked = self._asked or f"asked by {signal.Signals(number).name}"


def agree(stop: Stop | NoStop, sections: Sections, ranks: Ranks) -> str | None:
    """Return why to stop, if any rank was asked; the same on every rank, called by all.

    They also learn from each other how long each section took at most.
    """
    longest = [sections.longest.get(name, 0.0) for name in NAMES]
    values = torch.tensor([float(stop.reason is not None), *longest], device=ranks.device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    asked, *longest = values.tolist()
    sections.learn({name: took for name, took in zip(NAMES, longest, strict=True) if took > 0})
    if not asked:
        return None
    return next(reason for reason in gather_objects(stop.reason) if reason is not None)


class Turns:
    """Let the ranks of a replica agree, turn by turn, whether to end a rollout.

    The answer to a turn's question is read some turns later, in the same one everywhere: by then
    it has arrived, and no pipeline stage waits for one behind it.
    """

    def __init__(self, stop: Stop | NoStop, ranks: Ranks):
        self._stop, self._group = stop, ranks.replica
        self._lag = 2 * ranks.pipeline.size
        self._under_way: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def is_asked(self) -> bool:
        """Ask in this turn; says what was answered to an earlier one."""
        is_asked = self._stop.reason is not None
        if self._group is None:
            return is_asked
        value = torch.tensor([int(is_asked)])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append((value, work))
        return len(self._under_way) > self._lag and self._answer()

    def close(self) -> None:
        """Wait for the answers that nobody needs any more; the same number on every rank."""
        while self._under_way:
            self._answer()

    def _answer(self) -> bool:
        value, work = self._under_way.popleft()
        work.wait()
        return bool(value)
