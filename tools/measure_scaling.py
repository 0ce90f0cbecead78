"""Measure weak and strong scaling of a small model on this machine's CPU, and compare the plan.

    python tools/measure_scaling.py examples/scaling/cpu.yaml --output runs/scaling

Trains a few iterations on 1, 2 and 4 ranks of one thread each, split by data, by tensors and by
pipeline stages. Weak scaling keeps the completions of each rank, strong scaling those of all ranks.
Seconds are the processor time of the first rank, so more ranks than cores may run, and a rank that
waits takes none; what they wait is the pipeline's bubble, which a run counts in slots. Efficiency
is FLOPs per processor second and rank, over that of one rank. The plan (`agrpo plan --measured`)
knows the run on one rank alone, and predicts the others. Finished runs are taken as they are.
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

from agrpo_megatron.config.schema import from_text
from agrpo_megatron.config.settings import ParallelSettings
from agrpo_megatron.launch.speed import measured_rows
from agrpo_megatron.planning.cluster import Given, read_cluster
from agrpo_megatron.planning.measured import read_measured
from agrpo_megatron.planning.presets import open_model
from agrpo_megatron.planning.ranking import rank_layouts
from agrpo_megatron.reports.plots.style import Theme, dress, new_figure, write_png
from agrpo_megatron.reports.read import Row
from agrpo_megatron.reports.tables import markdown_table
from agrpo_megatron.runs.progress import RUN_SETTINGS

RANKS = (1, 2, 4)
AXES = {"dp": "data", "tp": "tensor", "pp": "pipeline"}
PROMPTS = "algorithm.prompts_per_iteration"


@dataclass(frozen=True)
class Point:
    """A run, and what the plan says of it; seconds of an iteration."""

    scaling: str
    axis: str
    ranks: int
    measured: float  # processor time of the first rank
    planned: float  # without waiting and communication
    flops: float  # of all ranks
    bubble: float  # of the rollout, measured; share of slots
    planned_bubble: float  # share of the rollout's seconds


def main() -> int:
    """Train, plan, print and draw; returns the exit status."""
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
                points.append(_point(run, one, scaling, axis, ranks))
    first = _point(one, one, "both", "dp", 1)
    print(markdown_table([_row(point, first) for point in (first, *points)], left={"scaling"}))
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


def _point(run: Path, one: Path, scaling: str, axis: str, ranks: int) -> Point:
    rows: Sequence[Row] = measured_rows(run)[1]
    cluster = read_cluster(f"{ranks}xCPU", "fp32", Given())
    speed = cluster.with_measured(read_measured([one], read_cluster("1xCPU", "fp32", Given())))
    model = open_model(str(run / RUN_SETTINGS), [], ranks=ranks)
    only = from_text(ParallelSettings, f"{axis}{ranks}", key="parallel")
    (found,) = rank_layouts(model, speed, only=ParallelSettings(**only)).fitting
    times = found.iteration.times
    waits = times.rollout_exchange + times.update_exchange + times.gradients
    waits += times.rollout_bubble + times.update_bubble
    rollout = times.rollout + times.rollout_exchange + times.rollout_bubble
    return Point(
        scaling,
        axis,
        ranks,
        measured=statistics.median(row["timing/cpu"] for row in rows),
        planned=times.total - waits,
        flops=statistics.median(row["flops"] for row in rows),
        bubble=statistics.median(row.get("rollout/bubble", 0.0) for row in rows),
        planned_bubble=times.rollout_bubble / rollout,
    )


def _efficiency(point: Point, first: Point) -> float:
    return point.flops / point.ranks / point.measured / (first.flops / first.measured)


def _row(point: Point, first: Point) -> dict[str, str]:
    return {
        "scaling": point.scaling,
        "layout": f"{point.axis}{point.ranks}",
        "GFLOP of a rank": f"{point.flops / point.ranks / 1e9:.1f}",
        "CPU s": f"{point.measured:.2f}",
        "planned": f"{point.planned:.2f}",
        "error": f"{100 * (point.planned / point.measured - 1):+.0f} %",
        "efficiency": f"{100 * _efficiency(point, first):.0f} %",
        "bubble": f"{100 * point.bubble:.0f} %",
        "planned bubble": f"{100 * point.planned_bubble:.0f} %",
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
