"""The data that settings name by file or data set, and what of it this machine lacks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from agrpo_megatron.config.settings import Settings, SftSettings, TaskSettings
from agrpo_megatron.tasks import Task, build_task
from agrpo_megatron.tasks.base import GENERATED, SPLITS
from agrpo_megatron.tasks.mixture import Mixture
from agrpo_megatron.tasks.own.files import NONE
from agrpo_megatron.tasks.row_sources import HUB_SPLITS, lack
from agrpo_megatron.tasks.supervised.sources import sources
from agrpo_megatron.tasks.supervised.text_files import text_files

PLANNED_TEXTS = (
    "sft.data: raw texts are read when the run starts; planned with estimates by their first ones"
)
RESPONSES = "supervised responses of sampling.completion_length"
PROMPT_TOKENS = 256  # of a prompt that cannot be read; the benchmarks' have 100 to 300


class Named(NamedTuple):
    """A source of rows, and the setting that names it."""

    key: str
    source: str
    split: str  # of a data set whose source names none


@dataclass(frozen=True)
class MissingData:
    """What this machine lacks of a run's data."""

    lines: tuple[str, ...]  # one for each source
    of_task: bool  # whether problems are missing
    of_rows: bool  # whether rows of `sft.data` or `sft.eval_data` are missing


def task_sources(task: Task, key: str) -> Iterator[Named]:
    """Yield the sources of a task, or of the parts of a mixture.

    Args:
        key: of the task's settings, or of a mixture's parts.
    """
    if isinstance(task, Mixture):
        for label, (part, _) in task.parts.items():
            yield from task_sources(part, f"{key}.{label}")
        return
    of: Any = getattr(task, "source", None)
    for split in SPLITS:
        source = None if of is None else of(split)
        if source not in (None, NONE):
            yield Named(f"{key}.options.{split}", source, HUB_SPLITS[split])


def task_key(key: str, task: TaskSettings) -> str:
    """Return the key below which a task's settings, or the parts of a mixture, are."""
    return f"{key}.mixture" if task.name == Mixture.name else key


def evaluation_sources(settings: Settings) -> list[Named]:
    """Return the sources of `evaluation.tasks`.

    Raises:
        ValueError: a task or its options are wrong.
    """
    task, parts = settings.task, settings.evaluation.tasks
    if not parts:
        return []
    mixture = replace(task, name=Mixture.name, mixture=parts, options={}, pass_rates=None)
    try:
        return list(task_sources(build_task(mixture), "evaluation.tasks"))
    except ValueError as error:
        raise ValueError(str(error).replace("task.mixture", "evaluation.tasks")) from None


def plan_notes(settings: Settings, *, has_texts: bool) -> tuple[str, ...]:
    """Return lines on data that a plan does not read, and that do not stop a run.

    Args:
        has_texts: whether raw texts are there.

    Raises:
        ValueError: as `evaluation_sources`.
    """
    lines = _lines(iter(evaluation_sources(settings)))
    later = tuple(f"{line}; only `agrpo evaluate` reads it" for line in lines)
    return (PLANNED_TEXTS, *later) if has_texts else later


def row_sources(sft: SftSettings) -> Iterator[Named]:
    """Yield the sources of supervised rows."""
    for key, source in (sources(sft) if sft.data else {}).items():
        yield Named(key, source.data, HUB_SPLITS["train"])
    if sft.eval_data is not None:
        yield Named("sft.eval_data", sft.eval_data, HUB_SPLITS["eval"])


def missing_data(settings: Settings) -> MissingData | None:
    """Return the data that a run needs and this machine can neither read nor fetch now, if any.

    Raises:
        ValueError: the task, its options or a source of rows are wrong.
    """
    task, sft = settings.task, settings.sft
    problems = _lines(task_sources(build_task(task), task_key("task", task)))
    lines = _lines_of_texts if sft.format == "texts" else _lines
    rows = lines(row_sources(sft)) if sft.is_on and sft.data is not None else []
    if not problems and not rows:
        return None
    planned = []
    if problems:
        count = held_out_count(task)
        planned.append(f"{count} held-out problems, and {PROMPT_TOKENS} tokens in each prompt")
    if sft.epochs is not None and not sft.iterations and (rows or sft.data is None):
        planned.append(f"no supervised iteration, as sft.epochs={sft.epochs:g} needs the data")
    elif rows:
        planned.append("whole rows" if sft.has_texts else RESPONSES)
    *others, last = problems + rows
    last += f"; planned with {', and with '.join(planned)}"
    return MissingData((*others, last), bool(problems), bool(rows))


def held_out_count(task: TaskSettings) -> int:
    """Return the held-out problems that a plan counts with where their data are missing."""
    return task.eval_problems or GENERATED["eval"]


def _lines(named: Iterator[Named]) -> list[str]:
    found = ((each.key, each.source, lack(each.source)) for each in named)
    return [f"{key}={source} {lacking}" for key, source, lacking in found if lacking]


def _lines_of_texts(named: Iterator[Named]) -> list[str]:
    found = list[str]()
    for each in named:
        try:
            text_files(each.source, key=each.key)
        except ValueError as error:
            found.append(str(error))
    return found
