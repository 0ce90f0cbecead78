"""Figures of one run, as PNG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots.learning import has_learning, learning_figure
from agrpo_megatron.reports.plots.style import (
    LIGHT,
    Theme,
    curve,
    dress,
    end_labels,
    new_figure,
    render,
)
from agrpo_megatron.reports.plots.timing import time_figure
from agrpo_megatron.reports.read import Row, Run, read_run, series, time_totals
from agrpo_megatron.reports.text import number


@dataclass(frozen=True)
class Panel:
    """One small chart: metrics by label and colour role; left out where the run has none."""

    title: str
    curves: tuple[tuple[str, str, str], ...]  # (metric, label, role); no label for a lone curve
    percent: bool = False
    log: bool = False
    hide_zero: bool = False


POLICY_PANELS = (
    Panel(
        "Policy ratio error, |ratio - 1|",
        (("ratio/max_error", "largest", "blue"), ("ratio/mean_error", "of mean", "green")),
        log=True,
    ),
    Panel("Clipped tokens", (("clip_fraction", "", "purple"),), percent=True),
    Panel("Entropy (nats per token)", (("entropy", "", "green"),)),
    Panel("Gradient norm", (("grad_norm", "", "blue"),)),
    Panel("KL to the reference (nats per token)", (("kl", "", "orange"),), hide_zero=True),
    Panel("Policy loss", (("loss", "", "muted"),)),
)
SAMPLER_PANELS = (
    Panel(
        "Live denoising steps per completion",
        (("live_steps/mean", "mean", "blue"), ("live_steps/max", "longest", "muted")),
    ),
    Panel("Completion length (tokens)", (("completions/mean_length", "", "green"),)),
    Panel("Rollouts without advantage", (("zero_advantage_fraction", "", "red"),), percent=True),
    Panel("Rows trained on (rollout, step)", (("rows", "", "purple"),)),
)


def write_figures(run_dir: str | Path) -> list[Path]:
    """Write the figures of a run below its `figures` directory; return their paths."""
    folder = Path(run_dir) / "figures"
    pictures = draw_figures(read_run(run_dir))
    folder.mkdir(exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pictures]


def draw_figures(run: Run, theme: Theme = LIGHT) -> dict[str, bytes]:
    """Return the figures that the run has data for, as PNG by name."""
    draws: dict[str, Callable[[Theme], Figure]] = {}
    if has_learning(run):
        draws["learning"] = lambda t: learning_figure(run, t)
    for name, panels in (("policy", POLICY_PANELS), ("sampler", SAMPLER_PANELS)):
        if _shown(panels, run):
            draws[name] = lambda t, panels=panels: _panels(panels, run, t)
    if sum(time_totals(run).values()) > 0:
        draws["time"] = lambda t: time_figure(run, t)
    return {name: render(draw, theme) for name, draw in draws.items()}


def _shown(panels: Sequence[Panel], run: Run) -> list[Panel]:
    values = {panel: series(_ratio_rows(run), panel.curves[0][0])[1] for panel in panels}
    return [p for p, y in values.items() if len(y) and (not p.hide_zero or np.any(y != 0))]


def _panels(panels: Sequence[Panel], run: Run, theme: Theme) -> Figure:
    """Draw small charts in rows of two or three."""
    shown, rows = _shown(panels, run), _ratio_rows(run)
    columns = 3 if len(shown) in (3, 5, 6) else min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(11, 2.6 * lines + 0.2)
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(lines, columns, index + 1)
        dress(axes, panel.title, percent=panel.percent, log=panel.log)
        labels = []
        for key, label, role in panel.curves:
            x, y = series(rows, key)
            if len(x):
                colour = getattr(theme, role)
                labels.append((curve(axes, x, y, colour), label, colour))
        if panel.title == POLICY_PANELS[0].title:
            labels += _alarm(axes, run, theme)
        if index >= len(shown) - columns:
            axes.set_xlabel("RL iteration")
        end_labels(axes, labels)
    return figure


def _ratio_rows(run: Run) -> tuple[Row, ...]:
    """Return the RL rows with the distance of the mean policy ratio from 1."""
    means = [(row, number(row, "ratio/mean")) for row in run.rl]
    return tuple(r if m is None else r | {"ratio/mean_error": abs(m - 1)} for r, m in means)


def _alarm(axes: Axes, run: Run, theme: Theme) -> list[tuple[float, str, str]]:
    level = number(run.settings.get("train") or {}, "ratio_alarm")
    if not level:
        return []
    axes.axhline(level, color=theme.red, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return [(level, "alarm", theme.red)]
