"""`agrpo variance`: bias, noise and cost of estimators, on rollouts of a checkpoint."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agrpo_megatron.cli.common import (
    add_command,
    add_overrides,
    add_target,
    is_main,
    open_target,
    world_size,
)

if TYPE_CHECKING:
    from agrpo_megatron.training.variance.measure import Comparison

EPILOG = """\
  agrpo variance runs/tiny --draws 1,2,4,8                how many denoising steps to draw
  agrpo variance runs/tiny --checkpoint sft-000400 --estimators diffu_grpo,espo
  agrpo variance runs/tiny algorithm.proposal=entropy     another way to draw them

Batches are sampled from the checkpoint's weights, or are those of train.from_rollouts. `draw noise`
is the variance of one batch's gradient by the steps or masks that were drawn, over its variance by
the completions that were sampled, which no estimator can lower. `angle` is between the expected
gradient and that of all steps, in degrees. `work` is of an iteration, rollouts included, and
`signal` the signal-to-noise ratio for the work; both relative to the full trajectory. More signal
is better.
"""


def add_variance(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "bias, noise and cost of estimators on a checkpoint's rollouts"
    command = add_command(commands, "variance", text, variance, epilog=EPILOG)
    add_target(command)
    command.add_argument("--draws", default="1,2,4", metavar="K,...", help="of agrpo (1,2,4)")
    command.add_argument("--estimators", default="", metavar="NAME,...", help="others to compare")
    command.add_argument("--batches", type=int, default=4, help="rollout batches (4)")
    command.add_argument("--repeats", type=int, default=4, help="draws of each batch (4)")
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="default: RUN/variance/CHECKPOINT"
    )
    add_overrides(command)


def variance(arguments: argparse.Namespace) -> int:
    """Measure estimators on rollouts of a checkpoint; print and write a table and a figure."""
    for name, least in (("batches", 1), ("repeats", 2)):
        if (value := getattr(arguments, name)) < least:
            raise ValueError(f"--{name}={value} must be at least {least}; use for example 4")
    draws = arguments.draws.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in draws):
        raise ValueError(f"--draws={arguments.draws} must be numbers from 1; use for example 1,2,4")
    others = [name for name in arguments.estimators.split(",") if name]
    target = open_target(arguments)
    from rich.console import Console

    from agrpo_megatron.hardware.kernels import kernels_for
    from agrpo_megatron.reports.plots.variance import write_variance
    from agrpo_megatron.resilience.failure import ending_together
    from agrpo_megatron.runs.files import check_folder
    from agrpo_megatron.runs.resolve import resolve
    from agrpo_megatron.training.variance.command import Plan, measure, plan_variants, recommended

    resolved = resolve(target.settings, world_size=world_size())
    variants = plan_variants(resolved.settings, sorted(set(map(int, draws))), others)
    folder = arguments.output or target.folder.parent / "variance" / target.name
    check_folder(folder.parent, key="--output's folder")
    kernels_for(resolved.settings)
    console = Console()
    show = (lambda line: console.print(line, style="dim")) if is_main() else lambda _: None
    # The problems that follow those of training, or the first stored rollouts.
    train = resolved.settings.train
    first = train.iterations if train.from_rollouts is None else 0
    if train.from_rollouts is not None and arguments.batches > train.iterations:
        raise ValueError(
            f"--batches={arguments.batches} is more than the {train.iterations} iterations of "
            f"train.from_rollouts={train.from_rollouts}; use at most {train.iterations}"
        )
    plan = Plan(variants, arguments.batches, arguments.repeats, first=first)
    with ending_together():
        found = measure(resolved, target.checkpoint, plan, show=show)
    if not is_main():
        return 0
    best = recommended(found)
    rows = rows_of(found)
    _print(rows, best, console)
    more = "" if found.signal > 0 else ": below the noise; use more --batches"
    console.print(f"signal to noise of a batch, all steps scored: {found.signal:.2g}{more}")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": rows, "recommended": best, "signal": found.signal}, indent=1)
    (folder / "variance.json").write_text(text + "\n", encoding="utf-8")
    print(write_variance(rows, folder / "variance.png"))
    return 0


def rows_of(found: "Comparison") -> list[dict[str, Any]]:
    """Return the lines of the table; None stands for what is below the noise."""
    full = found.qualities["full_trajectory"]
    return [
        {
            "estimator": label,
            "angle": _known(math.degrees(math.acos(quality.cosine))),
            "draw_noise": _known(quality.draws),
            "work": quality.work / full.work,
            "signal": quality.per_work / full.per_work,
        }
        for label, quality in found.qualities.items()
    ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _print(rows: list[dict[str, Any]], best: str, console: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in ("estimator", "angle", "draw noise", "work", "signal"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for row in rows:
        label, *numbers = row.values()
        style = "bold green" if label == best else None
        cells = ("?" if number is None else f"{number:.3g}" for number in numbers)
        table.add_row(label, *cells, style=style)
    console.print(table)
    if any(row["angle"] is None for row in rows):
        console.print("?: below the noise of its draws; use more --repeats")
    is_drawn = best.startswith("agrpo, k")
    setting = f"mc_samples={best.split()[-1]}" if is_drawn else f"name={best}"
    console.print(f"most signal for the work: {best} (algorithm.{setting})")
