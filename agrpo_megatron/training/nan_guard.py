"""Updates that are not finite: told, written down, left out within bounds; or the run goes back."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from agrpo_megatron.checkpoint.resume import find_checkpoint
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.cache import sampling_number
from agrpo_megatron.rollout.data_order import pick_problems
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.runs.progress import CHECKPOINTS, Progress
from agrpo_megatron.training.nonfinite import Finding, Metrics, NotFinite, find_in_weights
from agrpo_megatron.training.step import drop_gradients, optimizer_step
from agrpo_megatron.types import SftBatch, TimestepBatch, Trajectory

NONFINITE = "nonfinite.jsonl"  # in the run directory; what happened stays, also when it goes back
SHOWN = 6  # rows, and ranks, that a message names
KEY = 40  # characters of a problem's key

type Found = tuple[Path, Progress] | None


@dataclass(frozen=True)
class Update:
    """Which update it is, for whoever reads of it."""

    iteration: int  # counted from 1
    rows: str  # "rollouts" or "examples"
    key: Callable[[int], str]  # of the problem that a row belongs to
    number: int = 1  # within the iteration


class Guard:
    """Makes the updates of one phase; every call is made by every rank."""

    def __init__(self, session: Session, phase: str):
        self._session, self._phase = session, phase
        self._in_a_row = 0  # updates that were left out

    def step[Batch: (SftBatch, TimestepBatch)](
        self,
        engine: Engine,
        batches: Sequence[Batch],
        *,
        loss: Callable[[Tensor, Batch], tuple[Tensor, Metrics]],
        examples: int,
        update: Update,
    ) -> dict[str, float]:
        """Make an update as `optimizer_step` does, or leave it out where it is not finite.

        An update that was left out has no metrics but `skipped_updates` and `learning_rate`;
        weights, optimizer and schedule are as before.

        Raises:
            NotFinite: more than `resilience.skip_updates` in a row are not.
        """
        try:
            metrics = optimizer_step(engine, batches, loss=loss, examples=examples)
        except NotFinite as error:
            self._leave_out(error.finding, update)
            drop_gradients(engine)
            rate = max(group["lr"] for group in engine.optimizer.param_groups)
            return {"learning_rate": rate, "skipped_updates": 1}
        self._in_a_row = 0
        return {**metrics, "skipped_updates": 0}

    def _leave_out(self, finding: Finding, update: Update) -> None:
        self._in_a_row += 1
        limit = self._session.settings.resilience.skip_updates
        text = described(finding, update, self._phase)
        is_over = self._in_a_row > limit
        record = {
            "phase": self._phase,
            "iteration": update.iteration,
            "update": update.number,
            "action": "ended" if is_over else "skipped",
            "problems": [update.key(row) for row in finding.rows],
        }
        _write(self._session, record, finding, text)
        if not is_over:
            count = f"{self._in_a_row} in a row, resilience.skip_updates={limit}"
            self._session.view.warn(f"{text}\n  the update is left out ({count})")
            return
        if limit:
            text += f"\n  more than resilience.skip_updates={limit} in a row"
        raise NotFinite(text, finding, phase=self._phase, iteration=update.iteration) from None


def refuse_spoilt(session: Session, engine: Engine, *, phase: str, iteration: int) -> None:
    """Let no checkpoint hold weights that are not finite; called by every rank before it saves.

    Raises:
        NotFinite: they are not.
    """
    finding = find_in_weights(engine)
    if finding is None:
        return
    first = f"{phase} iteration {iteration}: the weights are not finite {_on(finding)}"
    text = "\n".join([f"{first}; they are not saved", *_by_rank(finding.places)])
    record = {"phase": phase, "iteration": iteration, "action": "ended"}
    _write(session, record, finding, text)
    raise NotFinite(text, finding, phase=phase, iteration=iteration)


def _write(session: Session, record: dict[str, Any], finding: Finding, text: str) -> None:
    if not session.ranks.is_main:
        return
    path = Path(session.settings.run.dir) / NONFINITE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record, **asdict(finding), "text": text}) + "\n")


def described(finding: Finding, update: Update, phase: str) -> str:
    """Tell what was not finite, on a few lines; the first one stands by itself."""
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
        lines.append("  computed again, it is finite: a passing fault of the hardware is likely")
    if finding.weights:
        lines += ["  weights that are not finite themselves:", *_by_rank(finding.weights)]
    return "\n".join(lines)


def rollout_keys(session: Session, trajectory: Trajectory) -> Callable[[int], str]:
    """Return what gives the problem's key of one of an iteration's rollouts."""
    size, seed = session.settings.algorithm.group_size, session.settings.run.seed

    def key(row: int) -> str:
        place = int(trajectory.rollout_ids[row]) // size
        [number] = pick_problems(session.task.shares, range(place, place + 1), seed=seed)
        return session.task.problems("train")[number].key

    return key


def with_roll_backs(session: Session, run: Callable[[Found], None], found: Found) -> None:
    """Run from a checkpoint; where an update is not finite, go back as often as settings say.

    It goes on from the last good checkpoint as a restart would, in the same process.

    Args:
        run: takes the checkpoint that is gone on from; none for a new run.

    Raises:
        NotFinite: no going back is left, or it happened again where it had before.
    """
    before: list[tuple[str, int]] = []
    while True:
        try:
            run(found)
            return
        except NotFinite as error:
            _allow(session, error, before)
        root = Path(session.settings.run.dir) / CHECKPOINTS
        with session.sections("setup"):
            found = find_checkpoint(root, session.ranks, session.view.warn)
            session.log.cut_back(found[1].offsets if found else {})
        where = f"{found[1].phase} iteration {found[1].iteration}" if found else "the start"
        session.view.note(f"going on after {where}")


def _allow(session: Session, error: NotFinite, before: list[tuple[str, int]]) -> None:
    """Note where a run goes back, or raise the error."""
    limit, here = session.settings.resilience.roll_backs, (error.phase, error.iteration)
    if here in before:
        text = (
            f"{error}\n  the run went back to a checkpoint for this, and everything is computed "
            "alike: it is no passing fault of the hardware, and would come again; lower "
            "the learning rate, or leave the update out with resilience.skip_updates"
        )
        told = NotFinite(text, error.finding, phase=error.phase, iteration=error.iteration)
        raise told from None
    if len(before) == limit:
        raise error
    before.append(here)
    if session.bank is not None and error.phase == "rl":
        algorithm = session.settings.algorithm
        session.bank.drop(sampling_number(error.iteration - 1, 0, algorithm))
    count = f"{len(before)} of resilience.roll_backs={limit}"
    session.view.warn(f"{error}\n  going back to the last good checkpoint ({count})")


def _on(finding: Finding) -> str:
    ranks = ", ".join(map(str, list(finding.places)[:SHOWN])) + _more(len(finding.places) - SHOWN)
    return f"on rank{'s' if len(finding.places) > 1 else ''} {ranks}"


def _by_rank(places: Mapping[int, str]) -> list[str]:
    lines = [f"  rank {rank}: {text}" for rank, text in list(places.items())[:SHOWN]]
    return lines + (["  ..."] if len(places) > SHOWN else [])


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
