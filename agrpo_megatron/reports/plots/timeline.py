"""The timeline figure: when each part of some iterations began and ended, on each rank."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from agrpo_megatron.reports.plots.style import LABEL_SIZE, Theme, dress, new_figure
from agrpo_megatron.reports.read import Row, Run

SHOWN = 3  # iterations
RANKS = 8  # at most
# Parts in the order of an iteration, with the role of their colour; a later one is drawn on top.
PARTS = {
    "rollout": "blue",
    "reward": "red",
    "update": "green",
    "scoring": "pale",
    "evaluation": "orange",
    "checkpoint": "purple",
    "grading": "red",
}
BACKGROUND = ("grading",)  # parts that run while the rank does another: on a line of their own


def shown_iterations(run: Run) -> tuple[Row, ...]:
    """Return the iterations that the figure shows: the last ones, but for the end of the run.

    The last iteration has the closing evaluation, which may take longer than many iterations.
    Iterations whose parts all were too short to be recorded are left out.
    """
    rows = [row for row in run.timeline if _begins(row)]
    rows = rows[:-1] if len(rows) > SHOWN else rows
    return tuple(rows[-SHOWN:])


def _begins(row: Row) -> list[float]:
    """Return when the parts of an iteration began, without those in the background."""
    spans = (span for own in row["ranks"].values() for span in own)
    return [begin for part, begin, _ in spans if part in PARTS and part not in BACKGROUND]


def timeline_figure(run: Run, theme: Theme) -> Figure:
    """Draw a bar for each part, in rows by rank; a thin one for what runs in the background."""
    shown = shown_iterations(run)
    ranks = sorted({rank for row in shown for rank in row["ranks"]}, key=int)[:RANKS]
    spans = [
        (ranks.index(rank), span)
        for row in shown
        for rank, own in row["ranks"].items()
        if rank in ranks
        for span in own
        if span[0] in PARTS
    ]
    start = min(begin for _, (_, begin, _) in spans)
    figure = new_figure(11, 1.7 + 0.55 * len(ranks))
    axes = figure.subplots()
    numbers = [row["iteration"] for row in shown]
    dress(
        axes,
        f"Iterations {numbers[0]} to {numbers[-1]}" if numbers[1:] else f"Iteration {numbers[0]}",
    )
    order = list(PARTS)
    for place, (part, begin, end) in sorted(spans, key=lambda span: order.index(span[1][0])):
        is_thin = part in BACKGROUND
        low, height = (place + 0.3, 0.16) if is_thin else (place - 0.36, 0.6)
        colour = getattr(theme, PARTS[part])
        axes.broken_barh([(begin - start, end - begin)], (low, height), color=colour, lw=0)
    _borders(axes, shown, start, theme)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks], fontsize=LABEL_SIZE)
    axes.set_ylim(len(ranks) - 0.35, -0.65)
    axes.set_xlim(left=0)
    axes.grid(False)
    axes.set_xlabel("seconds")
    _legend(figure, {part for _, (part, _, _) in spans}, theme)
    return figure


def _borders(axes: Axes, shown: Sequence[Row], start: float, theme: Theme) -> None:
    """Draw a line where each iteration but the first begins."""
    for row in shown[1:]:
        axes.axvline(
            min(_begins(row)) - start, color=theme.ink, linewidth=0.9, linestyle=(0, (3, 3))
        )


def _legend(figure: Figure, parts: set[str], theme: Theme) -> None:
    """Name the colours below the chart."""
    texts = {part: part for part in PARTS if part in parts}
    texts |= {part: f"{part} in the background (thin)" for part in texts if part in BACKGROUND}
    handles = [Patch(color=getattr(theme, PARTS[part])) for part in texts]
    figure.legend(
        handles,
        list(texts.values()),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=LABEL_SIZE,
        handlelength=1,
        columnspacing=1.6,
    )
