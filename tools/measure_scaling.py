"""Measure weak and strong scaling, on this machine's CPU or from finished runs.

    python tools/measure_scaling.py examples/scaling/cpu.yaml --output runs/scaling
    python tools/measure_scaling.py --runs runs/scaling --figure scaling.png

With FILE, trains a few iterations on 1, 2 and 4 ranks of one thread each, split by data, by tensors
and by pipeline stages, and three smaller sizes on one rank. Weak scaling keeps the completions of
each rank, strong scaling those of all ranks. Seconds are the processor time of the first rank, so
more ranks than cores may run, and a rank that waits takes none; what they wait is the pipeline's
bubble, which a run counts in slots. `planned` are the processor seconds that `agrpo plan
--measured` predicts, without waiting, from the runs on one and two ranks: those are given to the
plan, the others are not. Finished runs are taken as they are.

With --runs, reads finished runs, such as the members of a sweep of `agrpo launch`, on CPUs or GPUs.

Efficiency is FLOPs for each second and rank, over that of the fewest ranks of the same model.
Prints a table in Markdown, and draws a figure. Exit status 1 if a run fails, 2 for wrong input.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scaling_points import Point, find_runs, read_point, scaling_figure, table_row, with_scaling

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.planning.cluster import Given, read_cluster
from agrpo_megatron.planning.measured import read_measured
from agrpo_megatron.planning.presets import open_model
from agrpo_megatron.planning.ranking import rank_layouts
from agrpo_megatron.reports.plots.style import write_png
from agrpo_megatron.reports.tables import markdown_table
from agrpo_megatron.runs.progress import RUN_SETTINGS

RANKS = (1, 2, 4)
GIVEN = 2  # most ranks of a run that is given to the plan
AXES = ("dp", "tp", "pp")
PROMPTS = "algorithm.prompts_per_iteration"
LEFT = {"model", "scaling", "layout"}  # columns of text


def main() -> int:
    """Train or read, print and draw; returns the exit status."""
    arguments = _arguments()
    try:
        if arguments.runs:
            rows, points = _read(find_runs(arguments.runs))
        else:
            rows, points = _measured(arguments.file, arguments.output)
    except ValueError as error:
        print(f"measure_scaling: error: {error}", file=sys.stderr)
        return 2
    print(markdown_table(rows, left=LEFT))
    if arguments.figure is not None:
        figure = write_png(arguments.figure, lambda theme: scaling_figure(points, theme))
        print(f"figure {figure}")
    return 0


def _read(runs: Sequence[Path]) -> tuple[list[dict[str, str]], list[Point]]:
    """Return rows and points of finished runs."""
    if not runs:
        raise ValueError("--runs holds no run; give run directories, or the folder of a sweep")
    points = with_scaling([read_point(run) for run in runs])
    if len({point.is_cpu for point in points}) > 1:
        raise ValueError("--runs has runs on CPUs and on GPUs; give one kind at a time")
    return [table_row(point, points) for point in points], points


def _measured(file: str, output: Path) -> tuple[list[dict[str, str]], list[Point]]:
    """Train runs; return their rows with what is planned, and their points."""
    base = open_model(file, [], ranks=1).settings
    alone, prompts = [_train(file, output / "one", 1, [])], base.algorithm.prompts_per_iteration
    for name, overrides in _sizes(base).items():
        alone.append(_train(file, output / f"one-{name}", 1, overrides))
    runs = list[Path]()
    for scaling in ("weak", "strong"):
        for axis in AXES:
            for ranks in RANKS[1:]:
                count = prompts * (ranks if scaling == "weak" else 1)
                own = [f"parallel={axis}{ranks}", f"{PROMPTS}={count}"]
                runs.append(_train(file, output / f"{scaling}-{axis}{ranks}", ranks, own))
    points = with_scaling([read_point(run) for run in (alone[0], *runs)])
    given = [*alone, *(p.run for p in points if 1 < p.ranks <= GIVEN)]
    measured = read_measured(given, read_cluster("1xCPU", "fp32", Given()))
    print(f"planned with {measured.text}\n", file=sys.stderr)
    rows = list[dict[str, str]]()
    for point in points:
        model = open_model(str(point.run / RUN_SETTINGS), [], ranks=point.ranks)
        speed = read_cluster(f"{point.ranks}xCPU", "fp32", Given()).with_measured(measured)
        only = load(Settings, point.run / RUN_SETTINGS).parallel
        times = rank_layouts(model, speed, only=only).fitting[0].iteration.times
        planned = times.total - times.rollout_bubble - times.update_bubble
        error = f"{100 * (planned / point.seconds - 1):+.0f} %"
        row = table_row(point, points) | {"planned": f"{planned:.2f}", "error": error}
        rows.append({**row, "given": "yes" if point.ranks <= GIVEN else "no"})
    return rows, points


def _sizes(base: Settings) -> dict[str, list[str]]:
    """Return overrides of smaller sizes by name, which tell kinds of work apart."""
    model = base.model
    width = [f"model.hidden_size={model.hidden_size // 2}"]
    width.append(f"model.ffn_hidden_size={model.ffn_hidden_size // 2}")
    steps = f"sampling.denoising_steps={base.sampling.denoising_steps // 2}"
    few = f"{PROMPTS}={max(1, base.algorithm.prompts_per_iteration // 2)}"
    depth = [f"model.num_layers={max(1, model.num_layers // 2)}"]
    return {"narrow": width, "shallow": depth, "short": [steps, few]}


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="settings file that is trained")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the runs of FILE")
    parser.add_argument(
        "--runs", type=Path, nargs="+", metavar="DIR", help="finished runs, or folders of them"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="efficiency, as PNG")
    found = parser.parse_args()
    if (found.file is None) == (found.runs is None) or (found.file and not found.output):
        parser.error("give FILE with --output DIR, or --runs DIR")
    return found


if __name__ == "__main__":
    sys.exit(main())
