"""Selection of training problems: by pass rate, or by having a solution."""

import json
from collections.abc import Sequence
from pathlib import Path

from agrpo_megatron.config.settings import SftSettings, TaskSettings
from agrpo_megatron.tasks.base import NoTask, Split, Task
from agrpo_megatron.tasks.mixture import Mixture
from agrpo_megatron.types import Problem

FIX = (
    "give the completions.jsonl of `agrpo evaluate RUN evaluation.split=train evaluation.samples=8`"
)
type Rates = dict[tuple[str, str], float]  # by the task's label or name, and the problem's key


def filter_by_pass_rate(task: Task, settings: TaskSettings) -> None:
    """Keep the training problems with a pass rate in the range; mutates the task and its notes.

    A problem without a pass rate in the file is kept.

    Raises:
        ValueError: the file cannot be read, rates no training problem, or leaves none of a task
            or of a part of a mixture.
    """
    if settings.pass_rates is None or isinstance(task, NoTask):
        return
    rates = _read_rates(settings.pass_rates)
    problems = task.problems("train")
    known = {problem.key: _rate(task, problem, rates) for problem in problems}
    rated = [rate for rate in known.values() if rate is not None]
    if not rated:
        raise ValueError(
            f"task.pass_rates={settings.pass_rates} rates no training problem of task "
            f"{settings.name}; {FIX}"
        )
    low, high = settings.pass_rate_low, settings.pass_rate_high
    below, above = _outside(rated, settings)
    span = f"task.pass_rate_low={low:g} to task.pass_rate_high={high:g}"
    for label in dict.fromkeys(problem.task for problem in problems):
        mine = [known[problem.key] for problem in problems if problem.task == label]
        lower, higher = _outside(mine, settings)
        if lower + higher == len(mine):
            part = f" of task.mixture.{label}" if label else ""
            raise ValueError(
                f"{span} leaves no training problem{part}: of {len(mine)}, {lower} have a lower "
                f"pass rate and {higher} a higher one; widen it"
            )
    unrated = len(problems) - len(rated)
    rest = f"; {unrated} without a pass rate are kept" if unrated else ""
    task.notes.append(
        f"{span}: {below + above} of {len(problems)} training problems left out, {below} passed "
        f"less often and {above} more often{rest}"
    )

    def is_wanted(split: Split, problem: Problem) -> bool:
        rate = None if split == "eval" else known[problem.key]
        return rate is None or low <= rate <= high

    task.keep(is_wanted)


def solved_problems(
    task: Task, settings: SftSettings
) -> tuple[list[Problem], Sequence[tuple[int, float]]]:
    """Return the first problems of each task with a solution, for `sft`, and their shares.

    Raises:
        ValueError: no problem has a solution.
    """
    problems, start = task.problems("train"), 0
    solved: list[Problem] = []
    shares, total = [], 0
    for count, weight in task.shares:
        first = problems[start : start + count][: settings.problems]
        mine = [problem for problem in first if problem.solution]
        solved += mine
        total += len(first)
        shares.append((len(mine), weight))
        start += count
    if not solved:
        name = task.name if isinstance(task, Mixture) else task.settings.name
        chosen = f" that sft.problems={settings.problems} selects" if settings.problems else ""
        raise ValueError(
            f"sft.iterations={settings.iterations} needs solutions, but none of the "
            f"{total} training problems of task {name}{chosen} has one; use sft.iterations=0, "
            "or data with solutions"
        )
    return solved, shares


def epoch_size(shares: Sequence[tuple[int, float]]) -> int:
    """Return the problems of one epoch: those of all tasks with a weight.

    Args:
        shares: problems and weight of each task.
    """
    return sum(count for count, weight in shares if weight)


def _outside(rates: Sequence[float | None], settings: TaskSettings) -> tuple[int, int]:
    """Return how many pass rates are below and above the range."""
    low, high = settings.pass_rate_low, settings.pass_rate_high
    known = [rate for rate in rates if rate is not None]
    return sum(rate < low for rate in known), sum(rate > high for rate in known)


def _read_rates(path: str) -> Rates:
    """Return the share of right completions of each problem of a file.

    Raises:
        ValueError: the file is missing, or no evaluation wrote it.
    """
    marks: dict[tuple[str, str], list[bool]] = {}
    number = 0
    try:
        for line in Path(path).read_text(encoding="utf-8").split("\n"):
            number += 1
            if line.strip():
                found = json.loads(line)
                mark = {True: True, False: False}[found["correct"]]
                marks.setdefault((found["task"], found["key"]), []).append(mark)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"({type(error).__name__}: {error})" + f" in line {number}" * (number > 0)
        raise ValueError(f"task.pass_rates={path} cannot be read {reason}; {FIX}") from None
    return {key: sum(right) / len(right) for key, right in marks.items()}


def _rate(task: Task, problem: Problem, rates: Rates) -> float | None:
    """Return a problem's pass rate, measured in the mixture or in an evaluation of its task."""
    names, keys = [task.settings.name, task.name, problem.task], [problem.key]
    if isinstance(task, Mixture):
        names.append(task.parts[problem.task][0].settings.name)
        keys.append(problem.key.removeprefix(f"{problem.task}: "))
    found = (rates.get((name, key)) for name in names for key in keys)
    return next((rate for rate in found if rate is not None), None)
