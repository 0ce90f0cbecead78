"""Score the tokens of micro-batches under the policy that drew them, or under the plain model."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.logprobs import (
    Vocabulary,
    exact_kl,
    policy_logits,
    shard_logprobs,
    token_logprobs,
)
from agrpo_megatron.types import TimestepBatch


class Scores(NamedTuple):
    """Scores of a micro-batch's tokens, [S] each, in nats."""

    logprobs: Tensor
    entropies: Tensor
    kl: Tensor | None  # from the reference, where the micro-batch has its distributions


def score_tokens(
    logits: Tensor,
    batch: TimestepBatch,
    vocab: Vocabulary,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> Scores:
    """Score a micro-batch's tokens.

    Under the sampler's policy, tempered and truncated as the token was drawn, or under the plain
    model, which may give probability to the mask token.
    """
    logits, vocab = scored_policy(logits, vocab, sampling, algorithm)
    scores = token_logprobs(logits, batch.targets, vocab=vocab, support_ids=batch.support_ids)
    target = batch.reference_shard
    return Scores(*scores, None if target is None else exact_kl(logits, target, vocab))


def scored_policy(
    logits: Tensor, vocab: Vocabulary, sampling: SamplingSettings, algorithm: AlgorithmSettings
) -> tuple[Tensor, Vocabulary]:
    """Return the logits of the scored policy, and its vocabulary."""
    temperature = sampling.temperature
    if algorithm.filled.scored_policy == "model":
        vocab, temperature = replace(vocab, forbidden=()), 1.0
    return policy_logits(logits, vocab, temperature=temperature), vocab


def fill_table(table: Tensor, batch: TimestepBatch, values: Tensor) -> None:
    """Put the values [S] of a micro-batch's tokens into a table [N, C] of all scored rows."""
    table[batch.row, batch.position] = values.to(table.dtype)


def with_distribution(
    batch: TimestepBatch,
    logits: Tensor,
    vocab: Vocabulary,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> TimestepBatch:
    """Return a micro-batch with the distributions of a frozen reference, of its logits [S, V]."""
    policy, vocab = scored_policy(logits, vocab, sampling, algorithm)
    return replace(batch, reference_shard=shard_logprobs(policy, vocab))
