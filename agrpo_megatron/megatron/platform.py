"""Megatron-Core without a GPU: one explicit replacement for the CUDA functions it calls.

`prepare_platform` is called once at start-up. With a GPU it sets only the current device. All else
is Megatron's own code, so the CPU runs the real schedule, data parallelism, optimizer and
checkpoints.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from agrpo_megatron.config.settings import KernelSettings
from agrpo_megatron.hardware.machine import device_index

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare_platform(threads: int | None = None) -> torch.device:
    """Choose this rank's device and make Megatron-Core run on it; mutates torch.cuda on a CPU.

    Args:
        threads: CPU threads of this rank; None shares the cores among the local ranks, unless
            this rank is alone and OMP_NUM_THREADS is set, which torch then follows.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Launchers set the variable to 1 for several ranks, on any machine.
    if threads or local_ranks > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index(torch.cuda.device_count()))
        torch.cuda.set_device(device)
        return device
    _stand_in_for_cuda()
    _keep_freed_memory()
    return torch.device("cpu")


def prepare_kernels(settings: KernelSettings, device: torch.device) -> None:
    """Set the switches of the whole process; called before the first kernel.

    `deterministic`: an operation without a deterministic form warns and runs. CPU kernels are
    deterministic anyway.
    """
    if device.type != "cuda":
        return
    if settings.deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else every `torch.empty` is filled, which finds reads of memory that nothing wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if settings.cuda_graphs:
        # Registered buffers of captured collectives and expandable segments of torch's allocator
        # give illegal accesses. Source: Megatron-Core, which requires this for its own graphs.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def use_torch_optimizers() -> None:
    """Let Megatron-Core update weights and sum norms with torch only; mutates its modules.

    Megatron-Core uses the fused kernels of any package it can import. Transformer Engine also
    imports on a machine without a GPU, where its kernels cannot run.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed

    lists = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
    }
    l2_norm = {"l2_norm_impl": utils.local_multi_tensor_l2_norm}
    flags = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    adam = {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True}
    optimizer.__dict__.update(adam)
    distrib_optimizer.__dict__.update(dict.fromkeys(flags, False), Adam=torch.optim.Adam)
    mixed.__dict__.update(lists)
    clip_grads.__dict__.update(lists | l2_norm, multi_tensor_scale_tensor_impl=None)


class _CpuForCuda(TorchFunctionMode):
    """Map `device="cuda"`, `.cuda()` and CUDA tensor type names to their CPU form."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers sort parameters by the name of their CUDA tensor type.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors of up to 32 MiB in place of returning it.

    A forward pass allocates what the one before has freed. The system clears each page that it
    hands out again, which took 8 % of a small model's rollout.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has none
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**30)  # so much may stay unused


@contextlib.contextmanager
def plain_torch(*, names_cuda: bool = False) -> Iterator[None]:
    """Suspend the replacement of CUDA devices and types, which costs time for each operation.

    Does nothing where there is none, and within another mode of torch's functions.

    Args:
        names_cuda: whether the code within names CUDA devices, so that it needs the replacement.
    """
    is_active = not names_cuda and _stand_in_for_cuda.cache_info().currsize
    mode, depth = _stand_in_for_cuda() if is_active else (None, 0)
    if mode is None or torch._C._len_torch_function_stack() != depth:
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


class _Stream:
    """A CUDA stream or event without waits: the CPU runs in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait(self, *_args: Any) -> None:
        """Do nothing: earlier work is done."""

    def record_event(self, *_args: Any) -> "_Stream":
        """Return an event that is over."""
        return self

    wait_stream = wait_event = record = synchronize = wait


def _to_host(counts: Any, *, as_numpy: bool = False, **_: Any) -> Any:
    """Return counts of tokens as Megatron copies them from a GPU, for collectives."""
    return counts.numpy() if as_numpy and isinstance(counts, torch.Tensor) else counts


def _gather_uneven(mine: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Gather tensors of unequal lengths, which gloo refuses."""
    whole = mine.new_empty(sum(sizes), *mine.shape[1:])
    for rank, part in enumerate(whole.split(sizes)):
        if rank == group.rank():
            part.copy_(mine)
        dist.broadcast(part, dist.get_global_rank(group, rank), group=group)
    return whole


def _reduce_uneven(whole: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Add up tensors over ranks and return this rank's part of unequal length."""
    total = whole.clone()
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].contiguous()


def _with_uneven(even: Callable[..., Any], uneven: Callable[..., Any]) -> Callable[..., Any]:
    """Return a collective of Megatron's that also takes unequal lengths."""

    def run(tensor: torch.Tensor, group: Any, sizes: Any = None, *others: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, sizes, *others)
        return uneven(tensor, group, sizes)

    return run


@functools.cache  # once in a process
def _stand_in_for_cuda() -> tuple[TorchFunctionMode, int]:
    """Replace CUDA; returns the mode that does it for devices and types, and its place."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as tracker
    from megatron.core.transformer.moe import token_dispatcher

    cpu, stream = torch.device("cpu"), _Stream()
    functions = {
        "current_device": lambda: cpu,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "is_current_stream_capturing": lambda: False,
    }
    torch.cuda.__dict__.update(functions)
    tracker._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    for name, uneven in (
        ("_gather_along_first_dim", _gather_uneven),
        ("_reduce_scatter_along_first_dim", _reduce_uneven),
    ):
        setattr(mappings, name, _with_uneven(getattr(mappings, name), uneven))
    return _CpuForCuda().__enter__(), torch._C._len_torch_function_stack()
