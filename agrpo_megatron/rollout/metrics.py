"""Metrics of graded completions: means, accuracies, and failed rewards."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from agrpo_megatron.types import Problem, Reward

SHOWN = 3  # kinds of failure that a warning names
LONGEST = 80  # characters of each


def means(verdicts: Sequence[Reward]) -> dict[str, Any]:
    """Return accuracy, mean score, mean of each named part, and number of failed gradings."""
    count = len(verdicts)
    names = sorted({name for verdict in verdicts for name in verdict.parts})
    return {
        "accuracy": sum(verdict.correct for verdict in verdicts) / count,
        "score": sum(verdict.score for verdict in verdicts) / count,
        "parts": {name: sum(v.parts.get(name, 0.0) for v in verdicts) / count for name in names},
        "failures": sum(verdict.failure is not None for verdict in verdicts),
    }


def reward_metrics(rewards: Sequence[Reward], problems: Sequence[Problem]) -> dict[str, float]:
    """Return mean and spread of the score, the accuracy, and the mean of each named part.

    A mixture also has metrics per task, named by its label.
    """
    found = means(rewards)
    scores = torch.tensor([reward.score for reward in rewards], dtype=torch.float64)
    return {
        "reward/mean": found["score"],
        "reward/std": float(scores.std(correction=0)),
        "failed_rewards": found["failures"],
        "failed_rewards_fraction": found["failures"] / len(rewards),
        "accuracy": found["accuracy"],
        **{f"reward/{name}": value for name, value in found["parts"].items()},
        **_by_task(rewards, problems),
    }


def failure_warning(rewards: Sequence[Reward], score: float) -> str | None:
    """Return a warning about failed rewards and their reasons; None if no reward failed."""
    kinds = Counter(reward.failure[:LONGEST] for reward in rewards if reward.failure is not None)
    if not kinds:
        return None
    named = [f"{count} {kind}" for kind, count in kinds.most_common(SHOWN)]
    named += [f"{len(kinds) - SHOWN} other kinds"] if len(kinds) > SHOWN else []
    why = ", ".join(named)
    return f"{kinds.total()} of {len(rewards)} rewards failed ({why}); scored {score:g}"


def _by_task(rewards: Sequence[Reward], problems: Sequence[Problem]) -> dict[str, float]:
    found = {}
    for label in sorted({problem.task for problem in problems} - {""}):
        mine = means([r for p, r in zip(problems, rewards, strict=True) if p.task == label])
        found[f"accuracy/{label}"] = mine["accuracy"]
        found[f"reward/{label}/mean"] = mine["score"]
    return found
