"""The data of the supervised phase before a run, and the iterations that its epochs take."""

import math
from dataclasses import replace
from pathlib import Path

from agrpo_megatron.config.annealing import validate_schedule
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.curriculum import epoch_size, solved_problems
from agrpo_megatron.tasks.supervised.examples import Supervised, read_supervised
from agrpo_megatron.tasks.supervised.leaks import held_out_problems
from agrpo_megatron.tasks.supervised.texts import read_texts
from agrpo_megatron.text.notes import text_notes
from agrpo_megatron.text.tokenizer import Tokenizer

TEXTS = "texts"  # in a run directory: ids of raw texts


def with_rows(settings: Settings, task: Task, tokenizer: Tokenizer) -> tuple[Settings, Supervised]:
    """Read `sft.data`; return settings with its padding and iterations, and the rows.

    Rows that ask held-out problems of the task are handled as `task.leaks` says.

    Raises:
        ValueError: as `read_supervised`, or `sft.iterations` and `sft.epochs` disagree.
    """
    sft, model = settings.sft, settings.model
    if sft.has_texts:
        return _with_texts(settings, tokenizer)
    own = "block" if model.has_blocks else "none" if sft.loss == "vrpo" else "batch"
    settings = replace(settings, sft=replace(sft, padding=sft.padding or own))
    data = read_supervised(
        settings.sft,
        tokenizer,
        model=model,
        sampling=settings.sampling,
        asked=held_out_problems(task, tokenizer),
    )
    return _counted(settings, data)


def _with_texts(settings: Settings, tokenizer: Tokenizer) -> tuple[Settings, Supervised]:
    """Do as `with_rows` for raw texts, whose ids the run's directory keeps."""
    folder = Path(settings.run.dir) / TEXTS
    data = read_texts(settings.sft, tokenizer, model=settings.model, folder=folder)
    return _counted(settings, data)


def _counted(settings: Settings, data: Supervised) -> tuple[Settings, Supervised]:
    """Return settings with the iterations of the data, and the data with notes."""
    settings, note = _with_iterations(settings, data.epoch)
    passes = settings.sft.iterations * settings.sft.batch_size / data.epoch
    note = note or [f"sft.iterations={settings.sft.iterations} are {passes:.3g} epochs"]
    return settings, replace(data, notes=[*data.notes, *note, *_warnings(settings, data)])


def with_solutions(settings: Settings, task: Task, tokenizer: Tokenizer) -> Settings:
    """Check the task's solutions, add notes on them to it, and return settings with iterations.

    Raises:
        ValueError: solutions are missing or do not fit, or iterations and epochs disagree.
    """
    length = settings.sampling.completion_length
    shown, shares = solved_problems(task, settings.sft)
    texts = [problem.solution for problem in shown]
    encoded = tokenizer.encode_prompts(texts)
    longest = max(map(len, encoded))
    if longest > length:
        raise ValueError(
            f"sampling.completion_length={length} is shorter than the longest solution of task "
            f"{task.settings.name} ({longest} tokens); use at least {longest}"
        )
    settings, note = _with_iterations(settings, epoch_size(shares))
    task.notes += [*text_notes(tokenizer, texts, encoded, what="solutions"), *note]
    return settings


def _with_iterations(settings: Settings, epoch: float) -> tuple[Settings, list[str]]:
    """Return settings with the iterations that `sft.epochs` takes, and a note on them.

    Args:
        epoch: examples of one epoch.
    """
    sft = settings.sft
    if sft.epochs is None:
        return settings, []
    batches = round(sft.epochs * epoch / sft.batch_size, 6)  # 1.1 * 100 / 10 is above 11
    iterations = max(1, math.ceil(batches))
    if sft.iterations not in (0, iterations):
        raise ValueError(
            f"sft.iterations={sft.iterations} and sft.epochs={sft.epochs:g} disagree: "
            f"{epoch:,.0f} examples make {iterations} iterations; give one of them"
        )
    note = f"sft.epochs={sft.epochs:g} of {epoch:,.0f} examples are {iterations} iterations"
    settings = replace(settings, sft=replace(sft, iterations=iterations))
    validate_schedule(settings)
    return settings, [note]


def _warnings(settings: Settings, data: Supervised) -> list[str]:
    """Return notes on choices that a user may not have meant."""
    sft, model, notes = settings.sft, settings.model, list[str]()
    copies, budget = 1 + model.has_blocks, settings.train.token_budget
    longest = sft.row_tokens or model.max_sequence_length
    if data.texts is None:
        longest = max(len(row.ids) for example in data.train for row in example.rows)
    longest *= copies
    if longest > budget:
        notes.append(
            f"the longest row has {longest} tokens{' with its copy' * model.has_blocks}, over "
            f"train.token_budget={budget}: such rows are micro-batches of their own"
        )
    if sft.turns == "all" and not model.has_blocks:
        notes.append(
            "sft.turns=all: with model.attention=full an earlier reply is learned in sight of the "
            "turns after it, which the sampler never has; sft.turns=random has no such rows"
        )
    return notes
