"""The curves of several runs: a colour for each family, the mean of its seeds, and a 95 % band."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from agrpo_megatron.evaluation.statistics import t_interval
from agrpo_megatron.reports.families import Curve, curve
from agrpo_megatron.reports.plots import style
from agrpo_megatron.reports.plots.style import Theme
from agrpo_megatron.reports.read import Run, smooth
from agrpo_megatron.reports.text import compact

POINTS = 100  # of a mean over seeds
PANELS = (  # title, metric, phase, whether it is a share
    ("Held-out accuracy", "accuracy", "eval", True),
    ("Training reward", "reward/mean", "rl", False),
    ("Training accuracy", "accuracy", "rl", True),
    ("Entropy (nats per token)", "entropy", "rl", False),
)


def families_figure(
    families: Mapping[str, Sequence[Run]], theme: Theme, *, axis: str, along: str
) -> Figure:
    """Draw the panels that the runs have metrics for; at least two.

    Args:
        families: runs by label, see `reports.families`.
        axis: of `curve`.
        along: the horizontal axis in words.
    """
    drawn = {}
    for title, key, phase, percent in PANELS:
        found = {
            label: [own for run in runs if len((own := curve(run, key, phase=phase, axis=axis))[0])]
            for label, runs in families.items()
        }
        if any(found.values()):
            drawn[title] = (found, percent, phase == "rl")
    figure = style.new_figure(11, 3.1 * -(-len(drawn) // 2) + 0.3 * -(-len(families) // 3))
    colours = dict(zip(families, theme.cycle() * len(families), strict=False))
    grid = figure.subplots(-(-len(drawn) // 2), 2, squeeze=False)
    handles = {}
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(drawn))
    for axes, (title, (found, percent, is_noisy)) in zip(grid.flat, drawn.items(), strict=False):
        style.dress(axes, title, percent=percent)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=style.STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.set_xlabel(along)
        for label, seeds in found.items():
            if seeds:
                handles[label] = _family(axes, seeds, colours[label], is_noisy=is_noisy)
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=3, frameon=False)
    return figure


def _family(axes: Axes, seeds: Sequence[Curve], colour: str, *, is_noisy: bool):
    """Draw each seed faintly, their mean, and its band; return the line of the mean."""
    shown = [(x, smooth(y) if is_noisy else y) for x, y in seeds]
    for x, y in shown if len(shown) > 1 else seeds if is_noisy else []:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3, zorder=2)
    x, y = shown[0]
    marker = "o" if len(x) < 20 else ""
    if len(shown) > 1:
        x, y, low, high = mean_and_band(shown)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)
        marker = ""
    (line,) = axes.plot(x, y, color=colour, linewidth=2.0, marker=marker, ms=4, zorder=3)
    return line


def mean_and_band(
    seeds: Sequence[Curve], points: int = POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x, the mean of two or more seeds, and its 95 % t interval, where all have values."""
    low, high = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
    places = np.linspace(low, high, points)
    drawn = [np.interp(places, x, y) for x, y in seeds]
    bands = np.array([t_interval(values) for values in np.transpose(drawn)])
    return places, np.mean(drawn, axis=0), bands[:, 0], bands[:, 1]
