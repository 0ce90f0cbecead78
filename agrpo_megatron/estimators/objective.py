"""The loss of micro-batches: of single tokens, or of all tokens of an update together.

A loss of single tokens takes one pass through the network. A loss that joins tokens (a sequence's
ratio, a pair of completions) needs the log-probs of all of them, which other micro-batches, ranks
and rows hold. So a pass without gradient computes all log-probs first; every rank differentiates
the loss by them; and the pass with gradient takes the sum of log-probs times these derivatives.
By the chain rule its gradient is that of the loss, whatever the loss is. Drawn positions depend on
the entropies of all masked positions of a block in the same way: these are a second table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.turns import position_scores, turn_logprobs
from agrpo_megatron.estimators.losses import errors_by_part, of_tokens, plain_metrics
from agrpo_megatron.estimators.scoring import Scores, score_tokens
from agrpo_megatron.estimators.table import find_loss
from agrpo_megatron.trajectories import weights_of_kl
from agrpo_megatron.types import LossInputs, LossOutputs, Rollout, ScoredRows, TimestepBatch

type BatchLoss = Callable[[Tensor, TimestepBatch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Tables:
    """Log-probs of all scored tokens, [N, C] each, under three policies."""

    current: Tensor
    old: Tensor
    reference: Tensor | None
    entropies: Tensor | None = None  # of the current one, where positions were drawn by them


class Slopes(NamedTuple):
    """Derivatives of a loss of all tokens, [N, C] each."""

    logprobs: Tensor
    entropies: Tensor | None  # None: the loss does not depend on them


def joint_loss(
    scored: ScoredRows, tables: Tables, rollout: Rollout, algorithm: AlgorithmSettings
) -> tuple[dict[str, Tensor], Slopes]:
    """Return the metrics of a loss of all tokens, and its derivatives by log-probs and entropies.

    The loss itself is the metric `loss`.
    """
    spots = scored.has_token.nonzero(as_tuple=True)
    inputs, entropies = joint_inputs(scored, tables, rollout), None
    leaves = [inputs.logprobs.requires_grad_()]
    with torch.enable_grad():
        if scored.turns is not None:
            assert tables.entropies is not None
            entropies = tables.entropies.double().requires_grad_()
            leaves.append(entropies)
            inputs = _with_turns(inputs, scored, entropies, rollout)
        outputs = LossOutputs(inputs.logprobs.sum(), plain_metrics(inputs))
        if len(inputs.logprobs):
            outputs = find_loss(algorithm)(inputs, algorithm)
        found = [torch.zeros_like(leaf) for leaf in leaves]
        if outputs.loss.requires_grad:
            found = torch.autograd.grad(outputs.loss, leaves, materialize_grads=True)
    slope = torch.zeros_like(tables.current)
    slope[spots] = found[0].to(slope.dtype)
    slopes = Slopes(slope, None if entropies is None else found[1].to(slope.dtype))
    metrics = {**outputs.metrics, "loss": outputs.loss}
    return {name: metric.detach() for name, metric in metrics.items()}, slopes


def _with_turns(
    inputs: LossInputs, scored: ScoredRows, entropies: Tensor, rollout: Rollout
) -> LossInputs:
    """Add the log-probs of drawn positions: one more unit for each row, without a KL.

    Args:
        entropies: [N, C] float64 of the scored positions, with gradient.
    """
    temperature = rollout.trajectory.sampling.position_temperature
    assert temperature is not None
    assert scored.turns is not None
    assert scored.turn_logprobs is not None
    scores = position_scores(entropies, temperature)
    turns = turn_logprobs(scores, scored.turns, scored.scored)[scored.has_token]
    old, reference = scored.turn_logprobs[scored.has_token].double(), inputs.reference_logprobs
    count, shared = len(turns), ("advantages", "weights", "rollout", "row", "position")
    tokens = torch.arange(count, device=turns.device)
    return replace(
        inputs,
        logprobs=torch.cat([inputs.logprobs, turns]),
        old_logprobs=torch.cat([inputs.old_logprobs, old]),
        reference_logprobs=None if reference is None else torch.cat([reference, turns.detach()]),
        kl_weights=torch.cat([inputs.kl_weights, torch.zeros_like(inputs.kl_weights)]),
        unit=torch.cat([tokens, count + inputs.row]),
        coefficient=torch.ones(2 * count, dtype=turns.dtype, device=turns.device),
        **{name: getattr(inputs, name).repeat(2) for name in shared},
    )


def joint_inputs(scored: ScoredRows, tables: Tables, rollout: Rollout) -> LossInputs:
    """Return the inputs of a loss of all tokens, in float64 and in the order of the tables."""
    row, position = spots = scored.has_token.nonzero(as_tuple=True)
    gains = rollout.advantages[scored.rollout] if scored.advantage is None else scored.advantage
    return LossInputs(
        logprobs=tables.current[spots].double(),
        old_logprobs=tables.old[spots].double(),
        reference_logprobs=None if tables.reference is None else tables.reference[spots].double(),
        advantages=gains[row].double(),
        weights=scored.weight[spots].double(),
        kl_weights=weights_of_kl(scored)[spots].double(),
        rollout=scored.rollout[row],
        row=row,
        position=position,
        unit=None if scored.unit is None else scored.unit[spots],
        coefficient=None if scored.coefficient is None else scored.coefficient[spots].double(),
    )


def make_loss(
    vocab: Vocabulary,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
    *,
    part: Tensor | None = None,
    parts: int = 0,
) -> BatchLoss:
    """Return the loss of one micro-batch of single tokens, for `optimizer_step`.

    Args:
        part: [N, C] the part of the denoising, of `parts`, that a scored token belongs to; None:
            no metrics by part.
    """
    loss_of = find_loss(algorithm)

    def loss(logits: Tensor, batch: TimestepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and its metrics."""
        scores = score_tokens(logits, batch, vocab, sampling, algorithm)
        inputs = of_tokens(scores.logprobs, batch)
        outputs = loss_of(inputs, algorithm)
        added, kl = _added(scores, batch, algorithm)
        metrics = outputs.metrics
        if part is not None:
            own = part[batch.row, batch.position]
            metrics = {**metrics, **errors_by_part(inputs, own, parts)}
        if kl is not None:
            metrics = {**metrics, "kl_sum": kl}
        return outputs.loss + added, metrics

    return loss


