"""Compare the seconds that `agrpo plan --measured` predicts with those of runs it has not seen.

    python tools/check_plan.py examples/tiny.yaml --output runs/check_plan

Trains four sizes of a file, plans three others with the speed of these runs, trains the three as
well, and prints both. An iteration's seconds are CPU seconds of the process, as other processes
disturb a clock on the wall; medians without the first iteration. Finished runs are taken as they
are. About ten minutes on two cores. Exit status 1 if a prediction is off by more than 15 %, 2 for
wrong input.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from agrpo_megatron.planning.cluster import Given, read_cluster
from agrpo_megatron.planning.measured import median_seconds, read_measured
from agrpo_megatron.planning.presets import open_model
from agrpo_megatron.planning.ranking import rank_layouts
from agrpo_megatron.runs.progress import RUN_SETTINGS

MEASURED = {
    "base": [],
    "wide": ["model.hidden_size=128", "model.ffn_hidden_size=384", "sft.iterations=60"],
    "deep": ["model.num_layers=6", "sft.iterations=80"],
    "few": ["algorithm.prompts_per_iteration=4", "sampling.denoising_steps=24"],
}
PREDICTED = {
    "larger": ["model.num_layers=4", "model.hidden_size=96", "model.ffn_hidden_size=288"],
    "shallow": [
        *("model.num_layers=2", "model.hidden_size=160", "model.ffn_hidden_size=480"),
        *("algorithm.prompts_per_iteration=6", "sft.iterations=70"),
    ],
    "longer": [
        *("sampling.denoising_steps=24", "algorithm.prompts_per_iteration=12"),
        "algorithm.mc_samples=8",
    ],
}
# A supervised phase after which rewards differ, so that updates have work.
SHORT = [
    *("sft.iterations=100", "train.iterations=7", "evaluation.interval=0"),
    *("task.eval_problems=4", "task.train_problems=500", "logging.live=false"),
    *("logging.wandb=disabled", "run.threads=1", "checkpoint.interval=0", "checkpoint.keep=1"),
]
MOST = 0.15  # error of a prediction


def main() -> int:
    """Train, plan and compare; returns the exit status."""
    arguments = _arguments()
    runs = {**MEASURED, **PREDICTED}
    for name, overrides in runs.items():
        _train(arguments.file, arguments.output / name, overrides)
    cluster = read_cluster("1xCPU", "fp32", Given())
    try:
        measured = read_measured([arguments.output / name for name in MEASURED], cluster)
    except ValueError as error:
        print(f"check_plan: error: {error}", file=sys.stderr)
        return 2
    print(f"measured  {measured.text}\n")
    print(f"{'size':10}{'predicted s':>12}{'measured s':>12}{'error':>9}")
    worst = 0.0
    for name in runs:
        run = arguments.output / name
        model = open_model(str(run / RUN_SETTINGS), [], ranks=1)
        speed = cluster.with_measured(measured)
        (one,) = rank_layouts(model, speed).fitting
        took = median_seconds(run, is_cpu=True)
        error = one.seconds / took - 1
        if name in PREDICTED:
            worst = max(worst, abs(error))
        kind = "" if name in PREDICTED else "  given"
        print(f"{name:10}{one.seconds:12.3f}{took:12.3f}{100 * error:+8.1f}%{kind}")
    print(f"\nlargest error of a size that was not given: {100 * worst:.1f} %")
    return 0 if worst <= MOST else 1


def _train(file: str, run: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "agrpo_megatron", "train", file, f"run.dir={run}"]
    run.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*command, *SHORT, *overrides], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="settings file, such as examples/tiny.yaml")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
