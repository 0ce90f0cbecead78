"""The time figure: seconds per iteration by part, and where the run's time went."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots.style import LABEL_SIZE, Theme, dress, new_figure, note
from agrpo_megatron.reports.read import Run, time_shares, time_totals
from agrpo_megatron.reports.text import duration, percent

BARS = 60


def time_figure(run: Run, theme: Theme) -> Figure:
    """Draw seconds per RL iteration by part, stacked, and the totals of the run."""
    colours = {
        "supervised": theme.muted,
        "rollout": theme.blue,
        "reward": theme.red,
        "update": theme.green,
        "checkpoint": theme.purple,
        "other": theme.pale,
        "evaluation": theme.orange,
    }
    totals = {part: seconds for part, seconds in time_totals(run).items() if seconds > 0}
    figure = new_figure(11, 3.9)
    if any(sum(time_shares(row).values()) > 0 for row in run.rl):
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        _stack(left, run, colours)
    else:
        right = figure.subplots()
    _totals(right, totals, colours)
    return figure


def _stack(axes: Axes, run: Run, colours: dict[str, str]) -> None:
    """Draw one bar per iteration, or per several if there are many."""
    each = -(-len(run.rl) // BARS)
    dress(axes, "Seconds per iteration" + (f", mean of {each} per bar" if each > 1 else ""))
    starts = range(0, len(run.rl), each)
    bins = [[time_shares(row) for row in run.rl[i : i + each]] for i in starts]
    count = np.array([len(members) for members in bins])
    centre = np.array([run.rl[i]["iteration"] for i in starts]) + (count - 1) / 2
    bottom = np.zeros(len(bins))
    for part in bins[0][0]:
        height = np.array([np.mean([shares[part] for shares in members]) for members in bins])
        axes.bar(centre, height, 0.86 * count, bottom, color=colours[part], linewidth=0)
        bottom += height
    axes.set_xlabel("RL iteration")


def _totals(axes: Axes, totals: dict[str, float], colours: dict[str, str]) -> None:
    """Draw total time by part as labelled bars, which also name the colours."""
    whole = sum(totals.values())
    dress(axes, f"Total {duration(whole)}")
    rows = range(len(totals))
    axes.barh(rows, list(totals.values()), 0.62, color=[colours[part] for part in totals])
    axes.set_yticks(rows, list(totals), fontsize=LABEL_SIZE + 0.5)
    axes.tick_params(axis="y", labelcolor=axes.title.get_color())
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.42)
    axes.set_xlim(left=0)
    for row, seconds in zip(rows, totals.values(), strict=True):
        text = f"{duration(seconds)}  {percent(seconds / whole, 0)}"
        note(axes, text, (seconds, row), va="center")
