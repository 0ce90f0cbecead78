"""The plan of a comparison: members, seeds, and the runs that they need."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import read_yaml
from agrpo_megatron.launch.sweep import flow
from agrpo_megatron.runs.resolve import resolve

KEYS = ("baseline", "seeds", "tuning_seeds", "common", "members")
NO_SFT = ("sft.iterations=0", "sft.epochs=null")
# Processes share the cores, and a comparison has its own table.
QUIET = ("run.threads=1", "logging.wandb=disabled", "logging.live=false")

Choice = dict[str, Any]  # settings by dotted name


@dataclass(frozen=True)
class Members:
    """The content of a file of members."""

    baseline: str  # the member that others are compared with
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    choices: dict[str, list[Choice]]  # by member: one of them, or several to choose from


@dataclass(frozen=True)
class Job:
    """One process: a supervised phase, RL, both in turn, or the measurement of variance."""

    kind: str  # "start", "tuning", "run", "whole" or "variance"
    directory: Path
    file: Path
    overrides: tuple[str, ...]
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)  # variance: their overrides

    @property
    def settings(self) -> Settings:
        """Return the settings as written; nothing is resolved."""
        return load(Settings, self.file, self.overrides)


@dataclass(frozen=True)
class Comparison:
    """Members on one task."""

    file: Path
    folder: Path
    overrides: tuple[str, ...]  # of all members
    members: Members

    @property
    def name(self) -> str:
        """Return the name of the task's file."""
        return self.file.stem

    def starts(self) -> list[Job]:
        """Return the supervised phase of each seed, from which all its members start."""
        members = self.members
        seeds = [*(members.tuning_seeds if self.is_tuned else ()), *members.seeds]
        return [self._start(seed) for seed in seeds]

    def tuning(self) -> dict[str, list[list[Job]]]:
        """Return, for members with several choices, the runs of each choice, by seed."""
        return {
            name: [
                [
                    self.job(name, choice, seed, kind="tuning", place=f"tuning/{name}/{number}")
                    for seed in self.members.tuning_seeds
                ]
                for number, choice in enumerate(choices)
            ]
            for name, choices in self.members.choices.items()
            if len(choices) > 1
        }

    @property
    def is_tuned(self) -> bool:
        """Whether any member has several choices."""
        return any(len(choices) > 1 for choices in self.members.choices.values())

    def runs(self, name: str, choice: Choice) -> list[Job]:
        """Return the runs of a member, by seed."""
        return [
            self.job(name, choice, seed, kind="run", place=f"runs/{name}")
            for seed in self.members.seeds
        ]

    def job(self, name: str, choice: Choice, seed: int, *, kind: str, place: str) -> Job:
        """Return one run of a member."""
        directory = self.folder / place / f"seed-{seed}"
        start = flow(str(self._start(seed).directory))
        shared = (f"run.seed={seed}", *NO_SFT, f"model.load={start}")
        own = (*_texts(name, choice), f"run.dir={flow(str(directory))}")
        return Job(kind, directory, self.file, (*self.overrides, *QUIET, *shared, *own))

    def variance(self, chosen: dict[str, Choice]) -> Job:
        """Return the measurement of members' gradients at the first seed's start."""
        seed, directory = self.members.seeds[0], self.folder / "variance"
        common = (*self.overrides, *QUIET, f"run.seed={seed}", *NO_SFT)
        start = flow(str(self._start(seed).directory))
        common += (f"model.load={start}", f"run.dir={flow(str(directory))}")
        own = {name: tuple(_texts(name, choice)) for name, choice in chosen.items()}
        return Job("variance", directory, self.file, common, own)

    def _start(self, seed: int) -> Job:
        directory = self.folder / "starts" / f"seed-{seed}"
        own = (f"run.seed={seed}", f"run.dir={flow(str(directory))}")
        return Job("start", directory, self.file, (*self.overrides, *QUIET, *own))


def _texts(name: str, choice: Choice) -> list[str]:
    """Return the overrides of a member; its estimator is its name unless the settings name it."""
    own = {"algorithm.name": name, **choice}
    return [f"{key}={flow(value)}" for key, value in own.items()]


def read_members(path: Path, seeds: Sequence[int] | None = None) -> Members:
    """Read a file of members.

    Args:
        seeds: in place of the file's; None: those of the file.

    Raises:
        ValueError: it lacks a key, has an unknown one, or names a member or a seed wrongly.
    """
    tree = read_yaml(path)
    for key in (*KEYS, *tree):
        if key not in tree or key not in KEYS:
            raise ValueError(f"{path}: {key} is missing or unknown; the keys are {', '.join(KEYS)}")
    members, common = tree["members"], tree["common"] or {}
    if tree["baseline"] not in members:
        raise ValueError(
            f"{path}: baseline={tree['baseline']} is no member; use one of {[*members]}"
        )
    choices = {name: _choices({**common, **(own or {})}) for name, own in members.items()}
    seeds, tuning = tuple(seeds or tree["seeds"] or ()), tuple(tree["tuning_seeds"] or ())
    if len(set(seeds)) < max(2, len(seeds)) or set(seeds) & set(tuning):
        raise ValueError(
            f"{path}: seeds={list(seeds)} must be at least two, each once and none of "
            f"tuning_seeds={list(tuning)}"
        )
    if not tuning and any(len(found) > 1 for found in choices.values()):
        raise ValueError(f"{path}: tuning_seeds is empty, and a member has a list to choose from")
    return Members(tree["baseline"], seeds, tuning, choices)


def _choices(settings: Choice) -> list[Choice]:
    """Return a choice for each combination of the values in lists."""
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [dict(zip(settings, chosen, strict=True)) for chosen in itertools.product(*values)]


def plan(file: Path, members: Members, overrides: Sequence[str], output: Path | None) -> Comparison:
    """Return the comparison of a task's file, after a check of its data and of every member.

    Raises:
        ValueError: settings break a rule, the task lacks problems, or there is no budget or start.
    """
    settings = load(Settings, file, overrides)
    folder = output / file.stem if output is not None else Path(settings.run.dir)
    if settings.train.flops is None:
        raise ValueError(
            f"{file}: train.flops=null gives members no equal budget; use for example "
            "train.flops=1e12"
        )
    if not settings.sft.is_on:
        raise ValueError(
            f"{file}: sft.iterations=0 makes no start that members share; use for example "
            "sft.iterations=300"
        )
    try:
        resolve(settings, world_size=1)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for name, choices in members.choices.items():
        for choice in choices:
            own = [*overrides, *_texts(name, choice)]
            try:
                validate(load(Settings, file, own))
            except ValueError as error:
                raise ValueError(f"member {name} of {file.stem}: {error}") from None
    return Comparison(file, folder, tuple(overrides), members)
