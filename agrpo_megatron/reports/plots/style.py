"""How charts look: two themes, one palette by role, and the marks of figures.

Matplotlib's object API only: no pyplot, no global state (`rc` is applied within a context).
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from agrpo_megatron.reports.read import smooth
from agrpo_megatron.reports.text import compact

DPI = 200
LABEL_SIZE = 9
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
STEPS = (1, 2, 2.5, 5, 10)  # multiples that ticks may take


@dataclass(frozen=True)
class Theme:
    """Colours by role."""

    face: str
    ink: str
    muted: str
    grid: str
    blue: str  # training
    orange: str  # held-out
    green: str
    purple: str
    red: str  # alarms
    grey: str
    pale: str  # the remainder

    def cycle(self) -> tuple[str, ...]:
        """Return the colours of interchangeable things, in order."""
        return self.blue, self.orange, self.green, self.purple, self.red, self.grey


LIGHT = Theme(
    face="#ffffff",
    ink="#1c2530",
    muted="#6b7684",
    grid="#e8ebef",
    blue="#2b6cd4",
    orange="#e06c1f",
    green="#148f6b",
    purple="#8250c8",
    red="#cf3f4f",
    grey="#9aa5b1",
    pale="#cfd6de",
)
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
    image.quantize(256, dither=Image.Dither.NONE).save(packed, format="png", dpi=(DPI, DPI))
    return packed.getvalue()


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


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, *, width: float = 2.0) -> float:
    """Draw values faintly with their running mean on top; return where the mean ends.

    On a log axis the mean is geometric, and values below 1e-9 are drawn at 1e-9.
    """
    log = axes.get_yscale() == "log"
    drawn = np.maximum(y, 1e-9) if log else y
    mean = np.exp(smooth(np.log(drawn))) if log else smooth(drawn)
    if len(x) >= 8:
        axes.plot(x, drawn, color=colour, alpha=0.22, linewidth=0.8, zorder=2)
    marker = "o" if len(x) < 8 else ""
    axes.plot(x, mean, color=colour, linewidth=width, zorder=3, marker=marker, ms=4.5)
    return float(mean[-1])


def end_labels(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) right of the axes at their values, pushed apart to be readable.

    Call last: fixes the vertical limits.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    to_axes = axes.transData + axes.transAxes.inverted()
    height = axes.get_position().height * axes.figure.get_figheight()  # type: ignore[union-attr]
    gap = 1.45 * LABEL_SIZE / 72 / height
    placed = sorted((float(to_axes.transform((1.0, v))[1]), text, c) for v, text, c in labels)
    spots = spread([spot for spot, _, _ in placed], [gap * _lines(t) for _, t, _ in placed])
    for spot, (_, text, colour) in zip(spots, placed, strict=True):
        axes.annotate(
            text,
            (1.0, spot),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            fontsize=LABEL_SIZE,
            va="center",
            annotation_clip=False,
        )


def spread(spots: list[float], sizes: list[float]) -> list[float]:
    """Return ascending spots moved as little as needed so that labels of these sizes stay apart."""
    groups: list[tuple[float, float, int]] = []  # centre, size, members
    for spot, size in zip(spots, sizes, strict=True):
        group = (spot, size, 1)
        while groups and group[0] - groups[-1][0] < (group[1] + groups[-1][1]) / 2:
            centre, extent, members = groups.pop()
            count = members + group[2]
            group = (
                (centre * members + group[0] * group[2]) / count,
                extent + group[1],
                count,
            )
        groups.append(group)
    moved: list[float] = []
    for centre, extent, members in groups:
        at = centre - extent / 2
        for size in sizes[len(moved) : len(moved) + members]:
            moved.append(at + size / 2)
            at += size
    return moved


def note(axes: Axes, text: str, xy: tuple[float, float], colour: str, *, offset=(0, 0)) -> None:
    """Write next to a point, legible over lines; offset in typographic points."""
    axes.annotate(
        text,
        xy,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        fontsize=LABEL_SIZE,
        fontweight="bold",
        ha="center" if offset[0] == 0 else ("left" if offset[0] > 0 else "right"),
        va="center" if offset[1] == 0 else ("bottom" if offset[1] > 0 else "top"),
        path_effects=[withStroke(linewidth=3, foreground=axes.get_facecolor())],
        zorder=6,
    )


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _rc(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": theme.ink,
        "text.parse_math": False,
        "figure.facecolor": theme.face,
        "savefig.facecolor": theme.face,
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
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "xtick.minor.size": 0,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
    }
