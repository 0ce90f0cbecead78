"""AGRPO: roll out, grade, draw denoising steps, update; one iteration, top to bottom."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion import estimators, timesteps
from agrpo_megatron.diffusion.batches import row_lengths, timestep_batch
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.diffusion.losses import policy_loss
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.layers.context import local_part
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.resilience.stragglers import Stragglers
from agrpo_megatron.rollout.dynamic_sampling import sample_groups
from agrpo_megatron.rollout.generate import sample_records
from agrpo_megatron.rollout.session import Run, Session
from agrpo_megatron.training.alarms import FIRST, Alarms
from agrpo_megatron.training.nan_guard import NanGuard, Update, rollout_keys
from agrpo_megatron.training.step import my_micro_batches
from agrpo_megatron.types import Rollout, StepDraws, TimestepBatch


def run_rl(
    session: Session,
    engine: Engine,
    reference: Network | None,
    *,
    start: int,
    on_iteration_end: Callable[[int], bool],
) -> None:
    """Iterate from `start` (iterations finished) to `train.iterations`; called by every rank.

    Args:
        reference: the frozen reference policy, where `kl_coefficient` needs one.
        on_iteration_end: called after each iteration with the number finished: evaluates, saves,
            and returns whether to continue.

    Raises:
        Stopped: the ranks agreed to stop, within a rollout or in `on_iteration_end`.
    """
    run, output, sections = session.run, session.output, session.safety.sections
    guard, stragglers = NanGuard(session, "rl"), Stragglers()
    first = output.log.first_values("rl", "entropy", iterations=min(start, FIRST))
    alarms = Alarms(run.settings, output, entropies=first)
    for iteration in range(start, run.settings.train.iterations):
        started = time.perf_counter()
        sections.at("rl", iteration + 1)
        rollout, rollout_metrics = collect_rollout(session, engine, iteration)
        update_started = time.perf_counter()
        with sections("update"):
            metrics, tokens = update_policy(session, engine, rollout, reference, guard=guard)
        now = time.perf_counter()
        tokens += rollout_metrics.pop("tokens")
        record = {
            "phase": "rl",
            "iteration": iteration + 1,
            **rollout_metrics,
            **metrics,
            **alarms.check(iteration + 1, {**rollout_metrics, **metrics}),
            **stragglers.report(sections.take(), run.ranks, warn=output.view.warn),
            "timing/update": now - update_started,
            "timing/iteration": now - started,
            "perf/tokens_per_second": tokens / (now - started),
        }
        output.log.metrics(record)
        output.view.rl(record)
        if not on_iteration_end(iteration + 1):
            break


def collect_rollout(
    session: Session, engine: Engine, iteration: int
) -> tuple[Rollout, dict[str, float]]:
    """Sample and grade a group of completions of each problem; the same on every rank.

    Cached completions are not sampled again.
    """
    run, groups = session.run, sample_groups(session, engine, iteration)
    algorithm, graded, device = run.settings.algorithm, groups.rollouts, run.ranks.device
    scores = torch.tensor([reward.score for reward in graded.rewards], device=device)
    advantages = estimators.advantages(
        scores,
        group_size=algorithm.group_size,
        baseline=algorithm.baseline,
        scale_by_std=algorithm.scale_by_std,
    )
    correct = torch.tensor([reward.correct for reward in graded.rewards], device=device)
    rollout = Rollout(graded.trajectory, rewards=scores, correct=correct, advantages=advantages)
    records = sample_records(run, groups.problems, graded, split="train")
    session.output.log.samples(records, phase="rl", iteration=iteration + 1)
    has_pipeline = engine.ranks.for_rollouts.pipeline.size > 1
    return rollout, {
        **groups.metrics,
        **_rollout_metrics(run, rollout),
        **({"rollout/bubble": graded.bubble} if has_pipeline else {}),
        **graded.seconds,
        "tokens": graded.tokens,
    }


def update_policy(
    session: Session,
    engine: Engine,
    rollout: Rollout,
    reference: Network | None,
    *,
    guard: NanGuard | None = None,
) -> tuple[dict[str, float], int]:
    """Update the weights on one batch of rollouts; returns metrics and the tokens of all ranks.

    Args:
        guard: counts skipped updates over iterations; None starts from 0.
    """
    run, guard = session.run, guard or NanGuard(session, "rl")
    iteration = rollout.trajectory.weights_version + 1
    key = rollout_keys(run, rollout.trajectory)
    settings, algorithm, ranks = run.settings, run.settings.algorithm, engine.ranks
    budget, results = settings.train.token_budget, []
    for update in range(algorithm.updates_per_iteration):
        seed = settings.run.seed + 7919 * update
        context = estimators.DrawContext(algorithm, eos_id=run.eos_id, seed=seed)
        draws = estimators.ESTIMATORS[algorithm.name](rollout.trajectory, context)
        draws = useful_draws(draws, rollout, algorithm)
        lengths = row_lengths(rollout, draws)
        plan = my_micro_batches(lengths, settings.model, ranks, budget=budget)
        batches = [
            timestep_batch(rollout, draws, rows, mask_id=run.mask_id, shift=settings.model.shift)
            for rows in plan
        ]
        batches = [local_part(batch, ranks) for batch in batches]
        if reference is not None:
            batches = with_reference(batches, reference, settings.sampling)
        metrics = guard.step(
            engine,
            batches,
            loss=make_loss(engine.network.vocab, settings.sampling, algorithm),
            examples=len(rollout.rewards),
            update=Update(iteration, "rollouts", key, update + 1),
        )
        slots = len(batches) * ranks.data.size * budget
        packed = {"rows": len(lengths), "filled": int(lengths.sum()), "slots": slots}
        results.append({**metrics, **packed, "micro_batches": len(batches)})
    return _update_metrics(results), sum(result["filled"] for result in results)


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
    batches: Sequence[TimestepBatch], reference: Network, sampling: SamplingSettings
) -> list[TimestepBatch]:
    """Add the frozen reference's log-probs on the last pipeline stage, where the loss is."""

    def score(number: int, logits: Tensor) -> Tensor:
        return _logprobs(logits, batches[number], reference.vocab, sampling)

    scored = forward_rows(reference, [batch.rows for batch in batches], score)
    scored = scored or [None] * len(batches)
    return [replace(b, reference_logprobs=s) for b, s in zip(batches, scored, strict=True)]


