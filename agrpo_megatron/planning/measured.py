"""What measured runs and benchmarks say of the speed of a rank."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.launch.speed import measured_rows
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.fit import Fit, Measured, Work, fit
from agrpo_megatron.planning.passes import rollout_passes, update_passes
from agrpo_megatron.planning.presets import open_model
from agrpo_megatron.planning.seconds import gradient_exchange
from agrpo_megatron.reports.read import Row
from agrpo_megatron.runs.progress import RUN_SETTINGS
from agrpo_megatron.scaling.forecast.work import count_flops
from agrpo_megatron.scaling.memory import worst_rank

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Point:
    """The work and the seconds of an iteration of a run."""

    rollout: Work
    update: Work
    rollout_seconds: float
    update_seconds: float
    rest: float  # seconds of each completion outside both
    rollout_share: float  # of the counted FLOPs, which ran
    update_share: float


def read_measured(files: Sequence[Path], cluster: Cluster) -> Measured:
    """Return what runs, or one benchmark, measured.

    Args:
        files: run directories or their metrics.jsonl; or the JSON of `agrpo benchmark --json`.

    Raises:
        ValueError: a file holds no such measurement.
    """
    records = [_benchmark(file) for file in files if file.is_file() and file.name != METRICS]
    if records and len(files) > 1:
        raise ValueError("--measured takes one benchmark, or runs; give a benchmark alone")
    if records:
        return _of_benchmark(records[0], files[0])
    is_cpu = cluster.device.name == "CPU"
    points = [_point(_directory(file), cluster, is_cpu=is_cpu) for file in files]
    if is_cpu:  # a clock of the process does not tell rollout and update apart
        both = [(p.rollout.plus(p.update), p.rollout_seconds + p.update_seconds) for p in points]
        rollout = update = fit(both)
    else:
        rollout = fit([(p.rollout, p.rollout_seconds) for p in points])
        update = fit([(p.update, p.update_seconds) for p in points])
    names = ", ".join(map(str, files))
    clock = "CPU seconds of the process" if is_cpu else "seconds"
    return Measured(
        rollout,
        update,
        rollout_share=_mean(points, "rollout_share"),
        update_share=_mean(points, "update_share"),
        rest=_mean(points, "rest"),
        text=f"{clock} of {_kinds(rollout)} as measured by {names}; of the counted work "
        f"{100 * _mean(points, 'rollout_share'):.0f} % of the rollout and "
        f"{100 * _mean(points, 'update_share'):.0f} % of the update ran",
        has_exchange=rollout.messages > 0 or rollout.sent > 0,
    )


def _point(run: Path, cluster: Cluster, *, is_cpu: bool) -> Point:
    """Return what a run's median iteration did."""
    ranks, rows = measured_rows(run)
    own = load(Settings, run / RUN_SETTINGS)
    model = open_model(str(run / RUN_SETTINGS), [], ranks=ranks)
    settings = replace(model.settings, parallel=own.parallel, rollout=own.rollout)
    flops = count_flops(settings, model.prompts, ())
    at = replace(cluster, ranks=ranks, measured=None)
    memory = worst_rank(settings, ranks)
    sampled = rollout_passes(settings, flops, at, memory.weights, prompts=model.prompts)
    trained = update_passes(settings, flops, at, memory.weights)
    updates = settings.algorithm.updates_per_iteration
    completions = settings.algorithm.prompts_per_iteration * settings.algorithm.group_size

    updating = _median(rows, "update_flops")
    ran = _median(rows, "flops") - updating - _median(rows, "measuring_flops")
    if ran <= 0 or updating <= 0:
        raise ValueError(f"--measured={run} made no rollouts or no updates; give another run")
    rollout, update = _median(rows, "timing/rollout"), _median(rows, "timing/update")
    rest = max(0.0, _median(rows, "timing/iteration") - rollout - update)
    if is_cpu:
        rollout, update, rest = median_seconds(run, is_cpu=True), 0.0, 0.0
    passed, learned = sampled.batches.count, trained.micro_batches * updates
    shares = ran / flops.rollout, updating / flops.update
    sampling, learning = sampled.of.work, trained.of.work
    if is_cpu:  # its clock does not run while a rank waits; sends are a part of the work
        sent = gradient_exchange(settings, at, memory).work.times(updates)
        learning = learning.times(learned * shares[1]).plus(sent)
    else:
        rollout = max(rollout / 2, rollout - passed * sampled.of.exchange)
        update = max(update / 2, update - learned * trained.of.exchange)
        sampling, learning = sampling.alone, learning.alone.times(learned * shares[1])
    return Point(
        sampling.times(passed * shares[0]),
        learning,
        rollout,
        update,
        rest / completions,
        *shares,
    )


def median_seconds(run: Path, *, is_cpu: bool) -> float:
    """Return the seconds of a run's median iteration; on a CPU those of the process.

    Raises:
        ValueError: it is no run, or had too few iterations.
    """
    return _median(measured_rows(run)[1], "timing/cpu" if is_cpu else "timing/iteration")


def _median(rows: Sequence[Row], key: str) -> float:
    return statistics.median(row.get(key, 0.0) for row in rows)


def _directory(file: Path) -> Path:
    return file.parent if file.name == METRICS else file


def _benchmark(file: Path) -> dict[str, Any]:
    """Read the last line of what `agrpo benchmark --json` printed."""
    try:
        found = json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])
        float(found["ours"]["flops"] / found["ours"]["seconds_median"])
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        raise ValueError(
            f"--measured={file} is neither a run directory nor the JSON of `agrpo benchmark`; give "
            "one of them"
        ) from None
    return found


def _of_benchmark(record: dict[str, Any], file: Path) -> Measured:
    ours = record["ours"]
    rate = Fit(ours["seconds_median"] / ours["flops"])
    text = f"{_kinds(rate)} in each phase, as measured by {file} ({record['kind']})"
    return Measured(rate, rate, rollout_share=1, update_share=1, rest=0, text=text)


def _kinds(one: Fit) -> str:
    """Return what a fit counts, in words."""
    said = [f"products at {1 / one.flops / 1e9:.4g} GFLOP/s"] if one.flops else []
    said += [f"operations at {1 / one.numbers / 1e9:.3g} G numbers/s"] if one.numbers else []
    said += [f"draws at {1 / one.drawn / 1e9:.3g} G logits/s"] if one.drawn else []
    said += [f"{1e6 * one.layers:.3g} us a layer and pass"] if one.layers else []
    said += [f"{1e6 * one.passes:.3g} us a pass"] if one.passes else []
    said += [f"{1e6 * one.messages:.3g} us a message"] if one.messages else []
    said += [f"{1e9 * one.sent:.3g} ns a byte that is sent"] if one.sent else []
    return ", ".join(said)


def _mean(points: Sequence[Point], name: str) -> float:
    return statistics.mean(getattr(point, name) for point in points)
