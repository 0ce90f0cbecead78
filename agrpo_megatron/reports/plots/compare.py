"""The comparison figure: held-out accuracy of several runs, with means over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots.style import (
    LABEL_SIZE,
    PERCENT,
    Theme,
    dress,
    end_labels,
    new_figure,
    render,
)
from agrpo_megatron.reports.read import Run, series
from agrpo_megatron.reports.text import percent, points

Curve = tuple[np.ndarray, np.ndarray]  # iterations, held-out accuracies


def write_comparison(runs: Mapping[str, Sequence[Run]], path: str | Path) -> Path:
    """Write held-out accuracy of several runs as a PNG at `path`; return the path.

    Args:
        runs: by label; the runs of a label differ by seed, drawn thin with their mean.

    Raises:
        ValueError: there is no run, or one without an evaluation.
    """
    if not runs or not all(runs.values()):
        raise ValueError("no runs to compare; give at least one run directory per label")
    path = Path(path)
    curves = {label: [_curve(run) for run in seeds] for label, seeds in runs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(lambda theme: _figure(curves, theme)))
    return path


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
    figure = new_figure(11, max(4.2, 1.6 + 0.62 * len(curves)))
    left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
    colours = dict(zip(curves, theme.cycle() * len(curves), strict=False))
    most = max(map(len, curves.values()))
    dress(left, "Held-out accuracy" + (f", mean of {most} seeds" if most > 1 else ""), percent=True)
    labels = []
    for label, seeds in curves.items():
        for x, y in seeds if len(seeds) > 1 else []:
            left.plot(x, y, color=colours[label], linewidth=1.0, alpha=0.35)
        x, y = _mean(seeds)
        left.plot(x, y, color=colours[label], linewidth=2.4)
        left.plot(x, y, "o", color=colours[label], mec=theme.face, mew=1.3, ms=6)
        labels += [(float(y[-1]), label, colours[label])] if len(y) else []
    left.set_xlabel("RL iteration")
    end_labels(left, labels)
    _gains(right, curves, colours, theme)
    return figure


def _gains(
    axes: Axes, curves: Mapping[str, Sequence[Curve]], colours: Mapping[str, str], theme: Theme
) -> None:
    """Draw first and last accuracy of every seed, and the mean gain of each label."""
    dress(axes, "First to last evaluation", percent=True)
    axes.xaxis.set_major_formatter(PERCENT)
    for row, (label, seeds) in enumerate(curves.items()):
        first = np.array([y[0] for _, y in seeds])
        last = np.array([y[-1] for _, y in seeds])
        colour, spots = colours[label], np.full(len(seeds), row)
        axes.plot([first.mean(), last.mean()], [row, row], color=colour, linewidth=2, alpha=0.5)
        axes.plot(first, spots, "o", mfc=theme.face, mec=colour, mew=1.5, ms=7)
        axes.plot(last, spots, "o", color=colour, mec=theme.face, mew=1, ms=8)
        spread = (
            f" (seeds {percent(last.min())} to {percent(last.max())})" if len(seeds) > 1 else ""
        )
        axes.annotate(
            f"{percent(last.mean())}, {points(last.mean() - first.mean())}{spread}",
            (first.min(), row),
            xytext=(0, 9),
            textcoords="offset points",
            fontsize=LABEL_SIZE,
        )
    axes.set_yticks(range(len(curves)), list(curves), fontsize=LABEL_SIZE + 0.5)
    for tick, label in zip(axes.get_yticklabels(), curves, strict=True):
        tick.set_color(colours[label])
    axes.set_ylim(len(curves) - 0.5, -0.6)
    axes.margins(x=0.08)
    axes.grid(False)
    axes.grid(True, axis="x")
