"""Rollouts ahead of their update (`train.async_steps: 1`): graded while the weights change.

Iteration i begins with the rollouts of iteration i + 1, under the weights before the update of
iteration i. So the rewards of both are graded while the other is sampled, and while the update
runs. A checkpoint after iteration i holds the weights after its update. They did not sample the
rollouts of iteration i + 1, so a restart reads these from the cache: their files are complete
before the update begins.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.dynamic_sampling import Groups, groups_of, picked_round
from agrpo_megatron.rollout.generate import Sampled, grade, sample_request, spent_on
from agrpo_megatron.rollout.requests import Request
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.runs.stored_rollouts import round_name, sampling_number
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.types import GradedRollouts, Problem


@dataclass(frozen=True)
class _Round:
    """The sampling round of an iteration."""

    number: int
    problems: list[Problem]
    found: GradedRollouts | Sampled  # an earlier attempt may have graded it
    sampled_by: str | None  # digest of the run that sampled it; None: this one


class Ahead:
    """The groups of one iteration after another; every call is made by every rank.

    Args:
        sampled_by: digest of the run that sampled the rollouts of the first iteration before the
            checkpoint's last update; None: they are sampled by the checkpoint's weights.
    """

    def __init__(self, session: Session, engine: Engine, *, sampled_by: str | None):
        self._session, self._engine, self._by = session, engine, sampled_by
        self._next: _Round | None = None

    @property
    def sampled_by(self) -> str | None:
        """Return the digest of this run if the next iteration's rollouts are sampled."""
        return None if self._next is None else self._session.safety.cache.run

    def groups(self, iteration: int) -> Groups:
        """Sample the next iteration's groups; return those of this one.

        FLOPs, tokens and time of sampling count where the sampling takes place.

        Args:
            iteration: iterations finished before.

        Raises:
            Stopped: the ranks agreed to stop; finished completions are cached.
        """
        session, current, begun = self._session, self._next, list[_Round]()
        if current is None:
            current = self._first(iteration)
            # Rollouts from before the checkpoint were counted before it.
            begun += [current] if current.sampled_by is None else []
        self._next = None
        if iteration + 1 < session.run.settings.train.iterations:
            self._next = self._start(iteration + 1, version=iteration)
            begun.append(self._next)
        spent = [self._spent_on(round_.found) for round_ in begun]
        found = current.found
        if isinstance(found, Sampled):
            found = grade(session, found)
            session.safety.cache.keep(current.number, found, run=current.sampled_by)
        slots = range(session.run.settings.algorithm.prompts_per_iteration)
        groups = groups_of(session, iteration, current.problems, [found], slots)
        flops, tokens, seconds = map(sum, zip(*spent, strict=True)) if spent else (0, 0, 0.0)
        timed = groups.rollouts.seconds | {"timing/rollout": seconds}
        return replace(
            groups,
            rollouts=replace(groups.rollouts, seconds=timed),
            metrics=groups.metrics | {"flops": flops},
            tokens=tokens,
        )

    def _spent_on(self, found: GradedRollouts | Sampled) -> tuple[int, int, float]:
        """Return FLOPs, packed tokens and seconds of sampling; called by every rank."""
        if isinstance(found, Sampled):
            return spent_on(self._session, found)
        flops = sum(completion_flops(found.trajectory, self._session.run.settings))
        return flops, found.tokens, found.seconds["timing/rollout"]

    def _first(self, iteration: int) -> _Round:
        """Return the rollouts of the first iteration of an attempt."""
        if self._by is None:
            return self._start(iteration, version=iteration)
        if self._is_stored(iteration):
            return self._start(iteration, version=iteration - 1, cached_by=self._by)
        session = self._session
        session.output.view.warn(
            f"iteration {iteration + 1}: its rollouts, which were sampled before the checkpoint's "
            "last update, are not on disk; the checkpoint's weights sample them, and the run will "
            "differ from an uninterrupted one"
        )
        session.safety.cache.drop(sampling_number(iteration, 0, session.run.settings.algorithm))
        return self._start(iteration, version=iteration)

    def _is_stored(self, iteration: int) -> bool:
        """Return whether all ranks can read all completions that the checkpoint counts on."""
        cache, sampling = self._session.safety.cache, self._session.run.settings.sampling
        number, _, ids = self._picked(iteration)
        if cache.find(number, ids, sampling=sampling, run=self._by) is not None:
            return True
        found = cache.find_completions(round_name(number), ids, sampling=sampling, run=self._by)
        return found is not None and len(found.rollout_ids) == len(ids)

    def _start(self, iteration: int, *, version: int, cached_by: str | None = None) -> _Round:
        """Sample the rollouts of an iteration, or read them from disk.

        Args:
            version: the iterations that the weights have finished.
        """
        session, engine = self._session, self._engine
        number, problems, ids = self._picked(iteration)
        sampling = session.run.settings.sampling
        found = session.safety.cache.find(number, ids, sampling=sampling, run=cached_by)
        if found is None:
            request = Request(
                problems,
                ids,
                sampling,
                weights_version=version,
                name=round_name(number),
                cached_by=cached_by,
                is_ahead=True,
            )
            with engine.sampling() as network:
                found = sample_request(session, network, request)
        return _Round(number, problems, found, cached_by)

    def _picked(self, iteration: int) -> tuple[int, list[Problem], Tensor]:
        groups = self._session.run.settings.algorithm.prompts_per_iteration
        return picked_round(self._session, self._engine, (iteration, 0), groups=groups)
