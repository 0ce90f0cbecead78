"""A whole run: supervised phase, reinforcement learning, evaluations, checkpoints, resume."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from agrpo_megatron.checkpoint.lora.base import find_base
from agrpo_megatron.checkpoint.resume import find_checkpoint
from agrpo_megatron.checkpoint.sharded import load_checkpoint
from agrpo_megatron.checkpoint.start import load_base, load_model, load_reference
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.evaluate import evaluate
from agrpo_megatron.evaluation.failures import check_solutions
from agrpo_megatron.hardware.kernels import in_one_line, kernels_for
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.parallel import Ranks, start_ranks, stop_ranks
from agrpo_megatron.reports.banner import banner
from agrpo_megatron.resilience.attempts import begin, claim
from agrpo_megatron.resilience.monitors import monitors
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import Stop, Stopped, agree
from agrpo_megatron.rollout.cache import NoCache, RolloutCache
from agrpo_megatron.rollout.replay import open_replay
from agrpo_megatron.rollout.session import Output, Run, Safety, Session, View
from agrpo_megatron.runs.base import check_base
from agrpo_megatron.runs.changes import Change, write_changes
from agrpo_megatron.runs.directory import changed_settings, check_data, data_digests, run_digest
from agrpo_megatron.runs.early_stopping import check_metrics, still_stopped
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.runs.odd_values import odd_values
from agrpo_megatron.runs.progress import CHECKPOINTS, Progress
from agrpo_megatron.runs.provenance import provenance, write_provenance
from agrpo_megatron.runs.resolve import Resolved
from agrpo_megatron.runs.sizes import measure
from agrpo_megatron.runs.stored_rollouts import ROLLOUTS
from agrpo_megatron.scaling.adapters import adapter_note
from agrpo_megatron.tasks.base import SPLITS
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.checkpointing import MODEL_FILES, Checkpointer, describe_model
from agrpo_megatron.training.measures.devices import device_text, rate_note
from agrpo_megatron.training.nan_guard import Found, with_roll_backs
from agrpo_megatron.training.nonfinite import NotFinite
from agrpo_megatron.training.rl import run_rl
from agrpo_megatron.training.sft import run_sft, with_balance
from agrpo_megatron.training.variance.auto import AutoDraws


def train(resolved: Resolved, view: View, *, phases: tuple[str, ...] = ("sft", "rl")) -> str | None:
    """Run or resume the phases of a run; called by every rank. Starts and stops the ranks.

    A run resumes from the checkpoint in its directory; on the same layout, bit for bit.

    Returns:
        The reason for an early, checkpointed stop, or None.

    Raises:
        ValueError: the earlier run in the directory had other problems or another task file.
        Stuck: several unattended restarts made no progress.
    """
    settings = resolved.settings
    sections = Sections(monitors(settings))
    stop = Stop(sections, margin=settings.resilience.stop_margin)
    try:
        with stop.listening(), _opened(resolved, view, sections, stop) as (session, found):
            _show_banner(session, phases)
            with_roll_backs(session, partial(_run_phases, session, phases), found)
    except Stopped as stopped:
        return str(stopped)
    finally:
        sections.close()
    return None


def _run_phases(session: Session, phases: tuple[str, ...], found: Found) -> None:
    """Continue from a checkpoint, or start a new run."""
    done = found[1] if found else Progress("sft", 0, {})
    if done.phase == "sft" and "sft" in phases and session.run.settings.sft.iterations > 0:
        _sft_phase(session, found[0] if found else None, done)
    if "rl" in phases and still_stopped(done, session.run.settings.train) is None:
        done = replace(done, stopped=None)  # it ended early, and its limit was raised
        _rl_phase(session, found[0] if found and done.phase == "rl" else None, done)


@contextmanager
def _opened(
    resolved: Resolved, view: View, sections: Sections, stop: Stop
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
        _show_notes(session)
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
    if found:
        changes = changed_settings(settings, found[1])
        write_changes(directory, changes, found[1])
    here = provenance(settings, ranks=ranks.world_size, device=device_text(ranks.device))
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


def _stop_if_asked(session: Session) -> None:
    """Raise `Stopped` on every rank if any was asked to stop."""
    reason = agree(session.safety.stop, session.safety.sections, session.run.ranks)
    if reason is not None:
        raise Stopped(reason)


def _show_notes(session: Session) -> None:
    """Show notes on kernels, problems and a replay; write all but those on kernels to a file."""
    run, view = session.run, session.output.view
    if run.settings.precision != "fp32":
        view.note(in_one_line(kernels_for(run.settings)))
    if run.settings.lora.rank is not None:
        view.note(adapter_note(run.settings.model, run.settings.lora))
    run.task.problems("train")  # loading the problems creates the notes
    run.task.notes.extend(check_solutions(run, SPLITS))
    if run.ranks.is_main and run.settings.train.iterations > 0:
        run.task.notes.append(rate_note(run.settings.precision, run.ranks))
    if run.replay is not None:
        run.task.notes.append(run.replay.note())
    for note in run.task.notes:
        view.note(note)
    session.output.log.notes(run.task.notes)


def _show_banner(session: Session, phases: tuple[str, ...]) -> None:
    """Show what the run is, and its odd values; on the main rank, which alone prints."""
    run, view, ranks = session.run, session.output.view, session.run.ranks
    if not ranks.is_main:
        return
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else cpu
    sizes = measure(Resolved(run.settings, run.task, run.tokenizer))
    facts = {"device": device, "world_size": ranks.world_size, "phases": phases}
    for line in banner(run.settings, sizes, **facts):
        view.note(line)
    for line in odd_values(run.settings, sizes, world_size=ranks.world_size):
        view.warn(line)


def _sft_phase(session: Session, checkpoint: Path | None, done: Progress) -> None:
    run, settings = session.run, session.run.settings.sft
    iterations = settings.iterations
    balanced = with_balance(run.settings)
    engine = build_engine(balanced, settings.optimizer, iterations=iterations, ranks=run.ranks)
    _fill(run, engine, checkpoint, None)
    needs_reference = run.settings.sft.needs_reference
    reference = load_reference(run.settings, engine.network, None) if needs_reference else None
    checkpointer = Checkpointer(session, engine, "sft", iterations, done)

    def on_iteration_end(iteration: int) -> None:
        checkpointer.save_if_due(iteration)
        if iteration < iterations:
            _stop_if_asked(session)

    with _saved_at_stop(checkpointer):
        run_sft(session, engine, reference, start=done.iteration, on_iteration_end=on_iteration_end)


@contextmanager
def _saved_at_stop(checkpointer: Checkpointer) -> Iterator[None]:
    """Save the finished iteration when the ranks agree to stop; wait until all saves are done."""
    try:
        yield
    except Stopped:
        checkpointer.on_stop()
        raise
    except NotFinite:
        checkpointer.wait()  # the run may roll back to a checkpoint that is still being written
        raise
    checkpointer.wait()


def _rl_phase(session: Session, checkpoint: Path | None, done: Progress) -> None:
    run, settings = session.run, session.run.settings
    updates = settings.train.iterations * settings.algorithm.updates_per_iteration
    engine = build_engine(settings, settings.optimizer, iterations=updates, ranks=run.ranks)
    start = _sft_end(Path(settings.run.dir), settings.sft.iterations)
    _fill(run, engine, checkpoint, start)
    reference = None
    if settings.algorithm.needs_reference:
        reference = load_reference(settings, engine.network, start)
    scores = done.scores  # none without an evaluation before this checkpoint
    if checkpoint is None:
        scores = evaluate(session, engine.rollout_network(), iteration=0, stage="before")
        done = Progress("rl", 0, {})
    if scores:
        best, stop = settings.checkpoint.best, settings.train.stop_metric
        check_metrics(scores, {"checkpoint.best": best, "train.stop_metric": stop})
    every, last = settings.evaluation.interval, settings.train.iterations
    checkpointer = Checkpointer(session, engine, "rl", last, done)
    auto = None
    if settings.algorithm.mc_samples == "auto":
        auto = AutoDraws(settings.algorithm, done.auto)

    def on_iteration_end(iteration: int, flops: int) -> bool:
        """Evaluate and save if due; return whether to continue."""
        kept = auto.state if auto is not None else {}
        stage = checkpointer.on_iteration_end(iteration, flops, every=every, auto=kept)
        reason = None
        if stage is not None:
            network = engine.rollout_network()
            scores = evaluate(session, network, iteration=iteration, stage=stage)
            reason = checkpointer.on_evaluation(scores)
            if reason is not None and iteration < last:
                _report_early_stop(session.output, scores, reason)
        checkpointer.save_if_due(iteration)
        if reason is None and iteration < last:
            _stop_if_asked(session)
        return reason is None

    with _saved_at_stop(checkpointer):
        # An earlier attempt may have stopped during this evaluation: repeat it.
        if done.is_evaluated or on_iteration_end(done.iteration, 0):
            run_rl(
                session,
                engine,
                reference,
                start=done.iteration,
                auto=auto,
                on_iteration_end=on_iteration_end,
            )


def _report_early_stop(output: Output, scores: dict, reason: str) -> None:
    """Log an early stop; the evaluation that caused it is also the final one."""
    if scores["stage"] != "after":
        last = {**scores, "stage": "after"}
        output.log.metrics(last)
        output.view.evaluation(last)
    output.view.note(f"ending early, after iteration {scores['iteration']}: {reason}")


def _sft_end(directory: Path, iterations: int) -> Path | None:
    """Return the last checkpoint of the supervised phase, from which RL starts."""
    path = directory / CHECKPOINTS / Progress("sft", iterations, {}).name
    return path if iterations > 0 and path.is_dir() else None


def _fill(run: Run, engine: Engine, checkpoint: Path | None, start: Path | None) -> None:
    """Load a checkpoint, or else start weights, into the network and the optimizer."""
    if checkpoint is None:
        engine.init_main_weights(load_model(engine.network, run.settings, start))
        return
    if engine.network.adapters is not None:
        load_base(engine.network, run.settings, checkpoint)
    load_checkpoint(checkpoint, engine)
