"""The supervised loss: of an update, and of the held-out rows under the same masks at any time."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.diffusion.supervised.examples import sft_loss
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import from_last_stage
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.rollout.session import Run
from agrpo_megatron.training.supervised.drawn import held_out_rows, micro_batches
from agrpo_megatron.types import SftBatch

SEED = 0  # of the held-out masks: they do not depend on the run's seed
SOME = 1024  # held-out examples that are laid out at a time


def make_sft_loss(
    vocab: Vocabulary,
) -> Callable[[Tensor, SftBatch], tuple[Tensor, dict[str, Tensor]]]:
    """Return the loss of a micro-batch, summed over its examples, with its metrics."""
    whole = replace(vocab, forbidden=())

    def loss(logits: Tensor, batch: SftBatch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = policy_logits(logits, whole)
        logprobs, _ = token_logprobs(policy, batch.targets, vocab=whole)
        return sft_loss(logprobs, batch), {"scored_tokens": torch.tensor(len(batch.targets))}

    return loss


def held_out_loss(run: Run, network: Network) -> float:
    """Return the mean loss of the held-out rows, in nats per trained token; called by every rank.

    Every reply of a row counts.
    """
    assert run.supervised is not None
    ranks, loss, held_out = run.ranks, make_sft_loss(network.vocab), run.supervised.held_out
    total, rows = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    batches = list[SftBatch]()

    def add(number: int, logits: Tensor) -> None:
        total.add_(loss(logits, batches[number])[0])

    for start in range(0, len(held_out), SOME):
        drawn = held_out_rows(run, held_out[start : start + SOME])
        ids = torch.arange(rows, rows + len(drawn.names), device=ranks.device)
        batches, _ = micro_batches(run, drawn, ids, seed=SEED)
        forward_rows(network, [batch.rows for batch in batches], add)
        rows += len(drawn.names)
    dist.all_reduce(total, group=ranks.data_context.group)
    return from_last_stage(float(total), ranks) / rows
