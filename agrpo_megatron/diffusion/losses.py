"""Losses over scored tokens. Each returns a sum; the caller divides it."""

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.types import SftBatch, TimestepBatch


def sft_loss(logprobs: Tensor, batch: SftBatch) -> Tensor:
    """Return the weighted cross-entropy, summed over examples.

    With weights 1 / (t * length) this bounds each example's mean negative log-likelihood per
    response token, in nats. Source: LLaDA (arXiv 2502.09992), equation 5.
    """
    return -(logprobs * batch.weights).sum()


def policy_loss(
    logprobs: Tensor, batch: TimestepBatch, algorithm: AlgorithmSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped policy loss summed over rollouts, and what the metrics are made of.

    Per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * KL * r, with
    r the policy ratio and KL the k3 estimate against the frozen reference, weighted by the
    token's row. Source: arXiv 2510.04019; k3 times ratio as in DeepSeek-V3.2.

    Args:
        logprobs: [S] of the current policy, with gradient.

    Returns:
        The loss, and metrics as `training.step` combines them: sums, a maximum, and for
        `ratio_p99_error` the value of each token [S], -1 where it has no weight.
    """
    log_ratio = logprobs - batch.old_logprobs
    ratio = log_ratio.exp()
    gain = ratio * batch.advantages
    clipped_gain = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * batch.advantages
    per_token = -torch.minimum(gain, clipped_gain)
    kl = torch.zeros_like(ratio)
    if algorithm.kl_coefficient > 0:
        assert batch.reference_logprobs is not None
        gap = batch.reference_logprobs - logprobs
        kl = (gap.exp() - gap - 1) * ratio
        per_token = per_token + algorithm.kl_coefficient * kl
    with torch.no_grad():
        used = batch.weights != 0
        error = (ratio - 1).abs()
        metrics = {
            "scored_tokens": used.sum(),
            "ratio_sum": (ratio * used).sum(),
            "ratio_max_error": (error * used).max() if len(ratio) else ratio.sum(),
            "ratio_p99_error": torch.where(used, error, -1.0),
            "clipped_tokens": ((clipped_gain < gain) & used).sum(),
            "kl_sum": (kl * used).sum(),
        }
    return (per_token * batch.weights).sum(), metrics
