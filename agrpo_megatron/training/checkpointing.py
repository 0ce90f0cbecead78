"""When a run saves checkpoints: at intervals, the best one, at its end, and when it stops."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from agrpo_megatron.checkpoint.model_files import write_model_files
from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.config.schema import to_whole_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.families.files import is_huggingface
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.runs.base import Base, write_base
from agrpo_megatron.runs.early_stopping import is_spent, with_best, with_early_stop
from agrpo_megatron.runs.progress import CHECKPOINTS, HF, RUN_FILE, TEMPLATE, Progress
from agrpo_megatron.runs.stored_rollouts import sampling_number
from agrpo_megatron.text.tokenizer import CHARACTERS
from agrpo_megatron.training.nan_guard import refuse_nonfinite_weights

MODEL_FILES = "model"  # below the run directory: files copied into each checkpoint


class Checkpointer:
    """Saves the checkpoints of one phase of a run; every call is made by every rank.

    Args:
        last: the phase's last iteration, which is always saved.
        done: the progress at the start of the phase.
    """

    def __init__(self, session: Session, engine: Engine, phase: str, last: int, done: Progress):
        settings = session.run.settings
        self._session, self._phase, self._last, self._done = session, phase, last, done
        self._settings, self._is_best, self._engine = settings.checkpoint, False, engine
        directory = Path(settings.run.dir)
        self._saver = Saver(
            directory / CHECKPOINTS,
            engine,
            keep=settings.checkpoint.keep,
            is_async=settings.checkpoint.background,
            files=directory / MODEL_FILES,
            check=session.output.log.check,
        )
        self._is_ahead = bool(settings.train.async_steps)
        self._iteration = done.iteration  # finished
        self._saved = done.iteration if done.offsets else None  # in the newest checkpoint

    def on_iteration_end(
        self, iteration: int, flops: int, *, every: int, kept: dict[str, Any]
    ) -> str | None:
        """Record a finished iteration; returns the stage of the evaluation that is due, if any.

        Args:
            flops: of the iteration.
            every: iterations between evaluations; 0 evaluates only at the end of the phase.
            kept: other fields of the progress: `auto` and `ahead`.
        """
        self._iteration = iteration
        done = replace(self._done, flops=self._done.flops + flops, **kept)
        is_last = iteration == self._last or is_spent(done, self._session.run.settings.train)
        stage = "interval" if every and iteration % every == 0 else None
        stage = "after" if is_last else stage
        self._done = replace(done, is_evaluated=stage is None)
        return stage

    def on_evaluation(self, scores: dict) -> str | None:
        """Record the metrics of an evaluation; returns the reason for early stopping, if any."""
        done, name = self._done, self._settings.best
        if name is not None:
            done, self._is_best = with_best(done, scores, name)
        kept = {k: v for k, v in scores.items() if isinstance(v, float) or k.startswith("summary/")}
        done = replace(done, is_evaluated=True, scores=kept)
        self._done = with_early_stop(done, scores, self._session.run.settings.train)
        return self._done.stopped

    def save_if_due(self, iteration: int) -> None:
        """Save after an iteration that is due, is the best so far, or ends the run."""
        self._iteration = iteration
        self._saver.poll()
        every, is_best, self._is_best = self._settings.interval, self._is_best, False
        before = self._saved or 0
        is_end = iteration == self._last or self._done.stopped is not None
        is_due = is_best or bool(every and iteration % every == 0)
        if not (is_end or (is_due and self._has_learned)):
            return
        self._save(is_best=is_best)
        # While a save is unfinished, a restart needs what the checkpoint before it counts on.
        self._forget_before(before if self._is_ahead and self._settings.background else iteration)

    def on_stop(self) -> None:
        """Save the finished iteration, if it is not saved yet, and wait for the save."""
        if self._has_learned and self._iteration != self._saved:
            self._save(is_best=False)
        self.wait()

    @property
    def _has_learned(self) -> bool:
        """Return whether the phase has made an update since its start weights."""
        return self._engine.scheduler.num_steps > 0

    def wait(self) -> None:
        """Wait until all checkpoints are on disk."""
        with self._session.safety.sections("checkpoint"):
            self._saver.finish()

    def on_end(self) -> None:
        """Wait until all checkpoints are on disk, at the end of the phase."""
        self.wait()
        if self._is_ahead and self._saved is not None:
            self._forget_before(self._saved)

    def _forget_before(self, iteration: int) -> None:
        """Remove the stored rollouts of iterations that a checkpoint includes, in RL."""
        if self._phase == "rl":
            algorithm = self._session.run.settings.algorithm
            self._session.safety.cache.forget(sampling_number(iteration, 0, algorithm))

    def _save(self, *, is_best: bool) -> None:
        run, log, iteration = self._session.run, self._session.output.log, self._iteration
        log.check()
        refuse_nonfinite_weights(run, self._engine, phase=self._phase, iteration=iteration)
        self._done = replace(
            self._done,
            phase=self._phase,
            iteration=iteration,
            offsets=log.offsets(),
            is_best=is_best,
            wandb=log.wandb_id,
        )
        with self._session.safety.sections("checkpoint"):
            self._saver.save(self._done)
        self._saved = iteration


def describe_model(
    folder: Path, settings: Settings, checkpoint: Path | None = None, base: Base | None = None
) -> None:
    """Write the files that checkpoints hold besides their tensors; one rank.

    The tokenizer, and the files of the Hugging Face model that the run starts from; of a resumed
    run, those of its checkpoint. Earlier checkpoints share the folder's files: it is made anew.

    Args:
        base: of adapters; None: all weights are trained.
    """
    load, tokenizer = settings.model.load, settings.tokenizer
    sources = [CHARACTERS if tokenizer.path is None else Path(tokenizer.path)]
    own = checkpoint / HF if checkpoint is not None else None
    if own is not None and own.is_dir():
        sources = [own]
    elif load is not None:
        places = (Path(load), Path(load, HF), Path(load, MODEL_FILES, HF))
        sources = [path for path in places if is_huggingface(path)] + sources
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_model_files(partial, settings.model, dict.fromkeys(sources))
    if own not in sources and (tokenizer.chat_template or "").endswith(".jinja"):
        shutil.copyfile(str(tokenizer.chat_template), partial / HF / TEMPLATE)
    (partial / RUN_FILE).write_text(to_whole_yaml(settings), encoding="utf-8")
    if base is not None:
        write_base(partial, base)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
