"""Grading beside the sampler: in worker processes, where a task does not bound itself."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.tasks.sandbox import Sandbox
from agrpo_megatron.types import Problem, Reward


class Call(NamedTuple):
    """A completion to grade: by the task's verdict where `raw` is there, else by its reward."""

    problem: Problem
    completion: str  # cut at end-of-text, without special tokens
    raw: str | None = None  # all of it, special tokens written out


class Grader:
    """Grades batches of completions in order; `start` returns at once.

    A grader that raises, hangs, or runs out of memory costs its completion a defined score: the
    reward says so in `failure`. Workers start with the first batch, and end with this process.
    """

    def __init__(self, task: Task, settings: TaskSettings):
        self._task, self._settings = task, settings
        self._batches: deque[Future[list[Reward]]] = deque()
        self._sandbox: Sandbox | None = None
        self._thread: ThreadPoolExecutor | None = None
        if not task.is_bounded:
            chosen = settings.grader
            self._sandbox = Sandbox(
                "agrpo_megatron.tasks.grading:load_grader",
                settings,
                seconds=chosen.seconds,
                memory=chosen.memory,
                workers=chosen.workers,
            )
            # Talks to the workers, so that neither side waits for the other to read.
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grader")

    @property
    def has_workers(self) -> bool:
        """Say whether grading goes on beside this process."""
        return self._sandbox is not None

    def start(self, calls: Sequence[Call]) -> None:
        """Hand in a batch."""
        if self._thread is not None:
            self._batches.append(self._thread.submit(self._in_workers, list(calls)))
            return
        done: Future[list[Reward]] = Future()
        done.set_result([self._here(call) for call in calls])
        self._batches.append(done)

    def collect(self) -> list[Reward]:
        """Wait for the oldest batch; one reward for each call.

        Raises:
            RuntimeError: the workers could not be started, or ended twice.
        """
        return self._batches.popleft().result()

    def grade(self, calls: Sequence[Call]) -> list[Reward]:
        """Hand in a batch and wait for it; nothing else may be under way."""
        assert not self._batches
        self.start(calls)
        return self.collect()

    def close(self) -> None:
        """End the workers."""
        if self._sandbox is not None and self._thread is not None:
            self._sandbox.close()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _here(self, call: Call) -> Reward:
        try:
            return grade_call(self._task, call)
        except Exception as error:  # whatever a reward raises is this completion's loss alone
            return self._failed(f"{type(error).__name__}: {error}")

    def _in_workers(self, calls: list[Call]) -> list[Reward]:
        assert self._sandbox is not None
        try:
            outcomes = self._sandbox.run(calls)
        except RuntimeError:  # the server was killed, by the system's want of memory for instance
            outcomes = self._sandbox.run(calls)
        return [
            outcome.value if outcome.failure is None else self._failed(outcome.failure)
            for outcome in outcomes
        ]

    def _failed(self, reason: str) -> Reward:
        return Reward(self._settings.grader.failed_score, False, failure=reason)


def grade_call(task: Task, call: Call) -> Reward:
    """Grade one completion.

    Raises:
        ValueError: the score is not finite.
    """
    problem, completion, raw = call
    if raw is None:
        reward = task.reward(problem, completion)
    else:
        reward = task.verdict(problem, completion, raw)
    if not math.isfinite(reward.score):
        raise ValueError(f"the score is {reward.score}")
    return reward


def load_grader(settings: TaskSettings) -> Callable[..., Reward]:
    """Build the task in the workers' server and return its handler; loads no problems."""
    from agrpo_megatron.tasks import build_task

    task = build_task(settings)
    return lambda *call: grade_call(task, Call(*call))
