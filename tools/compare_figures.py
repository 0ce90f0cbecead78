"""The figures of a comparison."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from compare_results import Finished, Summary, by_accuracy

from agrpo_megatron.reports.plots.estimators import Curve, Finals, Look, write_curves, write_finals
from agrpo_megatron.reports.plots.variance import write_variance


def write_figures(folder: Path, summaries: Sequence[Summary], baseline: str) -> list[Path]:
    """Write all figures of a task; returns their paths."""
    ordered = by_accuracy(summaries)
    found = {
        each.name: Finals(
            [run.final for run in each.runs],
            each.final.mean,
            (each.final.low, each.final.high),
            None if (d := each.difference) is None else (d.mean, (d.low, d.high)),
        )
        for each in ordered
    }
    start = float(np.mean([run.start for each in ordered for run in each.runs]))
    written = [write_finals(found, folder / "finals.png", baseline=baseline, start=start)]
    if baseline in found:
        for name, cost, along in (("flops", 0, "FLOPs"), ("cpu", 1, "CPU seconds")):
            curves = {s.name: [_accuracy(run, cost) for run in s.runs] for s in ordered}
            path, look = folder / f"accuracy_{name}.png", Look("held-out accuracy", along)
            written.append(write_curves(curves, path, baseline=baseline, look=look))
        curves = {s.name: [_entropy(run) for run in s.runs] for s in ordered}
        look = Look("entropy, nats a token", "iterations", percent=False, smoothed=True)
        written.append(write_curves(curves, folder / "entropy.png", baseline=baseline, look=look))
    variance = folder / "variance" / "variance.json"
    if variance.exists():
        rows = json.loads(variance.read_text(encoding="utf-8"))["rows"]
        written.append(write_variance(rows, folder / "variance.png"))
    return written


def _accuracy(run: Finished, cost: int) -> Curve:
    """Return held-out accuracy against a cost of training up to each evaluation."""
    x = [run.costs[iteration][cost] for iteration, _ in run.evaluated]
    return np.array(x), np.array([value for _, value in run.evaluated])


def _entropy(run: Finished) -> Curve:
    return np.arange(1.0, 1 + len(run.entropies)), np.array(run.entropies)
