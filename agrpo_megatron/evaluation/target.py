"""The model that a command works on: a run, a checkpoint, a Hugging Face directory.

Importing this module does not load torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import dump_yaml
from agrpo_megatron.evaluation.grid import EVALUATIONS
from agrpo_megatron.runs.loaded_model import on_its_own
from agrpo_megatron.runs.progress import (
    BASE_FILE,
    CHECKPOINTS,
    MODEL_FILE,
    RUN_FILE,
    RUN_SETTINGS,
    checkpoint_path,
)


@dataclass(frozen=True)
class Target:
    """The model of a command."""

    settings: Settings
    checkpoint: Path | None  # of a run; None: model.load
    name: str  # of the checkpoint
    run: str  # name of its run; empty if it has none
    folder: Path  # where its evaluations go


def find_target(
    target: Path,
    *,
    checkpoint: str | None = None,
    file: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Target:
    """Find a model and its settings.

    Args:
        target: run or Hugging Face directory, Megatron checkpoint, or settings file.
        checkpoint: of a run; None: the latest.
        file: settings in place of the run's own.
        overrides: of settings, each `section.key=value`.

    Raises:
        ValueError: there is no such model, or the settings are wrong.
    """
    if target.is_file():
        return _from_file(target, file, overrides)
    name, changes = checkpoint, (file, overrides)
    for override in overrides:
        if override.partition("=")[0].strip() == "model.load":
            raise ValueError(f"{override}: the weights are those of {target}; leave it out")
    if (target / RUN_SETTINGS).exists():
        path = checkpoint_path(target, name)
        settings = on_its_own(_load(changes, target / RUN_SETTINGS), path)
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
    settings = _load(changes, own if is_megatron and own.exists() else None, weights)
    settings = on_its_own(settings, target)
    whole = target.resolve()
    adapters = target if (target / BASE_FILE).exists() else None  # model.load is their base
    if whole.parent.name != CHECKPOINTS:
        return Target(settings, adapters, whole.name, "", Path(EVALUATIONS))
    run = whole.parent.parent
    return Target(settings, adapters, whole.name, run.name, run / EVALUATIONS)


def _load(
    changes: tuple[Path | str | None, Sequence[str]], own: Path | None, *more: str
) -> Settings:
    file, overrides = changes
    return load(Settings, file or own, [*overrides, *more])


def _from_file(file: Path, other: Path | str | None, overrides: Sequence[str]) -> Target:
    if other is not None:
        raise ValueError(f"{file} is a settings file and so is --settings; give the model first")
    settings = load(Settings, file, overrides)
    if settings.model.load is None:
        raise ValueError(f"{file} names no weights; set model.load, or give a run directory")
    folder = Path(settings.run.dir) / EVALUATIONS
    return Target(settings, None, Path(settings.model.load).name, "", folder)
