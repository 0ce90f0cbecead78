"""Weights of scored tokens: which count, what their sum is divided by, which share a ratio."""

from dataclasses import replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.losses import OF_TOKENS
from agrpo_megatron.trajectories import weights_of_kl
from agrpo_megatron.types import Rollout, ScoredRows, Trajectory


def counted_tokens(trajectory: Trajectory, context: DrawContext) -> Tensor:
    """Mark the completion tokens [R, C] that `algorithm.tail` lets an estimator score."""
    tail = context.algorithm.filled.tail
    if tail in (None, "all") or context.eos_id is None:
        return torch.ones_like(trajectory.tokens, dtype=torch.bool)
    is_end = trajectory.tokens == context.eos_id
    ends = is_end.long().cumsum(1)
    if tail == "first":
        return ends - is_end.long() == 0
    return ~is_end | (is_end & (ends == 1) if tail == "one_end" else torch.zeros_like(is_end))


def token_weights(
    scored: Tensor, owner: Tensor, rollout: Rollout, context: DrawContext, *, step: Tensor
) -> Tensor:
    """Return the weights [N, C] of scored tokens under `algorithm.normaliser`.

    Args:
        scored: [N, C] bool.
        owner: [N] the rollout of each row.
        step: [N] the denoising step or the number of the mask, for `same_step`.
    """
    settings, trajectory = context.algorithm.filled, rollout.trajectory
    rollouts, count = len(rollout.advantages), scored.sum(1, keepdim=True).double()
    rows = torch.bincount(owner, minlength=rollouts)[owner, None].double()
    kind = settings.normaliser
    if kind == "same_step":
        steps = trajectory.sampling.most_steps
        together = torch.zeros(steps, dtype=torch.float64, device=owner.device)
        together.index_add_(0, step, count[:, 0])
        each = rollouts / (steps * together.clamp(min=1)[step, None])
    else:
        constant = settings.normaliser_constant or trajectory.sampling.denoising_steps
        each = {
            "live_steps": 1 / rows,
            "all_steps": torch.full_like(rows, rollouts / max(1, len(rows))),
            "rows": rollouts / (max(1, len(rows)) * count.clamp(min=1)),
            "tokens": torch.full_like(rows, rollouts / max(1.0, float(count.sum()))),
            "constant": torch.full_like(rows, 1 / constant),
            "sum": torch.full_like(rows, float(rollouts)),
        }[str(kind)]
    return each * share_of_rollouts(rollout, context) * scored


def needs_every_rollout(algorithm: AlgorithmSettings) -> bool:
    """Return whether rollouts without advantage have a gradient: by a KL, a bonus or their loss."""
    if algorithm.kl_coefficient > 0 or algorithm.entropy_bonus > 0:
        return True
    return algorithm.filled.loss not in (*OF_TOKENS, "sandwich")


def share_of_rollouts(rollout: Rollout, context: DrawContext) -> float:
    """Return R over the rollouts that `algorithm.mean_over` averages."""
    rollouts = len(rollout.advantages)
    if context.algorithm.mean_over == "all":
        return 1.0
    return rollouts / max(1, int((rollout.advantages != 0).sum()))


def kl_weights(rows: ScoredRows, context: DrawContext) -> Tensor | None:
    """Return the weights of the KL where it is summed over a row and the loss averaged."""
    if not context.algorithm.kl_sum:
        return None
    return rows.weight * rows.has_token.sum(1, keepdim=True)


def by_row(rows: ScoredRows, likelihood: Tensor, context: DrawContext) -> ScoredRows:
    """Give each row one ratio: its log-likelihood is `likelihood` [N] times its log-probs."""
    count = rows.scored.sum(1).clamp(min=1)
    each = 1 / count.double() if context.algorithm.filled.length_scale else likelihood.double()
    number = torch.arange(len(count), device=count.device)[:, None].expand_as(rows.scored)
    return replace(rows, unit=number, coefficient=each[:, None] * rows.scored)


