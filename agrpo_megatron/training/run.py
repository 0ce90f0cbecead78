"""A whole run: supervised phase, reinforcement learning, evaluations, checkpoints, resume."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from agrpo_megatron.checkpoint.sharded import load_checkpoint
from agrpo_megatron.checkpoint.start import load_base, load_model, load_reference
from agrpo_megatron.config.annealing import without_schedule
from agrpo_megatron.evaluation.evaluate import evaluate
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.resilience.monitors import monitors
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import Stop, Stopped, agree
from agrpo_megatron.rollout.session import Output, Run, Session, View
from agrpo_megatron.runs.early_stopping import check_metrics, still_stopped
from agrpo_megatron.runs.progress import CHECKPOINTS, Progress
from agrpo_megatron.runs.resolve import Resolved
from agrpo_megatron.training.checkpointing import Checkpointer
from agrpo_megatron.training.measures.profiler import profilers
from agrpo_megatron.training.nan_guard import Found, with_roll_backs
from agrpo_megatron.training.nonfinite import NotFinite
from agrpo_megatron.training.opening import opened
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
    sections = Sections([*profilers(settings), *monitors(settings)])
    stop = Stop(sections, margin=settings.resilience.stop_margin)
    try:
        start = opened(resolved, view, sections, stop, phases=phases)
        with stop.listening(), start as (session, found):
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


def _stop_if_asked(session: Session) -> None:
    """Raise `Stopped` on every rank if any was asked to stop."""
    reason = agree(session.safety.stop, session.safety.sections, session.run.ranks)
    if reason is not None:
        raise Stopped(reason)


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
    checkpointer.on_end()


def _rl_phase(session: Session, checkpoint: Path | None, done: Progress) -> None:
    run, settings = session.run, without_schedule(session.run.settings)
    updates = settings.train.iterations * settings.algorithm.updates_per_iteration
    engine = build_engine(settings, settings.optimizer, iterations=updates, ranks=run.ranks)
    start = _sft_end(Path(settings.run.dir), settings.sft.iterations)
    _fill(run, engine, checkpoint, start)
    reference = None
    if settings.algorithm.needs_reference:
        reference = load_reference(settings, engine.network, start)
    scores = done.scores  # none without an evaluation before this checkpoint
    if checkpoint is None:
        with engine.sampling() as network:
            scores = evaluate(session, network, iteration=0, stage="before")
        done = Progress("rl", 0, {})
    if scores:
        best, stop = settings.checkpoint.best, settings.train.stop_metric
        check_metrics(scores, {"checkpoint.best": best, "train.stop_metric": stop})
    every, last = settings.evaluation.interval, settings.train.iterations
    checkpointer = Checkpointer(session, engine, "rl", last, done)
    auto = None
    if settings.algorithm.mc_samples == "auto":
        auto = AutoDraws(settings.algorithm, done.auto)

    def on_iteration_end(iteration: int, flops: int, sampled_by: str | None) -> bool:
        """Evaluate and save if due; return whether to continue."""
        kept = {"auto": auto.state if auto is not None else {}, "ahead": sampled_by}
        stage = checkpointer.on_iteration_end(iteration, flops, every=every, kept=kept)
        reason = None
        if stage is not None:
            with engine.sampling() as network:
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
        if done.is_evaluated or on_iteration_end(done.iteration, 0, done.ahead):
            run_rl(
                session,
                engine,
                reference,
                start=done.iteration,
                auto=auto,
                sampled_by=done.ahead,
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
