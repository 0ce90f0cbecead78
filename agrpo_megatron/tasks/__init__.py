"""Tasks: problems, their prompts and their reward. Imports no torch of its own."""

import dataclasses
import difflib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from agrpo_megatron.config import Described, build, describe
from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.tasks.countdown import Countdown
from agrpo_megatron.tasks.gym import ReasoningGym
from agrpo_megatron.tasks.maths import Gsm8k, Math
from agrpo_megatron.tasks.mixture import Mixture, errors_of
from agrpo_megatron.tasks.sudoku import Sudoku

__all__ = ["TASKS", "Task", "build_task", "describe_tasks"]

PREFIX = "task.options."
TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (Gsm8k, Math, Countdown, Sudoku, ReasoningGym)
}


def build_task(settings: TaskSettings) -> Task:
    """Build the task that `settings` names; its problems are loaded when they are first asked for.

    Raises:
        ValueError: unknown task, or unknown or illegal option.
    """
    if settings.name == Mixture.name:
        return _build_mixture(settings)
    cls = _load_class(settings.name) if ".py" in settings.name else TASKS.get(settings.name)
    if cls is None:
        raise ValueError(
            f"task.name={settings.name} must be one of {', '.join(TASKS)}, {Mixture.name}, or a "
            "file such as my_task.py"
        )
    known = [field.name for field in dataclasses.fields(cls.options_type)]
    for key in settings.options:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            have = f"it has {', '.join(known)}" if known else "it has none"
            fix = f"did you mean {nearest[0]}?" if nearest else have
            raise ValueError(f"{PREFIX}{key} is not an option of {settings.name}; {fix}")
    return cls(settings, build(cls.options_type, settings.options, PREFIX))


def describe_tasks() -> dict[str, list[Described]]:
    """Return every task's options with type, default and help, by task name."""
    return {name: list(describe(cls.options_type, PREFIX)) for name, cls in TASKS.items()}


def _build_mixture(settings: TaskSettings) -> Mixture:
    """Build the tasks of `task.mixture`; what a part leaves out it takes from `settings`."""
    if not settings.mixture:
        raise ValueError(
            "task.name=mixture needs task.mixture; write for example "
            "task.mixture={countdown: {weight: 2}, sudoku: {weight: 1}}"
        )
    parts = {}
    for label, tree in settings.mixture.items():
        key = f"task.mixture.{label}"
        if not isinstance(tree, dict):
            raise ValueError(f"{key}={tree!r} must be a section; use for example {{weight: 1}}")
        own = {name: value for name, value in tree.items() if name != "weight"}
        weight = tree.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ValueError(f"{key}.weight={weight!r} must be a number above 0; use for example 1")
        shared: Any = {
            **dataclasses.asdict(dataclasses.replace(settings, mixture={}, options={})),
            "name": label,
        }
        part = build(TaskSettings, {**shared, **own}, f"{key}.")
        if part.name == Mixture.name:
            raise ValueError(f"{key}.name=mixture: a mixture holds no mixtures; list their tasks")
        with errors_of(label):
            parts[label] = (build_task(part), float(weight))
    return Mixture(parts)


def _load_class(name: str) -> type[Task]:
    """Return the task class of a file, `FILE.py` or `FILE.py:CLASS`.

    Raises:
        ValueError: no such file, it raises when it is imported, or it holds no such class.
    """
    file, _, wanted = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"task.name={name}: {path} does not exist; give the path of a Python file")
    module_name = f"agrpo_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"task.name={name}: importing {path} raised {type(error).__name__}: {error}"
        ) from error
    classes = {
        key: cls
        for key, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Task) and cls.__module__ == module_name
    }
    if wanted in classes or (not wanted and len(classes) == 1):
        return classes[wanted] if wanted else next(iter(classes.values()))
    found = ", ".join(classes) or "no class"
    raise ValueError(
        f"task.name={name}: {path} holds {found} derived from agrpo_megatron.tasks.base.Task; "
        f"{'name one as ' + str(path) + ':CLASS' if classes else 'derive one'}"
    )
