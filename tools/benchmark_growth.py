"""Measure how the time of a rollout grows with rollouts and with denoising steps; draw it.

Each size is one `agrpo benchmark rollout` in a process of its own. The exponent is the slope of
log time over log size: 1 means that twice the size takes twice the time. FLOPs grow exactly so.

    python tools/benchmark_growth.py --output docs/growth.png
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from agrpo_megatron.reports.plots import style

SIZES = (2, 4, 8, 16, 32)
# Axis of the figure: the option that changes, its values, and the options that stay.
AXES: dict[str, tuple[str, tuple[int, ...], dict[str, int]]] = {
    "rollouts": ("--batch", SIZES, {"--denoising-steps": 16}),
    "denoising steps": ("--denoising-steps", tuple(4 * n for n in SIZES), {"--batch": 4}),
}


def main() -> None:
    """Measure both axes, print the exponents, and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("growth.png"), help="the figure (PNG)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size (3)")
    arguments = parser.parse_args()
    found = {}
    for axis, (option, sizes, fixed) in AXES.items():
        found[axis] = {n: measured({option: n, **fixed}, arguments.repeats) for n in sizes}
        seconds = {size: side["seconds_median"] for size, side in found[axis].items()}
        flops = {size: side["flops"] for size, side in found[axis].items()}
        print(
            f"{axis}: seconds grow with the power {exponent(seconds):.2f}, FLOPs with "
            f"{exponent(flops):.2f}, from {min(seconds)} to {max(seconds)}"
        )
    print(style.write_png(arguments.output, lambda theme: growth_figure(found, theme)))


def measured(options: Mapping[str, int], repeats: int) -> dict[str, Any]:
    """Return what `agrpo benchmark` says of ours."""
    words = [word for name, value in options.items() for word in (name, str(value))]
    command = [sys.executable, "-m", "agrpo_megatron", "benchmark", "rollout", *words]
    command += ["--repeats", str(repeats), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])["ours"]


def exponent(values: Mapping[int, float]) -> float:
    """Return the slope of log value over log size, by least squares."""
    x, y = [math.log(size) for size in values], [math.log(value) for value in values.values()]
    middle = sum(x) / len(x)
    spread = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / spread


def growth_figure(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]], theme: style.Theme
) -> Figure:
    """Draw the seconds over each size, and the line of the largest one's rate."""
    figure = style.new_figure(7.2, 3.0)
    for axes, (axis, sides) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        style.dress(axes, f"CPU seconds, by {axis}")
        sizes: Sequence[int] = sorted(sides)
        last = sides[sizes[-1]]
        rate = last["flops"] / last["seconds_median"]
        line = [sides[size]["flops"] / rate for size in sizes]
        axes.plot(sizes, line, color=theme.muted, linewidth=1.2, linestyle="--", zorder=2)
        seconds = [sides[size]["seconds_median"] for size in sizes]
        axes.plot(sizes, seconds, color=theme.blue, linewidth=0, marker="o", ms=5, zorder=3)
        style.note(axes, "FLOPs", (sizes[-2], line[-2]), color=theme.muted, offset=(-34, 6))
        axes.set_ylim(bottom=0)
    return figure


if __name__ == "__main__":
    main()
