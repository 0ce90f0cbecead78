"""The groups of the layout: those that Megatron does not make, and how many there are."""

import os

import torch.distributed as dist
from megatron.core import parallel_state

from agrpo_megatron.config.settings import ParallelSettings, RunSettings, Settings
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from tests.ranks import run_ranks
from tests.training.tiny import tiny


def _timeouts():
    """Return the longest wait, in seconds, of the group that is not made by Megatron."""
    settings = Settings(
        run=RunSettings(timeout=77, threads=1), parallel=ParallelSettings(pipeline=2)
    )
    ranks = start_ranks(settings)
    assert ranks.replica is not None
    backend = ranks.replica._get_backend(ranks.device)
    stop_ranks()
    return backend.options._timeout.total_seconds()


def test_a_group_of_our_own_waits_as_long_as_the_run_says():
    assert run_ranks(2, _timeouts) == 2 * [77.0]


def _counts():
    """Return the numbers of groups and of threads of this process."""
    return len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task"))


def _is_right(ranks):
    """Return whether each group has its layout's size, and Megatron uses the same groups."""
    groups, layout = ranks.groups, ranks.parallel
    return (
        (ranks.tensor.size, ranks.pipeline.size) == (layout.tensor, layout.pipeline)
        and groups.tp is parallel_state.get_tensor_model_parallel_group()
        and groups.pp is parallel_state.get_pipeline_model_parallel_group()
        and groups.dp_cp is parallel_state.get_data_parallel_group(with_context_parallel=True)
        and parallel_state.get_pipeline_model_parallel_world_size() == layout.pipeline
        and parallel_state.get_tensor_model_parallel_rank() == ranks.tensor.rank
    )


def _starts():
    """Start ten times, then in another layout, then as before; return what was counted."""
    here, there = tiny("parallel=tp2", "rollout.parallel=pp2"), tiny("parallel=pp2")
    counts, right = [], []
    for settings in [here] * 10 + [there, here]:
        ranks = start_ranks(settings)
        dist.barrier(parallel_state.get_data_parallel_group_gloo())  # type: ignore[arg-type]
        right.append(_is_right(ranks))
        counts.append(_counts())
    stop_ranks()
    left = _counts()[0]
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    right.append(_is_right(start_ranks(tiny())))
    return counts, right, left


def test_starting_again_makes_no_more_groups():
    for counts, right, left in run_ranks(2, _starts):
        assert counts[1:] == 11 * [counts[0]]
        assert all(right) and left == 0
