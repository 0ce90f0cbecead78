"""The denoising figure: metrics by part of the denoising, over iterations."""

from collections.abc import Sequence

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from agrpo_megatron.reports.plots import style
from agrpo_megatron.reports.plots.style import Theme
from agrpo_megatron.reports.read import Row, Run

BY_STEP = {  # title, and whether the axis is logarithmic
    "by_step/entropy": ("Entropy by denoising step (nats per token)", False),
    "by_step/ratio_error": ("Largest ratio error by denoising step", True),
}


def part_rows(run: Run, key: str) -> list[Row]:
    """Return the RL rows with a value for each part of a list, as `0`, `1`, ...; empty without."""
    rows = [
        {"iteration": row["iteration"], **{str(n): part for n, part in enumerate(row[key])}}
        for row in run.rl
        if isinstance(row.get(key), list)
    ]
    has_values = any(value is not None for row in rows for value in list(row.values())[1:])
    return rows if has_values else []


def denoising_figure(run: Run, keys: Sequence[str], theme: Theme) -> Figure:
    """Draw a line for each part of each metric, from pale to strong."""
    figure = style.new_figure(11 if len(keys) > 1 else 6, 3.2)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        title, is_log = BY_STEP[key]
        style.dress(axes, title, log=is_log)
        rows = part_rows(run, key)
        count = max(len(row) for row in rows) - 1
        names = {0: "first", count - 1: "last"} if count > 1 else {0: ""}
        shades = [_between(theme.pale, theme.blue, (n + 1) / count) for n in range(count)]
        drawn = [(str(n), names.get(n, ""), shade) for n, shade in enumerate(shades)]
        labels = style.curves(axes, rows, drawn)
        style.end_labels(axes, [label for label in labels if label[2]])
        axes.set_xlabel("RL iteration")
    return figure


def _between(start: str, end: str, share: float) -> str:
    """Return the colour at a share of the way from one colour to another."""
    pairs = zip(to_rgb(start), to_rgb(end), strict=True)
    red, green, blue = (a + share * (b - a) for a, b in pairs)
    return to_hex((red, green, blue))
