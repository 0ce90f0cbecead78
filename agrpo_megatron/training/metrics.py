"""What is said of graded completions: means, accuracies, and which rewards failed."""

from collections import Counter
from collections.abc import Sequence

import torch

from agrpo_megatron.types import Problem, Reward

SHOWN = 3  # kinds of failure that a warning names
LONGEST = 80  # characters of each


def reward_metrics(rewards: Sequence[Reward], problems: Sequence[Problem]) -> dict[str, float]:
    """Return mean and spread of the score, the accuracy, and the mean of each named part.

    The tasks of a mixture are told apart by their labels as well.
    """
    scores = torch.tensor([reward.score for reward in rewards], dtype=torch.float64)
    names = sorted({name for reward in rewards for name in reward.parts})
    parts = {
        f"reward/{name}": sum(r.parts.get(name, 0.0) for r in rewards) / len(rewards)
        for name in names
    }
    return {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(correction=0)),
        "failed_rewards": sum(reward.failure is not None for reward in rewards),
        "accuracy": sum(reward.correct for reward in rewards) / len(rewards),
        **parts,
        **_by_task(rewards, problems),
    }


def failure_warning(rewards: Sequence[Reward], score: float) -> str | None:
    """Say how many rewards failed, and why; None where none did."""
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
        mine = [r for p, r in zip(problems, rewards, strict=True) if p.task == label]
        found[f"accuracy/{label}"] = sum(r.correct for r in mine) / len(mine)
        found[f"reward/{label}/mean"] = sum(r.score for r in mine) / len(mine)
    return found