def by_rollout(
    rows: ScoredRows, likelihood: Tensor, rollout: Rollout, context: DrawContext
) -> ScoredRows:
    """Give each rollout one ratio; `likelihood` [N] times log-probs, summed over its rows."""
    is_mean, length = context.algorithm.filled.length_scale, rows.scored.shape[1]
    scale = length if is_mean else 1
    weight = rows.scored * share_of_rollouts(rollout, context)
    # k2 is of the whole log-likelihoods, and divided once (ESPO, arXiv 2512.03759).
    is_squared = is_mean and context.algorithm.kl == "k2"
    return replace(
        rows,
        weight=weight.double(),
        kl_weight=weight.double() * length if is_squared else None,
        unit=rows.rollout[:, None].expand_as(rows.scored),
        coefficient=likelihood.double()[:, None] / scale * rows.scored,
    )


def corrected(
    rows: ScoredRows, change: Tensor, *, limit: float, kl: str
) -> tuple[ScoredRows, dict[str, float]]:
    """Return rows whose weights include truncated importance weights, and metrics of these.

    The KL of drawn tokens has them, too. An exact KL is of states, whatever was drawn there.

    Args:
        change: [N, C] log-probs under the policy that is trained, less those of the sampler.
        kl: `algorithm.kl`.
    """
    change = change.masked_fill(~rows.has_token, 0).double()
    factors = importance(rows, change)
    found = _correction(factors[rows.has_token], change[rows.has_token], limit)
    factors = factors.clamp(max=limit)
    of_kl = weights_of_kl(rows) if kl == "exact" else weights_of_kl(rows) * factors
    return replace(rows, weight=rows.weight * factors, kl_weight=of_kl), found


def importance(rows: ScoredRows, change: Tensor) -> Tensor:
    """Return the importance weight [N, C] of each token's term in the loss, without a limit.

    It is exp(change). What shares a ratio shares a weight: that of a unit is exp of the sum of
    `coefficient` times change over its tokens.

    Args:
        change: [N, C] float64, 0 where nothing is scored.
    """
    if rows.unit is None or rows.coefficient is None:
        return change.exp()
    sums = change.new_zeros(int(rows.unit.max()) + 1 if len(rows.unit) else 0)
    sums.index_add_(0, rows.unit.flatten(), (rows.coefficient * change).flatten())
    return sums[rows.unit].exp()


def _correction(factors: Tensor, change: Tensor, limit: float) -> dict[str, float]:
    """Return metrics of the importance weights of scored tokens, [S] each.

    Args:
        change: of their log-probs; a mismatch is exp |change|.
    """
    if not len(change):
        factors, change = factors.new_ones(1), change.new_zeros(1)
    mismatch = change.abs().exp().sort().values
    return {
        "correction/mean": float(factors.mean()),
        "correction/truncated": float((factors > limit).double().mean()),
        "mismatch/mean": float(mismatch.mean()),
        "mismatch/p99": float(mismatch[int(0.99 * len(mismatch))]),
        "mismatch/max": float(mismatch[-1]),
    }


def effective_share(rows: ScoredRows) -> float:
    """Return the effective sample size of the rows' weights over their number; 1 without rows.

    The effective sample size is (sum w)^2 / sum w^2: so many rows of equal weights have a mean of
    the same variance. The weight of a row is that of its heaviest token.
    """
    weights = rows.weight.double().abs().amax(1)
    squares = float(weights.square().sum())
    return float(weights.sum()) ** 2 / (squares * len(weights)) if squares else 1.0


def select_rows(rows: ScoredRows, kept: Tensor) -> ScoredRows:
    """Return some of the rows, in the order of `kept` [n]."""
    hidden_prompt = rows.hidden_prompt
    if hidden_prompt is not None:
        hidden_prompt = tuple(hidden_prompt[row] for row in kept.tolist())
    chosen = {name: value[kept] for name, value in vars(rows).items() if isinstance(value, Tensor)}
    return replace(rows, **chosen, hidden_prompt=hidden_prompt)