def _rollout_metrics(run: Run, rollout: Rollout) -> dict[str, float]:
    trajectory = rollout.trajectory
    stops = torch.tensor(sorted(run.tokenizer.stop_ids), device=trajectory.tokens.device)
    text = torch.isin(trajectory.tokens, stops).long().cumsum(1) == 0
    sampled = trajectory.unmask_step < trajectory.num_steps[:, None]
    rule = run.settings.algorithm.live_steps
    live = timesteps.live_steps(trajectory, eos_id=run.eos_id, rule=rule)
    return {
        "entropy": float(trajectory.entropies.sum()) / max(1.0, float(sampled.sum())),
        "live_steps/mean": float(live.double().mean()),
        "completions/mean_length": float(text.sum(1).double().mean()),
        "completions/empty_fraction": float((text.sum(1) == 0).double().mean()),
        "zero_advantage_fraction": float((rollout.advantages == 0).double().mean()),
    }


def _update_metrics(results: list[dict[str, float]]) -> dict[str, float]:
    """Combine the updates of an iteration; the ratio's error is the first update's.

    Skipped updates are excluded from the means. Where no token was scored the ratio is 1.
    """
    made = [r for r in results if not r["skipped_updates"]]
    return {
        **(_made_metrics(made) if made else {}),
        "learning_rate": results[-1]["learning_rate"],
        "skipped_updates": len(results) - len(made),
        "rows": sum(r["rows"] for r in results),
        "micro_batches": sum(r["micro_batches"] for r in results),
        "perf/packing_efficiency": sum(r["filled"] for r in results)
        / sum(r["slots"] for r in results),
    }


def _made_metrics(results: list[dict[str, float]]) -> dict[str, float]:
    tokens = sum(r["scored_tokens"] for r in results)
    scored = max(1.0, tokens)
    return {
        "loss": sum(r["loss"] for r in results) / len(results),
        "grad_norm": max(r["grad_norm"] for r in results),
        "ratio/mean": sum(r["ratio_sum"] for r in results) / tokens if tokens else 1.0,
        "ratio/max_error": results[0]["ratio_max_error"],
        "ratio/p99_error": results[0]["ratio_p99_error"],
        "clip_fraction": sum(r["clipped_tokens"] for r in results) / scored,
        "kl": sum(r["kl_sum"] for r in results) / scored,
    }
