"""How fast the ranks of a run are assumed to be, or were measured to be."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.hardware.machine import look
from agrpo_megatron.hardware.rates import GPUS, TERA, Rate, device_rate, published_rate
from agrpo_megatron.reports.read import Row, read_run
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.resilience.limits import LEARNED

MFU = 0.4  # share of the peak that runs of this size reach elsewhere; not measured here on a GPU
GPU = "H100 SXM"  # assumed where settings are for GPUs and this machine has none
LEAST_MFU, LEAST_TERA = 1e-4, 1e-6  # less would be a slip, and its hours no number
SKIPPED = 1  # iterations of a measured run: the first one compiles and allocates
LEAST = 3  # iterations of a run that measure anything


@dataclass(frozen=True)
class Speed:
    """FLOP/s of one rank in each part of a run, with the assumption that it rests on."""

    rollout: float
    update: float
    text: str


@dataclass(frozen=True)
class Assumed:
    """What the user wants a forecast to assume."""

    rate: str | None = None  # a GPU's name, `cpu`, or TFLOP/s of one rank
    mfu: float | None = None  # share of that rate; None: 0.4
    measured: Path | None = None  # a run, in place of both


def speed_of(assumed: Assumed, precision: str, *, has_gpus: bool = True) -> Speed:
    """Return the measured speed of a run, or the peak rate of a device times a utilisation.

    Without a given rate it is that of this machine's GPU, else of this CPU for float32, else of an
    H100.

    Args:
        has_gpus: false for a job on CPUs.

    Raises:
        ValueError: no such rate, share or run.
    """
    if assumed.measured is not None:
        if assumed.rate is not None or assumed.mfu is not None:
            raise ValueError("--measured replaces --rate and --mfu; leave them out")
        return _measured(assumed.measured)
    share, rate = MFU if assumed.mfu is None else assumed.mfu, assumed.rate
    if not LEAST_MFU <= share <= 1:
        raise ValueError(
            f"--mfu={share:g} must be from {LEAST_MFU:g} to 1; use for example {MFU:g}"
        )
    found = _given(rate, precision) if rate is not None else _device(precision, has_gpus=has_gpus)
    speed = share * found.flops
    return Speed(speed, speed, f"{found.text}, at {100 * share:.3g} % utilisation")


def measured_rows(run: Path) -> tuple[int, tuple[Row, ...]]:
    """Return the ranks of a run, and the metrics of its iterations after the first.

    Raises:
        ValueError: it is no run, or had too few iterations.
    """
    said, path = f"--measured={run}", run / LAUNCH_FOLDER / LEARNED
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))["world_size"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{said} is not a run that was trained: {path} cannot be read") from None
    rows = read_run(run).rl[SKIPPED:]
    if len(rows) < LEAST:
        raise ValueError(
            f"{said} has {len(rows)} iterations after the first; at least {LEAST} are needed"
        )
    return ranks, rows


def _measured(run: Path) -> Speed:
    """Return the FLOP/s of one rank that a run reached in rollouts and updates."""
    said, (ranks, rows) = f"--measured={run}", measured_rows(run)
    updates = _sum(rows, "update_flops")
    rollouts = _sum(rows, "flops") - updates - _sum(rows, "measuring_flops")
    if rollouts <= 0 or updates <= 0:
        raise ValueError(f"{said} made no rollouts or no updates, so it measures no speed of them")
    rollout = rollouts / (ranks * _sum(rows, "timing/rollout"))
    update = updates / (ranks * _sum(rows, "timing/update"))
    what = f"{_tera(rollout)} in rollouts and {_tera(update)} in updates of each rank"
    return Speed(rollout, update, f"{what}, measured by {run} in {len(rows)} iterations")


def _sum(rows: Sequence[dict], key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows)


def _tera(flops: float) -> str:
    return f"{flops / TERA:.3g} TFLOP/s" if flops >= TERA else f"{flops / 1e9:.3g} GFLOP/s"


def _given(rate: str, precision: str) -> Rate:
    if rate.lower() == "cpu":
        return _cpu(precision)
    if found := published_rate(rate, precision):
        return found
    try:
        tera = float(rate)
    except ValueError:
        tera = 0.0
    if not LEAST_TERA <= tera < float("inf"):
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ValueError(
            f"--rate={rate} has no published {precision} rate; give TFLOP/s of one rank such as "
            f"989, cpu, or one of {known}"
        )
    return Rate(tera * TERA, f"{tera:g} TFLOP/s as given")


def _device(precision: str, *, has_gpus: bool) -> Rate:
    gpu = look().gpu if has_gpus else None
    if gpu is not None and (found := device_rate(precision, gpu=gpu)):
        return found
    if precision == "fp32" or not has_gpus:
        return _cpu(precision)
    found = published_rate(GPU, precision)
    assert found is not None
    return found


def _cpu(precision: str) -> Rate:
    found = device_rate(precision, gpu=None)
    assert found is not None
    return found
