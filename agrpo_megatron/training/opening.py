"""The start of an attempt: ranks, records, logs, cache, and what the run is."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agrpo_megatron.checkpoint.lora.base import find_base
from agrpo_megatron.checkpoint.resume import find_checkpoint
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.failures import check_solutions
from agrpo_megatron.hardware.kernels import in_one_line, kernels_for
from agrpo_megatron.megatron.parallel import Ranks, start_ranks, stop_ranks
from agrpo_megatron.reports.banner import banner
from agrpo_megatron.resilience.attempts import begin, claim
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import Stop
from agrpo_megatron.rollout.cache import NoCache, RolloutCache
from agrpo_megatron.rollout.replay import open_replay
from agrpo_megatron.rollout.session import Output, Run, Safety, Session, View
from agrpo_megatron.runs.base import check_base
from agrpo_megatron.runs.directory import changed_settings, check_data, data_digests, run_digest
from agrpo_megatron.runs.history.changes import Change, write_changes
from agrpo_megatron.runs.history.provenance import provenance, write_provenance
from agrpo_megatron.runs.log import RunLog, seconds_so_far
from agrpo_megatron.runs.odd_values import odd_values
from agrpo_megatron.runs.progress import CHECKPOINTS, RUN_SETTINGS, Progress
from agrpo_megatron.runs.resolve import Resolved
from agrpo_megatron.runs.sizes import measure
from agrpo_megatron.runs.stored_rollouts import ROLLOUTS
from agrpo_megatron.scaling.adapters import adapter_note
from agrpo_megatron.tasks.base import SPLITS
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.checkpointing import MODEL_FILES, describe_model
from agrpo_megatron.training.measures.devices import device_text, rate_note
from agrpo_megatron.training.nan_guard import Found


@contextmanager
def opened(
    resolved: Resolved, view: View, sections: Sections, stop: Stop, *, phases: tuple[str, ...]
) -> Iterator[tuple[Session, Found]]:
    """Start the ranks; yield a session, and the checkpoint to continue from, if any."""
    settings, task, started = resolved.settings, resolved.task, time.monotonic()
    directory = Path(settings.run.dir)
    with ExitStack() as stack:
        with sections("setup"):
            ranks = start_ranks(settings)
            stack.callback(stop_ranks)
            check = claim(directory, ranks)
            found = find_checkpoint(directory / CHECKPOINTS, ranks, view.warn)
            rows, is_new = resolved.supervised, found is None
            check_data(directory, task, rows, is_new=is_new, is_main=ranks.is_main)
            cache = _open_cache(resolved, ranks, check)
            done = found[1] if found else Progress("sft", 0, {})
            mark = f"{done.name}{'' if done.is_evaluated else ', not evaluated'}"
            marks = [mark if found else "the start", *(cache.progress() if ranks.is_main else [])]
            begin(directory, marks, most_idle=settings.resilience.idle_attempts, ranks=ranks)
            changes = _record_start(settings, found, ranks)
            log = RunLog(
                directory,
                settings=settings,
                is_main=ranks.is_main,
                wandb_id=done.wandb,
                started=started,
                check=check,
            )
            stack.callback(log.close)
            grader = Grader(task, settings.task)
            stack.callback(grader.close)
        run = Run(settings, ranks, task, resolved.tokenizer, grader, open_replay(settings), rows)
        session = Session(run, Output(log, view), Safety(sections, stop, cache))
        log.cut_back(done.offsets)
        if found:
            view.note(f"resuming after {done.phase} iteration {done.iteration}")
        for change in changes:
            view.note(f"from here on {change}")
        _show_banner(session, phases, done if found else None)
        _show_notes(session, found)
        base = None
        if settings.lora.rank is not None:
            base = find_base(settings, ranks, found[0] if found else None)
            if found:
                check_base(found[0], base)
        if ranks.is_main:
            describe_model(directory / MODEL_FILES, settings, found[0] if found else None, base)
        yield session, found


def _record_start(settings: Settings, found: Found, ranks: Ranks) -> list[Change]:
    """Record where an attempt runs and which settings it changes; before the log replaces them.

    Returns:
        The changes, on the main rank.
    """
    directory, changes = Path(settings.run.dir), []
    if not ranks.is_main:
        return changes
    if found and (directory / RUN_SETTINGS).exists():
        changes = changed_settings(settings, found[1])
        write_changes(directory, changes, found[1])
    device, before = device_text(ranks.device), seconds_so_far(directory)
    here = provenance(settings, ranks=ranks.world_size, device=device, seconds=before)
    write_provenance(directory, here)
    return changes


def _open_cache(
    resolved: Resolved, ranks: Ranks, check: Callable[[], None]
) -> RolloutCache | NoCache:
    """Return the cache of the run's own completions."""
    settings = resolved.settings
    if not settings.checkpoint.rollouts:
        return NoCache()
    return RolloutCache(
        Path(settings.run.dir) / ROLLOUTS,
        ranks,
        run=run_digest(settings, data_digests(resolved.task)),
        keeps_all=settings.checkpoint.keep_rollouts,
        check=check,
    )


def _show_notes(session: Session, found: Found) -> None:
    """Show notes on kernels, problems and a replay; write all but those on kernels to a file."""
    run, view = session.run, session.output.view
    if run.settings.precision != "fp32":
        view.note(in_one_line(kernels_for(run.settings)))
    if run.settings.lora.rank is not None:
        view.note(adapter_note(run.settings.model, run.settings.lora))
    run.task.problems("train")  # loading the problems creates the notes
    run.task.notes.extend(_graded_solutions(session, found))
    if run.replay is not None:
        run.task.notes.append(run.replay.note())
    if run.ranks.is_main and run.settings.train.iterations > 0:
        run.task.notes.append(rate_note(run.settings.precision, run.ranks))
    for note in run.task.notes:
        view.note(note)
    session.output.log.notes(run.task.notes)


def _graded_solutions(session: Session, found: Found) -> list[str]:
    """Return notes on rewards of known solutions; at a resumption their failure only warns.

    Raises:
        ValueError: as `check_solutions`, in a run that starts.
    """
    try:
        return check_solutions(session.run, SPLITS)
    except ValueError as error:
        if found is None:
            raise
        session.output.view.warn(f"{error}; the run resumes, and rewards that fail have no score")
        return []


def _show_banner(session: Session, phases: tuple[str, ...], done: Progress | None) -> None:
    """Show what the run is, and its odd values; on the main rank, which alone prints."""
    run, view, ranks = session.run, session.output.view, session.run.ranks
    if not ranks.is_main:
        return
    sizes = measure(Resolved(run.settings, run.task, run.tokenizer, run.supervised))
    facts = {"device": device_text(ranks.device), "world_size": ranks.world_size, "phases": phases}
    for line in banner(run.settings, sizes, **facts, done=done):
        view.note(line)
    for line in odd_values(run.settings, sizes, world_size=ranks.world_size, phases=phases):
        view.note(f"unusual: {line}")
