"""Process groups: started once, handed on as a record; nothing below this layer reads a global."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from agrpo_megatron.megatron.platform import prepare_platform
from agrpo_megatron.settings import Settings


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the layout."""

    rank: int
    world_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    tensor_rank: int
    tensor_size: int
    data_group: dist.ProcessGroup
    data_rank: int
    data_size: int

    @property
    def is_main(self) -> bool:
        """Say whether this rank writes files and speaks to the user."""
        return self.rank == 0


def world_size() -> int:
    """Return how many ranks were started, as the launcher tells; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_ranks(settings: Settings) -> Ranks:
    """Prepare the platform and build all process groups; called once, by every rank."""
    device = prepare_platform(settings.run.threads)
    if not dist.is_initialized():
        _join_world(device, settings.run.timeout)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.parallel.tensor,
        distributed_timeout_minutes=max(1, round(settings.run.timeout / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(settings.run.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    assert groups.tp is not None and groups.dp is not None
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tensor_group=groups.tp,
        tensor_rank=groups.tp.rank(),
        tensor_size=settings.parallel.tensor,
        data_group=groups.dp,
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
    )


def stop_ranks() -> None:
    """Tear all process groups down; called by every rank."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_world(device: torch.device, timeout: float) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit
        )
