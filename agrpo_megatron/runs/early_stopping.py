"""Early stopping, by a metric of evaluations or a budget of FLOPs; the best evaluation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agrpo_megatron.config.settings import TrainSettings
from agrpo_megatron.runs.progress import Progress


def with_early_stop(done: Progress, scores: Mapping[str, Any], settings: TrainSettings) -> Progress:
    """Return the progress after an evaluation; `stopped` is the reason to end the run, if any.

    It depends only on the metrics, which are the same on every rank.

    Raises:
        ValueError: the evaluation has no metric `train.stop_metric`.
    """
    name, value = settings.stop_metric, None
    if name is not None:
        value = metric(scores, name, key="train.stop_metric")
        done = _of_metric(done, name)
        is_best = done.stop_best is None or value > done.stop_best
        best, waited = (value, 0) if is_best else (done.stop_best, done.stop_waited + 1)
        done = replace(done, stop_best=best, stop_waited=waited)
    reason = _reason(done, value, settings)
    return done if reason is None else replace(done, stopped=reason)


def still_stopped(done: Progress, settings: TrainSettings) -> str | None:
    """Return why a run that ended early stays ended under these settings; None if it may resume."""
    name = settings.stop_metric
    if done.stopped is None or name is None:
        return _reason(done, None, settings) if done.stopped else None
    return _reason(_of_metric(done, name), done.scores.get(name), settings)


def _of_metric(done: Progress, name: str) -> Progress:
    """Return the progress under a metric; a changed metric starts without a best value."""
    if done.stop_metric not in (None, name):
        done = replace(done, stop_best=None, stop_waited=0)
    return replace(done, stop_metric=name)


def _reason(done: Progress, value: float | None, settings: TrainSettings) -> str | None:
    """Return why a run ends early, where its metric has a value; None if it does not."""
    name, target, patience = settings.stop_metric, settings.stop_target, settings.stop_patience
    if is_spent(done, settings):
        return f"{done.flops:.4g} FLOPs: train.flops={settings.flops:g}"
    if name is None:
        return None
    if target is not None and value is not None and value >= target:
        return f"{name} is {value:.4g}: train.stop_target={target:g}"
    if patience is None or done.stop_waited < patience:
        return None
    return f"{name} was never above {done.stop_best:.4g} again: train.stop_patience={patience}"


def with_best(done: Progress, scores: Mapping[str, Any], name: str) -> tuple[Progress, bool]:
    """Return the progress with the best value of a metric so far, and whether it is of `scores`.

    A best value of another metric, of before a resume, does not count.

    Raises:
        ValueError: the evaluation has no such metric.
    """
    best = done.best if done.best_metric in (None, name) else None
    value = metric(scores, name, key="checkpoint.best")
    is_best = best is None or value > best
    return replace(done, best=value if is_best else best, best_metric=name), is_best


def is_spent(done: Progress, settings: TrainSettings) -> bool:
    """Return whether the iterations so far reach the budget `train.flops`."""
    return settings.flops is not None and done.flops >= settings.flops


def check_metrics(scores: Mapping[str, Any], names: Mapping[str, str | None]) -> None:
    """Check, before training, that evaluations have the metrics in `names`, by setting.

    Raises:
        ValueError: an evaluation lacks one of them.
    """
    for key, name in names.items():
        if name is not None:
            metric(scores, name, key=key)


def metric(scores: Mapping[str, Any], name: str, *, key: str) -> float:
    """Return a metric of an evaluation by its name.

    Raises:
        ValueError: no metric has this name; the message lists the metrics.
    """
    if name not in scores:
        known = ", ".join(key for key, value in scores.items() if isinstance(value, float))
        raise ValueError(f"{key}={name}: not an evaluation metric; use {known}")
    return float(scores[name])
