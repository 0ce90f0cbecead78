"""`algorithm.mc_samples: auto`: measure during a run how many steps to draw, and draw that many.

A measurement computes gradients of some of the iteration's rollouts before their update, at several
numbers of draws, and keeps only their sketches: weights, optimizer, gradients and random states
are as before. The choice depends on the rollouts but not on the draws of the update, so the update
stays unbiased.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.weights import needs_every_rollout
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.rollout.session import Run, Session
from agrpo_megatron.scaling.flops import update_factor
from agrpo_megatron.training.step import without_trace
from agrpo_megatron.training.variance.choice import (
    State,
    components,
    from_record,
    ladder,
    learned,
    window,
)
from agrpo_megatron.training.variance.measure import gradients_of, some_of
from agrpo_megatron.trajectories import iteration_of
from agrpo_megatron.types import Rollout

PART = 4  # one in so many groups is measured, and two at least


class AutoDraws:
    """The number of draws of a run; every call is made by every rank.

    Args:
        algorithm: with `mc_samples=auto`.
        kept: `state` at the checkpoint that the run continues from; empty for a new run.
    """

    def __init__(self, algorithm: AlgorithmSettings, kept: Mapping[str, Any]):
        self._algorithm = algorithm
        self._state = State(self._with(None).draws) if not kept else from_record(kept)
        self._sampling = 0.0  # work of the iteration's rollouts
        self._with_gradient = 3.0  # work of a token in an update
        self._found: dict[str, float] = {}  # metrics of the iteration's measurement

    @property
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return asdict(self._state)

    def before_update(
        self,
        session: Session,
        engine: Engine,
        rollout: Rollout,
        reference: Network | None,
        *,
        sampled: float,
    ) -> Session:
        """Measure if there is work left for it; return the session with a number for `auto`.

        Args:
            sampled: groups that the iteration sampled, over those that it kept.
        """
        algorithm, steps = self._algorithm, _live_steps(session.run, rollout)
        lengths, self._found, settings = _lengths(rollout), {}, session.run.settings
        self._with_gradient = update_factor(settings.model, settings.lora)
        self._sampling = sampled * float((rollout.trajectory.num_steps * lengths).sum())
        counts = self._counts(rollout, int(steps.max()))
        # Rows of a rollout: its draws, or its live steps where these are fewer.
        rows = sum(steps.clamp(max=count) for count in counts) * _scored(rollout, algorithm)
        tokens = float((rows * lengths)[: _measured_rollouts(algorithm)].sum())
        total = self._state.spent + self._state.each * tokens
        # The first measurement need not stay within the share.
        is_paid = self._state.spent == 0 or total <= algorithm.auto_share * self._state.made
        if tokens and is_paid:
            started = time.perf_counter()
            self._measure(session, engine, rollout, reference, counts, tokens)
            self._found["timing/measure"] = time.perf_counter() - started
        settings = replace(settings, algorithm=self._with(self._state.chosen))
        return replace(session, run=replace(session.run, settings=settings))

    def after_update(self, metrics: Mapping[str, float], tokens: int) -> dict[str, float]:
        """Count the work of the iteration; return metrics of the draws and of measuring.

        Args:
            metrics: of the update.
            tokens: that it scored with gradient.
        """
        passes = metrics["scoring_rows"] / max(1.0, metrics["rows"])
        work = self._sampling + tokens * (self._with_gradient + passes)
        self._state = state = replace(self._state, made=self._state.made + work)
        own = state.candidates.get(state.chosen)
        return {
            "mc_samples": state.chosen,
            "measuring_rows": 0.0,
            "measuring_flops": 0.0,
            "auto/share": state.spent / state.made,
            **({"auto/draw_noise": own.noise} if own and own.is_known else {}),
            **self._found,
        }

    def _with(self, count: int | None) -> AlgorithmSettings:
        return replace(self._algorithm, mc_samples=count)

    def _counts(self, rollout: Rollout, most: int) -> list[int]:
        """Return the draws to compare, in ascending order: three at least, or none.

        Args:
            most: the most live steps of any rollout.
        """
        rungs = ladder(rollout.trajectory.sampling.most_steps, most)
        if len(rungs) < 2:
            return []
        counts = window(rungs, self._state.chosen) if self._state.candidates else rungs
        # Three entries give the noise of each; see `components`.
        return counts if len(counts) > 2 else [counts[0], *counts]

    def _measure(
        self,
        session: Session,
        engine: Engine,
        rollout: Rollout,
        reference: Network | None,
        counts: Sequence[int],
        tokens: float,
    ) -> None:
        """Measure on the first groups, add to the running averages, and choose.

        Args:
            tokens: of the rows that are scored, at most.
        """
        first = _measured_rollouts(self._algorithm)
        places, found = torch.arange(first, device=rollout.rewards.device), []
        part = some_of(rollout, places)
        with without_trace(engine):
            engine.finish_parameters()
            for number, count in enumerate(counts, start=1):
                algorithm, one = self._with(count), {"draws": 1, "first": number}
                found.append(
                    gradients_of(session, engine, [part], algorithm, reference=reference, **one)
                )
        sketches = torch.cat([gradients.sketches[0] for gradients in found])
        is_exact = counts[-1] == rollout.trajectory.sampling.most_steps and (
            self._algorithm.enumerate_short
        )
        draws, rollouts = components(sketches, is_exact=is_exact)
        values = torch.tensor([*draws, rollouts], dtype=torch.float64, device=sketches.device)
        dist.broadcast(values, src=0)  # ranks may differ in the last bits
        *draws, rollouts = values.tolist()
        state, spent = self._state, sum(gradients.work for gradients in found)
        self._found["measuring_rows"] = sum(gradients.rows for gradients in found)
        self._found["measuring_flops"] = sum(gradients.flops for gradients in found)
        self._state = replace(state, spent=state.spent + spent, each=spent / tokens)
        if not spent or not all(map(math.isfinite, (*draws, rollouts))):
            return  # the update reports what is not finite
        scored = _scored(rollout, self._algorithm)
        times = self._algorithm.updates_per_iteration * float(scored.sum() / scored[:first].sum())
        works = [self._sampling + times * gradients.work for gradients in found]
        self._state = learned(self._state, counts, draws, rollouts, works)
        self._report(session, iteration_of(rollout), counts, state)

    def _report(self, session: Session, iteration: int, counts: Sequence[int], old: State) -> None:
        """Add the measured candidates to the metrics; show a change of the chosen one."""
        state = self._state
        known = {count: state.candidates[count] for count in counts}
        known = {count: each for count, each in known.items() if each.is_known}
        own = known.get(state.chosen)
        if own is None:
            return
        signals = {count: own.cost / each.cost for count, each in known.items()}
        for count, signal in signals.items():
            self._found[f"auto/draw_noise/{count}"] = known[count].noise
            self._found[f"auto/signal/{count}"] = signal
        if state.chosen != old.chosen or not old.candidates:
            others = ", ".join(f"{signal:.2f} with {count}" for count, signal in signals.items())
            session.output.view.note(
                f"iteration {iteration}: algorithm.mc_samples is {state.chosen} (auto): draw noise "
                f"{own.noise:.2g}, signal for the work {others}"
            )


def _measured_rollouts(algorithm: AlgorithmSettings) -> int:
    """Return how many rollouts of a batch are measured: an even number of groups."""
    groups = 2 * max(1, algorithm.prompts_per_iteration // (2 * PART))
    return groups * algorithm.group_size


def _scored(rollout: Rollout, algorithm: AlgorithmSettings) -> Tensor:
    """Return which rollouts an update scores, [R] bool."""
    return (rollout.advantages != 0) | needs_every_rollout(algorithm)


def _live_steps(run: Run, rollout: Rollout) -> Tensor:
    rule = run.settings.algorithm.live_steps
    return timesteps.live_steps(rollout.trajectory, eos_id=run.eos_id, rule=rule)


def _lengths(rollout: Rollout) -> Tensor:
    """Return the tokens of a row of each rollout, [R] int64.

    Times the steps of its trajectory they are the work of its sampling, whether it was sampled,
    read from the cache or replayed.
    """
    trajectory = rollout.trajectory
    prompts = torch.tensor([len(prompt) for prompt in trajectory.prompts])
    return (prompts + trajectory.tokens.shape[1]).to(trajectory.tokens.device)
