"""The run directory before a run: new, to be resumed, or finished."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.early_stopping import still_stopped
from agrpo_megatron.runs.files import digest, free_name, write_whole
from agrpo_megatron.runs.history.changes import FREE, Change, differences, fixed, read_changes
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
    found = _own_start(settings, is_restart=is_restart)
    no_task = "rl" not in phases and settings.sft.is_on and settings.sft.data is not None
    needs = None if no_task else SPLITS
    if found is None:
        return resolve(settings, world_size=world_size, needs=needs, phases=phases)
    saved, checkpoint = found
    settings_here = on_its_own(settings, checkpoint)
    resolved = resolve(settings_here, world_size=world_size, needs=needs, phases=phases)
    return replace(resolved, settings=_as_started(resolved.settings, settings, saved))


def _as_started(resolved: Settings, given: Settings, saved: Settings) -> Settings:
    """Return resolved settings of a run that resumes with what it started from."""
    source, tokenizer = given.model.load, given.tokenizer
    if source is not None and tokenizer.path is None:
        template = tokenizer.chat_template or saved.tokenizer.chat_template
        tokenizer = replace(saved.tokenizer, chat_template=template)
    model = replace(resolved.model, load=source)
    return replace(resolved, model=model, tokenizer=tokenizer, lora=given.lora)


def plan_settings(settings: Settings, *, world_size: int, is_restart: bool = False) -> Planned:
    """Do as `resolve_run` for a plan, where files of `model.load` and data may be missing.

    Raises:
        ValueError: as `resolve_run`.
    """
    check_log(settings)
    found = _own_start(settings, is_restart=is_restart)
    if found is None:
        return plan(settings, world_size=world_size)
    saved, checkpoint = found
    planned = plan(on_its_own(settings, checkpoint), world_size=world_size)
    known = _as_started(planned.settings, settings, saved)
    sft, there = known.sft, saved.sft
    if sft.is_on and not sft.iterations and sft.epochs == there.epochs:
        sft = replace(sft, iterations=there.iterations)  # its data were not read
    padding = there.padding if sft.padding is None else sft.padding
    return replace(planned, settings=replace(known, sft=replace(sft, padding=padding)))


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
        ValueError: it holds a run with settings that may not change, or fewer iterations are asked
            for than are finished.
    """
    found = latest_checkpoint(Path(settings.run.dir) / CHECKPOINTS)
    if found is None:
        return None
    done = found[1]
    changed_settings(settings, done)
    key, planned = "train.iterations", settings.train.iterations
    if done.phase == "sft":
        key, planned = "sft.iterations", settings.sft.iterations
    if planned < done.iteration:
        raise ValueError(
            f"{key}={planned}: run.dir={settings.run.dir} has finished {done.iteration} iterations "
            f"of this phase; use at least {done.iteration}"
        )
    return done


def changed_settings(settings: Settings, done: Progress) -> list[Change]:
    """Return the logged changes of settings in a run that resumes.

    Raises:
        ValueError: a setting differs that may not change.
    """
    there = load(Settings, Path(settings.run.dir) / RUN_SETTINGS)
    try:
        return differences(there, settings, phase=done.phase)
    except ValueError as error:
        raise ValueError(f"{error}; {FIX}") from None


def check_data(
    directory: Path,
    task: Task,
    supervised: Supervised | None = None,
    *,
    is_new: bool,
    is_main: bool,
) -> None:
    """Compare a resumed run's data with its recorded data; record what is new. Every rank.

    What only one of them has is not compared: a run of one phase alone does not read the task, or
    no supervised rows.

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
    found = dict[str, str]()
    if isinstance(task, NoTask):
        return found
    for split, name in SPLIT_NAMES.items():
        text = "\0".join(f"{p.key}\0{p.solution}" for p in task.problems(split))
        found[f"{name} problems"] = digest(text.encode())
    return found | {f"lines of {name}": lines for name, lines in code_digests(task).items()}


def code_digests(task: Task) -> dict[str, str]:
    """Return a digest of the user's files of code by name; files with one name have one."""
    found: dict[str, str] = {}
    for file in map(Path, task.code_files):
        own, known = digest(file.read_bytes()), found.get(file.name)
        found[file.name] = own if known is None else digest((known + own).encode())
    return found


def run_digest(settings: Settings, data: Mapping[str, str]) -> str:
    """Return a digest of everything that determines what a run samples, except its weights.

    Args:
        data: digests of the problems, see `data_digests`.
    """
    return _digest_of(fixed(asdict(settings), FREE), data)


def digests_so_far(directory: Path, settings: Settings, data: Mapping[str, str]) -> set[str]:
    """Return the digest of a run, and those it had before its settings changed."""
    flat, always = fixed(asdict(settings), FREE), fixed(asdict(Settings()), FREE)
    found = {_digest_of(flat, data)}
    for change in reversed(read_changes(directory)):
        key, old = change["key"], change["old"]
        flat = {**flat, key: old}
        if old is None and key not in always:  # below a mapping, such as `evaluation.tasks`
            del flat[key]
        found.add(_digest_of(flat, data))
    return found


def _digest_of(flat: Mapping[str, Any], data: Mapping[str, str]) -> str:
    return digest(json.dumps([flat, data], default=str, sort_keys=True).encode())


def is_finished(settings: Settings, done: Progress | None) -> bool:
    """Return whether the run is finished."""
    if done is None or done.phase != "rl":
        return False
    is_last = done.iteration == settings.train.iterations and done.is_evaluated
    return is_last or still_stopped(done, settings.train) is not None


def move_away(directory: Path) -> Path | None:
    """Rename a run directory to the first free `NAME.1`, `NAME.2`, ...; nothing is deleted."""
    return directory.rename(free_name(directory)) if directory.exists() else None
