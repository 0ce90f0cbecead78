"""Score the tokens of micro-batches: with gradient for a loss, without for an older policy."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.types import TimestepBatch


def score_tokens(
    logits: Tensor,
    batch: TimestepBatch,
    vocab: Vocabulary,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of a micro-batch's tokens, [S] each, in nats.

    Under the sampler's policy, tempered and truncated as the token was drawn, or under the plain
    model, which may give probability to the mask token.
    """
    temperature = sampling.temperature
    if algorithm.filled.scored_policy == "model":
        vocab, temperature = replace(vocab, forbidden=()), 1.0
    logits = policy_logits(logits, vocab, temperature=temperature)
    return token_logprobs(logits, batch.targets, vocab=vocab, support_ids=batch.support_ids)


def logprob_table(
    network: Network,
    batches: Sequence[TimestepBatch],
    shape: torch.Size,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> Tensor:
    """Return the log-probs of all scored tokens [N, C], 0 elsewhere; called by every rank.

    Complete on every rank of the last pipeline stage, where losses are; zeros on other stages.
    A table adds up zeros and one value, so it is the same under every layout of the rows.

    Args:
        batches: micro-batches of this rank, cut to its scored tokens.
    """
    ranks = network.ranks
    table = torch.zeros(shape, device=ranks.device)

    def score(number: int, logits: Tensor) -> None:
        batch = batches[number]
        scores, _ = score_tokens(logits, batch, network.vocab, sampling, algorithm)
        table[batch.row, batch.position] = scores.to(table.dtype)

    forward_rows(network, [batch.rows for batch in batches], score)
    dist.all_reduce(table, group=ranks.data_context.group)
    return table