def make_tangent(
    slopes: Slopes,
    metrics: dict[str, Tensor],
    vocab: Vocabulary,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
    *,
    speaker: TimestepBatch | None,
) -> BatchLoss:
    """Return the loss of one micro-batch whose gradient is that of a joint loss.

    Args:
        slopes: of the joint loss.
        metrics: of the joint loss.
        speaker: the micro-batch with which this rank reports them; None: another rank does.
    """
    zeros = {n: m[:0] if "_p99" in n else torch.zeros_like(m) for n, m in metrics.items()}

    def loss(logits: Tensor, batch: TimestepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and its metrics."""
        scores = score_tokens(logits, batch, vocab, sampling, algorithm)
        total = (scores.logprobs * slopes.logprobs[batch.row, batch.position]).sum()
        if slopes.entropies is not None:
            total = total + (scores.entropies * slopes.entropies[batch.row, batch.position]).sum()
        added, kl = _added(scores, batch, algorithm)
        reported = dict(metrics if batch is speaker else zeros)
        reported["loss"] = reported["loss"] + added.detach()
        if kl is not None:
            reported["kl_sum"] = kl
        return total + added, reported

    return loss


def _added(
    scores: Scores, batch: TimestepBatch, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor | None]:
    """Return what a loss has besides log-probs: the exact KL less the entropy bonus.

    With it comes the sum of the exact KL over tokens, if there is one.
    """
    added = -algorithm.entropy_bonus * (scores.entropies * batch.weights).sum()
    if scores.kl is None:
        return added, None
    added = added + algorithm.kl_coefficient * (scores.kl * batch.kl_weights).sum()
    return added, (scores.kl * (batch.weights != 0)).sum().detach()
