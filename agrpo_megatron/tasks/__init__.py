"""Tasks: problems, their prompts and their reward. Imports no torch of its own."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Protocol

from agrpo_megatron.config import Described, build, describe
from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.tasks.countdown import Countdown
from agrpo_megatron.tasks.generated import Split
from agrpo_megatron.tasks.sudoku import Sudoku
from agrpo_megatron.types import Problem, Reward

PREFIX = "task.options."
TASKS = {cls.name: cls for cls in (Countdown, Sudoku)}


class Task(Protocol):
    """Problems, how they are put to the model, and how its answers are graded."""

    name: str

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return a split's problems: the same ones every time, no key in both splits."""
        ...

    def prompt(self, problem: Problem) -> str:
        """Return the text that the completion follows."""
        ...

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade a completion, cut at end-of-text; any text at all is graded, none raises."""
        ...


def build_task(settings: TaskSettings) -> Task:
    """Build the task that `settings` names, its problems included.

    Raises:
        ValueError: unknown task, unknown or illegal option, or more problems asked than exist.
    """
    if settings.name not in TASKS:
        raise ValueError(f"task.name={settings.name} must be one of {', '.join(TASKS)}")
    cls = TASKS[settings.name]
    known = [field.name for field in dataclasses.fields(cls.options_type)]
    for key in settings.options:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            fix = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            raise ValueError(f"{PREFIX}{key} is not an option of {settings.name}; {fix}")
    options: Any = build(cls.options_type, settings.options, PREFIX)
    return cls(settings, options)


def describe_tasks() -> dict[str, list[Described]]:
    """Return every task's options with type, default and help, by task name."""
    return {name: list(describe(cls.options_type, PREFIX)) for name, cls in TASKS.items()}
