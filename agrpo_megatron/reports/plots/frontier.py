"""The compute/quality frontier: accuracy against denoising steps, and against measured FLOPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from agrpo_megatron.reports.evaluations import Results
from agrpo_megatron.reports.plots.style import Theme, dress, end_labels, new_figure, render

DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))  # by length, longest first
MARKERS = ("o", "s", "D")  # the next when the colours repeat
CROWD = 4  # lines whose bands may overlap
ROOM = 0.055  # share of the axis for a tick's number
TICK_DIGITS = ((1.2, (1, 1.5, 2, 3, 5, 7)), (2.5, (1, 2, 5)))  # by decades of the axis
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


@dataclass(frozen=True)
class FrontierLine:
    """Accuracy of one model at one completion length; all arrays [points], steps ascending."""

    label: str
    length: int
    steps: np.ndarray
    flops: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray


def write_frontier(evaluations: Sequence[Results], path: Path) -> Path:
    """Write the frontier of evaluations as a PNG at `path`; return the path.

    Evaluations of one label are drawn as one model.

    Raises:
        ValueError: no cell is finished, or a model has two values at one cell.
    """
    lines = frontier_lines(evaluations)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(lambda theme: _figure(lines, theme)))
    return path


def frontier_lines(evaluations: Sequence[Results]) -> dict[str, list[FrontierLine]]:
    """Return the lines of every task: models in the order they are given, longest first.

    Raises:
        ValueError: no cell is finished, or a model has two values at one cell.
    """
    found: dict[str, dict[tuple[str, int], dict[int, dict[str, Any]]]] = {}
    for results in evaluations:
        for cell in results["cells"]:
            key = results["label"], cell["completion_length"]
            points = found.setdefault(cell["task"], {}).setdefault(key, {})
            steps = cell["denoising_steps"]
            if points.get(steps, cell) != cell:
                raise ValueError(
                    f"{key[0]} has two values on {cell['task']} at length {key[1]} and {steps} "
                    "steps; label the evaluations: LABEL=DIR"
                )
            points[steps] = cell
    if not found:
        raise ValueError("no evaluation has finished a cell; continue `agrpo evaluate`")
    labels = list(dict.fromkeys(results["label"] for results in evaluations))
    return {
        task: [
            _line(*key, points)
            for key, points in sorted(
                lines.items(), key=lambda item: (labels.index(item[0][0]), -item[0][1])
            )
        ]
        for task, lines in found.items()
    }


def _line(label: str, length: int, points: dict[int, dict[str, Any]]) -> FrontierLine:
    cells = [points[steps] for steps in sorted(points)]
    intervals = np.array([cell["accuracy_interval"] for cell in cells], dtype=float)
    return FrontierLine(
        label=label,
        length=length,
        steps=np.array(sorted(points), dtype=float),
        flops=np.array([cell["flops"] for cell in cells], dtype=float),
        accuracy=np.array([cell["accuracy"] for cell in cells], dtype=float),
        low=intervals[:, 0],
        high=intervals[:, 1],
    )


def _figure(lines: dict[str, list[FrontierLine]], theme: Theme) -> Figure:
    figure = new_figure(11, 0.5 + 3.7 * len(lines))
    grid = figure.subplots(len(lines), 2, squeeze=False, sharey="row", width_ratios=(1, 1))
    for (task, drawn), (left, right) in zip(lines.items(), grid, strict=True):
        _panel(left, f"{task}: accuracy by denoising steps", drawn, "steps", theme)
        _panel(right, f"{task}: accuracy by compute", drawn, "flops", theme)
        left.set_xlabel("denoising steps (bands: 95% interval)")
        right.set_xlabel("FLOPs per completion, as measured")
        _step_ticks(left, drawn)
        _flop_ticks(right, drawn)
        right.tick_params(axis="y", labelleft=False)
        looks = _looks(drawn, theme)
        labels = [
            (float(line.accuracy[-1]), _name(line, drawn), colour)
            for line, (colour, *_) in zip(drawn, looks, strict=True)
        ]
        end_labels(right, labels)
    return figure


def _panel(axes: Axes, title: str, lines: Sequence[FrontierLine], along: str, theme: Theme) -> None:
    dress(axes, title, percent=True)
    axes.set_xscale("log")
    axes.margins(x=0.04)
    axes.grid(True, axis="x")
    shade = 0.12 if len(lines) <= CROWD else 0.05
    for line, (colour, dashes, marker) in zip(lines, _looks(lines, theme), strict=True):
        x = getattr(line, along)
        axes.fill_between(x, line.low, line.high, color=colour, alpha=shade, linewidth=0, zorder=1)
        if len(x) == 1:  # a band needs two points
            axes.plot(x.repeat(2), [line.low[0], line.high[0]], color=colour, alpha=0.35, lw=1.6)
        axes.plot(x, line.accuracy, color=colour, linestyle=dashes, linewidth=2.2, zorder=3)
        axes.plot(x, line.accuracy, marker, color=colour, mec=theme.face, mew=1.4, ms=7, zorder=4)


def _looks(lines: Sequence[FrontierLine], theme: Theme) -> list[tuple[str, Any, str]]:
    """Return colour, dashes and marker of each line.

    Models by colour and lengths by dashes; the lengths of a lone model by colour.
    """
    labels = list(dict.fromkeys(line.label for line in lines))
    lengths = sorted({line.length for line in lines}, reverse=True)
    cycle, looks = theme.cycle(), []
    for line in lines:
        model, length = labels.index(line.label), lengths.index(line.length)
        place, dashes = (length, 0) if len(labels) == 1 else (model, length)
        marker = MARKERS[place // len(cycle) % len(MARKERS)]
        looks.append((cycle[place % len(cycle)], DASHES[dashes % len(DASHES)], marker))
    return looks


def _name(line: FrontierLine, lines: Sequence[FrontierLine]) -> str:
    """Return what distinguishes a line: its model, its length, or both."""
    several = len({other.length for other in lines}) > 1
    if len({other.label for other in lines}) == 1 and several:
        return f"{line.length} tokens"
    return f"{line.label}, {line.length} tokens" if several else line.label


def _step_ticks(axes: Axes, lines: Sequence[FrontierLine]) -> None:
    """Label the step counts as far as their numbers fit."""
    counts = sorted({int(steps) for line in lines for steps in line.steps})
    span = math.log(counts[-1] / counts[0]) or 1.0
    most = sorted(counts, key=lambda n: (n & (n - 1) != 0, -n))  # powers of two first
    kept: list[int] = []
    for count in most:
        if all(abs(math.log(count / other)) / span >= ROOM for other in kept):
            kept.append(count)
    axes.xaxis.set_major_locator(FixedLocator([float(count) for count in sorted(kept)]))
    axes.xaxis.set_major_formatter(FixedFormatter([str(count) for count in sorted(kept)]))
    axes.xaxis.set_minor_locator(NullLocator())


def _flop_ticks(axes: Axes, lines: Sequence[FrontierLine]) -> None:
    """Write round numbers of FLOPs: decades, and values between them if few."""
    values = np.concatenate([line.flops for line in lines])
    low, high = float(values.min()), float(values.max())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    digits = next((few for most, few in TICK_DIGITS if span < most), (1,))
    low, high = low / 1.1, high * 1.1
    ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([_flops(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _flops(value: float) -> str:
    unit, letter = next((u for u in UNITS if value >= 0.999 * u[0]), UNITS[-1])
    return f"{value / unit:.3g}{letter}"
