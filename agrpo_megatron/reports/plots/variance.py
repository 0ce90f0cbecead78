"""The figure of `agrpo variance`: noise by its source, and signal for the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots import style
from agrpo_megatron.reports.plots.style import Theme, dress


def write_variance(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the figure as a PNG at `path`; return the path.

    Args:
        rows: as `agrpo variance` writes them: estimator, angle, draw_noise, work, signal; None is
            not drawn.
    """
    return style.write_png(path, lambda theme: _figure(rows, theme))


def _figure(rows: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    figure = style.new_figure(11, max(3.2, 1.6 + 0.42 * len(rows)))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.4, 1, 1), sharey=True)
    places = np.arange(len(rows))[::-1]
    keys = [key for key in rows[0] if key != "estimator"]
    values = {key: np.array([row[key] for row in rows], dtype=float) for key in keys}
    dress(left, "Variance of one batch's gradient")
    ones = np.ones(len(rows))
    left.barh(places, ones, color=theme.grey, label="which completions were sampled")
    left.barh(
        places,
        values["draw_noise"],
        left=ones,
        color=theme.orange,
        label="which steps or masks were drawn",
    )
    figure.legend(frameon=False, loc="outside lower left", ncols=2)
    dress(middle, "Angle, degrees")
    middle.barh(places, values["angle"], color=theme.purple)
    middle.set_xlim(0, max(90.0, float(np.nanmax(values["angle"]))))
    dress(right, "Signal for the work")
    right.barh(places, values["signal"], color=theme.blue)
    right.axvline(1.0, color=theme.muted, linewidth=1.0)
    for axes in (left, middle, right):
        axes.grid(visible=False, axis="y")
    for place in places[np.isnan(values["angle"])]:
        for axes, x in ((left, 1.0), (middle, 0.0), (right, 0.0)):
            axes.annotate("  ?", (x, place), color=theme.muted, va="center")
    left.set_yticks(places, [row["estimator"] for row in rows])
    return figure
