"""The learning figure: accuracy and reward by iteration, held-out accuracy, supervised loss."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots.style import Theme, curve, dress, end_labels, new_figure, note
from agrpo_megatron.reports.read import Row, Run, accuracy_interval, after, before, series
from agrpo_megatron.reports.text import percent, points


def has_learning(run: Run) -> bool:
    """Return whether the run has a metric that this figure shows."""
    return bool(_learning_charts(run))


def learning_figure(run: Run, theme: Theme) -> Figure:
    """Draw accuracy large, with reward and supervised loss next to it where logged."""
    charts = _learning_charts(run)
    first, *rest = charts
    figure = new_figure(11 if rest else 8, 4.8)
    mosaic: list[Any] = [[first, name] for name in rest] or [[first]]
    ratios = (1.75, 1) if rest else (1,)
    for name, axes in figure.subplot_mosaic(mosaic, width_ratios=ratios).items():
        charts[name](axes, run, theme)
    return figure


def _learning_charts(run: Run) -> dict[str, Callable[[Axes, Run, Theme], None]]:
    sources = {
        "accuracy": (_accuracy, run.rl + run.evaluations, "accuracy"),
        "reward": (_rewards, run.rl, "reward/mean"),
        "supervised": (_supervised, run.sft, "loss"),
    }
    return {n: draw for n, (draw, rows, key) in sources.items() if len(series(rows, key)[0])}


def _accuracy(axes: Axes, run: Run, theme: Theme) -> None:
    first, last = before(run), after(run)
    title = "Accuracy"
    if first and last:
        title = f"Held-out accuracy: {points(last['accuracy'] - first['accuracy'])}"
    dress(axes, title, percent=True)
    labels = []
    x, y = series(run.rl, "accuracy")
    if len(x):
        labels.append((curve(axes, x, y, theme.blue), "training", theme.blue))
    x, y = series(run.evaluations, "accuracy")
    axes.set_xlabel("RL iteration")
    if len(x):
        axes.plot(x, y, color=theme.orange, linewidth=2.2, zorder=4)
        axes.plot(x, y, "o", color=theme.orange, mec=theme.face, mew=1.5, ms=7.5, zorder=5)
        stage = run.evaluations[-1].get("stage", "after")
        word = "latest" if stage == "interval" else stage
        labels.append((float(y[-1]), f"held-out\n{percent(y[-1])} {word}", theme.orange))
    if _intervals(axes, run.evaluations, theme):
        axes.set_xlabel("RL iteration (bars: 95% interval)")
    end_labels(axes, labels)
    if first and last:
        spot = (first["iteration"], first["accuracy"])
        note(axes, f"before {percent(first['accuracy'])}", spot, theme.orange, offset=(8, -10))


def _intervals(axes: Axes, evaluations: Sequence[Row], theme: Theme) -> int:
    """Draw the 95% interval of the evaluations that have one; return how many."""
    drawn = 0
    for row in evaluations:
        if interval := accuracy_interval(row):
            spot = [row["iteration"]] * 2
            axes.plot(spot, interval, color=theme.orange, alpha=0.35, lw=1.6)
            drawn += 1
    return drawn


def _rewards(axes: Axes, run: Run, theme: Theme) -> None:
    """Draw the mean reward and its parts; of a mixture, the mean of each task."""
    dress(axes, "Training reward")
    keys = sorted({key for row in run.rl for key in row if key.startswith("reward/")})
    of_tasks = [key for key in keys if key.endswith("/mean") and key != "reward/mean"]
    parts = of_tasks or [key for key in keys if key not in ("reward/mean", "reward/std")]
    colours = (theme.green, theme.purple, theme.grey, theme.red)
    shown = [("reward/mean", theme.blue), *zip(parts, colours, strict=False)]
    labels = []
    for key, colour in shown:
        x, y = series(run.rl, key)
        if len(x):
            labels.append((curve(axes, x, y, colour), key.split("/")[1], colour))
    axes.set_xlabel("RL iteration")
    end_labels(axes, labels)


def _supervised(axes: Axes, run: Run, theme: Theme) -> None:
    dress(axes, "Supervised loss")
    last = curve(axes, *series(run.sft, "loss"), theme.purple)
    axes.set_xlabel("supervised iteration")
    end_labels(axes, [(last, f"{last:.2f}", theme.purple)])
