"""What a comparison found: curves of each run, means over seeds with bands, and the table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agrpo_megatron.evaluation.statistics import t_interval
from agrpo_megatron.reports.read import after, before, read_run, series
from agrpo_megatron.reports.tables import markdown_table
from agrpo_megatron.reports.text import percent

LAST = 10  # iterations at the end of a run over which entropy is averaged


@dataclass(frozen=True)
class Finished:
    """A finished run of a member: numbers, and curves over its iterations."""

    seed: int
    start: float  # held-out accuracies
    final: float
    iterations: int
    flops: float  # of reinforcement learning
    update_flops: float  # the part without rollouts: updates, and measurements of draws
    cpu_seconds: float  # likewise
    entropy: float  # nats a token, mean of the last iterations
    evaluated: tuple[tuple[int, float], ...]  # iteration, held-out accuracy
    costs: tuple[tuple[float, float], ...]  # FLOPs and CPU seconds up to each iteration
    entropies: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % band, by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the estimate from a value per seed."""
        return cls(float(np.mean(values)), *t_interval(values))


@dataclass(frozen=True)
class Summary:
    """A member's results over its seeds."""

    name: str
    settings: dict[str, Any]
    runs: tuple[Finished, ...]
    final: Estimate
    difference: Estimate | None  # to the baseline, by seed; None: of the baseline, or no pairs
    at_edge: tuple[str, ...]  # settings whose chosen value is the first or the last of several


def read_finished(directory: Path, seed: int) -> Finished:
    """Read a finished run.

    Raises:
        ValueError: the directory holds no run with an evaluation before and after.
    """
    run = read_run(directory)
    first, last = before(run), after(run)
    if first is None or last is None:
        raise ValueError(f"{directory} has no evaluation before and after")
    costs = np.cumsum([[row["flops"], row["timing/cpu"]] for row in run.rl], axis=0)
    entropies = series(run.rl, "entropy")[1]
    x, y = series([row for row in run.evaluations if "accuracy" in row], "accuracy")
    return Finished(
        seed=seed,
        start=first["accuracy"],
        final=last["accuracy"],
        iterations=len(run.rl),
        flops=float(costs[-1, 0]),
        update_flops=float(
            sum(row["update_flops"] + row.get("measuring_flops", 0) for row in run.rl)
        ),
        cpu_seconds=float(costs[-1, 1]),
        entropy=float(entropies[-LAST:].mean()),
        evaluated=tuple((int(at), float(value)) for at, value in zip(x, y, strict=True)),
        costs=((0.0, 0.0), *((float(flops), float(cpu)) for flops, cpu in costs)),
        entropies=tuple(map(float, entropies)),
    )


def difference(ours: Sequence[Finished], theirs: Sequence[Finished]) -> Estimate | None:
    """Return the mean difference of final accuracies over the seeds that both have."""
    final = {run.seed: run.final for run in theirs}
    pairs = [run.final - final[run.seed] for run in ours if run.seed in final]
    return Estimate.of(pairs) if len(pairs) > 1 else None


def best_choice(accuracies: Sequence[Sequence[float]]) -> int | None:
    """Return which choice has the highest mean accuracy, the first of equals; None of none.

    Args:
        accuracies: final accuracies of each choice, over its finished tuning runs.
    """
    means = [float(np.mean(each)) if len(each) else -math.inf for each in accuracies]
    best = int(np.argmax(means))
    return best if means[best] > -math.inf else None


def at_edge(choices: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that were tuned and whose chosen value ends the list."""
    found = []
    for key, value in chosen.items():
        values = list(dict.fromkeys(choice[key] for choice in choices))
        if len(values) > 1 and value in (values[0], values[-1]):
            found.append(key)
    return tuple(found)


def table_rows(summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """Return the cells of the table, best first."""
    return [_cells(summary) for summary in by_accuracy(summaries)]


def by_accuracy(summaries: Sequence[Summary]) -> list[Summary]:
    """Return members in order of their final accuracy, best first."""
    return sorted(summaries, key=lambda summary: (-summary.final.mean, summary.name))


def _cells(summary: Summary) -> dict[str, str]:
    runs, mean = summary.runs, lambda name: float(np.mean([getattr(r, name) for r in summary.runs]))
    settings = {
        k.removeprefix("algorithm.").removeprefix("optimizer."): k for k in summary.settings
    }
    shown = [
        f"{short} {summary.settings[key]:g}{' (edge)' if key in summary.at_edge else ''}"
        for short, key in settings.items()
        if isinstance(summary.settings[key], int | float)
    ]
    other = summary.difference
    return {
        "estimator": f"`{summary.name}`",
        "settings": ", ".join(shown),
        "seeds": str(len(runs)),
        "start": percent(mean("start")),
        "final": _percent_band(summary.final),
        "against the baseline, points": "" if other is None else points_band(other),
        "iterations": f"{mean('iterations'):.0f}",
        "update FLOPs": f"{mean('update_flops'):.2e}",
        "CPU seconds": f"{mean('cpu_seconds'):.0f}",
        "entropy": f"{mean('entropy'):.3f}",
    }


def _percent_band(found: Estimate) -> str:
    return f"{percent(found.mean)} ({percent(found.low)} to {percent(found.high)})"


def points_band(found: Estimate) -> str:
    """Return a difference of shares with its band in percentage points."""
    mean, low, high = (f"{100 * value:+.1f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def write_results(
    folder: Path, summaries: Sequence[Summary], tuned: Mapping[str, Any], failures: Sequence[str]
) -> Path:
    """Write results.json, with all curves, and the table as results.md; returns the latter."""
    members = [asdict(summary) for summary in by_accuracy(summaries)]
    tree = {"members": members, "tuning": dict(tuned), "failures": list(failures)}
    text = json.dumps(tree, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    table = markdown_table(table_rows(summaries), left=("estimator", "settings"))
    lines = "".join(f"- {failure}\n" for failure in failures)
    path = folder / "results.md"
    path.write_text(table + ("\n" + lines if lines else ""), encoding="utf-8")
    return path
