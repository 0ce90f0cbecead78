"""Held-out evaluation with the sampler of `evaluation`."""

import time

import torch

from agrpo_megatron.megatron.network import Network
from agrpo_megatron.settings import evaluation_sampling
from agrpo_megatron.training.session import (
    EVALUATION_IDS,
    Session,
    answer,
    reward_metrics,
    sample_records,
)


def evaluate(session: Session, network: Network, *, iteration: int, stage: str) -> dict[str, float]:
    """Complete all held-out problems, log accuracy and samples, and return the metrics.

    Called by every rank; data-parallel ranks share the problems.

    Args:
        stage: "before", "interval" or "after" the reinforcement learning.
    """
    started = time.perf_counter()
    problems = session.task.problems("eval")
    ids = EVALUATION_IDS + torch.arange(len(problems), device=network.ranks.device)
    sampling = evaluation_sampling(session.settings)
    answers = answer(session, network, problems, ids, sampling=sampling, split="eval")
    metrics = reward_metrics(answers.rewards)
    record = {
        "phase": "eval",
        "iteration": iteration,
        "stage": stage,
        "problems": len(problems),
        **metrics,
        "time/evaluation": time.perf_counter() - started,
    }
    session.log.metrics(record)
    samples = sample_records(session, problems, answers)
    session.log.samples(samples, phase="eval", iteration=iteration, stage=stage)
    session.view.evaluation(record)
    return record
