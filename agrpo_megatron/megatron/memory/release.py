"""Memory of updates that is released while rollouts are sampled (`rollout.release`).

Gradients are freed, as each update begins with zeros. What the optimizer keeps (its moments, and
the float32 weights of bf16 or FP8 training) moves to the host and back. Storages are emptied in
place, so every view of them stays valid: Megatron's `offload_to_cpu` of optimizers gives a
parameter a new storage, and a float32 model would lose its weights' views. Source of emptying in
place: `offload_grad_buffers` of Megatron's DistributedDataParallel.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage


class Release:
    """Releases memory of updates and restores it; keeps its buffers on the host.

    Args:
        mode: "none", "gradients", or "optimizer", which includes the gradients.
    """

    def __init__(self, mode: str):
        self._mode = mode
        self._hosts: dict[int, Tensor] = {}  # by storage; pinned where there is a GPU

    @contextmanager
    def __call__(
        self, ddps: Sequence[Any], optimizers: Sequence[Any], *, kept: Iterable[Tensor]
    ) -> Iterator[None]:
        """Release the memory while the body runs.

        Args:
            kept: tensors that the body needs, such as the weights.
        """
        if self._mode == "none":
            yield
            return
        buffers = [b for ddp in ddps for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        gradients = _storages(buffer.grad_data for buffer in buffers)
        for optimizer in optimizers:
            optimizer.zero_grad()  # main gradients in float32 are copies
        moved = dict[int, UntypedStorage]()
        if self._mode == "optimizer":
            used = _storages([*kept, *(b.param_data for b in buffers if b.param_data is not None)])
            states = _storages(tensor for each in optimizers for tensor in _kept_by(each))
            moved = {key: each for key, each in states.items() if key not in used | gradients}
        sizes = {key: each.nbytes() for key, each in (gradients | moved).items()}
        self._take(moved)
        for storage in (gradients | moved).values():
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for allocations of other sizes, and of graphs
        try:
            yield
        finally:
            for key, storage in (gradients | moved).items():
                storage.resize_(sizes[key])
            for storage in gradients.values():
                _bytes(storage).zero_()
            for key, storage in moved.items():
                _bytes(storage).copy_(self._hosts[key])

    def _take(self, moved: dict[int, UntypedStorage]) -> None:
        """Copy storages to the host."""
        for key, storage in moved.items():
            host = self._hosts.get(key)
            if host is None or len(host) != storage.nbytes():
                pins = torch.cuda.is_available()
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pins)
            self._hosts[key] = host.copy_(_bytes(storage))


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Return the storages of tensors, each once, by an identity that outlives resizing."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found if storage.nbytes()}


def _kept_by(optimizer: Any) -> Iterator[Tensor]:
    """Yield the main weights and the states of one of Megatron's optimizers."""
    inner = optimizer.optimizer
    if inner is None:  # a rank may have no weights of a kind
        return
    for group in inner.param_groups:
        yield from group["params"]
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(storage: UntypedStorage) -> Tensor:
    """Return a storage as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
