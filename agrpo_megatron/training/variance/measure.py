"""Measure how noisy an estimator's gradient is on a batch of rollouts, and how far it points off.

The gradient of one batch differs from the expected one for two reasons: which completions were
sampled, and which of their steps or masks were drawn. The first remains if every step is scored; it
is measured by the two halves of a batch. The second is measured by drawing several times.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.scaling.flops import update_factor
from agrpo_megatron.training.step import accumulate_gradients
from agrpo_megatron.training.update import (
    Part,
    prepare,
    with_loss,
    with_old_logprobs,
    with_reference,
)
from agrpo_megatron.training.variance.sketch import SIZE, gradient_sketch
from agrpo_megatron.trajectories import select
from agrpo_megatron.types import Rollout


@dataclass(frozen=True)
class Gradients:
    """Sketches of one estimator's gradients: of each draw and half of each batch."""

    sketches: Tensor  # [batches, draws, 2, SIZE] float64
    work: float  # of an update, in tokens of a forward pass
    rows: float = 0.0  # scored with gradient in an update
    flops: float = 0.0  # of an update


@dataclass(frozen=True)
class Quality:
    """An estimator's noise, direction and cost; NaN where its gradient is below the noise."""

    draws: float  # variance by drawn steps or masks, over that by sampled completions
    cosine: float  # of the expected gradient, given the rollouts, and the full trajectory's
    work: float  # of an iteration, rollouts included, in tokens of a forward pass

    @property
    def per_work(self) -> float:
        """Return the share of the signal-to-noise ratio that is left, over the work."""
        share = self.cosine**2 / (1 + self.draws) / self.work
        return 0.0 if math.isnan(share) else share


@dataclass(frozen=True)
class Comparison:
    """Estimators on the same rollouts."""

    qualities: dict[str, Quality]
    signal: float  # squared length of the true gradient, over a batch's variance by completions


def gradients_of(
    session: Session,
    engine: Engine,
    rollouts: Sequence[Rollout],
    algorithm: AlgorithmSettings,
    *,
    reference: Network | None,
    draws: int,
    first: int = 0,
) -> Gradients:
    """Return sketches of an estimator's gradients on batches of rollouts; called by every rank.

    The weights do not change. A batch is halved by groups, as rollouts of a group depend on each
    other.

    Args:
        first: number of the first draw. Draws of different numbers are independent; number 0 is
            that of an iteration's first update.
    """
    found, work, rows, flops = [], 0.0, 0, 0
    settings = session.run.settings
    with_gradient = update_factor(settings.model, settings.lora)
    for rollout in rollouts:
        halves = _halves(rollout, algorithm.group_size)
        for number in range(first, first + draws):
            for half in halves:
                sketch, part = _gradient(session, engine, half, algorithm, reference, number)
                found.append(sketch)
                tokens = float(part.lengths.sum())
                work += tokens * (with_gradient + part.passes)
                rows += len(part.scored.rollout)
                flops += part.flops
    shape, times = (len(rollouts), draws, 2, SIZE), len(rollouts) * draws
    return Gradients(torch.stack(found).view(shape), work / times, rows / times, flops / times)


def compare(
    measured: Mapping[str, Gradients], full: Gradients, *, rollout_work: float
) -> Comparison:
    """Return the quality of each estimator, against the full trajectory on the same rollouts.

    Args:
        full: of `full_trajectory`, one draw.
        rollout_work: of sampling a batch, in tokens of a forward pass.
    """
    whole = full.sketches[:, 0]  # [batches, 2, SIZE]
    rollouts = float((whole[:, 0] - whole[:, 1]).square().sum(-1).mean()) / 4
    signal = float((whole[:, 0] * whole[:, 1]).sum(-1).mean())
    exact, results = whole.mean(1), {}
    if len(exact) > 1:  # batches are independent, too
        others = (exact.sum(0) - exact) / (len(exact) - 1)
        signal = float((exact * others).sum(-1).mean())
    for name, gradients in measured.items():
        batches = gradients.sketches.mean(2)  # [batches, draws, SIZE]
        mean, count = batches.mean(1), batches.shape[1]
        spread = (batches - mean[:, None]).square().sum(-1).sum(1) / max(1, count - 1)
        # Without the part that is noise of the draws; not known where nearly all is.
        left = spread.mean() / count
        size = mean.square().sum(-1).mean() - left
        size = torch.where(size > left / 10, size, torch.nan)
        length = exact.square().sum(-1).mean()
        cosine = (mean * exact).sum(-1).mean() / (size * length).sqrt()
        results[name] = Quality(
            draws=float(spread.mean() * length / size) / rollouts,  # a learning rate sets lengths
            cosine=float(cosine.clamp(-1.0, 1.0)),
            work=rollout_work + gradients.work,
        )
    return Comparison(results, signal / rollouts)


def some_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """Return some rollouts of a batch, in the order of `rows` [n]."""
    return Rollout(
        select(rollout.trajectory, rows),
        rollout.rewards[rows],
        rollout.correct[rows],
        rollout.advantages[rows],
        rollout.experts,
    )


def _halves(rollout: Rollout, group_size: int) -> list[Rollout]:
    """Return the rollouts of every second group, and the others."""
    group = torch.arange(len(rollout.rewards), device=rollout.rewards.device) // group_size
    return [some_of(rollout, (group % 2 == half).nonzero()[:, 0]) for half in (0, 1)]


def _gradient(
    session: Session,
    engine: Engine,
    rollout: Rollout,
    algorithm: AlgorithmSettings,
    reference: Network | None,
    number: int,
) -> tuple[Tensor, Part]:
    """Return the sketch of the gradient of one draw, and what was scored for it."""
    settings = replace(session.run.settings, algorithm=algorithm)
    part = prepare(settings, engine.ranks, rollout, seed=settings.run.seed + 104729 * number)
    part = with_old_logprobs(engine.network, part, settings, is_first=True)
    if reference is not None and algorithm.needs_reference:
        part = with_reference(part, reference, settings)
    part, loss = with_loss(engine, part, rollout, settings, is_first=True)
    accumulate_gradients(engine, part.batches, loss=loss, examples=len(rollout.rewards))
    return gradient_sketch(engine), part
