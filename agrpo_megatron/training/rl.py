"""AGRPO: roll out, grade, draw denoising steps, update. One iteration, top to bottom."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from agrpo_megatron.diffusion import estimators, timesteps
from agrpo_megatron.diffusion.batches import timestep_batches
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.diffusion.losses import policy_loss
from agrpo_megatron.diffusion.packing import unscored_row
from agrpo_megatron.megatron.engine import Engine, score_rows
from agrpo_megatron.megatron.model import MaskedDiffusionModel
from agrpo_megatron.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.training.session import (
    Session,
    grade,
    pick_problems,
    reward_metrics,
    reward_sums,
    sample_prompts,
    sample_records,
    sum_over_ranks,
    task_prompts,
)
from agrpo_megatron.training.step import equal_count, optimizer_step
from agrpo_megatron.types import Rollout, StepDraws, TimestepBatch


def run_rl(
    session: Session,
    engine: Engine,
    reference: MaskedDiffusionModel | None,
    *,
    start: int,
    after: Callable[[int], None],
) -> None:
    """Iterate from `start` (finished so far) to `train.iterations`; called by every rank.

    Args:
        reference: the frozen reference policy, where `kl_coefficient` asks for one.
        after: called after each iteration with the number finished: evaluates and saves.
    """
    for iteration in range(start, session.settings.train.iterations):
        started = time.perf_counter()
        rollout, rollout_metrics = collect_rollout(session, engine, iteration)
        update_started = time.perf_counter()
        metrics, tokens = update_policy(session, engine, rollout, reference, iteration)
        now = time.perf_counter()
        tokens += rollout_metrics.pop("tokens")
        record = {
            "phase": "rl",
            "iteration": iteration + 1,
            **rollout_metrics,
            **metrics,
            "time/update": now - update_started,
            "time/iteration": now - started,
            "tokens_per_second": tokens * session.ranks.data_size / (now - started),
        }
        session.log.metrics(record)
        session.view.rl(record)
        error, limit = record["ratio/max_error"], session.settings.train.ratio_alarm
        if error > limit:
            session.view.warn(
                f"iteration {iteration + 1}: a first update's policy ratio is {error:.2e} from 1 "
                f"(train.ratio_alarm={limit}); rollout and training disagree"
            )
        after(iteration + 1)


def collect_rollout(
    session: Session, engine: Engine, iteration: int
) -> tuple[Rollout, dict[str, float]]:
    """Sample and grade a group of completions for each of this rank's problems."""
    started = time.perf_counter()
    algorithm = session.settings.algorithm
    problems = session.task.problems("train")
    count = algorithm.prompts_per_iteration
    seed = session.settings.run.seed
    picked = pick_problems(len(problems), batch=count, iteration=iteration, seed=seed)
    group = algorithm.group_size
    places = [p * group + member for p in session.my_share(count) for member in range(group)]
    chosen = [problems[picked[place // group]] for place in places]
    ids = torch.tensor(places, dtype=torch.int64, device=session.ranks.device)
    trajectory, tokens = sample_prompts(
        session,
        engine.network,
        task_prompts(session, chosen),
        ids + iteration * count * group,
        sampling=session.settings.sampling,
        weights_version=iteration,
    )
    sampled = time.perf_counter()
    rewards = grade(session, chosen, trajectory)
    scores = torch.tensor([r.score for r in rewards], device=session.ranks.device)
    advantages = estimators.advantages(
        scores,
        group_size=group,
        baseline=algorithm.baseline,
        scale_by_std=algorithm.scale_by_std,
    )
    rollout = Rollout(
        trajectory,
        rewards=scores,
        correct=torch.tensor([r.correct for r in rewards], device=session.ranks.device),
        advantages=advantages,
    )
    session.log.samples(
        sample_records(session, chosen, trajectory, rewards), phase="rl", iteration=iteration + 1
    )
    sums = sum_over_ranks(session, {**reward_sums(rewards), **_rollout_sums(session, rollout)})
    return rollout, {
        **reward_metrics(sums),
        "entropy": sums["entropy"] / max(1.0, sums["sampled"]),
        "live_steps/mean": sums["steps"] / sums["count"],
        "completion_tokens/mean": sums["text"] / sums["count"],
        "zero_advantage_fraction": sums["flat"] / sums["count"],
        "time/rollout": sampled - started,
        "time/reward": time.perf_counter() - sampled,
        "tokens": tokens,
    }


def update_policy(
    session: Session,
    engine: Engine,
    rollout: Rollout,
    reference: MaskedDiffusionModel | None,
    iteration: int,
) -> tuple[dict[str, float], int]:
    """Update the weights on one batch of rollouts; returns metrics and the tokens processed."""
    settings, algorithm = session.settings, session.settings.algorithm
    results, tokens = [], 0
    for update in range(algorithm.updates_per_iteration):
        context = estimators.DrawContext(
            algorithm, eos_id=session.eos_id, seed=settings.run.seed + 7919 * update
        )
        draws = estimators.ESTIMATORS[algorithm.name](rollout.trajectory, context)
        draws = useful_draws(draws, rollout, algorithm)
        batches = timestep_batches(
            rollout, draws, mask_id=session.mask_id, token_budget=settings.train.token_budget
        )
        filled = sum(len(batch.rows.tokens) for batch in batches)
        batches = equal_count(batches, engine, _filler(session, rollout))
        if reference is not None:
            batches = [
                with_reference(b, reference, session.vocab, settings.sampling) for b in batches
            ]
        metrics = optimizer_step(
            engine,
            batches,
            loss=make_loss(session.vocab, settings.sampling, algorithm),
            examples=len(rollout.rewards),
        )
        tokens += filled
        packed = {"rows": float(len(draws.rollout)), "filled": float(filled)}
        packed = sum_over_ranks(session, packed)
        results.append({**metrics, **packed, "micro_batches": len(batches)})
    return _update_metrics(results, session), tokens


def useful_draws(draws: StepDraws, rollout: Rollout, algorithm: AlgorithmSettings) -> StepDraws:
    """Drop the rows of rollouts without advantage: without a KL term their gradient is zero."""
    if algorithm.kl_coefficient > 0:
        return draws
    kept = rollout.advantages[draws.rollout] != 0
    return StepDraws(draws.rollout[kept], draws.step[kept], draws.weight[kept])


def make_loss(vocab: Vocabulary, sampling: SamplingSettings, algorithm: AlgorithmSettings):
    """Return the loss of one micro-batch, for `optimizer_step`."""

    def loss(logits: Tensor, batch: TimestepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = _logprobs(logits, batch, vocab, sampling)
        return policy_loss(logprobs, batch, algorithm)

    return loss


def _logprobs(
    logits: Tensor, batch: TimestepBatch, vocab: Vocabulary, sampling: SamplingSettings
) -> Tensor:
    """Score the batch's tokens under the tempered, truncated policy that sampled them."""
    policy = policy_logits(logits, vocab, temperature=sampling.temperature)
    logprobs, _ = token_logprobs(policy, batch.targets, vocab=vocab, support_ids=batch.support_ids)
    return logprobs


def with_reference(
    batch: TimestepBatch,
    reference: MaskedDiffusionModel,
    vocab: Vocabulary,
    sampling: SamplingSettings,
) -> TimestepBatch:
    """Add the frozen reference's log-probs of the batch's tokens."""
    logits = score_rows(reference, batch.rows)
    return replace(batch, reference_logprobs=_logprobs(logits, batch, vocab, sampling))


def _rollout_sums(session: Session, rollout: Rollout) -> dict[str, float]:
    trajectory = rollout.trajectory
    text = (trajectory.tokens == session.eos_id).long().cumsum(1) == 0
    sampled = trajectory.unmask_step < trajectory.num_steps[:, None]
    rule = session.settings.algorithm.live_steps
    live = timesteps.live_steps(trajectory, eos_id=session.eos_id, rule=rule)
    return {
        "entropy": float(trajectory.entropies.sum()),
        "sampled": float(sampled.sum()),
        "steps": float(live.sum()),
        "text": float(text.sum()),
        "flat": float((rollout.advantages == 0).sum()),
    }


def _update_metrics(results: list[dict[str, float]], session: Session) -> dict[str, float]:
    """Combine the updates of an iteration; the ratio's error is the first update's."""
    scored = max(1.0, sum(r["scored_tokens"] for r in results))
    budget = session.settings.train.token_budget * session.ranks.data_size
    slots = sum(r["micro_batches"] for r in results) * budget
    return {
        "loss": sum(r["loss"] for r in results) / len(results),
        "grad_norm": max(r["grad_norm"] for r in results),
        "learning_rate": results[-1]["learning_rate"],
        "ratio/mean": sum(r["ratio_sum"] for r in results) / scored,
        "ratio/max_error": results[0]["ratio_max_error"],
        "clip_fraction": sum(r["clipped_tokens"] for r in results) / scored,
        "kl": sum(r["kl_sum"] for r in results) / scored,
        "rows": sum(r["rows"] for r in results),
        "micro_batches": sum(r["micro_batches"] for r in results),
        "packing_efficiency": sum(r["filled"] for r in results) / slots,
    }


def _filler(session: Session, rollout: Rollout) -> TimestepBatch:
    """Return a micro-batch without weight, for ranks that have fewer rows."""
    device = session.ranks.device
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    support = rollout.trajectory.support_ids
    return TimestepBatch(
        rows=unscored_row(session.mask_id, device),
        targets=nothing,
        old_logprobs=nothing.float(),
        reference_logprobs=None,
        support_ids=support[:0, 0] if support is not None else None,
        advantages=nothing.float(),
        weights=nothing.float(),
    )
