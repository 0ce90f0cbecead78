"""Turn what the user wrote into complete, checked settings; nothing heavy is started.

Runs before any process group and before torch is needed, so wrong input is refused at once.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from agrpo_megatron.checkpoint.progress import HF, MODEL_FILE
from agrpo_megatron.config import load
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.rules import validate
from agrpo_megatron.settings import ModelSettings, Settings
from agrpo_megatron.tasks import Task, build_task
from agrpo_megatron.tokenizer import Tokenizer, load_tokenizer
from agrpo_megatron.types import Problem

RUN_SETTINGS = "config.yaml"


@dataclass(frozen=True)
class Resolved:
    """Complete settings with the task and tokenizer they name."""

    settings: Settings
    task: Task
    tokenizer: Tokenizer


def resolve(settings: Settings, *, world_size: int) -> Resolved:
    """Fill what follows from `model.load` and the tokenizer, then check everything.

    Raises:
        ValueError: any rule is broken; the message names key, value, rule and fix.
    """
    validate(settings, world_size)
    settings = _with_loaded_model(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    model = settings.model
    model = replace(
        model,
        vocab_size=model.vocab_size or tokenizer.vocab_size,
        mask_token_id=_first(model.mask_token_id, tokenizer.mask_id),
        eos_token_id=_first(model.eos_token_id, tokenizer.eos_id),
    )
    settings = replace(settings, model=model)
    validate(settings, world_size)
    _check_tokens(model, tokenizer)
    task = build_task(settings.task)
    _check_lengths(settings, task, tokenizer)
    return Resolved(settings, task, tokenizer)


def _first(chosen: int | None, default: int) -> int:
    return default if chosen is None else chosen


def _with_loaded_model(settings: Settings) -> Settings:
    """Take the architecture from `model.load`, and its tokenizer where none is named."""
    source = settings.model.load
    if source is None:
        return settings
    run_file, model_file = Path(source) / RUN_SETTINGS, Path(source) / MODEL_FILE
    if run_file.exists():
        saved = load(Settings, run_file)
        model, tokenizer_path = saved.model, saved.tokenizer.path
    elif model_file.exists():
        model, tokenizer_path = load(ModelSettings, model_file), _carried_tokenizer(model_file)
    else:
        model, tokenizer_path = settings_from_hf(source), source
    model = replace(model, load=source, megatron={**model.megatron, **settings.model.megatron})
    if settings.tokenizer.path is None:
        settings = replace(settings, tokenizer=replace(settings.tokenizer, path=tokenizer_path))
    return replace(settings, model=model)


def _carried_tokenizer(model_file: Path) -> str | None:
    """Return the tokenizer that a checkpoint carries along, if it does."""
    folder = model_file.parent / HF
    if any(folder.glob("tokenizer*.json")):
        return str(folder)
    file = folder / "tokenizer.model"
    return str(file) if file.exists() else None


def _check_tokens(model: ModelSettings, tokenizer: Tokenizer) -> None:
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; leave it null or raise it"
        )
    for key in ("mask_token_id", "eos_token_id"):
        value = getattr(model, key)
        if value >= model.vocab_size:
            raise ValueError(
                f"model.{key}={value} is outside model.vocab_size={model.vocab_size}; "
                "leave it null to take the tokenizer's"
            )


def _check_lengths(settings: Settings, task: Task, tokenizer: Tokenizer) -> None:
    """Refuse prompts that leave no room and solutions that do not fit."""
    room, length = settings.model.max_sequence_length, settings.sampling.completion_length

    def prompt_tokens(problem: Problem) -> int:
        return len(tokenizer.encode(task.prompt(problem)))

    problems = [*task.problems("train"), *task.problems("eval")]
    longest = max(prompt_tokens(problem) for problem in problems)
    if longest + length > room:
        raise ValueError(
            f"model.max_sequence_length={room} is less than the longest prompt ({longest} tokens) "
            f"and sampling.completion_length={length} together; use at least {longest + length}"
        )
    if settings.sft.iterations == 0:
        return
    solution = max(len(tokenizer.encode(problem.solution)) for problem in problems)
    if solution > length:
        raise ValueError(
            f"sampling.completion_length={length} is shorter than the longest solution of task "
            f"{settings.task.name} ({solution} tokens); use at least {solution}"
        )
