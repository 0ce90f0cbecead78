"""Tasks: problems, their prompts and their reward. Does not import torch."""

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from agrpo_megatron.config.own_code import import_file, is_file_name, split_name
from agrpo_megatron.config.schema import Described, build, describe
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.config.values import MOST_FLOAT, did_you_mean
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.tasks.countdown import Countdown
from agrpo_megatron.tasks.gym import ReasoningGym
from agrpo_megatron.tasks.maths import Gsm8k, Math
from agrpo_megatron.tasks.mixture import Mixture, part_errors
from agrpo_megatron.tasks.own.jsonl import Jsonl
from agrpo_megatron.tasks.sudoku import Sudoku

PREFIX = "task.options."
PART_SETTINGS = ("name", "weight", "options", "train_problems", "eval_problems", "seed", "leaks")
TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (Gsm8k, Math, Countdown, Sudoku, ReasoningGym, Jsonl)
}


def build_task(settings: TaskSettings) -> Task:
    """Build the task that `settings` names; its problems are loaded at their first use.

    Raises:
        ValueError: unknown task, unknown or illegal option, or a setting of another task.
    """
    if settings.name == Mixture.name:
        return _build_mixture(settings)
    if settings.mixture:
        raise ValueError(
            f"task.mixture is for task.name=mixture, not for task.name={settings.name}; use "
            "task.name=mixture, or task.mixture={}"
        )
    cls = _load_class(settings.name) if is_file_name(settings.name) else TASKS.get(settings.name)
    if cls is None:
        names = [*TASKS, Mixture.name]
        raise ValueError(
            f"task.name={settings.name} must be one of {', '.join(names)}, or a file such as "
            f"my_task.py{did_you_mean(settings.name, names)}"
        )
    known = [field.name for field in dataclasses.fields(cls.options_type)]
    _check_names(settings.options, known, prefix=PREFIX, of=f"an option of {settings.name}")
    return cls(settings, build(cls.options_type, settings.options, PREFIX))


def describe_tasks() -> dict[str, list[Described]]:
    """Return every task's options with type, default and help, by task name."""
    return {name: list(describe(cls.options_type, PREFIX)) for name, cls in TASKS.items()}


def _check_names(names: Iterable[object], known: Sequence[str], *, prefix: str, of: str) -> None:
    """Refuse an unknown name; the error has the nearest known name, or all of them."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.65)
            have = f"it has {', '.join(known) or 'none'}"
            fix = f"did you mean {nearest[0]}?" if nearest else have
            raise ValueError(f"{prefix}{name} is not {of}; {fix}")


def _build_mixture(settings: TaskSettings) -> Mixture:
    """Build the tasks of `task.mixture`."""
    if not settings.mixture:
        raise ValueError(
            "task.name=mixture needs task.mixture; write for example "
            "task.mixture={countdown: {weight: 2}, sudoku: {weight: 1}}"
        )
    if settings.options:
        raise ValueError(
            f"task.options={settings.options} is not for task.name=mixture; give each part its "
            f"own, as task.mixture.{next(iter(settings.mixture))}.options"
        )
    trees = settings.mixture.items()
    return Mixture({label: _build_part(settings, label, tree=tree) for label, tree in trees})


def _build_part(settings: TaskSettings, label: Any, *, tree: Any) -> tuple[Task, float]:
    """Return a part of a mixture and its weight; `settings` fills in what the part does not set."""
    key = f"task.mixture.{label}"
    if not isinstance(label, str):
        raise ValueError(f"{key}: the label {label!r} is not text; write it in quotes")
    if not isinstance(tree, dict):
        raise ValueError(f"{key}={tree!r} must be a section; use for example {{weight: 1}}")
    _check_names(tree, PART_SETTINGS, prefix=f"{key}.", of="a setting of a part")
    own: dict[str, Any] = dict(tree)
    weight = own.pop("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight <= MOST_FLOAT:
        raise ValueError(f"{key}.weight={weight!r} must be a number above 0; use for example 1")
    defaults = {**dataclasses.asdict(settings), "mixture": {}, "options": {}, "name": label}
    part = build(TaskSettings, {**defaults, **own}, f"{key}.")
    if part.name == Mixture.name:
        raise ValueError(f"{key}.name=mixture: a mixture holds no mixtures; list their tasks")
    with part_errors(label):
        return build_task(part), float(weight)


def _load_class(name: str) -> type[Task]:
    """Return the task class of `FILE.py` or `FILE.py:CLASS`; `name` defaults to the file's stem.

    Raises:
        ValueError: the file is missing, its import fails, or it has no such class.
    """
    path, wanted = split_name(name)
    module = import_file(path, said=f"task.name={name}")
    classes = {
        key: cls
        for key, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Task) and cls.__module__ == module.__name__
    }
    if wanted in classes or (not wanted and len(classes) == 1):
        cls = classes[wanted] if wanted else next(iter(classes.values()))
        if not hasattr(cls, "name"):
            cls.name = path.stem
        return cls
    found = ", ".join(classes) or "no class"
    raise ValueError(
        f"task.name={name}: {path} holds {found} derived from agrpo_megatron.tasks.base.Task; "
        f"{'name one as ' + str(path) + ':CLASS' if classes else 'derive one'}"
    )
