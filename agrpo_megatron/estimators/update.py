"""The losses of one update of any torch module: drawn states, older log-probs, micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.config.rules.algorithm import validate_algorithm
from agrpo_megatron.config.rules.blocks import validate_block_estimator
from agrpo_megatron.config.schema import rebuilt
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.batches import recorded_logprobs, row_lengths, timestep_batch
from agrpo_megatron.diffusion.blocks import block_numbers
from agrpo_megatron.diffusion.modules.sampling import check_context
from agrpo_megatron.diffusion.packing import assign_rows
from agrpo_megatron.diffusion.sampler import SamplerContext
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.objective import (
    BatchLoss,
    Tables,
    joint_loss,
    make_loss,
    make_tangent,
)
from agrpo_megatron.estimators.scoring import (
    Scores,
    fill_table,
    score_tokens,
    with_distribution,
)
from agrpo_megatron.estimators.table import is_joint, scored_rows
from agrpo_megatron.estimators.weights import select_rows
from agrpo_megatron.types import LossOutputs, Rollout, ScoredRows, TimestepBatch, Trajectory

# Settings that only `agrpo train` supports, with the value that leaves each out.
LEFT_OUT = {"rollout_correction": None, "rollout_experts": None, "resample_rounds": 0}


def make_rollout(
    trajectory: Trajectory,
    rewards: Tensor | Sequence[float],
    algorithm: AlgorithmSettings | None = None,
) -> Rollout:
    """Return a trajectory with its rewards [R], and their advantages within each group.

    Raises:
        ValueError: the rewards are not one for each completion, in groups of `group_size`.
    """
    algorithm = algorithm or AlgorithmSettings()
    count, size = len(trajectory.rollout_ids), algorithm.group_size
    scores = torch.as_tensor(rewards, dtype=torch.float32, device=trajectory.tokens.device)
    if scores.shape != (count,) or count % size:
        raise ValueError(
            f"{count} completions and rewards of shape {list(scores.shape)}: give one reward for "
            f"each, and neighbouring completions of the same prompt in groups of group_size={size}"
        )
    return Rollout(trajectory, scores, scores > 0, advantages(scores, algorithm))


def micro_batches(
    rollout: Rollout, scored: ScoredRows, *, context: SamplerContext
) -> list[TimestepBatch]:
    """Rebuild the scored states of rollouts, packed up to the token budget.

    A module with blocks sees the finished text before the block that is masked, so each scored
    block of a state is a row of its own, which ends with it.
    """
    numbers = torch.arange(len(scored.rollout), device=scored.rollout.device)
    if context.model.has_blocks:
        scored, numbers = block_parts(rollout, scored)
    (plan,) = assign_rows(
        row_lengths(rollout, scored), budget=context.token_budget, ranks=1, attention=0.0
    )
    mask_id, shift = context.mask_id, context.model.shift
    batches = [
        timestep_batch(rollout, scored, rows, mask_id=mask_id, shift=shift)
        for rows in plan
        if len(rows)
    ]
    return [replace(batch, row=numbers[batch.row]) for batch in batches]


def block_parts(rollout: Rollout, scored: ScoredRows) -> tuple[ScoredRows, Tensor]:
    """Return a row for each block of each scored row [N] in which tokens are scored.

    It shows the text of the blocks before as the rollout finished it, and ends with the block.

    Returns:
        P rows, and the scored row of each, [P].
    """
    trajectory = rollout.trajectory
    blocks = block_numbers(trajectory)[0][scored.rollout]
    numbers = torch.arange(trajectory.sampling.most_blocks, device=blocks.device)
    is_scored = (blocks[:, None] == numbers[:, None]) & scored.scored[:, None]
    row, number = is_scored.any(2).nonzero(as_tuple=True)
    parts, blocks, number = select_rows(scored, row), blocks[row], number[:, None]
    ends = (blocks <= number).sum(1)
    return replace(
        parts,
        hidden=parts.hidden & (blocks == number),
        scored=parts.scored & (blocks == number),
        length=ends if parts.length is None else torch.minimum(ends, parts.length),
    ), row


def update_losses(
    rollout: Rollout,
    algorithm: AlgorithmSettings | None = None,
    *,
    context: SamplerContext,
    reference: SamplerContext | None = None,
    seed: int | None = None,
) -> Iterator[LossOutputs]:
    """Yield the loss of each micro-batch; the gradient of their sum is that of the update.

    A loss is a mean over rollouts. An estimator whose rollouts have no log-probs of the scored
    tokens, such as `diffu_grpo`, takes the current policy for the old one: one update per rollout.

    Args:
        context: of the policy; see `module_context`.
        reference: of the frozen policy, for a KL or a preference.
        seed: of the draws; another one for each further update on a rollout. None: the context's.

    Raises:
        ValueError: a setting has no meaning here, or a reference is missing.
    """
    algorithm = algorithm or AlgorithmSettings()
    _check(algorithm, rollout, context, reference)
    draws = DrawContext(algorithm, context.eos_id, context.seed if seed is None else seed)
    scored = scored_rows(rollout, draws)
    batches = micro_batches(rollout, scored, context=context)
    if reference is not None and algorithm.needs_reference:
        batches = [
            _with_reference(batch, reference, rollout.trajectory.sampling, algorithm)
            for batch in batches
        ]
    loss = _loss_of(scored, batches, rollout, algorithm, context)
    for batch in batches:
        total, metrics = loss(_logits(batch, context), batch)
        yield LossOutputs(total / len(rollout.rewards), metrics)


def _check(
    algorithm: AlgorithmSettings,
    rollout: Rollout,
    context: SamplerContext,
    reference: SamplerContext | None,
) -> None:
    sampling = rollout.trajectory.sampling
    validate_algorithm(rebuilt(algorithm, "algorithm"), sampling)
    validate_block_estimator(algorithm.name, context.model)
    for each in (context, reference):
        if each is not None:
            check_context(each, sampling)
    if reference is not None and reference.model.block_length != context.model.block_length:
        raise ValueError(
            f"the reference has block_length={reference.model.block_length}, and the policy "
            f"block_length={context.model.block_length}; make both by the same module_context(...)"
        )
    for key, value in LEFT_OUT.items():
        if (given := getattr(algorithm, key)) != value:
            raise ValueError(f"algorithm.{key}={given} needs `agrpo train`; leave it out")
    if algorithm.filled.mc_samples == "auto":
        raise ValueError("algorithm.mc_samples=auto needs `agrpo train`; give a number such as 8")
    if algorithm.needs_reference and reference is None:
        raise ValueError(
            f"algorithm.name={algorithm.name} with algorithm.kl_coefficient="
            f"{algorithm.kl_coefficient:g} needs the frozen policy; give `reference`"
        )


def _loss_of(
    scored: ScoredRows,
    batches: Sequence[TimestepBatch],
    rollout: Rollout,
    algorithm: AlgorithmSettings,
    context: SamplerContext,
) -> BatchLoss:
    """Return the loss of a micro-batch; one that joins tokens takes a pass without gradient."""
    sampling, vocab = rollout.trajectory.sampling, context.vocab
    if not batches or not is_joint(scored, algorithm):
        return make_loss(vocab, sampling, algorithm)
    with torch.no_grad():
        found = [_scores(batch, context, sampling, algorithm) for batch in batches]
    current = _table(scored, batches, [scores.logprobs for scores in found])
    recorded, frozen = recorded_logprobs(rollout, scored), None
    if batches[0].reference_logprobs is not None:
        frozen = _table(scored, batches, [batch.reference_logprobs for batch in batches])
    entropies = _table(scored, batches, [scores.entropies for scores in found])
    tables = Tables(current, current if recorded is None else recorded, frozen, entropies)
    metrics, slopes = joint_loss(scored, tables, rollout, algorithm)
    return make_tangent(slopes, metrics, vocab, sampling, algorithm, speaker=batches[0])


def _table(scored: ScoredRows, batches: Sequence[TimestepBatch], values: Sequence[Any]) -> Tensor:
    """Return the values [S] of each batch in one table [N, C]; 0 where nothing is scored."""
    table = values[0].new_zeros(scored.scored.shape)
    for batch, part in zip(batches, values, strict=True):
        fill_table(table, batch, part)
    return table


@torch.no_grad()
def _with_reference(
    batch: TimestepBatch,
    reference: SamplerContext,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> TimestepBatch:
    """Score a micro-batch under the frozen policy."""
    if algorithm.kl != "exact":
        scores = _scores(batch, reference, sampling, algorithm)
        return replace(batch, reference_logprobs=scores.logprobs)
    logits = _logits(batch, reference)
    return with_distribution(batch, logits, reference.vocab, sampling, algorithm)


def _scores(
    batch: TimestepBatch,
    context: SamplerContext,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> Scores:
    return score_tokens(_logits(batch, context), batch, context.vocab, sampling, algorithm)


def _logits(batch: TimestepBatch, context: SamplerContext) -> Tensor:
    """Return the logits [S, V] of a micro-batch; a network of Megatron has no such function."""
    return context.forward.score(batch.rows)  # type: ignore[attr-defined]
