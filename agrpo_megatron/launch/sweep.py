"""A sweep: one run for each combination of settings, each in a subdirectory.

DIR/sweep.yaml    the settings file, overrides for all, and the settings of each member
DIR/00, DIR/01    the members' run directories
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import flatten
from agrpo_megatron.config.yaml_files import dump_yaml, read_override, read_yaml

SWEEP = "sweep.yaml"
UNSWEPT = {"run.dir": "each member has its own", "launch": "all members are one job"}

Grid = dict[str, list[Any]]


@dataclass(frozen=True)
class Sweep:
    """The content of `DIR/sweep.yaml`."""

    file: str
    overrides: tuple[str, ...]  # of all members
    members: dict[str, dict[str, Any]]  # by name: the settings of each

    def arguments(self, directory: Path, name: str) -> list[str]:
        """Return the arguments of `agrpo train` for a member of the sweep in `directory`."""
        own = [f"{key}={flow(value)}" for key, value in self.members[name].items()]
        return [self.file, *self.overrides, *own, f"run.dir={flow(str(directory / name))}"]

    def text(self) -> str:
        """Return the content of the file."""
        tree = {"file": self.file, "overrides": list(self.overrides), "members": self.members}
        return dump_yaml(tree)


def read_grid(texts: Sequence[str]) -> Grid:
    """Read the values of `--sweep`: key=[value, ...], or YAML files of such keys.

    Raises:
        ValueError: a key has no list of values, or cannot differ between members.
    """
    grid: Grid = {}
    for text in texts:
        if "=" in text and not Path(text).is_file():
            key, values = read_override(text)
            pairs = {key: values}
        else:
            pairs = flatten(read_yaml(text))
        for key, values in pairs.items():
            _check_values(key, values)
            if key in grid:
                raise ValueError(f"--sweep {key} is given twice; write all values in one list")
            grid[key] = values
    if not grid:
        raise ValueError(f"--sweep {' '.join(texts)} names no setting; write key=[value, ...]")
    return grid


def make_sweep(file: str | Path, overrides: Sequence[str], grid: Grid) -> Sweep:
    """Return a member for each combination; the last key changes fastest."""
    combinations = list(itertools.product(*grid.values()))
    width = max(2, len(str(len(combinations) - 1)))
    members = {
        f"{number:0{width}d}": dict(zip(grid, values, strict=True))
        for number, values in enumerate(combinations)
    }
    return Sweep(str(Path(file).absolute()), tuple(overrides), members)


def read_sweep(directory: Path) -> Sweep:
    """Read the sweep of a directory.

    Raises:
        ValueError: it holds no sweep.
    """
    path = directory / SWEEP
    if not path.is_file():
        raise ValueError(f"{directory} holds no {SWEEP}; give the directory of a sweep")
    tree = read_yaml(path)
    try:
        return Sweep(tree["file"], tuple(tree["overrides"]), dict(tree["members"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not what `agrpo launch --sweep` writes") from None


def check_directory(directory: Path, sweep: Sweep) -> None:
    """Check that a directory is free, or already holds this sweep.

    Raises:
        ValueError: it holds a run or another sweep.
    """
    if (directory / SWEEP).is_file():
        if read_sweep(directory).members != sweep.members:
            raise ValueError(
                f"run.dir={directory} holds another sweep; choose another run.dir, or move it "
                "away with --restart"
            )
        return
    from agrpo_megatron.runs.progress import RUN_SETTINGS  # a member's job does not need it

    if (directory / RUN_SETTINGS).exists():
        raise ValueError(f"run.dir={directory} holds a run, not a sweep; choose another run.dir")


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = dump_yaml(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _check_values(key: str, values: Any) -> None:
    for name, reason in UNSWEPT.items():
        if f"{key}.".startswith(f"{name}."):
            raise ValueError(f"--sweep {key} cannot differ: {reason}; set it for all, before it")
    if not isinstance(values, list) or not values:
        shown = flow(values)
        raise ValueError(
            f"--sweep {key}={shown} is not a list of values; write {key}=[{shown}, ...], or put "
            "it before --sweep to set it for all"
        )
    texts = [flow(value) for value in values]
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise ValueError(f"--sweep {key} has {twice[0]} twice; write it once")
