"""Score the tokens of micro-batches without gradient: an older policy, a reference; all ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.estimators.scoring import fill_table, score_tokens, with_distribution
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.types import TimestepBatch


def score_tables(
    network: Network,
    batches: Sequence[TimestepBatch],
    shape: torch.Size,
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of all scored tokens [N, C], 0 elsewhere; every rank.

    Complete on every rank of the last pipeline stage, where losses are; zeros on other stages.
    A table adds up zeros and one value, so it is the same under every layout of the rows.

    Args:
        batches: micro-batches of this rank, cut to its scored tokens.
    """
    ranks = network.ranks
    tables = torch.zeros(2, *shape, device=ranks.device)

    def score(number: int, logits: Tensor) -> None:
        batch = batches[number]
        scores = score_tokens(logits, batch, network.vocab, sampling, algorithm)
        for table, values in zip(tables, (scores.logprobs, scores.entropies), strict=True):
            fill_table(table, batch, values)

    forward_rows(network, [batch.rows for batch in batches], score)
    dist.all_reduce(tables, group=ranks.data_context.group)
    return tables[0], tables[1]


def with_distributions(
    network: Network,
    batches: Sequence[TimestepBatch],
    sampling: SamplingSettings,
    algorithm: AlgorithmSettings,
) -> list[TimestepBatch]:
    """Return micro-batches with the frozen reference's distributions; called by every rank.

    They take 4 bytes per token and id, on the last pipeline stage. Other stages have no use for
    them, and get none.
    """
    result = list(batches)

    def store(number: int, logits: Tensor) -> None:
        batch = result[number]
        result[number] = with_distribution(batch, logits, network.vocab, sampling, algorithm)

    forward_rows(network, [batch.rows for batch in batches], store)
    return result
