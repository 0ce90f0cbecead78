"""Chart style: two themes, one palette by role, and the marks of figures.

Matplotlib's object API only: no pyplot, no global state (`rc` is applied within a context).
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from agrpo_megatron.reports.read import Row, series, smooth
from agrpo_megatron.reports.text import compact

DPI = 200
LABEL_SIZE = 9
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
STEPS = (1, 2, 2.5, 5, 10)  # multiples that ticks may take

Metric = tuple[str, str, str]  # key, label, colour
Label = tuple[float | None, float, str, str]  # x (None: the right edge), y, text, colour
NEAR = 0.03  # of the width: labels this close to each other, or to the edge, form one column


@dataclass(frozen=True)
class Theme:
    """Colours by role; the defaults are for a light page."""

    face: str = "#ffffff"
    ink: str = "#1c2530"
    muted: str = "#6b7684"
    grid: str = "#e8ebef"
    blue: str = "#2b6cd4"  # training
    orange: str = "#e06c1f"  # held-out
    green: str = "#148f6b"
    purple: str = "#8250c8"
    red: str = "#cf3f4f"  # alarms
    grey: str = "#9aa5b1"
    pale: str = "#cfd6de"  # the remainder

    def cycle(self) -> tuple[str, ...]:
        """Return the colours of interchangeable items, in order."""
        return self.blue, self.orange, self.green, self.purple, self.red, self.grey


LIGHT = Theme()
DARK = Theme(
    face="#161b22",
    ink="#e6eaf0",
    muted="#98a3b0",
    grid="#2a313b",
    blue="#6ea8ff",
    orange="#ff9d52",
    green="#4ccaa0",
    purple="#b794f6",
    red="#ff7b86",
    grey="#7d8896",
    pale="#434c58",
)


def render(draw: Callable[[Theme], Figure], theme: Theme = LIGHT) -> bytes:
    """Return a figure as PNG."""
    with matplotlib.rc_context(_rc(theme)):
        canvas = FigureCanvasAgg(draw(theme))
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    packed = io.BytesIO()  # 256 colours: a third of the size, and no difference to the eye
    colours = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colours.save(packed, format="png", dpi=(DPI, DPI))
    return packed.getvalue()


def write_png(path: Path, draw: Callable[[Theme], Figure]) -> Path:
    """Write a figure as PNG, below new folders if needed; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(draw))
    return path


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def dress(axes: Axes, title: str, *, percent: bool = False, log: bool = False) -> None:
    """Give an axes its title and scale; call before anything is drawn."""
    axes.set_title(title)
    axes.margins(x=0.01, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    plain = FuncFormatter(lambda value, _: compact(round(value, 12)))
    axes.yaxis.set_major_formatter(PERCENT if percent else plain)


def curves(axes: Axes, rows: Sequence[Row], metrics: Iterable[Metric]) -> list[Label]:
    """Draw metrics faintly with their running means on top; return labels at the ends of the means.

    A metric without values is left out. On a log axis the mean is geometric, and values below 1e-9
    are drawn at 1e-9.
    """
    labels = []
    log = axes.get_yscale() == "log"
    for key, label, colour in metrics:
        x, y = series(rows, key)
        if not len(x):
            continue
        drawn = np.maximum(y, 1e-9) if log else y
        mean = np.exp(smooth(np.log(drawn))) if log else smooth(drawn)
        if len(x) >= 8:
            axes.plot(x, drawn, color=colour, alpha=0.22, linewidth=0.8, zorder=2)
        marker = "o" if len(x) < 8 else ""
        axes.plot(x, mean, color=colour, linewidth=2.0, zorder=3, marker=marker, ms=4.5)
        labels.append((float(x[-1]), float(mean[-1]), label, colour))
    return labels


def end_labels(axes: Axes, labels: Iterable[Label]) -> None:
    """Write labels right of the ends of their lines, pushed apart to be readable.

    Call last: fixes the limits.
    """
    axes.set_ylim(axes.get_ylim())
    axes.set_xlim(axes.get_xlim())
    to_axes = axes.transData + axes.transAxes.inverted()
    height = axes.get_position().height * axes.figure.get_figheight()  # type: ignore[union-attr]
    line = 1.45 * LABEL_SIZE / 72 / height
    columns: dict[float, list[tuple[float, str, str]]] = {}
    for x, y, text, colour in labels:
        across, up = to_axes.transform((axes.get_xlim()[1] if x is None else x, y))
        own = 1.0 if across > 1 - NEAR else float(across)
        own = next((other for other in columns if abs(other - own) < NEAR), own)
        columns.setdefault(own, []).append((float(up), text, colour))
    look: dict[str, Any] = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
    for across, members in columns.items():
        placed = sorted(members)
        sizes = [line * (text.count("\n") + 1) for _, text, _ in placed]
        spots = spread([spot for spot, _, _ in placed], sizes)
        for spot, (_, text, colour) in zip(spots, placed, strict=True):
            note(axes, text, (across, spot), color=colour, **look)


def spread(spots: Iterable[float], sizes: Sequence[float]) -> list[float]:
    """Return ascending spots moved as little as needed so that labels of these sizes stay apart."""
    groups: list[tuple[float, float, int]] = []  # centre, extent, members
    for centre, extent in zip(spots, sizes, strict=True):
        members = 1
        while groups and centre - groups[-1][0] < (extent + groups[-1][1]) / 2:
            below, size, count = groups.pop()
            centre = (below * count + centre * members) / (count + members)
            extent, members = size + extent, count + members
        groups.append((centre, extent, members))
    moved: list[float] = []
    for centre, extent, members in groups:
        at = centre - extent / 2
        for size in sizes[len(moved) : len(moved) + members]:
            moved.append(at + size / 2)
            at += size
    return moved


def note(
    axes: Axes, text: str, xy: tuple[float, float], *, offset: tuple[int, int] = (6, 0), **look: Any
) -> None:
    """Write text next to a point; offset in typographic points."""
    axes.annotate(text, xy, xytext=offset, textcoords="offset points", fontsize=LABEL_SIZE, **look)


def _rc(theme: Theme) -> dict[Any, Any]:
    ticks = {"color": theme.muted, "labelsize": 8.5, "major.size": 0, "minor.size": 0}
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": theme.ink,
        "text.parse_math": False,
        "figure.facecolor": theme.face,
        "axes.facecolor": theme.face,
        "axes.edgecolor": theme.grid,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlecolor": theme.ink,
        "axes.titlepad": 9,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 9,
        "grid.color": theme.grid,
        "grid.linewidth": 0.9,
        **{f"{axis}tick.{key}": value for axis in "xy" for key, value in ticks.items()},
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
    }
