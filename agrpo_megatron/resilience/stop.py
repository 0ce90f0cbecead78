"""Preemption: stop on a signal or near the job's time limit, at the same point on all ranks.

A request reaches some ranks first. Each rank only records it; all ranks then stop at an agreed
point: after an iteration, or in the same turn of a rollout. Ctrl-C is such a request; a second one
ends the process at once.
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
from agrpo_megatron.resilience.exit_status import LAUNCHERS
from agrpo_megatron.resilience.failure import ends_all, outlive_launcher
from agrpo_megatron.resilience.sections import NAMES, Sections

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
CTRL_C = "interrupted by Ctrl-C"
GOES_ON = "\nCtrl-C: stopping and saving; press it again to end at once, without saving\n"
JOB_END = "AGRPO_JOB_END"  # seconds since the epoch at which the job is killed
SPARE = 1.5  # the learned margin, as a multiple of the longest reward, update and checkpoint
LEAST_MARGIN = 10.0  # seconds


class Stopped(Exception):
    """The ranks agreed to stop, for this reason. The handler saves the finished work."""


class NoStop:
    """A run that is never asked to stop."""

    reason = None


class Stop:
    """Whether this rank was asked to stop.

    Args:
        margin: seconds before the job's end at which to stop; None learns the margin.
    """

    def __init__(self, sections: Sections, *, margin: float | None = None):
        self._sections, self._margin = sections, margin
        self._asked: str | None = None
        # Ranks of a launcher have no terminal: it passes Ctrl-C on, and a second one as SIGTERM.
        has_launcher = any(name in os.environ for name in LAUNCHERS)
        self._second = (signal.SIGINT, signal.SIGTERM) if has_launcher else (signal.SIGINT,)
        end = os.environ.get(JOB_END)
        self._end = float(end) if end else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as stop requests; only a main thread can.

        After an error that ends all ranks, signals stay ignored until this one has printed it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        except BaseException as error:
            if ends_all() and not isinstance(error, Stopped):
                before.clear()
                outlive_launcher()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Return why to stop, or None without a request."""
        if self._asked is None and self._end is not None:
            left = self._end - time.time()
            if left < self.margin:
                self._asked = f"the job's time is up in {max(0.0, left):.0f} s"
        return self._asked

    @property
    def margin(self) -> float:
        """Return how many seconds before the job's end to stop: enough for an update and a save."""
        if self._margin is not None:
            return self._margin
        longest = self._sections.longest
        needed = sum(longest.get(name, 0.0) for name in ("reward", "update", "checkpoint"))
        return LEAST_MARGIN + SPARE * needed

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._asked == CTRL_C and number in self._second:
            raise KeyboardInterrupt
        if number != signal.SIGINT:
            self._asked = self._asked or f"asked by {signal.Signals(number).name}"
            return
        self._asked = CTRL_C
        if os.environ.get("RANK", "0") == "0":
            os.write(2, GOES_ON.encode())  # a print could be inside another one


def agree(stop: Stop | NoStop, sections: Sections, ranks: Ranks) -> str | None:
    """Return why to stop, if any rank has a request; equal on all ranks, called by every rank.

    The ranks also share the longest time of each section.
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

    The answer of a turn is read a fixed number of turns later, equal on all ranks: by then it has
    arrived, and no pipeline stage waits for a later stage.
    """

    def __init__(self, stop: Stop | NoStop, ranks: Ranks):
        self._stop, self._group = stop, ranks.replica
        self._lag = 2 * ranks.pipeline.size
        self._pending: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def is_asked(self) -> bool:
        """Ask in this turn; returns the answer of an earlier turn."""
        is_asked = self._stop.reason is not None
        if self._group is None:
            return is_asked
        value = torch.tensor([int(is_asked)])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((value, work))
        return len(self._pending) > self._lag and self._answer()

    def close(self) -> None:
        """Wait for the remaining answers; every rank has the same number of them."""
        while self._pending:
            self._answer()

    def _answer(self) -> bool:
        value, work = self._pending.popleft()
        work.wait()
        return bool(value)
