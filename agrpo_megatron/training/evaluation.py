"""Held-out evaluation with the sampler of `evaluation`."""

import time

import torch

from agrpo_megatron.megatron.model import MaskedDiffusionModel
from agrpo_megatron.settings import evaluation_sampling
from agrpo_megatron.training.session import (
    EVALUATION_IDS,
    Session,
    grade,
    reward_metrics,
    reward_sums,
    sample_prompts,
    sample_records,
    sum_over_ranks,
    task_prompts,
)


def evaluate(
    session: Session, network: MaskedDiffusionModel, *, iteration: int, stage: str
) -> dict[str, float]:
    """Complete all held-out problems, log accuracy and samples, and return the metrics.

    Called by every rank; data-parallel ranks share the problems.

    Args:
        stage: "before", "interval" or "after" the reinforcement learning.
    """
    started = time.perf_counter()
    problems = session.task.problems("eval")
    mine = session.my_share(len(problems))
    chosen = [problems[i] for i in mine]
    ids = EVALUATION_IDS + torch.tensor(mine, dtype=torch.int64, device=session.ranks.device)
    sampling = evaluation_sampling(session.settings)
    trajectory, _ = sample_prompts(
        session, network, task_prompts(session, chosen), ids, sampling=sampling
    )
    rewards = grade(session, chosen, trajectory)
    metrics = reward_metrics(sum_over_ranks(session, reward_sums(rewards)))
    record = {
        "phase": "eval",
        "iteration": iteration,
        "stage": stage,
        "problems": len(problems),
        **metrics,
        "time/evaluation": time.perf_counter() - started,
    }
    session.log.metrics(record)
    samples = sample_records(session, chosen, trajectory, rewards)
    session.log.samples(samples, phase="eval", iteration=iteration, stage=stage)
    session.view.evaluation(record)
    return record
