"""Process groups: built once, passed on as a record; lower layers read no global state."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from agrpo_megatron.config.parallel import model_ranks
from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.megatron.platform import prepare_kernels, prepare_platform
from agrpo_megatron.megatron.precision import token_multiple


@dataclass(frozen=True)
class Axis:
    """One axis of the layout: the ranks that differ only in it, and this rank's index."""

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Ranks:
    """This rank's place in a layout."""

    rank: int
    world_size: int
    device: torch.device
    parallel: ParallelSettings
    groups: ProcessGroupCollection  # Megatron's own record of the same groups
    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    data_context: Axis  # data x context: the ranks with the same weights, except experts
    expert: Axis  # the ranks that share the experts of a layer
    expert_tensor: Axis  # the ranks that share each expert
    replica: dist.ProcessGroup | None  # the ranks of one model copy, over gloo; None: one rank
    token_multiple: int = 1  # packed tokens of a rank are padded to it
    rollout_layout: "Ranks | None" = None  # if rollouts have a separate layout

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints to the user."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so has logits."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def speaks_for_replica(self) -> bool:
        """Whether this rank is the first of its replica."""
        return self.tensor.rank == self.pipeline.rank == self.context.rank == 0

    def split_of(self, expert: int | None) -> Axis:
        """Return the ranks that split a matrix, of an expert or not."""
        return self.tensor if expert is None else self.expert_tensor

    @property
    def for_rollouts(self) -> "Ranks":
        """Return the layout that samples."""
        return self.rollout_layout or self


def world_size() -> int:
    """Return the number of ranks, set by the launcher; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_ranks(settings: Settings) -> Ranks:
    """Prepare the platform and build all process groups; called once, by every rank."""
    device = prepare_platform(settings.run.threads)
    prepare_kernels(settings.kernels, device)
    if not dist.is_initialized():
        _join_world(device, settings.run.timeout)
    rollout = None
    if settings.rollout_layout != settings.parallel:
        rollout = _lay_out(settings.rollout_layout, settings, device)
    # The training layout comes last: it remains Megatron's global one.
    ranks = _lay_out(settings.parallel, settings, device)
    tensor_parallel.model_parallel_cuda_manual_seed(settings.run.seed)
    return replace(ranks, rollout_layout=rollout)


def stop_ranks() -> None:
    """Destroy all process groups; called by every rank."""
    _made.clear()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects[Item](mine: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """Return each rank's value, by rank; called by all ranks of the group."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def from_last_stage[Item](mine: Item, ranks: Ranks) -> Item:
    """Return the value that the last pipeline stage has; called by every rank of a pipeline."""
    shared: list[Any] = [mine]
    if ranks.pipeline.size > 1:
        last = dist.get_process_group_ranks(ranks.pipeline.group)[-1]
        dist.broadcast_object_list(shared, src=last, group=ranks.pipeline.group)
    return shared[0]


def on_main[Item](ranks: Ranks, compute: Callable[[], Item]) -> Item:
    """Return what the main rank computes, on every rank; called by every rank.

    Raises:
        ValueError: the main rank's, on every rank: the others would wait for it.
    """
    shared: list[Any] = [None]
    if ranks.is_main:
        try:
            shared = [compute()]
        except ValueError as error:
            shared = [error]
    dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return shared[0]


def _lay_out(parallel: ParallelSettings, settings: Settings, device: torch.device) -> Ranks:
    """Return this rank's place in a layout, and make its groups Megatron's global ones.

    A layout that this process had before gets the groups from then: each has threads and, on
    GPUs, channels of its own.
    """
    timeout, world = settings.run.timeout, dist.group.WORLD
    sizes = (parallel.tensor, parallel.pipeline, parallel.virtual, parallel.context)
    key = (world, timeout, *sizes, parallel.expert, parallel.expert_tensor)
    if key not in _made:
        parallel_state.__dict__.update(_NO_GROUPS)
        replica = _make_groups(parallel, timeout)
        _made[key] = _megatron_globals(), replica
    megatron, replica = _made[key]
    parallel_state.__dict__.update(megatron)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        parallel=parallel,
        groups=groups,
        tensor=_axis(groups.tp),
        pipeline=_axis(groups.pp),
        context=_axis(groups.cp),
        data=_axis(groups.dp),
        data_context=_axis(groups.dp_cp),
        expert=_axis(groups.ep),
        expert_tensor=_axis(groups.expt_tp),
        replica=replica,
        token_multiple=token_multiple(settings.precision),
    )


def _make_groups(parallel: ParallelSettings, timeout: float) -> dist.ProcessGroup | None:
    """Let Megatron make the groups of a layout; returns the replica's, which is none of them."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
    )
    if model_ranks(parallel) == 1:
        return None
    numbers = gather_objects(parallel_state.get_data_parallel_rank())
    limit, mine = datetime.timedelta(seconds=timeout), numbers[dist.get_rank()]
    made: dict[int, Any] = {}
    for number in sorted(set(numbers)):
        members = [rank for rank, other in enumerate(numbers) if other == number]
        made[number] = dist.new_group(members, timeout=limit, backend="gloo")
    return made[mine]


def _megatron_globals() -> dict[str, Any]:
    """Return the values by which Megatron knows the current layout, by name."""
    return {
        name: value
        for name, value in parallel_state.__dict__.items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _axis(group: dist.ProcessGroup | None) -> Axis:
    assert group is not None
    return Axis(group, group.rank(), group.size())


def _join_world(device: torch.device, timeout: float) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout)
    is_single = "RANK" not in os.environ
    place: Any = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if is_single else {}
    dist.init_process_group(backend, timeout=limit, **place)


_NO_GROUPS = _megatron_globals()
# By layout: Megatron's globals, and the group of the replica.
_made: dict[tuple[Any, ...], tuple[dict[str, Any], dist.ProcessGroup | None]] = {}
