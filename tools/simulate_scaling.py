"""Simulate weak and strong scaling by the planner's arithmetic; nothing is run.

    python tools/simulate_scaling.py llada-8b 70b llada2-flash --gpu H100 --output docs/scaling.png

For each model and number of GPUs, the fastest layout that fits is taken (as `agrpo plan` does).
Weak scaling keeps 16 completions an iteration for each GPU, strong scaling 2048 of them in all.
Efficiency is completion tokens per second and GPU, over the most of any number of GPUs: on the
fewest that hold a model, only slow layouts fit. Prints a table in Markdown, and draws a figure that
is marked as simulated. Exit status 2 for wrong input.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agrpo_megatron.planning.cluster import DEVICES, Given, read_cluster
from agrpo_megatron.planning.presets import PER_GPU, PRESETS, open_model
from agrpo_megatron.planning.ranking import Candidate, ordered, rank_layouts
from agrpo_megatron.planning.reasons import changed
from agrpo_megatron.planning.report import tokens_per_second
from agrpo_megatron.reports.plots.style import Theme, dress, new_figure, write_png
from agrpo_megatron.reports.tables import markdown_table

STRONG = 2048  # completions of an iteration, of strong scaling
LEAST, MOST = 8, 1024  # GPUs


@dataclass(frozen=True)
class Point:
    """The fastest layout of a model on some GPUs."""

    gpus: int
    layout: str
    seconds: float  # of an iteration
    rate: float  # completion tokens per second and GPU
    bubble: float  # share of the iteration
    exchange: float  # share of the iteration


type Curves = dict[str, dict[str, list[Point]]]  # by kind of scaling and model


def main() -> int:
    """Simulate, print and draw; returns the exit status."""
    arguments = _arguments()
    counts = [LEAST << power for power in range((MOST // LEAST).bit_length())]
    counts = [count for count in counts if count <= arguments.most][:: -arguments.every][::-1]
    found: Curves = {"weak": {}, "strong": {}}
    try:
        for name in arguments.models:
            for count in counts:
                _simulate(name, f"{count}x{arguments.gpu}", found)
    except ValueError as error:
        print(f"simulate_scaling: error: {error}", file=sys.stderr)
        return 2
    print(markdown_table(_rows(found), left={"scaling", "model", "layout"}), end="")
    write_png(arguments.output, lambda theme: _figure(found, theme, gpu=arguments.gpu))
    print(f"\nfigure {arguments.output}")
    return 0


def _simulate(name: str, gpus: str, found: Curves) -> None:
    """Add a model's points on some GPUs, if it fits them."""
    count = int(gpus.partition("x")[0])
    model = open_model(name, [], ranks=count)
    ranking = rank_layouts(model, read_cluster(gpus, model.settings.precision, Given()))
    strong = changed(ranking, ranking.cluster, completions=STRONG / (PER_GPU * count))
    fitting = {"weak": ranking.fitting, "strong": ordered(one for one in strong if one.fits)}
    for kind, layouts in fitting.items():
        if layouts:
            found[kind].setdefault(name, []).append(_point(layouts[0], count))


def _point(one: Candidate, gpus: int) -> Point:
    times = one.iteration.times
    exchange = times.rollout_exchange + times.update_exchange + times.gradients
    bubble = times.rollout_bubble + times.update_bubble
    rate = tokens_per_second(one) / gpus
    share = bubble / one.seconds, exchange / one.seconds
    return Point(gpus, one.name, one.seconds, rate, *share)


def _best(points: Sequence[Point]) -> float:
    return max(point.rate for point in points)


def _rows(found: Curves) -> list[dict[str, str]]:
    return [
        {
            "scaling": kind,
            "model": name,
            "GPUs": str(point.gpus),
            "layout": point.layout,
            "s/iteration": f"{point.seconds:.1f}",
            "tokens/s and GPU": f"{point.rate:.0f}",
            "efficiency": f"{100 * point.rate / _best(points):.0f} %",
            "bubble": f"{100 * point.bubble:.0f} %",
            "exchange": f"{100 * point.exchange:.0f} %",
        }
        for kind, curves in found.items()
        for name, points in curves.items()
        for point in points
    ]


def _figure(found: Curves, theme: Theme, *, gpu: str) -> Figure:
    figure = new_figure(11, 4.4)
    titles = {
        "weak": f"weak scaling, simulated: {PER_GPU} completions for each {gpu}",
        "strong": f"strong scaling, simulated: {STRONG} completions in all",
    }
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        _panel(axes, title, found[kind], theme)
    return figure


def _panel(axes: Axes, title: str, curves: Mapping[str, Sequence[Point]], theme: Theme) -> None:
    dress(axes, title, percent=True)
    for (name, points), colour in zip(curves.items(), theme.cycle(), strict=False):
        gpus = [point.gpus for point in points]
        shares = [point.rate / _best(points) for point in points]
        axes.plot(gpus, shares, color=colour, marker="o", label=name)
    axes.set_xscale("log", base=2)
    shown = sorted({point.gpus for points in curves.values() for point in points})
    axes.set_xticks(shown, [str(count) for count in shown])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("GPUs (arithmetic of agrpo plan, no measurement)")
    axes.legend(loc="lower left", frameon=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", choices=PRESETS, help="presets")
    kinds = [device.name for device in DEVICES if device.name != "CPU"]
    parser.add_argument("--gpu", default="H100", choices=kinds, help="kind of GPU (H100)")
    parser.add_argument("--most", type=int, default=MOST, help=f"most GPUs ({MOST})")
    parser.add_argument("--every", type=int, default=1, help="each so many doublings (1)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="figure (PNG)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
