"""Measure weak and strong scaling of a small model on this machine's CPU.

    python tools/measure_scaling.py examples/scaling/cpu.yaml --output runs/scaling

Trains a few iterations on 1, 2 and 4 ranks of one thread each, split by data, by tensors and by
pipeline stages. Weak scaling keeps the completions of each rank, strong scaling those of all ranks.
Seconds are the processor time of the first rank, so more ranks than cores may run, and a rank that
waits takes none; what they wait is the pipeline's bubble, which a run counts in slots. Efficiency
is FLOPs per processor second and rank, over that of one rank. Finished runs are taken as they are.
Prints a table in Markdown, and draws a figure. Exit status 1 if a run fails.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from agrpo_megatron.launch.speed import measured_rows
from agrpo_megatron.planning.presets import open_model
from agrpo_megatron.reports.plots.style import Theme, dress, new_figure, write_png
from agrpo_megatron.reports.tables import markdown_table

RANKS = (1, 2, 4)
AXES = {"dp": "data", "tp": "tensor", "pp": "pipeline"}
PROMPTS = "algorithm.prompts_per_iteration"


@dataclass(frozen=True)
class Point:
    """A run; its median iteration."""

    scaling: str
    axis: str
    ranks: int
    seconds: float  # processor time of the first rank
    flops: float  # of all ranks
    bubbles: tuple[float, float]  # shares of the slots in which a stage waits: rollout, update


def main() -> int:
    """Train, print and draw; returns the exit status."""
    arguments = _arguments()
    runs = arguments.output
    alone = open_model(arguments.file, [], ranks=1).settings.algorithm.prompts_per_iteration
    one = _train(arguments.file, runs / "one", 1, [])
    points = list[Point]()
    for scaling in ("weak", "strong"):
        for axis in AXES:
            for ranks in RANKS[1:]:
                prompts = alone * (ranks if scaling == "weak" else 1)
                own = [f"parallel={axis}{ranks}", f"{PROMPTS}={prompts}"]
                run = _train(arguments.file, runs / f"{scaling}-{axis}{ranks}", ranks, own)
                points.append(_point(run, scaling, axis, ranks))
    first = _point(one, "both", "dp", 1)
    print(
        markdown_table(
            [_row(point, first) for point in (first, *points)], left={"scaling", "layout"}
        )
    )
    if arguments.figure is not None:
        print(f"figure {write_png(arguments.figure, lambda theme: _figure(points, first, theme))}")
    return 0


def _train(file: str, run: Path, ranks: int, overrides: Sequence[str]) -> Path:
    """Train a run unless it is there; returns its directory."""
    if not (run / "report.html").exists():
        command = ["torchrun", "--nproc-per-node", str(ranks), "-m", "agrpo_megatron", "train"]
        run.parent.mkdir(parents=True, exist_ok=True)
        own = [file, f"run.dir={run}", *overrides]
        python = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
        done = subprocess.run([*python, *own], capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(1)
        print(f"{run}: trained", file=sys.stderr)
    return run


def _point(run: Path, scaling: str, axis: str, ranks: int) -> Point:
    rows = measured_rows(run)[1]
    seconds, flops = (
        statistics.median(row[key] for row in rows) for key in ("timing/cpu", "flops")
    )
    rollout, update = (
        statistics.median(row.get(f"{phase}/bubble", 0.0) for row in rows)
        for phase in ("rollout", "update")
    )
    return Point(scaling, axis, ranks, seconds, flops, (rollout, update))


def _efficiency(point: Point, first: Point) -> float:
    return point.flops / point.ranks / point.seconds / (first.flops / first.seconds)


def _row(point: Point, first: Point) -> dict[str, str]:
    return {
        "scaling": point.scaling,
        "layout": f"{point.axis}{point.ranks}",
        "GFLOP of a rank": f"{point.flops / point.ranks / 1e9:.1f}",
        "CPU s": f"{point.seconds:.2f}",
        "efficiency": f"{100 * _efficiency(point, first):.0f} %",
        "bubble of rollout": f"{100 * point.bubbles[0]:.0f} %",
        "of update": f"{100 * point.bubbles[1]:.0f} %",
    }


def _figure(points: Sequence[Point], first: Point, theme: Theme) -> Figure:
    figure = new_figure(11, 4.4)
    panels = zip(figure.subplots(1, 2, sharey=True), ("weak", "strong"), strict=True)
    for axes, scaling in panels:
        dress(axes, f"{scaling} scaling, measured on a CPU", percent=True)
        for (axis, name), colour in zip(AXES.items(), theme.cycle(), strict=False):
            own = [p for p in points if (p.scaling, p.axis) == (scaling, axis)]
            shares = [1.0, *(_efficiency(point, first) for point in own)]
            axes.plot(RANKS, shares, color=colour, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(count) for count in RANKS])
        axes.minorticks_off()
        axes.set_ylim(0, 1.15)
        axes.set_xlabel("ranks of one thread (FLOPs per processor second and rank)")
        axes.legend(loc="lower left", frameon=False)
    return figure


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="settings file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the runs")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="efficiency, as PNG")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
