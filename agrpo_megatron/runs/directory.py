"""The run directory before a run: new, to be resumed, or finished."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import flatten, load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.files import digest, free_name, write_whole
from agrpo_megatron.runs.loaded_model import on_its_own
from agrpo_megatron.runs.log import check_log
from agrpo_megatron.runs.progress import (
    CHECKPOINTS,
    PHASES,
    RUN_SETTINGS,
    Progress,
    latest_checkpoint,
)
from agrpo_megatron.runs.resolve import SPLIT_NAMES, Planned, Resolved, plan, resolve
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.base import SPLITS, NoTask
from agrpo_megatron.tasks.supervised.examples import Supervised

# Settings that may change on resume: they alter no number, or only add iterations.
MAY_CHANGE = ("run.dir", "run.threads", "run.timeout", "logging", "checkpoint", "parallel")
MAY_CHANGE += ("rollout", "ddp", "optimizer.distributed", "sft.optimizer.distributed")
MAY_CHANGE += ("task.grader.workers", "task.grader.most_failed", "resilience", "launch")
# Files, which may be moved: `check_data` compares the problems.
MAY_CHANGE += ("task.options.train", "task.options.eval", "task.pass_rates")
MAY_CHANGE += ("sft.data", "sft.eval_data")
# The supervised phase does not use these; the RL phase may refuse their metric.
OF_RL = ("train.stop_metric", "train.stop_target", "train.stop_patience")
DATA = "data.json"  # digests of the problems and of the task's file
FIX = "choose another run.dir (model.load=RUN continues from its weights), or use --restart"


def resolve_run(
    settings: Settings,
    *,
    world_size: int,
    is_restart: bool = False,
    phases: Sequence[str] = PHASES,
) -> Resolved:
    """Resolve the settings of a run that is to write its directory.

    A run that resumes needs nothing that it started from. The task is not read where only rows of
    `sft.data` are trained.

    Args:
        phases: the phases to train.

    Raises:
        ValueError: as `resolve` and `check_log`.
    """
    check_log(settings)
    source, given = settings.model.load, settings.tokenizer
    found = _own_start(settings, is_restart=is_restart)
    no_task = "rl" not in phases and settings.sft.is_on and settings.sft.data is not None
    needs = None if no_task else SPLITS
    if found is None:
        return resolve(settings, world_size=world_size, needs=needs, phases=phases)
    saved, checkpoint = found
    settings_here = on_its_own(settings, checkpoint)
    resolved = resolve(settings_here, world_size=world_size, needs=needs, phases=phases)
    if source is not None and given.path is None:
        template = given.chat_template or saved.tokenizer.chat_template
        given = replace(saved.tokenizer, chat_template=template)
    model = replace(resolved.settings.model, load=source)
    own = replace(resolved.settings, model=model, tokenizer=given, lora=settings.lora)
    return replace(resolved, settings=own)


def plan_settings(settings: Settings, *, world_size: int, is_restart: bool = False) -> Planned:
    """Do as `resolve_run` for a plan, where files of `model.load` may be missing.

    Raises:
        ValueError: as `resolve_run`.
    """
    if _own_start(settings, is_restart=is_restart) is None:
        check_log(settings)
        return plan(settings, world_size=world_size)
    found = resolve_run(settings, world_size=world_size, is_restart=is_restart)
    return Planned(found.settings, found.task, found.tokenizer, None, found.supervised)


def _own_start(settings: Settings, *, is_restart: bool) -> tuple[Settings, Path] | None:
    """Return settings and checkpoint of a run that resumes without what it started from."""
    directory = Path(settings.run.dir)
    found = None if is_restart else latest_checkpoint(directory / CHECKPOINTS)
    saved = load(Settings, directory / RUN_SETTINGS) if found else None
    is_reference = settings.algorithm.needs_reference and not settings.sft.is_on
    is_sft = found is not None and found[1].phase == "sft"
    is_reference |= settings.sft.needs_reference and is_sft
    if found is None or saved is None or saved.model.load != settings.model.load or is_reference:
        return None
    return saved, found[0]


def progress(settings: Settings) -> Progress | None:
    """Return the progress of the run directory; None for a new one.

    Raises:
        ValueError: it holds a run with other settings; names the first that differs.
    """
    directory = Path(settings.run.dir)
    found = latest_checkpoint(directory / CHECKPOINTS)
    if found is None:
        return None
    may_change = MAY_CHANGE + (OF_RL if found[1].phase == "sft" else ())
    there = _fixed(asdict(load(Settings, directory / RUN_SETTINGS)), may_change)
    here = _fixed(asdict(settings), may_change)
    for key in [*here, *there]:
        old, new = there.get(key), here.get(key)
        if old != new:
            raise ValueError(f"run.dir={directory} holds a run with {key}={old}, not {new}; {FIX}")
    return found[1]


def check_data(
    directory: Path,
    task: Task,
    supervised: Supervised | None = None,
    *,
    is_new: bool,
    is_main: bool,
) -> None:
    """Compare a resumed run's data with its recorded data; record what is new. Every rank.

    Raises:
        ValueError: the problems, the task's file or the supervised rows changed.
    """
    path, there = directory / DATA, dict[str, str]()
    here = data_digests(task) | (supervised.digests() if supervised is not None else {})
    if not is_new and path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
    for what, value in here.items():
        if there.get(what, value) != value:
            raise ValueError(
                f"run.dir={directory} holds a run whose {what} changed; restore them, {FIX}"
            )
    if is_main and here.keys() - there.keys():  # the supervised phase may be alone at first
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**there, **here}, indent=2) + "\n")


def data_digests(task: Task) -> dict[str, str]:
    """Return digests of both splits' problems, and of the files of user tasks."""
    found = {}
    if isinstance(task, NoTask):
        return found
    for split, name in SPLIT_NAMES.items():
        text = "\0".join(f"{p.key}\0{p.solution}" for p in task.problems(split))
        found[f"{name} problems"] = digest(text.encode())
    for file in task.code_files:
        found[f"lines of {file}"] = digest(Path(file).read_bytes())
    return found


def run_digest(settings: Settings, data: Mapping[str, str]) -> str:
    """Return a digest of everything that determines what a run samples, except its weights.

    Args:
        data: digests of the problems, see `data_digests`.
    """
    everything = [_fixed(asdict(settings), MAY_CHANGE), data]
    return digest(json.dumps(everything, default=str).encode())


def is_finished(settings: Settings, done: Progress | None) -> bool:
    """Return whether the run is finished."""
    if done is None or done.phase != "rl":
        return False
    is_last = done.iteration == settings.train.iterations and done.is_evaluated
    return is_last or done.stopped is not None


def move_away(directory: Path) -> Path | None:
    """Rename a run directory to the first free `NAME.1`, `NAME.2`, ...; nothing is deleted."""
    return directory.rename(free_name(directory)) if directory.exists() else None


def _fixed(tree: Mapping[str, Any], may_change: tuple[str, ...]) -> dict[str, object]:
    """Return the settings of a tree that may not change, by dotted name."""
    free, flat = tuple(f"{name}." for name in may_change), flatten(tree)
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(free)}
