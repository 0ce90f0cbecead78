"""The comparison figure: held-out accuracy of several runs, with means over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots import style
from agrpo_megatron.reports.plots.style import Theme, dress
from agrpo_megatron.reports.read import Run, series
from agrpo_megatron.reports.text import percent, points

Curve = tuple[np.ndarray, np.ndarray]  # iterations, held-out accuracies


def write_comparison(runs: Mapping[str, Sequence[Run]], path: Path) -> Path:
    """Write held-out accuracy of several runs as a PNG at `path`; return the path.

    Args:
        runs: by label; the runs of a label differ by seed, drawn thin with their mean.

    Raises:
        ValueError: there is no run, or one without an evaluation.
    """
    if not runs or not all(runs.values()):
        raise ValueError("no runs to compare; give at least one run directory per label")
    curves = {label: [_curve(run) for run in seeds] for label, seeds in runs.items()}
    return style.write_png(path, lambda theme: _figure(curves, theme))


def _curve(run: Run) -> Curve:
    x, y = series(run.evaluations, "accuracy")
    if not len(x):
        raise ValueError(f"run {run.path} has no evaluation; compare runs with evaluations")
    return x, y


def _mean(seeds: Sequence[Curve]) -> Curve:
    """Return the mean over seeds, at the iterations that all of them have evaluated."""
    tables = [dict(zip(x, y, strict=True)) for x, y in seeds]
    shared = sorted(set(tables[0]).intersection(*tables[1:]))
    return np.array(shared), np.array([np.mean([t[x] for t in tables]) for x in shared])


def _figure(curves: Mapping[str, Sequence[Curve]], theme: Theme) -> Figure:
    figure = style.new_figure(11, max(4.2, 1.6 + 0.62 * len(curves)))
    left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
    colours = dict(zip(curves, theme.cycle() * len(curves), strict=False))
    most = max(map(len, curves.values()))
    dress(left, "Held-out accuracy" + (f", mean of {most} seeds" if most > 1 else ""), percent=True)
    labels = []
    for label, seeds in curves.items():
        for x, y in seeds if len(seeds) > 1 else []:
            left.plot(x, y, color=colours[label], linewidth=1.0, alpha=0.35)
        x, y = _mean(seeds)
        left.plot(x, y, "o-", color=colours[label], lw=2.4, mec=theme.face, mew=1.3, ms=6)
        labels += [(float(x[-1]), float(y[-1]), label, colours[label])] if len(y) else []
    left.set_xlabel("RL iteration")
    style.end_labels(left, labels)
    _gains(right, curves, colours)
    return figure


def _gains(axes: Axes, curves: Mapping[str, Sequence[Curve]], colours: Mapping[str, str]) -> None:
    """Draw first and last accuracy of every seed, and the mean gain of each label."""
    face = axes.get_facecolor()
    dress(axes, "First to last evaluation", percent=True)
    axes.xaxis.set_major_formatter(style.PERCENT)
    for row, (label, seeds) in enumerate(curves.items()):
        first = np.array([y[0] for _, y in seeds])
        last = np.array([y[-1] for _, y in seeds])
        colour, spots = colours[label], np.full(len(seeds), row)
        axes.plot([first.mean(), last.mean()], [row, row], color=colour, linewidth=2, alpha=0.5)
        axes.plot(first, spots, "o", mfc=face, mec=colour, mew=1.5, ms=7)
        axes.plot(last, spots, "o", color=colour, mec=face, mew=1, ms=8)
        text = f"{percent(last.mean())}, {points(last.mean() - first.mean())}"
        if len(seeds) > 1:
            text += f" (seeds {percent(last.min())} to {percent(last.max())})"
        style.note(axes, text, (first.min(), row), offset=(0, 9))
    axes.set_yticks(range(len(curves)), list(curves), fontsize=style.LABEL_SIZE + 0.5)
    for tick, label in zip(axes.get_yticklabels(), curves, strict=True):
        tick.set_color(colours[label])
    axes.set_ylim(len(curves) - 0.5, -0.6)
    axes.margins(x=0.08)
    axes.grid(False)
    axes.grid(True, axis="x")
