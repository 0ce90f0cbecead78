"""Figures of a comparison of estimators: a panel for each with its band, and final accuracies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from agrpo_megatron.evaluation.statistics import Interval, t_interval
from agrpo_megatron.reports.plots import style
from agrpo_megatron.reports.plots.style import Theme, dress
from agrpo_megatron.reports.read import smooth
from agrpo_megatron.reports.text import percent as shown

Curve = tuple[np.ndarray, np.ndarray]  # of one seed
COLUMNS, POINTS = 4, 60  # panels side by side; points at which seeds are averaged
UNITS = {1.0: "", 1e6: "million ", 1e9: "billion ", 1e12: "trillion ", 1e15: "quadrillion "}


@dataclass(frozen=True)
class Look:
    """What the axes of curves are, and how they are drawn."""

    title: str  # of the vertical axis
    along: str  # of the horizontal axis
    percent: bool = True  # values are shares
    smoothed: bool = False  # draw running means


@dataclass(frozen=True)
class Finals:
    """A member's final accuracies, and their differences to the baseline."""

    finals: Sequence[float]  # by seed
    mean: float
    band: Interval
    difference: tuple[float, Interval] | None


def write_curves(
    curves: Mapping[str, Sequence[Curve]], path: Path, *, baseline: str, look: Look
) -> Path:
    """Write a panel for each member as a PNG at `path`; return the path.

    Args:
        curves: by member, of each seed; a band is the 95 % t interval of the seeds' mean.
        baseline: the member that every panel shows.
    """
    return style.write_png(path, lambda theme: curves_figure(curves, theme, baseline, look))


def curves_figure(
    curves: Mapping[str, Sequence[Curve]], theme: Theme, baseline: str, look: Look
) -> Figure:
    """Draw the panels; arguments as of `write_curves`."""
    means = {name: _mean(seeds, look) for name, seeds in curves.items()}
    top = max(float(x[-1]) for x, *_ in means.values())
    unit = max(size for size in UNITS if size <= max(1.0, top / 10))
    key = f"blue: {baseline}; grey: the others; band: 95% of the seeds' mean"
    columns = min(COLUMNS, len(means))
    count = math.ceil(len(means) / columns)
    figure = style.new_figure(max(6, 2.75 * columns), 0.7 + 1.9 * count)
    grid = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(means))
        is_lowest = place + columns >= len(means)
        axes.tick_params(axis="x", labelbottom=is_lowest)
    for axes, name in zip(grid.flat, means, strict=False):
        final = float(np.mean([y[-1] for _, y in curves[name]]))
        title = f"{name}  {shown(final)}" if look.percent else name
        dress(axes, title, percent=look.percent)
        _panel(axes, name, means, baseline, theme)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=style.STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    text: dict[str, Any] = {"fontsize": style.LABEL_SIZE, "color": theme.muted}
    figure.supxlabel(f"{UNITS[unit]}{look.along} ({key})", **text)
    figure.supylabel(look.title, **text)
    return figure


def _mean(seeds: Sequence[Curve], look: Look) -> tuple[np.ndarray, ...]:
    """Return x, mean over seeds, and the band, where all seeds have values.

    Bands of shares end at 0 and 1.
    """
    low, high = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
    places = np.linspace(low, high, POINTS)
    drawn = [np.interp(places, x, smooth(y) if look.smoothed else y) for x, y in seeds]
    bands = np.array([t_interval(values) for values in np.transpose(drawn)])
    if look.percent:
        bands = bands.clip(0.0, 1.0)
    return places, np.mean(drawn, axis=0), bands[:, 0], bands[:, 1]


def _panel(
    axes: Axes,
    name: str,
    means: Mapping[str, tuple[np.ndarray, ...]],
    baseline: str,
    theme: Theme,
) -> None:
    x, mean, low, high = means[name]
    for other, (places, values, *_) in means.items():
        if other not in (name, baseline):
            axes.plot(places, values, color=theme.pale, linewidth=0.8, zorder=1)
    axes.plot(*means[baseline][:2], color=theme.blue, linewidth=1.4, zorder=3)
    colour = theme.blue if name == baseline else theme.orange
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=2)
    axes.plot(x, mean, color=colour, linewidth=2.0, zorder=4)


def write_finals(found: Mapping[str, Finals], path: Path, *, baseline: str, start: float) -> Path:
    """Write final accuracies and differences to the baseline as a PNG; return the path.

    Args:
        found: by member, in the order of rows.
        start: mean accuracy before reinforcement learning.
    """
    return style.write_png(path, lambda theme: _finals_figure(found, theme, baseline, start))


def _finals_figure(
    found: Mapping[str, Finals], theme: Theme, baseline: str, start: float
) -> Figure:
    places = np.arange(len(found))[::-1]
    figure = style.new_figure(11, 1.3 + 0.3 * len(found))
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1), sharey=True)
    dress(left, "Final held-out accuracy", percent=True)
    dress(right, f"Difference to {baseline}, points")
    left.axvline(start, color=theme.grey, linewidth=1.2, linestyle="--")
    right.axvline(0.0, color=theme.blue, linewidth=1.2)
    for place, (name, member) in zip(places, found.items(), strict=True):
        colour = theme.blue if name == baseline else theme.orange
        spots = np.full(len(member.finals), place - 0.27)
        left.plot(member.finals, spots, "o", color=theme.grey, alpha=0.7, ms=3, zorder=2)
        _interval(left, place, member.mean, member.band, colour)
        if member.difference is not None:
            mean, (low, high) = member.difference
            _interval(right, place, 100 * mean, (100 * low, 100 * high), colour)
    left.xaxis.set_major_formatter(style.PERCENT)
    left.set_xlabel("dots: seeds; bars: mean and 95% band; dashed: before")
    right.set_xlabel("paired by seed; bars: mean and 95% band")
    left.set_yticks(places, list(found))
    for axes in (left, right):
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.margins(x=0.04)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
    return figure


def _interval(axes: Axes, place: float, mean: float, band: Interval, colour: str) -> None:
    axes.plot(band, [place, place], color=colour, linewidth=2.4, alpha=0.45, zorder=3)
    axes.plot(mean, place, "o", color=colour, mec=axes.get_facecolor(), mew=1.0, ms=7, zorder=4)
