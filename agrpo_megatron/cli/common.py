"""Shared by the sub-commands of `agrpo`: the target model, overrides, and the main rank."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import dump_yaml
from agrpo_megatron.evaluation.grid import EVALUATIONS
from agrpo_megatron.launch.sweep import flow

OVERRIDES = "section.key=value ..., for instance run.seed=1 train.iterations=200"
TARGET = "run or Hugging Face directory, Megatron checkpoint, or settings file with model.load"


@dataclass(frozen=True)
class Target:
    """The model of a command."""

    settings: Settings
    checkpoint: Path | None  # of a run; None: model.load
    name: str  # of the checkpoint
    run: str  # name of its run; empty if it has none
    folder: Path  # where its evaluations go


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
    command.add_argument("file", metavar="FILE", help="settings file (YAML)")
    command.add_argument(
        "--restart", action="store_true", help="move an earlier run away instead of resuming it"
    )
    command.add_argument(
        "--from-rollouts",
        metavar="RUN",
        help="update on the rollouts that RUN stored: short for train.from_rollouts=RUN",
    )


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
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


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
    from agrpo_megatron.runs.loaded_model import on_its_own
    from agrpo_megatron.runs.progress import (
        BASE_FILE,
        CHECKPOINTS,
        MODEL_FILE,
        RUN_FILE,
        RUN_SETTINGS,
    )
    from agrpo_megatron.runs.progress import checkpoint_path as find

    target, name = Path(arguments.target), arguments.checkpoint
    if target.is_file():
        return _from_file(arguments, target)
    for override in arguments.overrides:
        if override.partition("=")[0].strip() == "model.load":
            raise ValueError(f"{override}: the weights are those of {target}; leave it out")
    if (target / RUN_SETTINGS).exists():
        path = find(target, name)
        settings = on_its_own(_load(arguments, target / RUN_SETTINGS), path)
        return Target(settings, path, path.name, target.resolve().name, target / EVALUATIONS)
    if name is not None:
        raise ValueError(f"--checkpoint {name}: {target} is not a run directory; leave it out")
    is_megatron = (target / MODEL_FILE).exists()
    if not is_megatron and not (target / "config.json").exists():
        what = "is not a run directory" if target.is_dir() else "does not exist"
        raise ValueError(
            f"{target} {what}: it has no {RUN_SETTINGS}, nor {MODEL_FILE} of a Megatron "
            "checkpoint, nor config.json of a Hugging Face directory"
        )
    own = target / RUN_FILE
    weights = f"model.load={dump_yaml(str(target))}"
    settings = _load(arguments, own if is_megatron and own.exists() else None, weights)
    settings = on_its_own(settings, target)
    whole = target.resolve()
    adapters = target if (target / BASE_FILE).exists() else None  # model.load is their base
    if whole.parent.name != CHECKPOINTS:
        return Target(settings, adapters, whole.name, "", Path(EVALUATIONS))
    run = whole.parent.parent
    return Target(settings, adapters, whole.name, run.name, run / EVALUATIONS)


def is_main() -> bool:
    """Whether this rank prints; from the environment, as `megatron.parallel` loads torch."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return how many ranks were started; from the environment, as `is_main`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _load(arguments: argparse.Namespace, own: Path | None, *more: str) -> Settings:
    return load(Settings, arguments.settings or own, [*arguments.overrides, *more])


def _from_file(arguments: argparse.Namespace, file: Path) -> Target:
    if arguments.settings is not None:
        raise ValueError(f"{file} is a settings file and so is --settings; give the model first")
    settings = load(Settings, file, arguments.overrides)
    if settings.model.load is None:
        raise ValueError(f"{file} names no weights; set model.load, or give a run directory")
    folder = Path(settings.run.dir) / EVALUATIONS
    return Target(settings, None, Path(settings.model.load).name, "", folder)
