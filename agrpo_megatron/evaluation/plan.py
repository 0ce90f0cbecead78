"""The plan of `agrpo evaluate`, checked before a rank starts."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.checkpoint.integrity import MANIFEST
from agrpo_megatron.config.parallel import model_ranks
from agrpo_megatron.config.settings import EvaluationSettings, ModelSettings, Settings, TaskSettings
from agrpo_megatron.config.yaml_files import with_file_names
from agrpo_megatron.evaluation.grid import Cell, cell_sampling, evaluation_grid
from agrpo_megatron.runs.directory import code_digests
from agrpo_megatron.runs.files import digest
from agrpo_megatron.runs.progress import RUN_SETTINGS, checkpoint_path
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.tasks import Task, build_task
from agrpo_megatron.tasks.base import Split, task_prompts
from agrpo_megatron.tasks.mixture import Mixture, problems_by_task
from agrpo_megatron.tasks.own.files import NONE, FileTask
from agrpo_megatron.types import Problem

EDGE = 1 << 20  # bytes read at both ends of a weight file without checksums
BATCH_FORWARDS = 4  # default batch size, in full forwards at the first step
# Settings of the model's source, not of the model itself.
NOT_IDENTITY = ("load", "megatron", "init_std")


@dataclass(frozen=True)
class Batch:
    """Problems that are completed together."""

    label: str
    cell: Cell
    places: range  # among the task's problems
    is_last: bool  # of its task and cell


@dataclass(frozen=True)
class Plan:
    """All problems that an evaluation completes, in order."""

    resolved: Resolved
    checkpoint: Path | None  # None: the weights that `model.load` names
    cells: list[Cell]
    tasks: Mapping[str, Task]  # by label
    problems: Mapping[str, Sequence[Problem]]  # by label
    batch_size: int  # problems
    evaluation: dict[str, Any]  # content of evaluation.json

    @property
    def samples(self) -> int:
        """Return the completions of each problem."""
        return self.resolved.settings.evaluation.samples

    @property
    def split(self) -> Split:
        """Return the split that `evaluation.split` names."""
        return _split(self.resolved.settings.evaluation)

    def batches(self) -> list[Batch]:
        """Return all batches: task by task, cell by cell."""
        size = self.batch_size
        return [
            Batch(label, cell, range(len(found))[first : first + size], first + size >= len(found))
            for label, found in self.problems.items()
            for cell in self.cells
            for first in range(0, len(found), size)
        ]


def plan_evaluation(
    settings: Settings,
    *,
    checkpoint: Path | None,
    label: str,
    world_size: int,
    is_sweep: bool = False,
    stored: dict[str, Any] | None = None,
) -> Plan:
    """Plan an evaluation.

    Args:
        checkpoint: of a run; None takes the weights of `model.load`.
        label: name of the model in figures.
        stored: evaluation.json of an earlier attempt; batches stay the same.

    Raises:
        ValueError: a setting or an argument is wrong.
    """
    cells = evaluation_grid(settings, is_sweep=is_sweep)
    try:
        resolved = resolve(_prepared(settings, cells), world_size=world_size, needs=())
    except ValueError as error:
        if not settings.evaluation.tasks:
            raise
        said = str(error).replace("task.mixture", "evaluation.tasks")
        at = "evaluation.tasks: " if said.startswith("task.") else ""
        raise ValueError(f"{at}{said}") from error
    tasks, problems = _tasks(resolved)
    size = settings.evaluation.batch_size or (stored or {}).get("evaluates", {}).get("batch_size")
    size = size or _batch_size(resolved, world_size)
    weights = checkpoint or _weights(settings.model)
    evaluation = {
        "label": label,
        "weights": str(weights),
        "evaluates": {
            "checkpoint": fingerprint(weights),
            **_identity(resolved, cells),
            "batch_size": size,
            "tasks": {
                name: _task_identity(resolved, tasks[name], problems[name]) for name in tasks
            },
        },
    }
    return Plan(resolved, checkpoint, cells, tasks, problems, size, evaluation)


def _split(settings: EvaluationSettings) -> Split:
    return "train" if settings.split == "train" else "eval"


def fingerprint(weights: Path) -> str:
    """Return a digest of a checkpoint: of its checksums, or of names, sizes and both file ends."""
    manifest = weights / MANIFEST
    if manifest.exists():
        return digest(manifest.read_bytes())
    known = hashlib.sha256()
    for path in sorted(weights.glob("*")):
        if path.suffix in (".safetensors", ".bin", ".distcp") or path.name == "config.json":
            size = path.stat().st_size
            known.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as stream:
                known.update(stream.read(EDGE))
                stream.seek(max(0, size - EDGE))
                known.update(stream.read(EDGE))
    return known.hexdigest()


def _prepared(settings: Settings, cells: Sequence[Cell]) -> Settings:
    """Return the settings with the sampler of the longest cell, for the other checks."""
    sampling = cell_sampling(settings, max(cells))
    settings = replace(
        settings,
        sampling=replace(
            settings.sampling,
            completion_length=sampling.completion_length,
            block_length=sampling.block_length,
            denoising_steps=sampling.denoising_steps,
        ),
        evaluation=replace(settings.evaluation, denoising_steps=None, block_length=None),
        # These name metrics of the training run.
        checkpoint=replace(settings.checkpoint, best=None),
        train=replace(settings.train, stop_metric=None, stop_target=None, stop_patience=None),
    )
    task = replace(settings.task, pass_rates=None)
    if settings.evaluation.tasks:
        task = replace(task, name=Mixture.name, mixture=settings.evaluation.tasks, options={})
    if settings.evaluation.split == "eval" and not settings.evaluation.few_shot:
        task = _held_out_only(task)
    return replace(settings, task=task)


def _held_out_only(settings: TaskSettings) -> TaskSettings:
    """Drop the training data, which may be missing, if only held-out problems are used."""
    task = build_task(settings)
    if isinstance(task, Mixture):
        parts = {label: _held_out_only(part.settings) for label, (part, _) in task.parts.items()}
        given = settings.mixture
        mixture = {label: {**given[label], "options": parts[label].options} for label in given}
        return replace(settings, mixture=mixture)
    if isinstance(task, FileTask) and task.source("eval") is not None:
        return replace(settings, options={**settings.options, "train": NONE})
    return settings


def _tasks(resolved: Resolved) -> tuple[dict[str, Task], dict[str, list[Problem]]]:
    """Return tasks and problems by label: the tasks of a mixture, or the single task."""
    settings, task = resolved.settings, resolved.task
    if isinstance(task, Mixture):
        tasks = {label: part for label, (part, _) in task.parts.items()}
    else:
        tasks = {task.name: task}
    problems = problems_by_task(task, _split(settings.evaluation))
    sorted_out = dict(zip(tasks, problems.values(), strict=True))
    for label, found in sorted_out.items():
        if not found:
            raise ValueError(
                f"task {label} has no problems in evaluation.split={settings.evaluation.split}; "
                "ask for more, or leave the task out"
            )
    return tasks, sorted_out


def _batch_size(resolved: Resolved, world_size: int) -> int:
    """Return problems per batch: several full forwards, so that only its end runs with few rows."""
    settings = resolved.settings
    replicas = max(1, world_size // model_ranks(settings.rollout_layout))
    row = 2 * settings.sampling.completion_length
    completions = BATCH_FORWARDS * replicas * max(1, settings.train.token_budget // row)
    return max(1, completions // settings.evaluation.samples)


def _weights(model: ModelSettings) -> Path:
    assert model.load is not None
    source = Path(model.load)
    return checkpoint_path(source) if (source / RUN_SETTINGS).exists() else source


def _identity(resolved: Resolved, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the settings that determine completions, and which completions are requested."""
    settings = resolved.settings
    model = {k: v for k, v in asdict(settings.model).items() if k not in NOT_IDENTITY}
    sampling = asdict(cell_sampling(settings, cells[0]))
    for name in ("completion_length", "denoising_steps"):
        del sampling[name]
    return {
        "precision": settings.precision,
        **({"fp8": asdict(settings.fp8)} if settings.precision == "fp8" else {}),
        "seed": settings.run.seed,
        "split": settings.evaluation.split,
        "samples": settings.evaluation.samples,
        **({"few_shot": few_shot} if (few_shot := settings.evaluation.few_shot) else {}),
        "steps": {
            str(length): [c.denoising_steps for c in cells if c.completion_length == length]
            for length in dict.fromkeys(cell.completion_length for cell in cells)
        },
        "sampling": sampling,
        "model": model,
    }


def _task_identity(resolved: Resolved, task: Task, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return digests of the prompts, the solutions and a task file, which determine rewards."""
    written = task_prompts(task, problems, split=_split(resolved.settings.evaluation))
    prompts = resolved.tokenizer.encode_prompts(written)
    asked = json.dumps([[problem.key for problem in problems], prompts])
    graded = _canonical([[p.key, p.fields, p.solution] for p in problems])
    code = code_digests(task)
    if len(code) == 1:  # as evaluations of tasks in one file have it
        code = {"file": code.popitem()[1]}
    named = with_file_names({"task": asdict(task.settings)})["task"]
    return {
        "name": named["name"],
        "options": {k: v for k, v in named["options"].items() if (k, v) != ("train", NONE)},
        "problems": len(problems),
        "asked": digest(asked.encode()),
        "graded": digest(graded.encode(errors="backslashreplace")),
        **code,
    }


def _canonical(value: Any) -> str:
    """Return a value as text, equal in every process: sorted, without addresses."""
    if isinstance(value, Mapping):
        pairs = sorted(f"{_canonical(key)}: {_canonical(each)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_canonical, value)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_canonical, value))}]"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
