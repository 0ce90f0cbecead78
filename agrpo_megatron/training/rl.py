"""Reinforcement learning: roll out, grade, estimate, update; one iteration, top to bottom."""

import time
from collections.abc import Callable
from typing import Any

import torch

from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.resilience.stragglers import Stragglers
from agrpo_megatron.rollout.ahead import Ahead
from agrpo_megatron.rollout.data_order import epochs
from agrpo_megatron.rollout.dynamic_sampling import sample_groups
from agrpo_megatron.rollout.metrics import rollout_metrics
from agrpo_megatron.rollout.records import sample_records
from agrpo_megatron.rollout.session import Run, Session
from agrpo_megatron.runs.stored_rollouts import sampling_number
from agrpo_megatron.training.alarms import FIRST, Alarms
from agrpo_megatron.training.measures.iteration import Measures
from agrpo_megatron.training.measures.timeline import record_timeline
from agrpo_megatron.training.nan_guard import NanGuard
from agrpo_megatron.training.update import update_policy
from agrpo_megatron.training.variance.auto import AutoDraws
from agrpo_megatron.types import Rollout


def run_rl(
    session: Session,
    engine: Engine,
    reference: Network | None,
    *,
    start: int,
    auto: AutoDraws | None,
    sampled_by: str | None,
    on_iteration_end: Callable[[int, int, str | None], bool],
) -> None:
    """Iterate from `start` (iterations finished) to `train.iterations`; called by every rank.

    Args:
        reference: the frozen reference policy, where `kl_coefficient` needs one.
        auto: chooses the number of draws, where `algorithm.mc_samples` is auto.
        sampled_by: see `Ahead`.
        on_iteration_end: called after each iteration with the number finished, its FLOPs and
            `Ahead.sampled_by`: evaluates, saves, and returns whether to continue.

    Raises:
        Stopped: the ranks agreed to stop, within a rollout or in `on_iteration_end`.
    """
    run, output, sections = session.run, session.output, session.safety.sections
    guard, stragglers = NanGuard(session, "rl"), Stragglers()
    first = output.log.first_values("rl", "entropy", iterations=min(start, FIRST))
    alarms = Alarms(run.settings, output, entropies=first)
    measures = Measures(run, last=output.log.last("rl"))
    ahead = None
    if run.settings.train.async_steps:
        ahead = Ahead(session, engine, sampled_by=sampled_by)
    for iteration in range(start, run.settings.train.iterations):
        sections.at("rl", iteration + 1)
        measures.begin()
        rollout, rollout_metrics = collect_rollout(session, engine, iteration, ahead=ahead)
        groups = run.settings.algorithm.prompts_per_iteration
        sampled = 1 + rollout_metrics.get("rollout/resampled_groups", 0) / groups
        of = session, engine, rollout, reference
        metrics, tokens = _updated(*of, guard=guard, auto=auto, sampled=sampled)
        measured = metrics.get("measuring_flops", 0.0)
        tokens, counted = tokens + rollout_metrics.pop("tokens"), rollout_metrics.pop("counted")
        record: dict[str, Any] = {
            "phase": "rl",
            "iteration": iteration + 1,
            "epoch": _epoch(run, iteration + 1),
            **rollout_metrics,
            **metrics,
            "flops": rollout_metrics["flops"] + metrics["flops"] + measured,
            "update_flops": metrics["flops"],
            **alarms.check(iteration + 1, {**rollout_metrics, **metrics}),
            **stragglers.report(sections.take(), run.ranks, warn=output.view.warn),
        }
        record |= measures.end(record, tokens=tokens, counted=counted)
        output.log.metrics(record)
        output.view.rl(record)
        next_by = None if ahead is None else ahead.sampled_by
        goes_on = on_iteration_end(iteration + 1, int(record["flops"]), next_by)
        record_timeline(session)
        if not goes_on:
            break


def _updated(
    session: Session,
    engine: Engine,
    rollout: Rollout,
    reference: Network | None,
    *,
    guard: NanGuard,
    auto: AutoDraws | None,
    sampled: float,
) -> tuple[dict[str, Any], int]:
    """Update the weights; return metrics, and the tokens of all ranks.

    Args:
        sampled: groups that the iteration sampled, over those that it kept.
    """
    sections, updating = session.safety.sections, session
    if auto is not None:
        with sections("update"):
            updating = auto.before_update(session, engine, rollout, reference, sampled=sampled)
    started = time.perf_counter()
    with sections("update"):
        metrics, tokens = update_policy(updating, engine, rollout, reference, guard=guard)
    metrics["timing/update"] = time.perf_counter() - started
    if auto is not None:
        metrics |= auto.after_update(metrics, tokens)
    return metrics, tokens


def _epoch(run: Run, iterations: int) -> float:
    """Return the passes over the training problems in so many iterations."""
    algorithm = run.settings.algorithm
    rounds = sampling_number(iterations, 0, algorithm)
    return epochs(run.task.shares, rounds * algorithm.prompts_per_iteration)


def collect_rollout(
    session: Session, engine: Engine, iteration: int, *, ahead: Ahead | None = None
) -> tuple[Rollout, dict[str, Any]]:
    """Sample and grade a group of completions of each problem; the same on every rank.

    Cached completions are not sampled again.

    Args:
        ahead: has sampled them, and samples the next iteration's; None: they are sampled now.
    """
    run, take = session.run, ahead and ahead.groups
    groups = take(iteration) if take else sample_groups(session, engine, iteration)
    algorithm, graded, device = run.settings.algorithm, groups.rollouts, run.ranks.device
    scores = torch.tensor([reward.score for reward in graded.rewards], device=device)
    gains = advantages(scores, algorithm)
    correct = torch.tensor([reward.correct for reward in graded.rewards], device=device)
    staleness = iteration - graded.trajectory.weights_version if ahead else 0
    rollout = Rollout(graded.trajectory, scores, correct, gains, graded.experts, staleness)
    records = sample_records(run, groups.problems, graded, split="train")
    session.output.log.samples(records, phase="rl", iteration=iteration + 1)
    room = graded.passes * run.settings.train.token_budget
    has_pipeline = engine.ranks.for_rollouts.pipeline.size > 1
    return rollout, {
        **groups.metrics,
        **rollout_metrics(run, rollout),
        **({"rollout/bubble": graded.bubble} if has_pipeline else {}),
        **({"rollout/packing_efficiency": graded.tokens / room} if room else {}),
        **({"rollout/staleness": staleness * algorithm.updates_per_iteration} if ahead else {}),
        **graded.seconds,
        "tokens": groups.tokens,
        "counted": groups.counted,
    }
