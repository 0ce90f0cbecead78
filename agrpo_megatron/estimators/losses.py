"""Losses over scored tokens or units. Each returns a sum over rollouts; the caller divides it.

A loss of single tokens runs once per micro-batch. All others need all tokens of an update at once,
which other ranks and micro-batches hold: `objective.joint_loss` computes their gradient by the
log-probs first, and `objective.make_tangent` passes it through the network.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.types import LossInputs, LossOutputs, TimestepBatch

PART_ERROR = "ratio_max_error_part"  # with the number of a part of the denoising

type Loss = Callable[[LossInputs, AlgorithmSettings], LossOutputs]


def of_tokens(logprobs: Tensor, batch: TimestepBatch) -> LossInputs:
    """Return the inputs of a loss of single tokens.

    Where the old policy's log-probs are not known, it is the current policy.

    Args:
        logprobs: [S] of the current policy, with gradient.
    """
    old = batch.old_logprobs
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old is None else old,
        reference_logprobs=batch.reference_logprobs,
        advantages=batch.advantages,
        weights=batch.weights,
        kl_weights=batch.kl_weights,
        rollout=batch.sources,
        row=batch.row,
        position=batch.position,
    )


def in_units(inputs: LossInputs) -> LossInputs:
    """Sum log-probs times coefficients over each unit; without units, return the inputs."""
    if inputs.unit is None:
        return inputs
    unit, coefficient = inputs.unit, inputs.coefficient
    assert coefficient is not None
    known, place = unit.unique(return_inverse=True)

    def summed(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        zeros = torch.zeros(len(known), dtype=values.dtype, device=values.device)
        return zeros.index_add(0, place, values * coefficient.to(values.dtype))

    def of_unit(values: Tensor) -> Tensor:
        """Return what all tokens of a unit have in common."""
        return values.new_zeros(len(known)).index_copy(0, place, values)

    shared = ("advantages", "weights", "kl_weights", "rollout", "row", "position")
    return replace(
        inputs,
        logprobs=summed(inputs.logprobs),
        old_logprobs=summed(inputs.old_logprobs),
        reference_logprobs=summed(inputs.reference_logprobs),
        unit=known,
        coefficient=None,
        **{name: of_unit(getattr(inputs, name)) for name in shared},
    )


def policy(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    """Return the clipped policy loss and its metrics.

    Per token or unit: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * KL, with
    r the policy ratio. Source: arXiv 2510.04019; k3 times ratio as in DeepSeek-V3.2; dual clip as
    in arXiv 1912.09729; `always` as in StableDRL (arXiv 2603.06743).
    """
    inputs = in_units(inputs)
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    return _clipped(ratio, inputs, algorithm)


def linear_bound(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    """Replace the ratio by 1 + log-ratio where the advantage is positive.

    Both bound the gain from below, and are linear in sampled log-likelihoods. Source: BGPO.
    """
    inputs = in_units(inputs)
    log_ratio = inputs.logprobs - inputs.old_logprobs
    ratio = torch.where(inputs.advantages > 0, 1 + log_ratio, log_ratio.exp())
    return _clipped(ratio, inputs, algorithm)


def reinforce(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    """Return the log-likelihoods times minus the advantages, without a ratio or a clip.

    Source: wd1 (arXiv 2507.08838) with `softmax` advantages.
    """
    inputs = in_units(inputs)
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    terms = -inputs.logprobs * inputs.advantages
    return _outputs(terms, ratio, torch.zeros_like(ratio, dtype=torch.bool), inputs, algorithm)


def preference(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    """Return -log sigmoid(beta (d_best - d_worst)), d = log-likelihood over the reference's.

    Units 2 p and 2 p + 1 are pair p. Source: VRPO (LLaDA 1.5, arXiv 2505.19223).
    """
    units = in_units(inputs)
    assert units.reference_logprobs is not None
    gaps = (units.logprobs - units.reference_logprobs).view(-1, 2)
    terms = preference_terms(gaps, beta=algorithm.preference_beta)
    weight = units.weights.view(-1, 2)[:, 0]
    return LossOutputs((terms * weight).sum(), plain_metrics(units))


def preference_terms(gaps: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return DPO's loss of each pair [P], from log-likelihoods over the reference's [P, 2]."""
    margin = beta * (gaps[:, 0] - gaps[:, 1])
    exchanged = label_smoothing * F.logsigmoid(-margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - exchanged


def sandwich(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    """Return -A times a lower bound of good completions' log-likelihood, an upper bound of others'.

    The lower bound is the mean over masks of the mean log-prob; the upper one is 1 / b times the
    mean over tokens of the log of a mean over masks of p^b / t. Source: SPG (arXiv 2510.09541).
    """
    first, bound = bounds(inputs, algorithm)
    gain, weight = inputs.advantages[first], inputs.weights[first]
    return LossOutputs(-(weight * gain * bound).sum(), plain_metrics(inputs))


def bounds(inputs: LossInputs, algorithm: AlgorithmSettings) -> tuple[Tensor, Tensor]:
    """Return a scored token of each rollout, and the bound of its log-likelihood per token."""
    assert inputs.unit is not None
    rollouts, owner = inputs.rollout.unique(return_inverse=True)
    _, row = inputs.row.unique(return_inverse=True)
    count = torch.bincount(row)
    masks = int(inputs.unit.max()) + 1
    lower = _sums(inputs.logprobs / (count[row] * masks), owner, len(rollouts))
    upper = _upper_bound(inputs, owner, len(rollouts), masks, algorithm)
    share = {"mix": algorithm.bound_share, "eubo": 1.0, "elbo": 0.0}[algorithm.bound]
    first = torch.zeros(len(rollouts), dtype=torch.int64, device=owner.device)
    first = first.scatter(0, owner, torch.arange(len(owner), device=owner.device))
    is_good = inputs.advantages[first] > 0
    return first, torch.where(is_good, lower, share * upper + (1 - share) * lower)


def _upper_bound(
    inputs: LossInputs, owner: Tensor, rollouts: int, masks: int, algorithm: AlgorithmSettings
) -> Tensor:
    """Return the evidence upper bound per token of each rollout."""
    power, width = algorithm.bound_power, int(inputs.position.max()) + 1
    assert inputs.coefficient is not None
    places, token = (owner * width + inputs.position).unique(return_inverse=True)
    powers = (power * inputs.logprobs).exp() * inputs.coefficient.to(inputs.logprobs.dtype)
    logs = _sums(powers / masks, token, len(places)).log() / power
    of_token = places // width
    count = torch.bincount(of_token, minlength=rollouts)
    return _sums(logs / count[of_token], of_token, rollouts)


def filtered(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    """Return the policy loss of a step's own tokens and of other probable masked tokens.

    Means are over the used tokens of each unit. With a single update per iteration the terms are
    log-likelihoods, else clipped ratios, as in its code. Source: RLDF.
    """
    assert inputs.unit is not None
    own = inputs.weights > 0
    used = own | (inputs.old_logprobs.exp() > algorithm.least_probability)
    units, place = inputs.unit.unique(return_inverse=True)
    count = _sums(used.to(inputs.weights.dtype), place, len(units)).clamp(min=1)
    share = torch.zeros_like(count).scatter_reduce(0, place, inputs.weights, "amax")
    weight = used * (share / count)[place]
    inputs = replace(inputs, unit=None, weights=weight, kl_weights=weight)
    return (reinforce if algorithm.updates_per_iteration == 1 else policy)(inputs, algorithm)


def _clipped(ratio: Tensor, inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
    gain = ratio * inputs.advantages
    limited = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * inputs.advantages
    kept = {
        "ppo": torch.minimum(gain, limited),
        "dual": torch.minimum(gain, limited),
        "always": limited,
        "none": gain,
    }[algorithm.clip]
    if algorithm.clip == "dual":
        floor = algorithm.dual_clip * inputs.advantages
        kept = torch.where(inputs.advantages < 0, torch.maximum(kept, floor), kept)
    return _outputs(-kept, ratio, kept != gain, inputs, algorithm)


def _outputs(
    terms: Tensor, ratio: Tensor, clipped: Tensor, inputs: LossInputs, algorithm: AlgorithmSettings
) -> LossOutputs:
    """Add the KL to the terms [S] of tokens or units, and sum them.

    An exact KL is no function of log-probs, so it is not added here.
    """
    loss, kl = (terms * inputs.weights).sum(), None
    if algorithm.kl_coefficient > 0 and algorithm.kl != "exact":
        is_old = algorithm.kl_target == "old"
        target = inputs.old_logprobs if is_old else inputs.reference_logprobs
        assert target is not None
        kl = _kl(target - inputs.logprobs, ratio, algorithm.kl)
        loss = loss + algorithm.kl_coefficient * (kl * inputs.kl_weights).sum()
    return LossOutputs(loss, _metrics(ratio, clipped, inputs, kl))


def _kl(gap: Tensor, ratio: Tensor, kind: str) -> Tensor:
    """Return an estimate of the KL from log-probs of the target minus the policy's.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    if kind == "k1":
        return -gap
    if kind == "k2":
        return gap.square() / 2
    k3 = gap.exp() - gap - 1
    return k3 * ratio if kind == "k3_ratio" else k3


def plain_metrics(inputs: LossInputs) -> dict[str, Tensor]:
    """Return the metrics of a loss that clips nothing and has no KL."""
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    return _metrics(ratio, torch.zeros_like(ratio, dtype=torch.bool), inputs)


@torch.no_grad()
def _metrics(
    ratio: Tensor, clipped: Tensor, inputs: LossInputs, kl: Tensor | None = None
) -> dict[str, Tensor]:
    used, error = inputs.weights != 0, (ratio - 1).abs()
    return {
        "scored_tokens": used.sum(),
        "ratio_sum": (ratio * used).sum(),
        "ratio_max_error": (error * used).max() if len(ratio) else ratio.sum(),
        "ratio_p99_error": torch.where(used, error, -1.0),
        "clipped_tokens": (clipped & used).sum(),
        "clipped_high_tokens": (clipped & used & (ratio > 1)).sum(),
        "kl_sum": ratio.new_zeros(()) if kl is None else (kl * used).sum(),
    }


@torch.no_grad()
def errors_by_part(inputs: LossInputs, part: Tensor, parts: int) -> dict[str, Tensor]:
    """Return the largest distance of a token's ratio from 1 in each part; -1 without a token.

    Args:
        part: [S] int64, of each token.
    """
    error = ((inputs.logprobs - inputs.old_logprobs).exp() - 1).abs()
    found = error.new_full((parts,), -1.0)
    found = found.scatter_reduce(0, part, error.where(inputs.weights != 0, -1.0), "amax")
    return {f"{PART_ERROR}{number}": largest for number, largest in enumerate(found)}


def _sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Return the sums of values [S] by group [S], [count]."""
    return values.new_zeros(count).index_add(0, group, values)


LOSSES: dict[str, Loss] = {
    "policy": policy,
    "reinforce": reinforce,
    "linear_bound": linear_bound,
    "preference": preference,
    "sandwich": sandwich,
    "filtered": filtered,
}
OF_TOKENS = ("policy", "reinforce", "linear_bound")  # without units, a sum over single tokens
