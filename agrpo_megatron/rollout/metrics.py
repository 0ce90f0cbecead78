"""Metrics of graded completions: means, accuracies, failed rewards, lengths and entropies."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import batched
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.estimators import timesteps
from agrpo_megatron.rollout.session import Run
from agrpo_megatron.trajectories import parts_of_steps, step_parts
from agrpo_megatron.types import Problem, Reward, Rollout, Trajectory

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


def pass_at_group(rewards: Sequence[Reward], group_size: int) -> float:
    """Return the share of groups with a correct completion; members of a group are neighbours."""
    groups = [any(reward.correct for reward in own) for own in batched(rewards, group_size)]
    return sum(groups) / len(groups)


def rollout_metrics(run: Run, rollout: Rollout) -> dict[str, Any]:
    """Return metrics of completions, their sampling and their advantages; equal on every rank."""
    trajectory, gains = rollout.trajectory, rollout.advantages
    sampled = trajectory.is_sampled
    rule = run.settings.algorithm.live_steps
    live = timesteps.live_steps(trajectory, eos_id=run.eos_id, rule=rule)
    lengths = text_lengths(trajectory.tokens, run.tokenizer.stop_ids)
    return {
        "entropy": float(trajectory.entropies.sum()) / max(1.0, float(sampled.sum())),
        "by_step/entropy": entropy_by_step(trajectory),
        "live_steps/mean": float(live.double().mean()),
        "completions/mean_length": float(lengths.double().mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/empty_fraction": float((lengths == 0).double().mean()),
        "completions/truncated_fraction": float(
            (lengths == trajectory.tokens.shape[1]).double().mean()
        ),
        "advantage/min": float(gains.min()),
        "advantage/max": float(gains.max()),
        "zero_advantage_fraction": float((gains == 0).double().mean()),
    }


def text_lengths(tokens: Tensor, stop_ids: Collection[int]) -> Tensor:
    """Return how many tokens [R] of completions [R, C] precede the first stop token; C without."""
    stops = torch.tensor(sorted(stop_ids), device=tokens.device)
    return (torch.isin(tokens, stops).long().cumsum(1) == 0).sum(1)


def entropy_by_step(trajectory: Trajectory) -> list[float | None]:
    """Return the mean entropy in nats of the tokens that each part of the denoising drew.

    None stands for a part that drew no token.
    """
    sampled = trajectory.is_sampled
    part, means = parts_of_steps(trajectory), list[float | None]()
    for number in range(step_parts(trajectory)):
        mine = sampled & (part == number)
        count = int(mine.sum())
        # A sum of all in a fixed order: the same bits on every rank and after a resume.
        means.append(float((trajectory.entropies * mine).sum()) / count if count else None)
    return means


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
