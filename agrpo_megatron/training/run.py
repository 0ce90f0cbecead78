"""A whole run: supervised phase, reinforcement learning, evaluations, checkpoints, resume."""

from collections.abc import Callable
from pathlib import Path

from agrpo_megatron.checkpoint.progress import (
    CHECKPOINTS,
    Progress,
    checkpoint_path,
    latest_checkpoint,
)
from agrpo_megatron.checkpoint.sharded import load_checkpoint, load_weights, save_checkpoint
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.ranks import start_ranks, stop_ranks
from agrpo_megatron.megatron.weights import initialise, load_hf
from agrpo_megatron.settings import OptimizerSettings, Settings
from agrpo_megatron.training.evaluation import evaluate
from agrpo_megatron.training.log import RunLog
from agrpo_megatron.training.resolve import RUN_SETTINGS, Resolved
from agrpo_megatron.training.rl import run_rl
from agrpo_megatron.training.session import Session, View
from agrpo_megatron.training.sft import run_sft


def train(resolved: Resolved, view: View, *, phases: tuple[str, ...] = ("sft", "rl")) -> None:
    """Run or resume the phases of a run; called by every rank. Starts and stops the ranks.

    A run directory with a checkpoint is continued from it, bit for bit on the same layout.
    """
    settings = resolved.settings
    ranks = start_ranks(settings)
    log = RunLog(Path(settings.run.dir), settings=settings, is_main=ranks.is_main)
    session = Session(settings, ranks, resolved.task, resolved.tokenizer, log, view)
    try:
        found = latest_checkpoint(_root(settings))
        log.cut_back(found[1].offsets if found else {})
        done = found[1] if found else Progress("sft", 0, {})
        if found:
            view.note(f"resuming after {done.phase} iteration {done.iteration}")
        if done.phase == "sft" and "sft" in phases and settings.sft.iterations > 0:
            _sft_phase(session, found[0] if found else None, done.iteration)
        if "rl" in phases:
            _rl_phase(session, found[0] if found and done.phase == "rl" else None, done)
    finally:
        log.close()
        stop_ranks()


def load_start_weights(network: Network, settings: Settings) -> None:
    """Fill a network with what `model.load` names, or with random weights; mutates it.

    Raises:
        ValueError: the directory does not hold weights of this shape.
    """
    source = settings.model.load
    if source is None:
        initialise(network, settings.model, settings.run.seed)
    elif (Path(source) / RUN_SETTINGS).exists():
        load_weights(checkpoint_path(Path(source)), network)
    else:
        load_hf(network, settings.model, source)


def _root(settings: Settings) -> Path:
    return Path(settings.run.dir) / CHECKPOINTS


def _sft_phase(session: Session, checkpoint: Path | None, done: int) -> None:
    settings = session.settings
    iterations = settings.sft.iterations
    engine = _engine(session, settings.sft.optimizer, iterations)
    _fill(session, engine, checkpoint, None)
    run_sft(session, engine, start=done, after=_saver(session, engine, "sft", iterations))


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
    if checkpoint is None:
        evaluate(session, engine.rollout_network(), iteration=0, stage="before")
    save = _saver(session, engine, "rl", settings.train.iterations)
    every, last = settings.evaluation.interval, settings.train.iterations

    def after(iteration: int) -> None:
        if iteration == last or (every and iteration % every == 0):
            stage = "after" if iteration == last else "interval"
            evaluate(session, engine.rollout_network(), iteration=iteration, stage=stage)
        save(iteration)

    first = done.iteration if checkpoint is not None else 0
    run_rl(session, engine, reference, start=first, after=after)


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
        load_weights(start, engine.network)
    else:
        load_start_weights(engine.network, session.settings)
    engine.optimizer.reload_model_params()


def _saver(session: Session, engine: Engine, phase: str, last: int) -> Callable[[int], None]:
    """Return a function that saves when an iteration is due."""
    settings = session.settings.checkpoint

    def save(iteration: int) -> None:
        """Save after this iteration, where one is due."""
        if iteration != last and not (settings.interval and iteration % settings.interval == 0):
            return
        engine.finish_parameters()
        progress = Progress(phase, iteration, session.log.offsets())
        root = _root(session.settings)
        save_checkpoint(root, engine, progress, keep=settings.keep)

    return save
