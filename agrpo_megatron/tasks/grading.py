"""Grading in parallel with sampling: in worker processes if a task's reward is not bounded."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import Split, Task
from agrpo_megatron.tasks.sandbox.client import Sandbox, ServerEnded
from agrpo_megatron.types import Problem, Reward

MAX_GRADED = 1000, 100  # problems of a split whose solutions are graded: at once, in workers


class Call(NamedTuple):
    """A completion to grade: by the task's verdict if `raw` is given, else by its reward."""

    problem: Problem
    completion: str  # the text before end-of-text, without special tokens
    raw: str | None = None  # the whole text, special tokens included


class _Batch(NamedTuple):
    calls: list[Call]
    rewards: Future[list[Reward]]


class Grader:
    """Grades completions; called by one thread.

    A completion scores `task.grader.failed_score` if its reward raises, hangs, runs out of memory,
    ends its process or is not finite; `Reward.failure` has the reason. If a reward kills the
    workers' server twice, every completion of its batch gets this score.
    Workers start with the first batch, and end with this process, even if it is killed.
    """

    def __init__(self, task: Task, settings: TaskSettings):
        self.has_workers = not task.is_bounded  # processes that grade in parallel with this one
        self.busy = 0.0  # seconds with active workers
        self._task, self._settings = task, settings
        self._waiting: deque[_Batch] = deque()
        self._is_closed = False
        self._sandbox = Sandbox(
            "agrpo_megatron.tasks.grading:load_grader",
            settings,
            seconds=settings.grader.seconds,
            memory=settings.grader.memory,
            workers=settings.grader.workers,
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grader")

    def start(self, calls: Sequence[Call]) -> Future[list[Reward]]:
        """Submit a batch; with workers this returns at once.

        The future's `result` waits for one reward per call, and raises a RuntimeError if the
        workers cannot start.
        """
        batch = _Batch(list(calls), Future())
        if self.has_workers:
            self._waiting.append(batch)
            self._thread.submit(self._grade_waiting)
        else:
            batch.rewards.set_result([self._grade_inline(call) for call in calls])
        return batch.rewards

    def grade(self, calls: Sequence[Call]) -> list[Reward]:
        """Submit a batch and wait for it."""
        return self.start(calls).result()

    def close(self) -> None:
        """End the workers; pending calls are lost."""
        self._is_closed = True
        self._sandbox.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _grade_waiting(self) -> None:
        """Grade all waiting batches as one: workers do not idle between batches."""
        batches = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not batches:
            return
        started = time.perf_counter()
        try:
            rewards = iter(self._in_workers([call for batch in batches for call in batch.calls]))
        except Exception as error:
            for batch in batches:
                batch.rewards.set_exception(error)
            return
        self.busy += time.perf_counter() - started
        for batch in batches:
            batch.rewards.set_result([next(rewards) for _ in batch.calls])

    def _in_workers(self, calls: list[Call]) -> list[Reward]:
        for _ in range(2):  # another process may have killed the server
            try:
                outcomes = self._sandbox.run(calls)
            except ServerEnded:
                if self._is_closed:
                    raise
                continue
            return [o.value if o.failure is None else self._failed(o.failure) for o in outcomes]
        return [self._failed("the workers were killed")] * len(calls)

    def _grade_inline(self, call: Call) -> Reward:
        try:
            return grade_call(self._task, call)
        except Exception as error:  # any error of a reward affects only this completion
            return self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, reason: str) -> Reward:
        return Reward(self._settings.grader.failed_score, False, failure=reason)


def grade_call(task: Task, call: Call) -> Reward:
    """Grade one completion; convert the numbers of the `Reward` to plain floats.

    Raises:
        TypeError: the task did not return a `Reward`.
        ValueError: the score, or a part of it, is not finite.
    """
    problem, completion, raw = call
    if raw is None:
        reward = task.reward(problem, completion)
    else:
        reward = task.verdict(problem, completion, raw)
    if not isinstance(reward, Reward):
        raise TypeError(f"the reward is of type {type(reward).__name__}, not Reward")
    score = _finite("score", reward.score)
    parts = {str(name): _finite(str(name), part) for name, part in reward.parts.items()}
    return Reward(score, bool(reward.correct), parts, reward.failure)


def wrong_solutions(task: Task, grader: Grader, split: Split) -> list[str]:
    """Grade the solutions of a split; return a note for each task that refuses some.

    `MAX_GRADED` limits the problems of each task; they are evenly spread.
    """
    by_task: dict[str, list[Problem]] = {}
    for problem in task.problems(split):
        by_task.setdefault(problem.task, []).append(problem)
    notes = []
    for problems in by_task.values():
        spread = problems[:: math.ceil(len(problems) / MAX_GRADED[grader.has_workers])]
        golds = [(p, gold) for p in spread if (gold := task.known_solution(p, split))]
        calls = [Call(p, gold, gold if split == "eval" else None) for p, gold in golds]
        rewards = zip(golds, grader.grade(calls) if calls else [], strict=True)
        wrong = [(p.key, reward.failure) for (p, _), reward in rewards if not reward.correct]
        if wrong:
            key, failure = wrong[0]
            notes.append(
                f"{split}: the gold answers of {len(wrong)} of {len(golds)} problems (of "
                f"{len(problems)}) are graded as wrong, such as of {key!r:.80}"
                f"{f' ({failure})' if failure else ''}: no completion may ever solve them"
            )
    return notes


def load_grader(settings: TaskSettings) -> Callable[..., Reward]:
    """Build the task in the workers' server and return its handler; loads no problems."""
    task = build_task(settings)
    task.prepare()
    return lambda *call: grade_call(task, Call(*call))


def _finite(name: str, value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the {name} is {number}")
    return number
