"""Shared by the sub-commands of `agrpo`: the target model, overrides, and the main rank."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agrpo_megatron.evaluation.target import Target, find_target
from agrpo_megatron.launch.sweep import flow
from agrpo_megatron.runs.progress import RUN_SETTINGS

if TYPE_CHECKING:
    from agrpo_megatron.launch.speed import Assumed

OVERRIDES = "section.key=value ..., for instance run.seed=1 train.iterations=200"
TARGET = "run or Hugging Face directory, Megatron checkpoint, or settings file with model.load"


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    *,
    details: str = "",
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command that calls `run`; its help shows `text`, details and epilog."""
    command = commands.add_parser(
        name,
        help=text,
        description=details or f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_run(command: argparse.ArgumentParser) -> None:
    """Add the settings file of a run, moving an earlier run away, and short forms of settings."""
    command.add_argument(
        "file", metavar="FILE", help="settings file (YAML), or the directory of a run to resume"
    )
    command.add_argument(
        "--restart", action="store_true", help="move an earlier run away instead of resuming it"
    )
    command.add_argument(
        "--from-rollouts",
        metavar="RUN",
        help="update on the rollouts that RUN stored: short for train.from_rollouts=RUN",
    )


def run_file(file: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Return settings file and overrides of a run; for a run directory, those that resume it.

    Raises:
        ValueError: the directory holds no run, or is given another `run.dir`.
    """
    directory = Path(file)
    if not directory.is_dir():
        return file, [*overrides]
    own = directory / RUN_SETTINGS
    if not own.is_file():
        raise ValueError(
            f"{file} is a directory without {RUN_SETTINGS}; give a settings file, or the "
            "directory of a run"
        )
    if named := next((o for o in overrides if o.partition("=")[0].strip() == "run.dir"), None):
        raise ValueError(
            f"{named}: {file} is the directory of the run to resume; leave it out, or give "
            f"{own} to start a new run with these settings"
        )
    return str(own), [*overrides, *_other_length(overrides), f"run.dir={flow(str(directory))}"]


def _other_length(overrides: Sequence[str]) -> list[str]:
    """Return the override of the length of the supervised phase that another one replaces.

    A run's settings have its epochs, and the iterations that they took.
    """
    given = {key.strip(): value.strip() for key, _, value in (o.partition("=") for o in overrides)}
    none = {"sft.iterations": "0", "sft.epochs": "null"}
    new = [key for key in none if given.get(key, none[key]) != none[key]]
    return [f"{key}={none[key]}" for key in none if new and key not in given]


def all_overrides(arguments: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the settings of a command line, with those that have a short form.

    Args:
        rest: overrides that argparse left over.
    """
    source = getattr(arguments, "from_rollouts", None)
    short = [] if source is None else [f"train.from_rollouts={flow(source)}"]
    return [*arguments.overrides, *rest, *short]


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add settings to a command's arguments."""
    command.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=OVERRIDES)


def add_assumed(command: argparse.ArgumentParser) -> None:
    """Add what a forecast assumes to a command's arguments."""
    command.add_argument(
        "--rate",
        help="forecast: peak of each rank, a GPU's name, TFLOP/s or cpu; "
        "default: this machine's, or H100 for a run on GPUs elsewhere",
    )
    command.add_argument(
        "--mfu", type=float, metavar="SHARE", help="forecast: share of that peak; default: 0.4"
    )
    command.add_argument(
        "--measured", type=Path, metavar="RUN", help="forecast: the speed of this run instead"
    )


def assumed(arguments: argparse.Namespace) -> "Assumed":
    """Return what a forecast assumes."""
    from agrpo_megatron.launch.speed import Assumed  # loads numpy

    return Assumed(arguments.rate, arguments.mfu, arguments.measured)


def add_target(command: argparse.ArgumentParser) -> None:
    """Add a model to a command's arguments."""
    command.add_argument("target", metavar="TARGET", help=TARGET)
    command.add_argument(
        "--checkpoint", metavar="NAME", help="of a run, such as sft-000300 or best; default: latest"
    )
    command.add_argument(
        "--settings", metavar="FILE", help="settings file (YAML); default: the run's own, if any"
    )


def open_target(arguments: argparse.Namespace) -> Target:
    """Find the model that `TARGET` names, and its settings.

    Raises:
        ValueError: there is no such model, or the settings are wrong.
    """
    return find_target(
        Path(arguments.target),
        checkpoint=arguments.checkpoint,
        file=arguments.settings,
        overrides=arguments.overrides,
    )


def is_main() -> bool:
    """Whether this rank prints; from the environment, as `megatron.parallel` loads torch."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return how many ranks were started; from the environment, as `is_main`."""
    return int(os.environ.get("WORLD_SIZE", "1"))
