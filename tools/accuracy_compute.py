"""Measure held-out accuracy against training FLOPs: sizes, supervised phases and budgets of RL.

    python tools/accuracy_compute.py examples/scaling/accuracy.yaml --output runs/accuracy
    python tools/accuracy_compute.py examples/scaling/accuracy.yaml --output runs/accuracy \\
      --draw docs/accuracy_compute.png

The first command trains what is missing of examples/compare/compute.yaml (or of --grid): for each
size, length of the supervised phase and seed one run, which RL follows where the grid has it among
its starts. Interrupted runs continue, and finished ones are taken as they are. The second command
trains nothing: it draws what is finished, and prints a table in Markdown.

FLOPs are those of training: supervised phase, rollouts and updates, without evaluations. Those of
RL are counted as they run, those of a supervised iteration by the arithmetic of forecasts.
Exit status 1 if a run failed; the others are not affected.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from accuracy_figure import write_figure  # noqa: E402 - in this folder
from accuracy_plan import Line, plan, read_grid  # noqa: E402
from accuracy_points import read_sizes, table_rows  # noqa: E402
from compare_jobs import Clock, add_workers, exit_status, failures_of, run_jobs  # noqa: E402

from agrpo_megatron.reports.tables import markdown_table  # noqa: E402

GRID = Path(__file__).resolve().parent.parent / "examples" / "compare" / "compute.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, or draw what is finished; returns the exit status."""
    arguments = _arguments(argv)
    try:
        grid = read_grid(arguments.grid)
        lines = plan(arguments.file, grid, arguments.overrides, arguments.output)
        if arguments.draw is not None:
            sizes = read_sizes(lines, grid)
            print(markdown_table(table_rows(sizes, grid.budgets), left={"size"}))
            print(f"figure {write_figure(sizes, arguments.draw)}")
            return 0
    except ValueError as error:
        print(f"accuracy_compute: error: {error}", file=sys.stderr)
        return 2
    return exit_status(lambda: train_all(lines, arguments.workers))


def train_all(lines: Sequence[Line], workers: int) -> list[str]:
    """Train or resume all runs; returns what failed."""
    jobs = [job for line in lines for job in line.jobs]
    clock = Clock(Counter(whole=len(jobs)), workers, lambda line: print(line, flush=True))
    return failures_of(run_jobs(jobs, workers, clock))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="settings file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all runs")
    parser.add_argument("--grid", type=Path, default=GRID, metavar="FILE", help="default: above")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the runs")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw finished runs, train none")
    add_workers(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
