"""The learning figure: accuracy and reward by iteration, held-out accuracy, supervised loss."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from agrpo_megatron.reports.plots.style import Theme, curves, dress, end_labels, new_figure, note
from agrpo_megatron.reports.read import Run, accuracy_interval, after, before, series
from agrpo_megatron.reports.text import percent, points


def learning_figure(run: Run, theme: Theme) -> Figure:
    """Draw accuracy large, with reward and supervised loss next to it where logged."""
    charts = learning_charts(run)
    first, *rest = charts
    figure = new_figure(11 if rest else 8, 4.8)
    mosaic: list[Any] = [[first, name] for name in rest] or [[first]]
    ratios = (1.75, 1) if rest else (1,)
    for name, axes in figure.subplot_mosaic(mosaic, width_ratios=ratios).items():
        charts[name](axes, run, theme)
    return figure


def learning_charts(run: Run) -> dict[str, Callable[[Axes, Run, Theme], None]]:
    """Return the charts that the run has metrics for, by name."""
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
    labels = curves(axes, run.rl, [("accuracy", "training", theme.blue)])
    x, y = series(run.evaluations, "accuracy")
    if len(x):
        axes.plot(x, y, "o-", color=theme.orange, lw=2.2, mec=theme.face, mew=1.5, ms=7.5, zorder=4)
        stage = run.evaluations[-1].get("stage", "after")
        word = "latest" if stage == "interval" else stage
        labels.append(
            (float(x[-1]), float(y[-1]), f"held-out\n{percent(y[-1])} {word}", theme.orange)
        )
    intervals = [(row["iteration"], accuracy_interval(row)) for row in run.evaluations]
    drawn = [(at, interval) for at, interval in intervals if interval]
    for at, interval in drawn:
        axes.plot([at, at], interval, color=theme.orange, alpha=0.35, lw=1.6)
    axes.set_xlabel("RL iteration (bars: 95% interval)" if drawn else "RL iteration")
    end_labels(axes, labels)
    if first and last:
        text = f"before {percent(first['accuracy'])}"
        spot = (first["iteration"], first["accuracy"])
        bold: dict[str, Any] = {"color": theme.orange, "fontweight": "bold", "va": "top"}
        stroke = withStroke(linewidth=3, foreground=theme.face)  # legible over lines
        note(axes, text, spot, offset=(8, -10), **bold, path_effects=[stroke], zorder=6)


def _rewards(axes: Axes, run: Run, theme: Theme) -> None:
    """Draw the mean reward and its parts; of a mixture, the mean of each task."""
    dress(axes, "Training reward")
    keys = sorted({key for row in run.rl for key in row if key.startswith("reward/")})
    of_tasks = [key for key in keys if key.endswith("/mean") and key != "reward/mean"]
    parts = of_tasks or [key for key in keys if key not in ("reward/mean", "reward/std")]
    colours = (theme.green, theme.purple, theme.grey, theme.red)
    shown = [("reward/mean", theme.blue), *zip(parts, colours, strict=False)]
    metrics = [(key, key.split("/")[1], colour) for key, colour in shown]
    axes.set_xlabel("RL iteration")
    end_labels(axes, curves(axes, run.rl, metrics))


def _supervised(axes: Axes, run: Run, theme: Theme) -> None:
    """Draw the loss of the batches, and that of held-out rows where it is measured."""
    dress(axes, "Supervised loss")
    shown = [("loss", "", theme.purple), ("held_out_loss", "held out ", theme.orange)]
    labels = curves(axes, run.sft, shown)
    axes.set_xlabel("supervised iteration")
    end_labels(axes, [(x, y, f"{name}{y:.2f}", colour) for x, y, name, colour in labels])
