"""Turn what the user wrote into complete, checked settings; nothing heavy is started.

Runs before any process group and before torch is needed, so wrong input is refused at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.parallel import stage_layers
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.settings import ModelSettings, Settings
from agrpo_megatron.families.lora import check_stages
from agrpo_megatron.runs.loaded_model import missing_files, with_loaded_model
from agrpo_megatron.runs.missing_data import missing_data, plan_notes
from agrpo_megatron.runs.progress import PHASES
from agrpo_megatron.runs.supervised import with_rows, with_solutions
from agrpo_megatron.tasks import Task, build_task
from agrpo_megatron.tasks.base import SPLITS, NoTask, Split, as_prompt, task_prompts
from agrpo_megatron.tasks.curriculum import filter_by_pass_rate
from agrpo_megatron.tasks.mixture import problems_by_task
from agrpo_megatron.tasks.supervised.examples import Supervised
from agrpo_megatron.text.chat import Jinja
from agrpo_megatron.text.notes import text_notes
from agrpo_megatron.text.tokenizer import Tokenizer, load_tokenizer
from agrpo_megatron.types import Chat

SPLIT_NAMES: dict[Split, str] = {"train": "training", "eval": "held-out"}


@dataclass(frozen=True)
class Resolved:
    """Complete settings with the task and tokenizer they name."""

    settings: Settings
    task: Task
    tokenizer: Tokenizer
    supervised: Supervised | None = None  # rows of `sft.data`, where they are needed


@dataclass(frozen=True)
class Planned:
    """Complete settings and their task, where files of `model.load` and data may be missing."""

    settings: Settings
    task: Task  # without problems if its data are missing
    tokenizer: Tokenizer | None  # None: it is missing, and nothing that needs it was checked
    missing: tuple[str, ...]  # lines on what a run needs and this machine lacks
    supervised: Supervised | None = None  # rows of `sft.data`; None also where something is missing
    notes: tuple[str, ...] = ()  # lines on what the plan assumes, or what only `evaluate` lacks
    has_texts: bool = False  # whether raw texts are there, which were not read


def resolve(
    settings: Settings,
    *,
    world_size: int,
    needs: Sequence[Split] | None = SPLITS,
    phases: Sequence[str] = (),
) -> Resolved:
    """Fill what follows from `model.load` and the tokenizer, then check everything.

    Args:
        needs: splits that must have problems; training ones only if the run trains. None: the task
            is not read.
        phases: the phases that are going to train (sft, rl); with sft, rows of `sft.data` are read.

    Raises:
        ValueError: any rule is broken; the message names key, value, rule and fix.
    """
    validate_unread(settings, world_size)
    settings = with_loaded_model(settings)
    tokenizer = load_tokenizer(settings.tokenizer, mask_id=settings.model.mask_token_id)
    return _resolved(settings, tokenizer, world_size=world_size, needs=needs, phases=phases)


def plan(settings: Settings, *, world_size: int) -> Planned:
    """Do as `resolve`, also where files of `model.load` or data are missing.

    Raises:
        ValueError: as `resolve`.
    """
    source, missing, data = settings.model.load, missing_files(settings), missing_data(settings)
    lines = (missing.text,) if missing is not None else ()
    lines += data.lines if data is not None else ()
    needs = None if data is not None and data.of_task else SPLITS
    has_rows, is_text = data is None or not data.of_rows, settings.sft.has_texts
    phases = PHASES if has_rows and not is_text else ()  # a plan reads no texts
    more: dict[str, Any] = {"missing": lines, "has_texts": has_rows and is_text}
    more["notes"] = plan_notes(settings, has_texts=more["has_texts"])
    if missing is None:
        found = resolve(settings, world_size=world_size, needs=needs, phases=phases)
        given = found.settings, found.task, found.tokenizer
        return Planned(*given, supervised=found.supervised, **more)
    if missing.has_folder:
        validate_unread(settings, world_size)
        settings = with_loaded_model(settings, has_weights=False)
    else:
        settings = replace(settings, model=replace(settings.model, load=None))
    if missing.has_tokenizer:
        tokenizer = load_tokenizer(settings.tokenizer, mask_id=settings.model.mask_token_id)
        found = _resolved(settings, tokenizer, world_size=world_size, needs=needs, phases=phases)
        settings, task, rows = found.settings, found.task, found.supervised
    else:
        _validate_known(settings, world_size)
        tokenizer, task = None, _filled_task(settings, needs)
        filter_by_pass_rate(task, settings.task)
        rows = None
    settings = replace(settings, model=replace(settings.model, load=source))
    return Planned(settings, task, tokenizer, supervised=rows, **more)


def validate_unread(settings: Settings, world_size: int) -> None:
    """Check settings before `model.load` is read.

    Raises:
        ValueError: a rule is broken that does not depend on the model of `model.load`.
    """
    model = settings.model
    unread = model if model.load is None else replace(model, vocab_size=None)  # not `is_known`
    validate(replace(settings, model=unread), world_size)


def _validate_known(settings: Settings, world_size: int) -> None:
    """Check settings with a known model, whose layers may get adapters."""
    validate(settings, world_size)
    model, lora = settings.model, settings.lora
    if lora.rank is not None:
        check_stages(model, lora, stage_layers(model, settings.parallel))
    if lora.load is not None:
        from agrpo_megatron.families.peft import read_peft  # loads torch

        read_peft(Path(lora.load), model, lora)


def _resolved(
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    world_size: int,
    needs: Sequence[Split] | None,
    phases: Sequence[str],
) -> Resolved:
    """Fill what follows from the tokenizer into settings with a known model; check everything."""
    model = settings.model
    model = replace(
        model,
        vocab_size=model.vocab_size or tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_id if model.mask_token_id is None else model.mask_token_id,
        eos_token_id=tokenizer.eos_id if model.eos_token_id is None else model.eos_token_id,
    )
    settings = replace(settings, model=model)
    if settings.sft.has_texts:
        settings = replace(settings, sft=replace(settings.sft, padding="none"))
    _validate_known(settings, world_size)
    _check_tokens(model, tokenizer)
    task = _filled_task(settings, needs)
    supervised = None
    if "sft" in phases and settings.sft.data is not None and settings.sft.is_on:
        settings, supervised = with_rows(settings, task, tokenizer)
        _validate_known(settings, world_size)
    task.notes += supervised.notes if supervised else []
    for key, own in (("mask_token_id", tokenizer.mask_id), ("eos_token_id", tokenizer.eos_id)):
        if (used := getattr(model, key)) != own:
            task.notes.append(f"model.{key}={used} is used; the tokenizer's own is {own}")
    check_prompts(settings, task, tokenizer)
    filter_by_pass_rate(task, settings.task)
    if settings.sft.is_on and settings.sft.data is None and "train" in (needs or ()):
        settings = with_solutions(settings, task, tokenizer)
    return Resolved(settings, task, tokenizer, supervised)


def _filled_task(settings: Settings, needs: Sequence[Split] | None) -> Task:
    """Build the task, which must have the problems that are needed; one without any for None."""
    if needs is None:
        return NoTask(settings.task, None)
    task = build_task(settings.task)
    learns = settings.sft.is_on and settings.sft.data is None
    _require_problems(task, needs, trains=settings.train.iterations > 0 or learns)
    if settings.evaluation.few_shot:
        task.show_examples(settings.evaluation.few_shot)
    return task


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
    if model.mask_token_id == model.eos_token_id:
        raise ValueError(
            f"model.mask_token_id={model.mask_token_id} is model.eos_token_id too; use another id"
        )


def check_prompts(settings: Settings, task: Task, tokenizer: Tokenizer) -> None:
    """Refuse or drop problems whose prompts are over the limit; mutates the task and its notes.

    A prompt is never cut. The notes count prompts with unknown text.

    Raises:
        ValueError: `task.long_prompts` refuses long prompts, or nothing is left.
    """
    limit, length = settings.task.prompt_tokens, settings.sampling.completion_length
    room = settings.model.max_sequence_length - length
    if limit is not None and limit > room:
        raise ValueError(
            f"task.prompt_tokens={limit} and sampling.completion_length={length} are together over "
            f"model.max_sequence_length={settings.model.max_sequence_length}; use at most {room}"
        )
    dropped: set[tuple[Split, str]] = set()
    before, has_chats = {split: _filled(task, split) for split in SPLITS}, False
    for split in SPLITS:
        problems, what = task.problems(split), SPLIT_NAMES[split]
        prompts = task_prompts(task, problems, split=split)
        encoded = tokenizer.encode_prompts(prompts)
        lengths = [len(ids) for ids in encoded]
        long = [p for p, n in zip(problems, lengths, strict=True) if n > (limit or room)]
        if long:
            said = f"{len(long)} of {len(problems)} {what} problems have prompts over"
            if settings.task.long_prompts == "refuse":
                longest = max(lengths)
                raise ValueError(_too_long(said, limit, room, longest=longest, length=length))
            dropped |= {(split, problem.key) for problem in long}
            task.notes.append(f"{said} {limit or room} tokens; left out (task.long_prompts=drop)")
        task.notes += text_notes(tokenizer, prompts, encoded, what=f"{what} prompts")
        has_chats |= any(isinstance(prompt, Chat) for prompt in prompts)
    template = tokenizer.render
    if isinstance(template, Jinja) and template.is_dated and has_chats:
        task.notes.append(
            f"the chat template of {template.source} prints today's date, so prompts change from "
            "day to day; to fix the date, use a copy as tokenizer.chat_template"
        )
    if dropped:
        task.keep(lambda split, problem: (split, problem.key) not in dropped)
        if any(_filled(task, split) != before[split] for split in SPLITS):
            raise ValueError(
                f"task.long_prompts=drop leaves a task without problems of at most {limit or room} "
                "prompt tokens; raise task.prompt_tokens or model.max_sequence_length"
            )


def check_prompt(resolved: Resolved, text: str) -> list[str]:
    """Check the text of `agrpo sample --prompt`, which is never cut; return notes on it.

    Raises:
        ValueError: it is empty, not valid Unicode, or too long.
    """
    settings, tokenizer = resolved.settings, resolved.tokenizer
    encoded = tokenizer.encode_prompts([as_prompt(text, of="--prompt")])
    limit, length = settings.model.max_sequence_length, settings.sampling.completion_length
    if len(encoded[0]) + length > limit:
        raise ValueError(
            f"--prompt has {len(encoded[0])} tokens, and model.max_sequence_length={limit} leaves "
            f"{limit - length} besides sampling.completion_length={length}; shorten one of them"
        )
    return text_notes(tokenizer, [text], encoded, what="prompts")


def _too_long(found: str, limit: int | None, room: int, *, longest: int, length: int) -> str:
    """Return the error for prompts over the limit, or over the room in a row."""
    if limit is not None:
        wider = f", with model.max_sequence_length={longest + length}" if longest > room else ""
        return (
            f"task.prompt_tokens={limit}: {found} it, the longest of {longest} tokens; use at "
            f"least {longest}{wider}, or leave them out by task.long_prompts=drop"
        )
    return (
        f"model.max_sequence_length={room + length} leaves {room} tokens for prompts besides "
        f"sampling.completion_length={length}: {found} that, the longest of {longest} tokens; "
        f"use at least {longest + length}, or leave them out by task.long_prompts=drop"
    )


def _filled(task: Task, split: Split) -> list[str]:
    """Return the labels of the tasks that have problems in a split."""
    return [label for label, problems in problems_by_task(task, split).items() if problems]


def _require_problems(task: Task, needs: Sequence[Split], *, trains: bool) -> None:
    """Refuse a task, or a part of a mixture, without problems in a split that is needed."""
    fix: dict[Split, str] = {
        "train": "give it some (task.options.train=none is only for `agrpo evaluate`), or use "
        "train.iterations=0 and sft.iterations=0",
        "eval": "give it some",
    }
    for split in needs:
        empty = [label for label, found in problems_by_task(task, split).items() if not found]
        if empty and (split == "eval" or trains):
            raise ValueError(f"task {empty[0]} has no {SPLIT_NAMES[split]} problems; {fix[split]}")
