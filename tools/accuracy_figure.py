"""The figure of accuracy against compute: a column for each size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accuracy_points import Point, Size
from compare_results import Estimate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from agrpo_megatron.reports.plots.style import Theme, dress, new_figure, write_png
from agrpo_megatron.reports.text import compact


def write_figure(sizes: Sequence[Size], path: Path) -> Path:
    """Write the figure as a PNG at `path`; return the path."""
    return write_png(path, lambda theme: accuracy_figure(sizes, theme))


def accuracy_figure(sizes: Sequence[Size], theme: Theme) -> Figure:
    """Draw accuracies above, and what RL gains for the same FLOPs below."""
    figure = new_figure(11, 6.6)
    rows = {"sharex": True, "sharey": "row", "height_ratios": (1.5, 1)}
    grid = figure.subplots(2, len(sizes), squeeze=False, **rows)
    for (upper, lower), size in zip(grid.T.reshape(-1, 2), sizes, strict=True):
        dress(upper, f"{size.name}: {compact(size.parameters)} parameters", percent=True)
        dress(lower, "RL less SFT of the same FLOPs")
        lower.axhline(0.0, color=theme.ink, linewidth=1.2)
        _line(upper, [*size.alone.values()], theme.ink, "SFT alone")
        for (count, points), colour in zip(size.curves.items(), theme.cycle(), strict=False):
            _line(upper, points, colour, f"RL after {count} iterations of SFT")
            _gains(lower, points, colour)
        upper.set_xscale("log")
        upper.set_ylim(-0.02, 1.02)
        lower.set_xlabel("training FLOPs")
        lower.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e12:g}T"))
        lower.xaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_ylabel("held-out accuracy, greedy")
    grid[1, 0].set_ylabel("points")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _line(axes: Axes, points: Sequence[Point], colour: str, label: str) -> None:
    x, found = [point.flops for point in points], [point.accuracy for point in points]
    _band(axes, x, found, colour)
    axes.plot(x, [each.mean for each in found], color=colour, marker="o", ms=4.5, label=label)


def _gains(axes: Axes, points: Sequence[Point], colour: str) -> None:
    pairs = [(point.flops, gain) for point in points if (gain := point.gain) is not None]
    x = [flops for flops, _ in pairs]
    found = [Estimate(100 * g.mean, 100 * g.low, 100 * g.high) for _, g in pairs]
    _band(axes, x, found, colour)
    axes.plot(x, [each.mean for each in found], color=colour, marker="o", ms=4.5)


def _band(axes: Axes, x: Sequence[float], found: Sequence[Estimate], colour: str) -> None:
    low, high = np.array([(each.low, each.high) for each in found]).reshape(-1, 2).T
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0, zorder=1)
