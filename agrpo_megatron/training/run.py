"""A whole run: supervised phase, reinforcement learning, evaluations, checkpoints, resume."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from agrpo_megatron.checkpoint.resume import find_checkpoint
from agrpo_megatron.checkpoint.sharded import load_checkpoint, load_weights
from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.config.settings import OptimizerSettings, Settings
from agrpo_megatron.evaluation.evaluate import evaluate
from agrpo_megatron.hardware.kernels import in_one_line, kernels_for
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import Ranks, start_ranks, stop_ranks
from agrpo_megatron.resilience.attempts import begin, claim
from agrpo_megatron.resilience.monitors import monitors
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import Stop, Stopped, agree
from agrpo_megatron.rollout.cache import RolloutBank
from agrpo_megatron.rollout.session import Session, View
from agrpo_megatron.runs.directory import check_data, run_digest
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.runs.progress import (
    CHECKPOINTS,
    Progress,
)
from agrpo_megatron.runs.resolve import Resolved
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.checkpointing import MODEL_FILES, Keeper, describe_model
from agrpo_megatron.training.early_stopping import check_metrics
from agrpo_megatron.training.nan_guard import Found, with_roll_backs
from agrpo_megatron.training.nonfinite import NotFinite
from agrpo_megatron.training.rl import run_rl
from agrpo_megatron.training.sft import run_sft


def train(resolved: Resolved, view: View, *, phases: tuple[str, ...] = ("sft", "rl")) -> str | None:
    """Run or resume the phases of a run; called by every rank. Starts and stops the ranks.

    A run directory with a checkpoint is continued from it, bit for bit on the same layout.

    Returns:
        Why it stopped before its end, all that was done being saved; None where it did not.

    Raises:
        ValueError: the directory's run had other problems or another task file.
        Stuck: nobody looks on, and the last attempts got nowhere.
    """
    settings = resolved.settings
    sections = Sections(monitors(settings))
    stop = Stop(sections, margin=settings.resilience.stop_margin)
    try:
        with stop.listening(), _opened(resolved, view, sections, stop) as (session, found):
            with_roll_backs(session, partial(_run_phases, session, phases), found)
    except Stopped as stopped:
        return str(stopped)
    finally:
        sections.close()
    return None


def _run_phases(session: Session, phases: tuple[str, ...], found: Found) -> None:
    """Go on from a checkpoint, or begin where there is none."""
    done = found[1] if found else Progress("sft", 0, {})
    if done.phase == "sft" and "sft" in phases and session.settings.sft.iterations > 0:
        _sft_phase(session, found[0] if found else None, done)
    if "rl" in phases and done.stopped is None:
        _rl_phase(session, found[0] if found and done.phase == "rl" else None, done)


@contextmanager
def _opened(
    resolved: Resolved, view: View, sections: Sections, stop: Stop
) -> Iterator[tuple[Session, Found]]:
    """Start the ranks; yield a session, and the checkpoint to go on from where there is one."""
    settings, task = resolved.settings, resolved.task
    directory = Path(settings.run.dir)
    with ExitStack() as stack:
        with sections("setup"):
            ranks = start_ranks(settings)
            stack.callback(stop_ranks)
            attempt = claim(directory, ranks)
            found = find_checkpoint(_root(settings), ranks, view.warn)
            check_data(directory, task, is_new=found is None, is_main=ranks.is_main)
            folder = directory / "rollouts" if settings.checkpoint.rollouts else None
            bank = RolloutBank(folder, ranks, run=run_digest(settings, task), check=attempt.check)
            _begin(settings, ranks, found, bank)
            done = found[1] if found else Progress("sft", 0, {})
            log = RunLog(
                directory,
                settings=settings,
                is_main=ranks.is_main,
                wandb_id=done.wandb,
                check=attempt.check,
            )
            stack.callback(log.close)
            grader = Grader(task, settings.task)
            stack.callback(grader.close)
        session = Session(
            settings, ranks, task, resolved.tokenizer, log, view, grader, bank, sections, stop
        )
        log.cut_back(done.offsets)
        if found:
            view.note(f"resuming after {done.phase} iteration {done.iteration}")
        _tell_notes(session)
        if ranks.is_main:
            describe_model(directory / MODEL_FILES, settings)
        yield session, found


def _begin(settings: Settings, ranks: Ranks, found: Found, bank: RolloutBank) -> None:
    """Begin an attempt, unless the last ones got nowhere."""
    mark = "the start"
    if found:
        mark = f"{found[1].name}{'' if found[1].is_evaluated else ', not evaluated'}"
    begin(
        Path(settings.run.dir),
        [mark, *(bank.progress() if ranks.is_main else [])],
        most_idle=settings.resilience.idle_attempts,
        ranks=ranks,
    )


def _stop_if_asked(session: Session) -> None:
    """Raise `Stopped` on every rank if any was asked to stop."""
    reason = agree(session.stop, session.sections, session.ranks)
    if reason is not None:
        raise Stopped(reason)


def _tell_notes(session: Session) -> None:
    """Show what is to be known of kernels and problems, and keep the latter with the run."""
    if session.settings.precision != "fp32":
        session.view.note(in_one_line(kernels_for(session.settings)))
    session.task.problems("train")  # notes are made as problems are loaded
    for note in session.task.notes:
        session.view.note(note)
    session.log.notes(session.task.notes)


def _root(settings: Settings) -> Path:
    return Path(settings.run.dir) / CHECKPOINTS


def _sft_phase(session: Session, checkpoint: Path | None, done: Progress) -> None:
    settings = session.settings
    iterations = settings.sft.iterations
    engine = _engine(session, settings.sft.optimizer, iterations)
    _fill(session, engine, checkpoint, None)
    keeper = Keeper(session, engine, "sft", iterations, done)

    def after(iteration: int) -> None:
        keeper.after(iteration)
        if iteration < iterations:
            _stop_if_asked(session)

    with _saved_at_stop(keeper):
        run_sft(session, engine, start=done.iteration, after=after)
    keeper.finish()


@contextmanager
def _saved_at_stop(keeper: Keeper) -> Iterator[None]:
    """Save what is finished when the ranks agree to stop, or have to go back."""
    try:
        yield
    except Stopped:
        keeper.stop()
        raise
    except NotFinite:
        keeper.finish()  # what is being written may be what the run goes back to
        raise


def _rl_phase(session: Session, checkpoint: Path | None, done: Progress) -> None:
    settings = session.settings
    updates = settings.train.iterations * settings.algorithm.updates_per_iteration
    engine = _engine(session, settings.optimizer, updates)
    start = _sft_end(settings)
    _fill(session, engine, checkpoint, start)
    reference = None
    if settings.algorithm.kl_coefficient > 0:
        reference = build_network(settings, session.ranks)
        if start is not None:
            load_weights(start, reference)
        else:
            load_start_weights(reference, settings)
    scores = done.scores  # none where no evaluation came before this checkpoint
    if checkpoint is None:
        scores = evaluate(session, engine.rollout_network(), iteration=0, stage="before")
        done = Progress("rl", 0, {})
    if scores:
        check_metrics(scores, settings)
    every, last = settings.evaluation.interval, settings.train.iterations
    keeper = Keeper(session, engine, "rl", last, done)

    def after(iteration: int) -> bool:
        """Evaluate and save, where they are due; says whether to go on."""
        reason, is_due = None, iteration == last or bool(every and iteration % every == 0)
        keeper.reach(iteration, is_evaluated=not is_due)
        if is_due:
            stage = "after" if iteration == last else "interval"
            network = engine.rollout_network()
            scores = evaluate(session, network, iteration=iteration, stage=stage)
            reason = keeper.judge(scores)
            if reason is not None and stage == "interval":
                _tell_end(session, scores, reason)
        keeper.after(iteration)
        if reason is None and iteration < last:
            _stop_if_asked(session)
        return reason is None

    with _saved_at_stop(keeper):
        # An evaluation may be left over from an attempt that was stopped in it.
        if done.is_evaluated or after(done.iteration):
            run_rl(session, engine, reference, start=done.iteration, after=after)
    keeper.finish()


def _tell_end(session: Session, scores: dict, reason: str) -> None:
    """Say that a run ends early: the evaluation that decided it is also the one at the end."""
    last = {**scores, "stage": "after"}
    session.log.metrics(last)
    session.view.evaluation(last)
    session.view.note(f"ending early, after iteration {scores['iteration']}: {reason}")


def _sft_end(settings: Settings) -> Path | None:
    """Return the checkpoint that ended the supervised phase: what RL starts from."""
    path = _root(settings) / Progress("sft", settings.sft.iterations, {}).name
    return path if settings.sft.iterations > 0 and path.is_dir() else None


def _engine(session: Session, optimizer: OptimizerSettings, iterations: int) -> Engine:
    return build_engine(session.settings, optimizer, iterations=iterations, ranks=session.ranks)


def _fill(session: Session, engine: Engine, checkpoint: Path | None, start: Path | None) -> None:
    """Load a checkpoint, or else start weights; the optimizer takes its copy of them."""
    if checkpoint is not None:
        load_checkpoint(checkpoint, engine)
        return
    if start is not None:
        given = load_weights(start, engine.network)
    else:
        given = load_start_weights(engine.network, session.settings)
    engine.init_main_weights(given)
