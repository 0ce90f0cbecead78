"""Held-out accuracies of finished runs against their training FLOPs, and the table of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accuracy_plan import Grid, Line
from compare_results import Estimate, points_band

from agrpo_megatron.reports.read import read_run
from agrpo_megatron.reports.text import compact, flop, percent
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.runs.sizes import measure
from agrpo_megatron.scaling.forecast.disk import parameters
from agrpo_megatron.scaling.forecast.work import count_flops

Reached = dict[int, tuple[float, float]]  # FLOPs and held-out accuracy by iteration of RL


@dataclass(frozen=True)
class Point:
    """What some training reached, over seeds."""

    rl: int  # iterations
    flops: float  # of supervised phase, rollouts and updates; mean over seeds
    accuracies: dict[int, float]  # by seed
    # By seed, the accuracy less that of a supervised phase of the same FLOPs; empty if no phase
    # was as long, or without RL.
    gains: dict[int, float] = field(default_factory=dict)

    @property
    def gain(self) -> Estimate | None:
        """The mean gain with its band; None: too few seeds have one."""
        return Estimate.of([*self.gains.values()]) if len(self.gains) > 1 else None


@dataclass(frozen=True)
class Size:
    """All that a size of the model reached."""

    name: str
    parameters: int
    alone: dict[int, Point]  # by iterations of a supervised phase that no RL follows
    curves: dict[int, tuple[Point, ...]]  # the same for phases that RL follows; first without RL


def read_sizes(lines: Sequence[Line], grid: Grid) -> list[Size]:
    """Return what the finished runs of each size reached; a point needs two seeds.

    Raises:
        ValueError: a size has no two finished seeds of two supervised phases.
    """
    sizes = []
    for name in grid.sizes:
        mine = [line for line in lines if line.size == name]
        each, count = _of_model(mine[0])
        found = {line.supervised: _finished(line, grid, each) for line in mine}
        alone = {n: point for n, runs in found.items() if (point := _point(runs, 0)) is not None}
        if len(alone) < 2:
            raise ValueError(f"{name}: fewer than two supervised phases have two finished seeds")
        curves = {
            line.supervised: tuple(
                _with_gains(point, found, number=number)
                for number in sorted(set[int]().union(*found[line.supervised].values()))
                if (point := _point(found[line.supervised], number)) is not None
            )
            for line in mine
            if line.has_rl and line.supervised in alone
        }
        sizes.append(Size(name, count, alone, curves))
    return sizes


def _of_model(line: Line) -> tuple[int, int]:
    """Return the FLOPs of a supervised iteration, and the parameters."""
    resolved = resolve(line.jobs[0].settings, world_size=1)
    sizes = measure(resolved)
    flops = count_flops(resolved.settings, sizes.train, sizes.held_out, sizes.rows)
    return flops.sft, parameters(resolved.settings)[0]


def _finished(line: Line, grid: Grid, each: int) -> dict[int, Reached]:
    """Return what the finished runs of a line reached, by seed.

    Args:
        each: FLOPs of a supervised iteration.
    """
    found = {}
    for seed, job in zip(grid.seeds, line.jobs, strict=True):
        last = job.settings.train.iterations
        if (job.directory / "metrics.jsonl").is_file():
            reached = read_reached(job.directory, supervised=line.supervised * each)
            if last in reached:
                found[seed] = reached
    return found


def read_reached(directory: Path, *, supervised: int) -> Reached:
    """Return FLOPs and accuracy at each evaluation of a run.

    Args:
        supervised: FLOPs of its supervised phase.
    """
    run = read_run(directory)
    spent = np.cumsum([supervised, *(row["flops"] for row in run.rl)])
    return {
        row["iteration"]: (float(spent[row["iteration"]]), row["accuracy"])
        for row in run.evaluations
        if "accuracy" in row
    }


def _point(runs: Mapping[int, Reached], number: int) -> Point | None:
    """Return the point at an iteration of RL; None if fewer than two seeds have it."""
    found = {seed: reached[number] for seed, reached in runs.items() if number in reached}
    if len(found) < 2:
        return None
    flops = float(np.mean([spent for spent, _ in found.values()]))
    return Point(number, flops, {seed: accuracy for seed, (_, accuracy) in found.items()})


def _with_gains(point: Point, found: Mapping[int, Mapping[int, Reached]], *, number: int) -> Point:
    """Return a point with its gains over supervised phases of the same FLOPs, by seed.

    Args:
        found: by iterations of the supervised phase and seed.
    """
    gains = {}
    for seed, accuracy in point.accuracies.items():
        alone = [runs[seed][0] for runs in found.values() if seed in runs]
        other = at_flops(alone, point.flops)
        if number and other is not None:
            gains[seed] = accuracy - other
    return Point(point.rl, point.flops, point.accuracies, gains)


def at_flops(points: Sequence[tuple[float, float]], flops: float) -> float | None:
    """Return the accuracy at some FLOPs, between the two nearest points; None outside of them.

    It is linear in the logarithm of the FLOPs.
    """
    points = sorted(points)
    if not points or not points[0][0] <= flops <= points[-1][0]:
        return None
    x, y = zip(*points, strict=True)
    return float(np.interp(math.log(flops), np.log(x), y))


def table_rows(sizes: Sequence[Size], budgets: Sequence[int]) -> list[dict[str, str]]:
    """Return the cells of the table: of each size first supervised phases alone, then RL."""
    rows = []
    for size in sizes:
        rows += [_row(size, n, point) for n, point in size.alone.items()]
        rows += [
            _row(size, n, point)
            for n, points in size.curves.items()
            for point in points
            if point.rl in budgets
        ]
    return rows


def _row(size: Size, supervised: int, point: Point) -> dict[str, str]:
    gain, values = point.gain, [*point.accuracies.values()]
    return {
        "size": f"{size.name}, {compact(size.parameters)}",
        "supervised": str(supervised),
        "RL": str(point.rl),
        "trained with": flop(point.flops),
        "accuracy (seeds)": f"{percent(float(np.mean(values)))} "
        f"({', '.join(f'{100 * value:.0f}' for value in values)})",
        "less SFT alone, points (95 %)": "" if gain is None else points_band(gain),
    }
