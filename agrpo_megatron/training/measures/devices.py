"""Peak memory of an iteration, and the share of the devices' peak rate that it used."""

import resource
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from agrpo_megatron.hardware import machine
from agrpo_megatron.hardware.rates import Rate, device_rate
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.reports.text import counted

GIB = 2**30


def device_text(device: torch.device) -> str:
    """Return the device of a rank in words, such as "NVIDIA H200" or "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def forget_peak(ranks: Ranks) -> None:
    """Reset the peak of GPU memory."""
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)


def memory_peaks(ranks: Ranks) -> dict[str, float]:
    """Return the peaks of the rank that used most, in GiB; called by every rank.

    Of a GPU since `forget_peak`: what tensors took, and what torch reserved. Of the host since the
    process started: its resident memory, without worker processes.
    """
    peaks = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if ranks.device.type == "cuda":
        peaks["memory/allocated_peak"] = torch.cuda.max_memory_allocated(ranks.device)
        peaks["memory/reserved_peak"] = torch.cuda.max_memory_reserved(ranks.device)
    values = torch.tensor([*peaks.values()], dtype=torch.float64, device=ranks.device) / GIB
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(peaks, values.tolist(), strict=True))


def rate_of(precision: str, ranks: Ranks) -> Rate | None:
    """Return the peak rate of a device; None if it is not known, and on ranks that log nothing."""
    return device_rate(precision, gpu=machine.look().gpu) if ranks.is_main else None


def rate_note(precision: str, ranks: Ranks) -> str:
    """Return a sentence on the rate that `utilisation` divides by."""
    rate = rate_of(precision, ranks)
    if rate is None:
        return f"no peak rate of {machine.look().gpu} is known, so perf/mfu_* are not logged"
    return f"perf/mfu_* are shares of {rate.text}"


def utilisation(record: Mapping[str, Any], ranks: Ranks, rate: Rate | None) -> dict[str, float]:
    """Return model FLOPs utilisation of rollouts and updates, of all devices; empty if unknown.

    Counted FLOPs over time and peak rate; recomputed activations are not counted.
    """
    if rate is None:
        return {}
    whole, update = record["flops"], record["update_flops"]
    measuring = record.get("measuring_flops", 0.0)  # in neither of the two times
    work = {"rollout": whole - update - measuring, "update": update}
    spent = {name: record.get(f"timing/{name}", 0.0) for name in work}
    return {
        f"perf/mfu_{name}": flops / (spent[name] * rate.flops * ranks.world_size)
        for name, flops in work.items()
        if flops and spent[name]
    }
