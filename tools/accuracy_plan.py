"""The runs of accuracy against compute: each size with each supervised phase and each seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_plan import QUIET, Choice, Job

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.yaml_files import read_yaml
from agrpo_megatron.launch.sweep import flow

# The least number of values, and the lowest value.
LISTS = {"seeds": (2, 0), "supervised": (2, 1), "starts": (1, 1), "budgets": (1, 1)}
KEYS = ("sizes", *LISTS)


@dataclass(frozen=True)
class Grid:
    """The content of a file of sizes, supervised phases and budgets."""

    seeds: tuple[int, ...]
    sizes: dict[str, Choice]  # by name: settings of the model
    supervised: tuple[int, ...]  # iterations of each supervised phase, ascending
    starts: tuple[int, ...]  # those that RL follows
    budgets: tuple[int, ...]  # iterations of RL that the table has, ascending


@dataclass(frozen=True)
class Line:
    """The runs of one size and one supervised phase, a job for each seed."""

    size: str
    supervised: int  # iterations
    has_rl: bool
    jobs: tuple[Job, ...]


def read_grid(path: Path) -> Grid:
    """Read a file of sizes, supervised phases and budgets.

    Raises:
        ValueError: a key is missing, unknown or of another form, a list is not ascending or has too
            few values, or a start is no supervised phase.
    """
    tree = read_yaml(path)
    for key in (*KEYS, *tree):
        if key not in tree or key not in KEYS:
            raise ValueError(f"{path}: {key} is missing or unknown; the keys are {', '.join(KEYS)}")
    for key, (least, lowest) in LISTS.items():
        if not _is_ascending(tree[key], least, lowest):
            raise ValueError(
                f"{path}: {key}={tree[key]} must be {least} or more whole numbers from {lowest}, "
                f"ascending; use for example {key}: [100, 200, 400]"
            )
    sizes = tree["sizes"]
    if not isinstance(sizes, dict) or not all(isinstance(own, dict) for own in sizes.values()):
        raise ValueError(
            f"{path}: sizes={sizes} must be settings by the name of a size; use for "
            "example sizes: {small: {model.hidden_size: 32}}"
        )
    if other := set(tree["starts"]) - set(tree["supervised"]):
        raise ValueError(
            f"{path}: starts={tree['starts']} has {min(other)}, which is not among "
            f"supervised={tree['supervised']}; add it there"
        )
    return Grid(sizes=sizes, **{key: tuple(tree[key]) for key in LISTS})


def _is_ascending(values: Any, least: int, lowest: int) -> bool:
    """Whether values are a list of `least` or more whole numbers from `lowest`, ascending."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        return False
    return len(values) >= least and values[0] >= lowest and values == sorted(set(values))


def plan(file: Path, grid: Grid, overrides: Sequence[str], folder: Path) -> list[Line]:
    """Return all runs, those of the shortest supervised phases first.

    Raises:
        ValueError: settings break a rule, or RL is shorter than the largest budget.
    """
    lines = [
        _line(file, grid, overrides, folder, size=size, supervised=supervised)
        for supervised in grid.supervised
        for size in grid.sizes
    ]
    for line in lines:
        settings = line.jobs[0].settings
        validate(settings)
        if line.has_rl and settings.train.iterations < grid.budgets[-1]:
            raise ValueError(
                f"{file}: train.iterations={settings.train.iterations} is less than the largest of "
                f"budgets={list(grid.budgets)}; use train.iterations={grid.budgets[-1]}"
            )
    return lines


def _line(
    file: Path, grid: Grid, overrides: Sequence[str], folder: Path, *, size: str, supervised: int
) -> Line:
    has_rl = supervised in grid.starts
    own = [f"{key}={flow(value)}" for key, value in grid.sizes[size].items()]
    own += [f"sft.iterations={supervised}", *([] if has_rl else ["train.iterations=0"])]
    jobs = []
    for seed in grid.seeds:
        directory = folder / size / f"sft-{supervised}" / f"seed-{seed}"
        place = (f"run.seed={seed}", f"run.dir={flow(str(directory))}")
        jobs.append(Job("whole", directory, file, (*overrides, *QUIET, *own, *place)))
    return Line(size, supervised, has_rl, tuple(jobs))
