"""Grading in parallel with sampling: in worker processes if a task's reward is not bounded."""

import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import Split, Task
from agrpo_megatron.tasks.rewards.scores import as_reward
from agrpo_megatron.tasks.sandbox.client import Sandbox, ServerEnded
from agrpo_megatron.tasks.sandbox.worker import Outcome, Trace, failed
from agrpo_megatron.types import Problem, Reward

SPANS = 1000  # of workers that are kept
MAX_GRADED = 1000, 100  # problems of a split whose solutions are graded: at once, in workers


class Call(NamedTuple):
    """A completion to grade: by the task's verdict if `raw` is given, else by its reward."""

    problem: Problem
    completion: str  # the text before end-of-text, without special tokens
    raw: str | None = None  # the whole text, special tokens included


class Failure(NamedTuple):
    """Why a reward failed."""

    reason: str
    trace: Trace | None  # of an exception


class _Batch(NamedTuple):
    calls: list[Call]
    owner: object
    rewards: Future[list[Reward]]


class Grader:
    """Grades completions; called by one thread.

    A completion scores `task.grader.failed_score` if its reward raises, hangs, runs out of memory,
    ends its process or is not finite; `Reward.failure` has the reason. If a reward kills the
    workers' server twice, every completion of its batch gets this score.
    Workers start with the first batch, and end with this process, even if it is killed.
    """

    def __init__(self, task: Task, settings: TaskSettings):
        # Whether processes or services grade in parallel with this one.
        self.has_workers = not task.is_bounded or task.services is not None
        self.busy = defaultdict[object, float](
            float
        )  # seconds of workers for each owner of batches
        # Begin and end of the latest work of workers, in seconds since 1970.
        self.spans: deque[tuple[float, float]] = deque(maxlen=SPANS)
        self.first_failure: Failure | None = None  # with a traceback, if any has one
        self._task, self._settings = task, settings
        self._waiting: deque[_Batch] = deque()
        self._closed = threading.Event()
        self._sandbox = Sandbox(
            "agrpo_megatron.tasks.grading:load_grader",
            settings,
            seconds=settings.grader.seconds,
            memory=settings.grader.memory,
            workers=settings.grader.workers,
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grader")

    def start(self, calls: Sequence[Call], *, owner: object = None) -> Future[list[Reward]]:
        """Submit a batch; with workers this returns at once.

        Args:
            owner: of the batch. Batches of one owner may be graded together; those of another
                wait, and delay none.

        The future's `result` waits for one reward per call, and raises a RuntimeError if the
        workers cannot start.
        """
        batch = _Batch(list(calls), owner, Future())
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
        self._closed.set()
        self._sandbox.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _grade_waiting(self) -> None:
        """Grade all waiting batches of an owner as one: workers do not idle between batches."""
        batches = list[_Batch]()
        while self._waiting and self._waiting[0].owner is (batches or self._waiting)[0].owner:
            batches.append(self._waiting.popleft())
        if not batches:
            return
        started, began = time.perf_counter(), time.time()
        try:
            rewards = iter(self._grade([call for batch in batches for call in batch.calls]))
        except Exception as error:
            for batch in batches:
                batch.rewards.set_exception(error)
            return
        self.busy[batches[0].owner] += time.perf_counter() - started
        self.spans.append((began, time.time()))
        for batch in batches:
            batch.rewards.set_result([next(rewards) for _ in batch.calls])

    def _grade(self, calls: list[Call]) -> list[Reward]:
        """Grade by workers, or here if the task is bounded, and then by services."""
        is_local = self._task.is_bounded
        local = list(map(self._grade_inline, calls)) if is_local else self._in_workers(calls)
        if self._task.services is None:
            return local
        asked = [(call.problem, call.completion) for call in calls]
        found = self._task.services.add(asked, local, closed=self._closed)
        return [self._reward(Outcome(reward)) for reward in found]

    def _in_workers(self, calls: list[Call]) -> list[Reward]:
        for _ in range(2):  # another process may have killed the server
            try:
                outcomes = self._sandbox.run(calls)
            except ServerEnded:
                if self._closed.is_set():
                    raise
                continue
            return [self._reward(outcome) for outcome in outcomes]
        return [self._reward(Outcome(None, "the workers were killed"))] * len(calls)

    def _grade_inline(self, call: Call) -> Reward:
        try:
            return self._reward(Outcome(grade_call(self._task, call)))
        except Exception as error:  # any error of a reward affects only this completion
            return self._reward(failed(error))

    def _reward(self, outcome: Outcome) -> Reward:
        """Return the reward of a call; keep its failure if it is the first one."""
        failure = outcome.failure or outcome.value.failure
        known = self.first_failure
        if failure and (known is None or (known.trace is None and outcome.trace is not None)):
            self.first_failure = Failure(failure, outcome.trace)
        if outcome.failure is None:
            return outcome.value
        return Reward(self._settings.grader.failed_score, False, failure=outcome.failure)


def grade_call(task: Task, call: Call) -> Reward:
    """Grade one completion; convert the numbers of the `Reward` to plain floats.

    A plain number is a reward too, and correct from 1 on; so is true or false.

    Raises:
        TypeError: the task returned something else.
        ValueError: the score, or a part of it, is not finite.
    """
    problem, completion, raw = call
    if raw is None:
        reward = as_reward(task.reward(problem, completion))
    else:
        reward = as_reward(task.verdict(problem, completion, raw))
    score = _finite("score", reward.score)
    parts = {str(name): _finite(str(name), part) for name, part in reward.parts.items()}
    return Reward(score, bool(reward.correct), parts, reward.failure)


def failing(problems: Sequence[Problem], rewards: Sequence[Reward], most: float) -> str:
    """Return of a task how many of its rewards failed if it is more than a share; else nothing."""
    by_task: dict[str, list[bool]] = {}
    for problem, reward in zip(problems, rewards, strict=True):
        by_task.setdefault(problem.task, []).append(reward.failure is not None)
    for label, failures in by_task.items():
        if sum(failures) > most * len(failures):
            return f"{label}{': ' * bool(label)}{sum(failures)} of {len(failures)} rewards"
    return ""


def failing_error(found: str, firsts: Iterable[Failure | None], *, when: str) -> ValueError:
    """Return the error of a run whose rewards fail; its note is the first traceback.

    Args:
        found: from `failing`.
        firsts: the first failure of each rank.
    """
    failures = [first for first in firsts if first is not None]
    first = next((failure for failure in failures if failure.trace is not None), failures[0])
    place = f" at {first.trace.place}" if first.trace is not None and first.trace.place else ""
    error = ValueError(
        f"{found} {when} failed, the first{place} ({first.reason}); fix that, or use "
        "task.grader.most_failed=1 to train on what does not fail"
    )
    if first.trace is not None:
        error.add_note(first.trace.text)
    return error


def grade_solutions(task: Task, grader: Grader, split: Split) -> list[tuple[Problem, Reward]]:
    """Grade the known solutions of a split.

    `MAX_GRADED` limits the problems of each task; they are evenly spread.
    """
    by_task: dict[str, list[Problem]] = {}
    for problem in task.problems(split):
        by_task.setdefault(problem.task, []).append(problem)
    chosen = [
        (problem, gold)
        for problems in by_task.values()
        for problem in problems[:: math.ceil(len(problems) / MAX_GRADED[grader.has_workers])]
        if (gold := task.known_solution(problem, split))
    ]
    calls = [Call(p, gold, gold if split == "eval" else None) for p, gold in chosen]
    rewards = grader.grade(calls) if calls else []
    return [(problem, reward) for (problem, _), reward in zip(chosen, rewards, strict=True)]


def wrong_solutions(
    task: Task, graded: Sequence[tuple[Problem, Reward]], split: Split
) -> list[str]:
    """Return a note for each task that refuses some of its graded solutions."""
    notes, totals = [], Counter(problem.task for problem in task.problems(split))
    for label, total in totals.items():
        mine = [(problem, reward) for problem, reward in graded if problem.task == label]
        wrong = [(p.key, reward.failure) for p, reward in mine if not reward.correct]
        if wrong:
            key, failure = wrong[0]
            notes.append(
                f"{split}: the gold answers of {len(wrong)} of {len(mine)} problems (of "
                f"{total}) are graded as wrong, such as of {key!r:.80}"
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
