"""The figure of accuracy against compute: a column for each size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accuracy_points import Point, Size
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from agrpo_megatron.reports.plots.style import Theme, dress, new_figure, write_png
from agrpo_megatron.reports.text import compact

Values = Sequence[tuple[float, Sequence[float]]]  # FLOPs, and a value for each seed


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
        for (count, points), colour in zip(size.curves.items(), theme.cycle(), strict=False):
            _line(upper, _accuracies(points), colour, f"RL after {count} iterations of SFT")
            _line(lower, [(p.flops, [*p.gains.values()]) for p in points if p.gain], colour)
        _line(upper, _accuracies([*size.alone.values()]), theme.ink, "SFT alone")
        upper.set_xscale("log")
        upper.margins(x=0.04)
        lower.set_xlabel("training FLOPs")
        lower.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        lower.xaxis.set_major_formatter(EngFormatter(sep=""))
        lower.xaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_ylabel("held-out accuracy, greedy")
    grid[1, 0].set_ylabel("points of accuracy")
    lower.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:+.0f}" if value else "0")
    )
    handles, labels = grid[0, 0].get_legend_handles_labels()
    look = {"ncols": len(labels), "frameon": False, "columnspacing": 1.4}
    title = "lines: mean of the seeds; bands: lowest to highest seed"
    figure.legend(handles, labels, loc="outside lower center", title=title, **look)
    return figure


def _accuracies(points: Sequence[Point]) -> Values:
    return [(point.flops, [*point.accuracies.values()]) for point in points]


def _line(axes: Axes, values: Values, colour: str, label: str = "") -> None:
    """Draw the mean over seeds with a band from the lowest to the highest."""
    x = [flops for flops, _ in values]
    low, mean, high = (
        [f(seeds) for _, seeds in values] for f in (min, lambda v: float(np.mean(v)), max)
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, zorder=1)
    axes.plot(x, mean, color=colour, marker="o", ms=4, linewidth=1.8, label=label, zorder=3)
