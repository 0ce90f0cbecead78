"""Figures of one run, as PNG."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots import style
from agrpo_megatron.reports.plots.denoising import BY_STEP, denoising_figure, part_rows
from agrpo_megatron.reports.plots.learning import learning_charts, learning_figure
from agrpo_megatron.reports.plots.style import LIGHT, Theme
from agrpo_megatron.reports.plots.timeline import shown_iterations, timeline_figure
from agrpo_megatron.reports.plots.timing import time_figure
from agrpo_megatron.reports.read import Row, Run, ratio_alarm, series, time_totals
from agrpo_megatron.reports.text import number


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small chart: metrics by label and colour role; omitted if the run lacks the first."""

    title: str
    curves: tuple[tuple[str, str, str], ...]  # (metric, label, role); a single curve has no label
    percent: bool = False
    log: bool = False
    hide_zero: bool = False


POLICY_PANELS = (
    Panel(
        "Policy ratio error, |ratio - 1|",
        (
            ("ratio/max_error", "largest", "blue"),
            ("ratio/p99_error", "99 % below", "purple"),
            ("ratio/mean_error", "of mean", "green"),
        ),
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
        (("live_steps/mean", "", "blue"),),
    ),
    Panel("Completion length (tokens)", (("completions/mean_length", "", "green"),)),
    Panel("Rollouts without advantage", (("zero_advantage_fraction", "", "red"),), percent=True),
    Panel("Rows trained on (rollout, step)", (("rows", "", "purple"),)),
    Panel("Drawn steps per completion, chosen (auto)", (("mc_samples", "", "orange"),)),
)


def draw_figures(run: Run, theme: Theme = LIGHT) -> dict[str, bytes]:
    """Return the figures that the run has data for, as PNG by name."""
    run = dataclasses.replace(run, rl=_ratio_rows(run))
    draws: dict[str, Callable[[Theme], Figure]] = {}
    if learning_charts(run):
        draws["learning"] = lambda t: learning_figure(run, t)
    for name, panels in (("policy", POLICY_PANELS), ("sampler", SAMPLER_PANELS)):
        if shown := [panel for panel in panels if _has_values(run, panel)]:
            draws[name] = lambda t, shown=shown: _panels(shown, run, t)
    if parts := [key for key in BY_STEP if part_rows(run, key)]:
        draws["denoising"] = lambda t: denoising_figure(run, parts, t)
    if sum(seconds > 0 for seconds in time_totals(run).values()) > 1:
        draws["time"] = lambda t: time_figure(run, t)
    if shown_iterations(run):
        draws["timeline"] = lambda t: timeline_figure(run, t)
    return {name: style.render(draw, theme) for name, draw in draws.items()}


def _has_values(run: Run, panel: Panel) -> bool:
    values = series(run.rl, panel.curves[0][0])[1]
    return bool(len(values) and (not panel.hide_zero or np.any(values != 0)))


def _panels(shown: Sequence[Panel], run: Run, theme: Theme) -> Figure:
    """Draw small charts in rows of two or three."""
    alarm = ratio_alarm(run)
    columns = 3 if len(shown) in (3, 5, 6) else min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = style.new_figure(11, 2.6 * lines + 0.2)
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(lines, columns, index + 1)
        style.dress(axes, panel.title, percent=panel.percent, log=panel.log)
        metrics = [(key, label, getattr(theme, role)) for key, label, role in panel.curves]
        labels = style.curves(axes, run.rl, metrics)
        if alarm and panel is POLICY_PANELS[0]:
            axes.axhline(alarm, color=theme.red, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            labels.append((None, alarm, "alarm", theme.red))
        if index >= len(shown) - columns:
            axes.set_xlabel("RL iteration")
        style.end_labels(axes, labels)
    return figure


def _ratio_rows(run: Run) -> tuple[Row, ...]:
    """Return the RL rows with the distance of the mean policy ratio from 1."""
    means = [(row, number(row, "ratio/mean")) for row in run.rl]
    return tuple(r if m is None else r | {"ratio/mean_error": abs(m - 1)} for r, m in means)
