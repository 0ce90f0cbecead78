"""Ours and the reference compute the same, which is checked before anything is timed.

The reference gets our counted noise and our weights: it must draw the same tokens at the same
positions, and the same drawn states must give the same gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.benchmark.ours import Ours, gradient, prepared
from agrpo_megatron.benchmark.reference.model import Reference
from agrpo_megatron.benchmark.reference.rollout import Noise, Rollouts
from agrpo_megatron.benchmark.reference.update import Pass, accumulate
from agrpo_megatron.diffusion import noise
from agrpo_megatron.types import Rollout, ScoredRows, Trajectory

TOLERANCE = 1e-4  # of log-probs in nats, and of a gradient relative to its length
# Of a gradient in bfloat16, whose numbers have 8 bits: each side is up to 0.07 from float32.
TOLERANCE_BF16 = 0.2


class Unequal(Exception):
    """Ours and the reference do not compute the same."""


@dataclass(frozen=True)
class Equality:
    """What was compared, and how much it differs."""

    tokens: int  # of completions, all equal with their steps
    logprob_error: float  # nats, the largest, entropies included
    gradient_error: float | None = None  # of the tensor that differs most; None: not compared
    bf16_error: float | None = None  # likewise in bfloat16, where the rest is compared in float32


def counted_noise(ours: Ours) -> Noise:
    """Return our counted noise."""
    seed, ids = ours.settings.run.seed, ours.rollout_ids
    vocab = torch.arange(ours.settings.model.vocab_size or 0, device=ours.device)

    def keys(stream: int, rows: Tensor, step: int, positions: Tensor) -> Tensor:
        steps = torch.tensor(step, device=ours.device)
        return noise.noise_key(seed, stream, ids[rows][:, None], steps, positions)

    def tokens(rows: Tensor, step: int, positions: Tensor) -> Tensor:
        own = keys(noise.TOKENS, rows, step, positions)
        return noise.uniform(noise.fold(own[..., None], vocab))

    def positions_(rows: Tensor, step: int, positions: Tensor) -> Tensor:
        return noise.uniform(keys(noise.POSITIONS, rows, step, positions))

    return Noise(tokens, positions_)


def same_rollouts(trajectory: Trajectory, found: Rollouts) -> Equality:
    """Compare rollouts of ours with the reference's.

    Raises:
        Unequal: a token, the step that fixed it, a log-prob or the kept candidates differ.
    """
    is_other = (trajectory.tokens != found.tokens) | (trajectory.unmask_step != found.unmask_step)
    if count := int(is_other.sum()):
        row, place = is_other.nonzero()[0].tolist()
        raise Unequal(
            f"{count} of {is_other.numel()} tokens or their steps differ, first at rollout {row}, "
            f"position {place}"
        )
    mine = own_records(trajectory, found.prompts, vocab=found.support.shape[-1])
    is_cut = trajectory.support_ids is not None
    if is_cut and (count := int((mine.support != found.support).sum())):
        raise Unequal(
            f"{count} candidates of top-k and top-p differ; if they are few, sums of probabilities "
            "that are nearly sampling.top_p round to either side of it: try another run.seed"
        )
    pairs = [(mine.logprobs, found.logprobs), (mine.entropies, found.entropies)]
    error = max(float((left - right).abs().max()) for left, right in pairs)
    if not error <= TOLERANCE:
        raise Unequal(f"log-probs or entropies differ by {error:.2g} nats")
    return Equality(is_other.numel(), error)


def same_gradient(ours: Ours, rollout: Rollout, reference: Reference, found: Rollouts) -> float:
    """Compare the gradients of an update on the same drawn states.

    Returns the length of the difference over the length of the gradient, of the worst tensor.

    Raises:
        Unequal: a tensor's gradients differ.
    """
    part, loss = prepared(ours, rollout)
    mine = gradient(ours, rollout, part, loss)
    settings = ours.settings
    passes = passes_of(part.scored, len(rollout.rewards))
    accumulate(reference, found, rollout.advantages, passes, settings.sampling, settings.algorithm)
    errors = {}
    for name, weight in reference.weights.items():
        assert weight.grad is not None
        theirs = weight.grad.float()
        errors[name] = float((mine[name] - theirs).norm() / theirs.norm())
        weight.grad.zero_()
    worst = max(errors, key=lambda name: errors[name])
    limit = TOLERANCE if settings.precision == "fp32" else TOLERANCE_BF16
    if not errors[worst] <= limit:
        raise Unequal(f"the gradients of {worst} differ by {errors[worst]:.2g} of their length")
    return errors[worst]


def passes_of(scored: ScoredRows, count: int) -> list[Pass]:
    """Return our drawn states as passes over all `count` rollouts; a missing one scores nothing."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for row, owner in enumerate(scored.rollout.tolist()):
        rows[owner].append(row)
    passes = []
    for number in range(max(map(len, rows))):
        owners = [owner for owner, own in enumerate(rows) if number < len(own)]
        chosen = [rows[owner][number] for owner in owners]
        shape = (count, scored.hidden.shape[1])
        parts = (scored.hidden, scored.scored, scored.weight.float())
        tables = [part.new_zeros(shape) for part in parts]
        for table, part in zip(tables, parts, strict=True):
            table[owners] = part[chosen]
        passes.append(Pass(*tables))
    return passes


def own_records(trajectory: Trajectory, prompts: Tensor, *, vocab: int) -> Rollouts:
    """Return rollouts of ours as the reference's update takes them.

    Args:
        vocab: ids of a support mask.
    """
    shape, device = trajectory.tokens.shape, trajectory.tokens.device
    support = torch.ones(*shape, vocab, dtype=torch.bool, device=device)
    if trajectory.support_ids is not None:
        ids = trajectory.support_ids.long()
        kept = torch.zeros(*shape, vocab + 1, dtype=torch.bool, device=device)
        kept = kept.scatter_(2, ids.masked_fill(ids < 0, vocab), value=True)[..., :vocab]
        support = kept | ~trajectory.is_sampled[..., None]
    return Rollouts(
        prompts=prompts,
        tokens=trajectory.tokens,
        unmask_step=trajectory.unmask_step,
        num_steps=trajectory.num_steps,
        logprobs=trajectory.logprobs,
        entropies=trajectory.entropies,
        support=support,
    )
