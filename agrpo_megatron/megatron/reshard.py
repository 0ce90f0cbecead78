"""Copy the training weights into a network of another layout, with megatron-core's resharding.

The transfer plan is made once; after that an update costs only its transfers.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding.copy_services.base import (
    CopyService,
    RecvOp,
    SendOp,
    match_local_ops_by_task_id,
)
from megatron.core.resharding.refit import clear_all_caches, swap_model_weights
from torch import Tensor, nn

from agrpo_megatron.families.tensors import HEAD_WEIGHT
from agrpo_megatron.megatron.layers.head import copy_tied_weights
from agrpo_megatron.megatron.network import Network

# Transfers of a rank in one group. NCCL can hang in groups of a thousand.
# (Source: github.com/pytorch/pytorch/pull/174942.)
LARGEST_GROUP = 256


@dataclass
class RolloutCopy:
    """A second network for rollouts, and the optimizer step of its weights."""

    network: Network
    step: int | None = None

    def __post_init__(self) -> None:
        clear_all_caches()  # an earlier engine's plans hold its tensors

    @torch.no_grad()
    def update(self, source: Network, step: int) -> Network:
        """Return the network with the weights of an optimizer step; called by every rank."""
        if step != self.step:
            torch.cuda.synchronize()  # the optimizer has streams of its own
            for network in (source, self.network):
                network.for_updates()
            swap_model_weights(_Whole(source), _Whole(self.network), GroupedCopy())  # type: ignore[arg-type]
            for chunk in self.network.chunks:
                copy_tied_weights(chunk)
            self.step = step
        return self.network


class _Whole(nn.Module):
    """All virtual stages of a network as one module with global names, as resharding needs."""

    def __init__(self, network: Network):
        super().__init__()
        self.config, self.pg_collection = network.config, network.ranks.groups
        self._named = network.named_weights
        self._is_tied = network.chunks[0].settings.tie_embeddings

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """Yield this rank's weights with their global names, but no tied head."""
        weights = self._named()
        return (pair for pair in weights if not (self._is_tied and pair[0] == HEAD_WEIGHT))


class GroupedCopy(CopyService):
    """Copies tensors between ranks in groups of bounded size.

    Transfers from one rank to another are cut into rounds, in the order of the plan. Both ranks
    cut them alike and every rank runs its rounds in order, so no ranks wait for each other in a
    circle, and all pairs of ranks transfer at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sends: list[SendOp] = []
        self._receives: list[RecvOp] = []

    def submit_send(self, src_tensor: Tensor, dest_rank: int, task_id: int | None = None) -> None:
        """Queue a tensor to send to another rank, or to this one."""
        self._sends.append(SendOp(task_id, src_tensor, dest_rank))

    def submit_recv(self, dest_tensor: Tensor, src_rank: int, task_id: int | None = None) -> None:
        """Queue a tensor to receive into."""
        self._receives.append(RecvOp(task_id, dest_tensor, src_rank))

    def run(self) -> None:
        """Run all queued transfers, and wait for them."""
        here = [op for op in self._sends if op.dest_rank == self.rank]
        own = [op for op in self._receives if op.src_rank == self.rank]
        for send, receive in match_local_ops_by_task_id(here, own, "copy", self.rank):
            receive.tensor.copy_(send.tensor)
        for group in self._rounds():
            for work in dist.batch_isend_irecv(group):
                work.wait()
        self._sends, self._receives = [], []

    def _rounds(self) -> Iterator[list[dist.P2POp]]:
        """Yield the transfers with other ranks, one round after another."""
        each = max(1, LARGEST_GROUP // max(1, 2 * (self.world_size - 1)))  # to or from one rank
        remote = [(dist.isend, op, op.dest_rank) for op in self._sends]
        remote += [(dist.irecv, op, op.src_rank) for op in self._receives]
        remote = [entry for entry in remote if entry[2] != self.rank]
        places: Counter[tuple[Any, int]] = Counter()
        rounds: defaultdict[int, list[dist.P2POp]] = defaultdict(list)
        for function, op, peer in sorted(remote, key=lambda entry: _task(entry[1])):
            number = places[function, peer] // each
            rounds[number].append(dist.P2POp(function, op.tensor, peer))
            places[function, peer] += 1
        for number in sorted(rounds):
            yield rounds[number]


def _task(operation: SendOp | RecvOp) -> int:
    """Return the transfer's place in the plan: the same for its sender and its receiver."""
    assert operation.task_id is not None
    return operation.task_id
