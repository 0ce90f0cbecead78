"""Handle NaN or inf updates: log them, skip up to a limit, then roll back to a checkpoint."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agrpo_megatron.checkpoint.resume import find_checkpoint
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.data_order import pick_problems
from agrpo_megatron.rollout.session import Run, Session
from agrpo_megatron.runs.progress import CHECKPOINTS, Progress
from agrpo_megatron.runs.stored_rollouts import sampling_number
from agrpo_megatron.training.nonfinite import Finding, Loss, NotFinite, find_in_weights
from agrpo_megatron.training.step import drop_gradients, optimizer_step
from agrpo_megatron.types import SftBatch, TimestepBatch, Trajectory

NONFINITE = "nonfinite.jsonl"  # in the run directory; kept by a roll-back
SHOWN = 6  # rows, and ranks, that a message names
KEY = 40  # characters of a problem's key

type Found = tuple[Path, Progress] | None


@dataclass(frozen=True)
class Update:
    """The identity of an update, for messages."""

    iteration: int  # counted from 1
    rows: str  # "rollouts" or "examples"
    key: Callable[[int], str]  # of a row's problem
    number: int = 1  # within the iteration


class NanGuard:
    """Makes the updates of one phase and skips non-finite ones; called by every rank."""

    def __init__(self, session: Session, phase: str):
        self._run, self._view, self._phase = session.run, session.output.view, phase
        self._in_a_row = 0  # skipped updates

    def step[Batch: (SftBatch, TimestepBatch)](
        self,
        engine: Engine,
        batches: Sequence[Batch],
        *,
        loss: Loss[Batch],
        examples: int,
        update: Update,
    ) -> dict[str, float]:
        """Make an update as `optimizer_step` does, or skip a non-finite one.

        A skipped update has only the metrics `skipped_updates` and `learning_rate`; weights,
        optimizer and schedule do not change.

        Raises:
            NotFinite: more than `resilience.skip_updates` updates in a row are not finite.
        """
        try:
            metrics = optimizer_step(engine, batches, loss=loss, examples=examples)
        except NotFinite as error:
            self._skip(error.finding, update)
            drop_gradients(engine)
            rate = max(group["lr"] for group in engine.optimizer.param_groups)
            return {"learning_rate": rate, "skipped_updates": 1}
        self._in_a_row = 0
        return {**metrics, "skipped_updates": 0}

    def _skip(self, finding: Finding, update: Update) -> None:
        self._in_a_row += 1
        limit = self._run.settings.resilience.skip_updates
        text = described(finding, update, self._phase)
        is_over = self._in_a_row > limit
        record = {
            "phase": self._phase,
            "iteration": update.iteration,
            "update": update.number,
            "action": "ended" if is_over else "skipped",
            "problems": [update.key(row) for row in finding.rows],
        }
        _write(self._run, record, finding, text)
        if not is_over:
            count = f"{self._in_a_row} in a row, resilience.skip_updates={limit}"
            self._view.warn(f"{text}\n  the update is skipped ({count})")
            return
        if limit:
            text += f"\n  more than resilience.skip_updates={limit} in a row"
        raise NotFinite(text, finding, phase=self._phase, iteration=update.iteration) from None


def refuse_nonfinite_weights(run: Run, engine: Engine, *, phase: str, iteration: int) -> None:
    """Refuse to save weights that are not finite; called by every rank before a save.

    Raises:
        NotFinite: some weights are not finite.
    """
    finding = find_in_weights(engine)
    if finding is None:
        return
    first = f"{phase} iteration {iteration}: the weights are not finite {_on(finding)}"
    text = "\n".join([f"{first}; they are not saved", *_by_rank(finding.places)])
    record = {"phase": phase, "iteration": iteration, "action": "ended"}
    _write(run, record, finding, text)
    raise NotFinite(text, finding, phase=phase, iteration=iteration)


def _write(run: Run, record: dict[str, Any], finding: Finding, text: str) -> None:
    if not run.ranks.is_main:
        return
    path = Path(run.settings.run.dir) / NONFINITE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record, **asdict(finding), "text": text}) + "\n")


def described(finding: Finding, update: Update, phase: str) -> str:
    """Describe the non-finite values on a few lines; the first line is a summary."""
    which = f", update {update.number}" if update.number > 1 else ""
    where = f"{phase} iteration {update.iteration}{which}"
    lines = [
        f"{where}: the {finding.what} is not finite {_on(finding)}; no weights were changed",
        *_by_rank(finding.places),
    ]
    rows = [f"{row} ({update.key(row)[:KEY]})" for row in finding.rows[:SHOWN]]
    among = "in" if finding.what == "loss" else "the update was of"
    lines.append(f"  {among} {update.rows} {', '.join(rows)}{_more(len(finding.rows) - SHOWN)}")
    if not finding.is_again:
        lines.append("  a second forward pass is finite: a transient hardware fault is likely")
    if finding.weights:
        lines += ["  weights that are not finite themselves:", *_by_rank(finding.weights)]
    return "\n".join(lines)


def rollout_keys(run: Run, trajectory: Trajectory) -> Callable[[int], str]:
    """Return a function from a rollout of the iteration to the key of its problem."""
    size, seed = run.settings.algorithm.group_size, run.settings.run.seed

    def key(row: int) -> str:
        place = int(trajectory.rollout_ids[row]) // size
        [number] = pick_problems(run.task.shares, range(place, place + 1), seed=seed)
        return run.task.problems("train")[number].key

    return key


def with_roll_backs(session: Session, train: Callable[[Found], None], found: Found) -> None:
    """Train from a checkpoint; roll back up to `resilience.roll_backs` times.

    A roll-back continues from the last good checkpoint as a restart would, in the same process.

    Args:
        train: takes the checkpoint to continue from; None for a new run.

    Raises:
        NotFinite: no roll-back is left, or the same iteration failed a second time.
    """
    before: list[tuple[str, int]] = []
    while True:
        try:
            train(found)
            return
        except NotFinite as error:
            _allow(session, error, before)
        root = Path(session.run.settings.run.dir) / CHECKPOINTS
        view = session.output.view
        with session.safety.sections("setup"):
            found = find_checkpoint(root, session.run.ranks, view.warn)
            session.output.log.cut_back(found[1].offsets if found else {})
        where = f"{found[1].phase} iteration {found[1].iteration}" if found else "the start"
        view.note(f"continuing after {where}")


def _allow(session: Session, error: NotFinite, before: list[tuple[str, int]]) -> None:
    """Record a roll-back, or raise the error."""
    limit, here = session.run.settings.resilience.roll_backs, (error.phase, error.iteration)
    if here in before:
        text = (
            f"{error}\n  it failed again after a roll-back to a checkpoint, so it is no transient "
            "hardware fault; lower the learning rate, or skip the update with "
            "resilience.skip_updates"
        )
        again = NotFinite(text, error.finding, phase=error.phase, iteration=error.iteration)
        raise again from None
    if len(before) == limit:
        raise error
    before.append(here)
    if error.phase == "rl":
        algorithm = session.run.settings.algorithm
        session.safety.cache.drop(sampling_number(error.iteration - 1, 0, algorithm))
    count = f"{len(before)} of resilience.roll_backs={limit}"
    session.output.view.warn(f"{error}\n  rolling back to the last good checkpoint ({count})")


def _on(finding: Finding) -> str:
    ranks = ", ".join(map(str, list(finding.places)[:SHOWN])) + _more(len(finding.places) - SHOWN)
    return f"on rank{'s' if len(finding.places) > 1 else ''} {ranks}"


def _by_rank(places: Mapping[int, str]) -> list[str]:
    lines = [f"  rank {rank}: {text}" for rank, text in list(places.items())[:SHOWN]]
    return lines + (["  ..."] if len(places) > SHOWN else [])


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
