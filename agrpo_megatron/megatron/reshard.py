"""Copy the training weights into a network of another layout, with megatron-core's resharding.

The transfer plan is made once; after that an update costs only its transfers.
"""

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

from agrpo_megatron.megatron.network import Network


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
            method = "nccl" if self.network.ranks.device.type == "cuda" else _HostCopy()
            swap_model_weights(_Whole(source), _Whole(self.network), method)  # type: ignore[arg-type]
            self.step = step
        return self.network


class _Whole(nn.Module):
    """All virtual stages of a network as one module with global names, as resharding needs."""

    def __init__(self, network: Network):
        super().__init__()
        self.config, self.pg_collection = network.config, network.ranks.groups
        self._named = network.named_parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters with their global names."""
        return self._named()


class _HostCopy(CopyService):
    """Copies between CPU ranks: megatron-core's services need CUDA."""

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
        """Run all queued operations, and wait for them."""
        here = [op for op in self._sends if op.dest_rank == self.rank]
        own = [op for op in self._receives if op.src_rank == self.rank]
        for send, receive in match_local_ops_by_task_id(here, own, "host copy", self.rank):
            receive.tensor.copy_(send.tensor)
        receives = [op for op in self._receives if op.src_rank != self.rank]
        buffers = [(op, torch.empty_like(op.tensor).contiguous()) for op in receives]
        sent = [(op, op.tensor.contiguous()) for op in self._sends if op.dest_rank != self.rank]
        waits = [dist.isend(tensor, op.dest_rank, tag=_tag(op)) for op, tensor in sent]
        waits += [dist.irecv(tensor, op.src_rank, tag=_tag(op)) for op, tensor in buffers]
        for wait in waits:
            assert wait is not None
            wait.wait()
        for op, tensor in buffers:
            op.tensor.copy_(tensor)
        self._sends, self._receives = [], []


def _tag(operation: SendOp | RecvOp) -> int:
    assert operation.task_id is not None
    return operation.task_id
