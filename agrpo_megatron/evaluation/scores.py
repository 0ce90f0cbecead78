"""Metrics of graded completions: accuracy, score, pass@k, and the task's own metrics."""

from collections.abc import Sequence
from typing import Any

from agrpo_megatron.evaluation.statistics import (
    bootstrap_interval,
    mean_interval,
    pass_at,
    powers_of_two,
    share_interval,
)
from agrpo_megatron.rollout.metrics import means
from agrpo_megatron.tasks import Task
from agrpo_megatron.types import Problem, Reward


def scores(
    task: Task, problems: Sequence[Problem], verdicts: Sequence[Sequence[Reward]]
) -> dict[str, Any]:
    """Return the metrics of an evaluation, ready for JSON; intervals are 95 %.

    Args:
        verdicts: of every problem, equally many: one for each completion.
    """
    samples = len(verdicts[0])
    flat = [verdict for several in verdicts for verdict in several]
    hits = [sum(verdict.correct for verdict in several) for several in verdicts]
    rates = [count / samples for count in hits]
    of_problem = [sum(verdict.score for verdict in several) / samples for several in verdicts]
    overall = means(flat)
    repeated = [problem for problem in problems for _ in range(samples)]
    found: dict[str, Any] = {
        "problems": len(problems),
        "samples": samples,
        "accuracy": overall["accuracy"],
        "accuracy_interval": list(share_interval(rates, samples)),
        "score": overall["score"],
        "score_interval": list(mean_interval(of_problem)),
        "parts": overall["parts"],
        "summary": dict(task.summary(repeated, flat)),
        "failures": overall["failures"],
    }
    if samples > 1:
        found["pass_at"] = {str(k): _pass_at(k, samples, hits) for k in powers_of_two(samples)}
    return found


def _pass_at(k: int, samples: int, hits: Sequence[int]) -> dict[str, Any]:
    chances = [pass_at(k, samples=samples, correct=count) for count in hits]
    return {"value": sum(chances) / len(chances), "interval": list(bootstrap_interval(chances))}
