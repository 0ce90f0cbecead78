"""The rollouts that a run stores, and whether another run can replay them; needs no torch."""

import json
from collections.abc import Collection
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from agrpo_megatron.config.schema import flatten, load
from agrpo_megatron.config.settings import AlgorithmSettings, Settings
from agrpo_megatron.config.values import text
from agrpo_megatron.config.yaml_files import with_file_names
from agrpo_megatron.runs.directory import DATA, data_digests, digests_so_far
from agrpo_megatron.runs.progress import RUN_SETTINGS
from agrpo_megatron.runs.resolve import Planned, Resolved
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.base import NoTask, task_prompts
from agrpo_megatron.text.tokenizer import Tokenizer

ROLLOUTS, ROUND = "rollouts", ".safetensors"  # folder in a run directory; ending of a round's file
DIGITS = 6  # of a round's number
UNREADABLE = (OSError, SafetensorError, ValueError, LookupError, TypeError)
# Settings under which rollouts are picked, sampled and scored.
SHARED = ("run.seed", "model.vocab_size", "model.mask_token_id", "model.eos_token_id")
SHARED += ("task.mixture", "sampling", "algorithm.prompts_per_iteration", "algorithm.group_size")
SHARED += ("algorithm.resample_rounds",)
KEEP = "train it again (--restart) with checkpoint.keep_rollouts=true"


def sampling_number(iteration: int, resampling: int, algorithm: AlgorithmSettings) -> int:
    """Return the number of a sampling round, counted through the run.

    Args:
        iteration: iterations finished before.
        resampling: 0 is the iteration's first round; unused rounds count too.
    """
    return iteration * (1 + algorithm.resample_rounds) + resampling


def round_name(number: int) -> str:
    """Return the name of a round's files."""
    return f"{number:0{DIGITS}d}"


def round_path(folder: Path, number: int) -> Path:
    """Return the file of a graded round."""
    return folder / f"{round_name(number)}{ROUND}"


def stored_run(directory: Path) -> tuple[Settings, dict[str, str]]:
    """Return the settings of a run and the digests of its problems.

    Raises:
        ValueError: the directory holds no run.
    """
    try:
        data = json.loads((directory / DATA).read_text(encoding="utf-8"))
        settings = load(Settings, directory / RUN_SETTINGS)
    except OSError as error:
        raise ValueError(
            f"train.from_rollouts={directory} is not a run directory ({error.filename}: "
            f"{error.strerror}); give the directory of a run that kept its rollouts"
        ) from None
    return settings, data


def check_replay(resolved: Resolved | Planned) -> None:
    """Check that a run can replay the rollouts of `train.from_rollouts`, where it is set.

    Without a tokenizer the prompts are not compared.

    Raises:
        ValueError: the directory holds no run or too few rollouts, or they are of other settings,
            problems or prompts.
    """
    here = resolved.settings
    if here.train.from_rollouts is None:
        return
    source = Path(here.train.from_rollouts)
    there, data = stored_run(source)
    _check_shared(source, there, here)
    problems, is_read = "training problems", not isinstance(resolved.task, NoTask)
    if is_read and data.get(problems) != data_digests(resolved.task)[problems]:
        raise ValueError(
            f"train.from_rollouts={source}: its rollouts are of other {problems} than this run's; "
            f"use the task settings of {source / RUN_SETTINGS}"
        )
    if here.train.iterations > 0:
        _check_rounds(source, there, here, runs=digests_so_far(source, there, data))
        if is_read and resolved.tokenizer is not None:
            _check_prompts(source, resolved.task, resolved.tokenizer)


def _check_shared(source: Path, there: Settings, here: Settings) -> None:
    ours, theirs = _shared(here), _shared(there)
    for key in ours | theirs:
        mine, stored = ours.get(key), theirs.get(key)
        if mine != stored:
            fix = f"{key}={text(stored)}"
            raise ValueError(
                f"{key}={text(mine)} differs from train.from_rollouts={source}, whose rollouts "
                f"were sampled with {fix}; use {fix}"
            )


def _shared(settings: Settings) -> dict[str, Any]:
    chosen = tuple(f"{name}." for name in SHARED)
    flat = flatten(with_file_names(asdict(settings)))
    return {key: value for key, value in flat.items() if f"{key}.".startswith(chosen)}


def _check_rounds(source: Path, there: Settings, here: Settings, *, runs: Collection[str]) -> None:
    """Check that each iteration has its first round; later rounds follow from its rewards."""
    said, wanted = f"train.from_rollouts={source}", here.train.iterations
    paths = [
        round_path(source / ROLLOUTS, sampling_number(iteration, 0, here.algorithm))
        for iteration in range(wanted)
    ]
    stored = next((i for i, path in enumerate(paths) if not path.exists()), wanted)
    if stored == 0 and there.train.from_rollouts is not None:
        other = there.train.from_rollouts
        raise ValueError(
            f"{said} stores no rollouts, as that run replays those of {other}; use "
            f"train.from_rollouts={other}"
        )
    if stored == 0:
        raise ValueError(f"{said} stores no rollouts of its first iteration; {KEEP}")
    if stored < wanted:
        raise ValueError(
            f"{said} stores the rollouts of {stored} iterations, and train.iterations={wanted} is "
            f"more; use at most {stored}"
        )
    # A run writes its rounds in order, so files of an earlier run in its folder are the last ones.
    for path in (paths[0], paths[-1]):
        if _run_of(path) not in runs:
            raise ValueError(
                f"{said}: {path} is damaged, of another version of agrpo_megatron, or of a run "
                f"with other settings than {source / RUN_SETTINGS}; {KEEP}"
            )


def _run_of(path: Path) -> str | None:
    """Return the digest that a round names; None if it cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["notes"])["run"]
    except UNREADABLE:
        return None


def _check_prompts(source: Path, task: Task, tokenizer: Tokenizer) -> None:
    """Check that the prompts of the first round have the ids that this run's tokenizer gives."""
    with safe_open(round_path(source / ROLLOUTS, 0), framework="np") as file:
        ids = iter(file.get_tensor("prompts").tolist())
        lengths = file.get_tensor("prompt_lengths").tolist()
    stored = {tuple(islice(ids, length)) for length in lengths}
    prompts = task_prompts(task, task.problems("train"), split="train")
    if not stored <= set(map(tuple, tokenizer.encode_prompts(prompts))):
        raise ValueError(
            f"train.from_rollouts={source}: its prompts are not this run's token by token; use "
            f"tokenizer.path, tokenizer.chat_template and task.options of {source / RUN_SETTINGS}"
        )
