"""Several tasks as one: each with a weight, its own prompts and its own reward."""

import contextlib
import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from agrpo_megatron.tasks.base import Split, Splits, Task
from agrpo_megatron.tasks.data import without_leaks
from agrpo_megatron.tasks.own.service import Asked
from agrpo_megatron.types import Problem, Prompt, Reward

# Settings of a part, as its errors write them.
_KEYS = re.compile(r"\btask\.(?=(?:name|options|train_problems|eval_problems|seed|leaks)\b)")


@contextlib.contextmanager
def part_errors(label: str) -> Iterator[None]:
    """Rewrite errors: the settings of a part get their names within the mixture."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_KEYS.sub(lambda _: f"task.mixture.{label}.", str(error))) from error


class Mixture(Task):
    """Tasks and their weights by label; each problem has the label of its task.

    Training draws from a task in proportion to its weight.
    """

    name = "mixture"

    def __init__(self, parts: dict[str, tuple[Task, float]]):
        super().__init__(next(iter(parts.values()))[0].settings, None)
        self.parts = parts
        self.is_bounded = all(task.is_bounded for task, _ in parts.values())
        if any(task.services is not None for task, _ in parts.values()):
            self.services = _MixedServices({label: task for label, (task, _) in parts.items()})

    def prepare(self) -> None:
        """Import what the tasks need to grade."""
        for task, _ in self.parts.values():
            task.prepare()

    def load(self) -> Splits:
        """Return the problems of all tasks, one after the other, without leaks between them."""
        train, held_out = self._load_parts("train"), self._load_parts("eval")
        for label, (task, _) in self.parts.items():
            self.notes += [f"{label}: {note}" for note in task.notes]
        parts = self.parts.items()
        for (label, (task, _)), (other, (holder, _)) in itertools.permutations(parts, 2):
            if _class_name(task) == _class_name(holder):
                mine, theirs = train[label], held_out[other]
                with part_errors(label):
                    train[label], notes = without_leaks(
                        mine, theirs, task=task, holder=holder, name=label, by=f" by {other}"
                    )
                self.notes += notes
        return {"train": _labelled(train), "eval": _labelled(held_out)}

    @property
    def shares(self) -> Sequence[tuple[int, float]]:
        """Return the number of training problems and the weight of each task."""
        counts = Counter(problem.task for problem in self.problems("train"))
        return [(counts[label], weight) for label, (_, weight) in self.parts.items()]

    def prompt(self, problem: Problem) -> Prompt:
        """Return the training prompt of the problem's task."""
        return self._task(problem).prompt(problem)

    def eval_prompt(self, problem: Problem) -> Prompt:
        """Return the evaluation prompt of the problem's task."""
        return self._task(problem).eval_prompt(problem)

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade by the problem's task."""
        return self._task(problem).reward(problem, completion)

    @property
    def code_files(self) -> list[str]:
        """Return the files of all tasks."""
        return [file for task, _ in self.parts.values() for file in task.code_files]

    def known_solution(self, problem: Problem, split: Split) -> str:
        """Return a right completion of the problem's task."""
        return self._task(problem).known_solution(problem, split)

    def verdict(self, problem: Problem, completion: str, raw: str) -> Reward:
        """Grade for evaluation by the problem's task."""
        return self._task(problem).verdict(problem, completion, raw)

    def summary(self, problems: Sequence[Problem], verdicts: Sequence[Reward]) -> dict[str, float]:
        """Return every task's own metrics, below its label."""
        found = {}
        for label, (task, _) in self.parts.items():
            mine = [(p, v) for p, v in zip(problems, verdicts, strict=True) if p.task == label]
            metrics = task.summary([p for p, _ in mine], [v for _, v in mine])
            found |= {f"{label}/{name}": value for name, value in metrics.items()}
        return found

    def show_examples(self, count: int, *, among: Sequence[Problem] | None = None) -> None:
        """Show each task's own training problems; those that leak into another one are left out."""
        for label, (task, _) in self.parts.items():
            task.show_examples(count, among=[p for p in self.problems("train") if p.task == label])

    def examples_for(self, problem: Problem) -> Sequence[tuple[Prompt, str]]:
        """Return the examples of the problem's task."""
        return self._task(problem).examples_for(problem)

    def _task(self, problem: Problem) -> Task:
        return self.parts[problem.task][0]

    def _load_parts(self, split: Split) -> dict[str, Sequence[Problem]]:
        found = {}
        for label, (task, _) in self.parts.items():
            with part_errors(label):
                found[label] = task.problems(split)
        return found


def problems_by_task(task: Task, split: Split) -> dict[str, list[Problem]]:
    """Return the problems of a split by label: the parts of a mixture, or the single task."""
    if not isinstance(task, Mixture):
        return {task.settings.name: list(task.problems(split))}
    found: dict[str, list[Problem]] = {label: [] for label in task.parts}
    for problem in task.problems(split):
        found[problem.task].append(problem)
    return found


class _MixedServices:
    """The services of the parts; each scores the completions of its own part."""

    def __init__(self, tasks: dict[str, Task]):
        self._services = {label: t.services for label, t in tasks.items() if t.services is not None}

    def add(
        self, asked: Sequence[Asked], rewards: Sequence[Reward], *, closed: threading.Event
    ) -> list[Reward]:
        """Return the rewards with what the services of their parts add."""
        found = list(rewards)
        for label, services in self._services.items():
            places = [place for place, (problem, _) in enumerate(asked) if problem.task == label]
            mine, local = [asked[p] for p in places], [rewards[p] for p in places]
            for place, reward in zip(places, services.add(mine, local, closed=closed), strict=True):
                found[place] = reward
        return found

    def check(self) -> None:
        """Ask the services of all parts."""
        for label, services in self._services.items():
            with part_errors(label):
                services.check()


def _class_name(task: Task) -> tuple[str, str]:
    """Return a class's name; a class that is loaded twice from its file has one name."""
    return type(task).__module__, type(task).__qualname__


def _labelled(problems: dict[str, Sequence[Problem]]) -> list[Problem]:
    return [
        replace(problem, key=f"{label}: {problem.key}", task=label)
        for label, mine in problems.items()
        for problem in mine
    ]
