"""Measured points of weak and strong scaling, read from finished runs; their table and figure."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from agrpo_megatron.config.parallel import data_ranks, layout_name
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.launch.speed import measured_rows
from agrpo_megatron.reports.plots.style import Theme, dress, new_figure
from agrpo_megatron.reports.text import compact
from agrpo_megatron.runs.progress import RUN_SETTINGS
from agrpo_megatron.scaling.forecast.disk import parameters

CLOSE = 1.02  # largest ratio of two batches that count as equal


@dataclass(frozen=True)
class Point:
    """A finished run; its median iteration."""

    run: Path
    model: str  # its number of parameters
    layout: str
    split: str  # what is split among the ranks; empty: one rank
    ranks: int
    completions: int  # of an iteration
    seconds: float  # on a CPU processor time of the first rank, in which it does not wait
    flops: float  # of all ranks
    bubbles: tuple[float, float]  # shares of the slots in which a stage waits: rollout, update
    is_cpu: bool
    scaling: str = ""  # "weak", "strong", "both" for the fewest ranks, or "other"

    @property
    def rate(self) -> float:
        """Return the FLOPs for each second and rank."""
        return self.flops / self.ranks / self.seconds


def read_point(run: Path) -> Point:
    """Return the point of a finished run.

    Raises:
        ValueError: it is no run, or had too few iterations.
    """
    ranks, rows = measured_rows(run)
    settings = load(Settings, run / RUN_SETTINGS)
    is_cpu = "memory/allocated_peak" not in rows[-1]

    def median(key: str) -> float:
        return statistics.median(row.get(key, 0.0) for row in rows)

    return Point(
        run,
        compact(parameters(replace(settings, parallel=ParallelSettings()))[0]),
        layout_name(settings.parallel, ranks),
        _split(settings.parallel, ranks),
        ranks,
        settings.algorithm.prompts_per_iteration * settings.algorithm.group_size,
        seconds=median("timing/cpu" if is_cpu else "timing/iteration"),
        flops=median("flops"),
        bubbles=(median("rollout/bubble"), median("update/bubble")),
        is_cpu=is_cpu,
    )


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the runs among folders and what they hold, such as the members of a sweep."""
    found = [folder for given in folders for folder in (given, *sorted(given.glob("*/")))]
    return [folder for folder in found if (folder / RUN_SETTINGS).is_file()]


def with_scaling(points: Sequence[Point]) -> list[Point]:
    """Return points with their kind of scaling, by the completions of the fewest ranks."""
    found = list[Point]()
    for point in points:
        first = first_of(points, point)
        weak = _equal(point.completions / point.ranks, first.completions / first.ranks)
        strong = _equal(point.completions, first.completions)
        kinds = {(True, True): "both", (True, False): "weak", (False, True): "strong"}
        found.append(replace(point, scaling=kinds.get((weak, strong), "other")))
    return sorted(found, key=lambda p: (p.model, p.scaling, p.split, p.ranks))


def first_of(points: Sequence[Point], point: Point) -> Point:
    """Return the fastest run of a point's model on the fewest ranks."""
    own = [one for one in points if one.model == point.model]
    fewest = min(one.ranks for one in own)
    return max((one for one in own if one.ranks == fewest), key=lambda one: one.rate)


def table_row(point: Point, points: Sequence[Point]) -> dict[str, str]:
    """Return the row of a point; efficiency is its rate over that of the fewest ranks."""
    return {
        "model": point.model,
        "scaling": point.scaling,
        "layout": point.layout,
        "ranks": str(point.ranks),
        "completions": str(point.completions),
        "GFLOP of a rank": f"{point.flops / point.ranks / 1e9:.1f}",
        "CPU s" if point.is_cpu else "s": f"{point.seconds:.2f}",
        "efficiency": f"{100 * point.rate / first_of(points, point).rate:.0f} %",
        "bubble of rollout": f"{100 * point.bubbles[0]:.0f} %",
        "of update": f"{100 * point.bubbles[1]:.0f} %",
    }


def scaling_figure(points: Sequence[Point], theme: Theme) -> Figure:
    """Draw efficiency over ranks: a line for each model, and what it splits."""
    figure, where = new_figure(11, 4.4), "on a CPU" if points[0].is_cpu else "on GPUs"
    ranks = sorted({point.ranks for point in points})
    lines = sorted({(point.model, point.split) for point in points if point.split})
    several = len({model for model, _ in lines}) > 1
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("weak", "strong"), strict=True):
        dress(axes, f"{kind} scaling, measured {where}", percent=True)
        own = [point for point in points if point.scaling in (kind, "both")]
        for (model, split), colour in zip(lines, theme.cycle(), strict=False):
            best = _best(own, points, model=model, split=split)
            label = f"{model}, {split}" if several else split
            axes.plot(
                sorted(best), [best[n] for n in sorted(best)], "o-", color=colour, label=label
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.15)
        axes.set_xlabel("ranks (FLOPs for each second and rank, over those of the fewest ranks)")
        axes.legend(loc="lower left", frameon=False)
    return figure


def _best(
    own: Sequence[Point], points: Sequence[Point], *, model: str, split: str
) -> dict[int, float]:
    """Return the best efficiency of a line by ranks; one rank is in each line of a model."""
    found = defaultdict[int, float](float)
    for point in own:
        if point.model == model and point.split in ("", split):
            share = point.rate / first_of(points, point).rate
            found[point.ranks] = max(found[point.ranks], share)
    return found


def _split(layout: ParallelSettings, ranks: int) -> str:
    sizes = {
        "data": data_ranks(layout, ranks),
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "expert": layout.expert,
    }
    return " and ".join(name for name, size in sizes.items() if size > 1)


def _equal(one: float, other: float) -> bool:
    return max(one, other) <= CLOSE * min(one, other)
