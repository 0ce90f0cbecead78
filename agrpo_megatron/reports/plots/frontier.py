"""The compute/quality frontier: accuracy against denoising steps, and against measured FLOPs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedFormatter, FixedLocator, NullLocator

from agrpo_megatron.reports.evaluations import Results
from agrpo_megatron.reports.plots.style import Theme, dress, end_labels, new_figure, write_png

DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))  # longest length first
MARKERS = ("o", "s", "D")  # the next when the colours repeat
CROWD = 4  # lines whose bands may overlap
ROOM = 0.055  # share of the axis for a tick's number
TICK_DIGITS = ((1.2, (1, 1.5, 2, 3, 5, 7)), (2.5, (1, 2, 5)))  # by decades of the axis
CELL = ("task", "completion_length", "denoising_steps")


Look = tuple[str, Any, str]  # colour, dashes, marker


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
    return write_png(path, lambda theme: _figure(lines, theme))


def frontier_lines(evaluations: Sequence[Results]) -> dict[str, list[FrontierLine]]:
    """Return the lines of every task: models in the order they are given, longest first.

    Raises:
        ValueError: no cell is finished, or a model has two values at one cell.
    """
    cells: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    for results in evaluations:
        label = results["label"]
        for cell in results["cells"]:
            task, length, steps = (cell[name] for name in CELL)
            if cells.setdefault((task, label, length, steps), cell) != cell:
                raise ValueError(
                    f"{label} has two values on {task} at length {length} and {steps} steps; "
                    "label the evaluations: LABEL=DIR"
                )
    if not cells:
        raise ValueError("no evaluation has finished a cell; continue `agrpo evaluate`")
    labels = list(dict.fromkeys(results["label"] for results in evaluations))
    ordered = sorted(cells, key=lambda key: (key[0], labels.index(key[1]), -key[2], key[3]))
    lines: dict[str, list[FrontierLine]] = {task: [] for task, *_ in cells}
    for (task, label, length), keys in itertools.groupby(ordered, key=lambda key: key[:3]):
        lines[task].append(_line(label, length, [cells[key] for key in keys]))
    return lines


def _line(label: str, length: int, cells: Sequence[dict[str, Any]]) -> FrontierLine:
    names = ("denoising_steps", "flops", "accuracy", "accuracy_interval")
    steps, flops, accuracy, interval = (
        np.array([cell[name] for cell in cells], dtype=float) for name in names
    )
    return FrontierLine(label, length, steps, flops, accuracy, *interval.T)


def _figure(lines: dict[str, list[FrontierLine]], theme: Theme) -> Figure:
    figure = new_figure(11, 0.5 + 3.7 * len(lines))
    grid = figure.subplots(len(lines), 2, squeeze=False, sharey="row", width_ratios=(1, 1))
    for (task, drawn), (left, right) in zip(lines.items(), grid, strict=True):
        names, looks = _names(drawn), _looks(drawn, theme)
        _panel(left, f"{task}: accuracy by denoising steps", drawn, looks, "steps")
        _panel(right, f"{task}: accuracy by compute", drawn, looks, "flops")
        left.set_xlabel("denoising steps (bands: 95% interval)")
        right.set_xlabel("FLOPs per completion, as measured")
        _step_ticks(left, drawn)
        _flop_ticks(right, drawn)
        right.tick_params(axis="y", labelleft=False)
        colours = [colour for colour, *_ in looks]
        ends = [float(line.accuracy[-1]) for line in drawn]
        end_labels(right, zip([None] * len(ends), ends, names, colours, strict=True))
    return figure


def _panel(
    axes: Axes, title: str, lines: Sequence[FrontierLine], looks: Sequence[Look], along: str
) -> None:
    dress(axes, title, percent=True)
    axes.set_xscale("log")
    axes.margins(x=0.04)
    axes.grid(True, axis="x")
    shade = 0.12 if len(lines) <= CROWD else 0.05
    edge = axes.get_facecolor()
    for line, (colour, dashes, marker) in zip(lines, looks, strict=True):
        x = getattr(line, along)
        axes.fill_between(x, line.low, line.high, color=colour, alpha=shade, linewidth=0, zorder=1)
        if len(x) == 1:  # a band needs two points
            axes.plot(x.repeat(2), [line.low[0], line.high[0]], color=colour, alpha=0.35, lw=1.6)
        axes.plot(x, line.accuracy, color=colour, linestyle=dashes, linewidth=2.2, zorder=3)
        axes.plot(x, line.accuracy, marker, color=colour, mec=edge, mew=1.4, ms=7, zorder=4)


def _looks(lines: Sequence[FrontierLine], theme: Theme) -> list[Look]:
    """Return colour, dashes and marker of each line.

    Models differ by colour and lengths by dashes; lengths of a single model differ by colour.
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


def _names(lines: Sequence[FrontierLine]) -> list[str]:
    """Return what distinguishes each line: its model, its length, or both."""
    if len({line.length for line in lines}) == 1:
        return [line.label for line in lines]
    is_single = len({line.label for line in lines}) == 1
    return [("" if is_single else f"{line.label}, ") + f"{line.length} tokens" for line in lines]


def _step_ticks(axes: Axes, lines: Sequence[FrontierLine]) -> None:
    """Label the step counts as far as their numbers fit."""
    counts = sorted({int(steps) for line in lines for steps in line.steps})
    span = math.log(counts[-1] / counts[0]) or 1.0
    kept: list[int] = []
    for count in sorted(counts, key=lambda n: (n & (n - 1) != 0, -n)):  # powers of two first
        if all(abs(math.log(count / other)) / span >= ROOM for other in kept):
            kept.append(count)
    _ticks(axes, {count: str(count) for count in sorted(kept)})


def _flop_ticks(axes: Axes, lines: Sequence[FrontierLine]) -> None:
    """Write round numbers of FLOPs: decades, and values between them if few."""
    values = np.concatenate([line.flops for line in lines])
    low, high = float(values.min()), float(values.max())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    digits = next((few for most, few in TICK_DIGITS if span < most), (1,))
    low, high = low / 1.1, high * 1.1
    ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
    written = EngFormatter(sep="").format_eng  # with an SI prefix, such as 3T
    _ticks(axes, {tick: written(tick) for tick in ticks})


def _ticks(axes: Axes, texts: Mapping[float, str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(texts)))
    axes.xaxis.set_major_formatter(FixedFormatter(list(texts.values())))
    axes.xaxis.set_minor_locator(NullLocator())
