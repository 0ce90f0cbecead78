"""Families of runs: they differ in the seed, and in nothing else that alters a number."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from agrpo_megatron.config.schema import flatten
from agrpo_megatron.reports.read import Run, series
from agrpo_megatron.reports.text import number, written
from agrpo_megatron.runs.history.changes import FREE

SEED = "run.seed"
LONGEST = 60  # characters of a label
AXES = {"iteration": "RL iteration", "flops": "FLOPs", "seconds": "hours"}
Curve = tuple[np.ndarray, np.ndarray]


def families(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs by family; a label is what sets a family apart from the others."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        own = tuple(sorted((key, written(value)) for key, value in _alike(run).items()))
        groups.setdefault(own or (str(run.path),), []).append(run)
    members = list(groups.values())
    keys = list(differences([own[0] for own in members]))
    found: dict[str, list[Run]] = {}
    for own in members:
        found[_label(own, keys, taken=found)] = own
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings, other than the seed, in which runs differ: each run's value as text."""
    keys = dict.fromkeys(key for run in runs for key in _alike(run))
    values = {key: [written(_alike(run).get(key)) for run in runs] for key in keys}
    return {key: own for key, own in values.items() if len(set(own)) > 1}


def _alike(run: Run) -> dict[str, Any]:
    """Return the settings that runs of a family have in common; options of a task one by one."""
    left_out = tuple(f"{name}." for name in (*FREE, SEED))
    flat = flatten(run.settings)
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(left_out)}


def _label(own: Sequence[Run], keys: Sequence[str], *, taken: Iterable[str]) -> str:
    """Return the settings that set a family apart, or the name of its first run."""
    first = own[0]
    parts = [f"{key.rpartition('.')[2]}={written(_alike(first).get(key))}" for key in keys]
    label, name = ", ".join(parts), first.path.resolve().name
    if not label or len(label) > LONGEST or label in taken:
        label = name if len(own) == 1 else f"{name} and {len(own) - 1} more"
    return label if label not in taken else str(first.path)


def curve(run: Run, key: str, *, phase: str, axis: str) -> Curve:
    """Return a metric along an axis of `AXES`, float [n] each; empty where it is not logged.

    Args:
        phase: rl or eval.
    """
    rows = run.rl if phase == "rl" else run.evaluations
    iterations, values = series(rows, key)
    if axis == "iteration" or not len(values):
        return iterations, values
    places = _places(run, axis)
    known = np.array([iteration in places for iteration in iterations])
    return np.array([places[i] for i in iterations[known]], dtype=float), values[known]


def _places(run: Run, axis: str) -> dict[float, float]:
    """Return where on an axis the run was after each RL iteration; 0 is before the first one."""
    if axis == "seconds" and all(number(row, "totals/seconds") for row in run.rl):
        rows = (*(row for row in run.evaluations if row["iteration"] == 0), *run.rl)
        return {row["iteration"]: (number(row, "totals/seconds") or 0.0) / 3600 for row in rows}
    each = "flops" if axis == "flops" else "timing/iteration"
    steps = [(row["iteration"], number(row, each) or 0.0) for row in run.rl]
    scale = 1.0 if axis == "flops" else 1 / 3600
    sums = np.cumsum([step for _, step in steps]) * scale
    found = {i: float(s) for (i, _), s in zip(steps, sums, strict=True)}
    return {0: 0.0, **found} if sums.any() else {}
