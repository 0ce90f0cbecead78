"""Supervised fine-tuning: masked-diffusion cross-entropy on the task's solutions."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.batches import sft_batches, sft_lengths, sft_loss
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.layers.context import local_part
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.stragglers import Stragglers
from agrpo_megatron.rollout.data_order import pick_problems
from agrpo_megatron.rollout.generate import encode_prompts
from agrpo_megatron.rollout.session import Run, Session
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.tasks.curriculum import solved_problems
from agrpo_megatron.training.nan_guard import NanGuard, Update
from agrpo_megatron.training.step import my_micro_batches
from agrpo_megatron.types import Problem, SftBatch


def run_sft(
    session: Session, engine: Engine, *, start: int, on_iteration_end: Callable[[int], None]
) -> None:
    """Train from `start` (iterations finished) to `sft.iterations`; called by every rank.

    Args:
        on_iteration_end: called after each iteration with the number finished; saves checkpoints.
    """
    run, output, sections = session.run, session.output, session.safety.sections
    settings, loss = run.settings.sft, _loss(engine.network.vocab)
    problems, shares = solved_problems(run.task, settings)
    size, guard, stragglers = settings.batch_size, NanGuard(session, "sft"), Stragglers()
    for iteration in range(start, settings.iterations):
        started = time.perf_counter()
        sections.at("sft", iteration + 1)
        places = range(iteration * size, (iteration + 1) * size)
        picked = pick_problems(shares, places, seed=run.settings.run.seed)
        chosen = [problems[place] for place in picked]
        batches, tokens = _batches(run, engine.ranks, chosen, iteration)
        update = Update(iteration + 1, "examples", lambda row, chosen=chosen: chosen[row].key)
        with sections("update"):
            metrics = guard.step(engine, batches, loss=loss, examples=size, update=update)
        seconds = time.perf_counter() - started
        record = {
            "phase": "sft",
            "iteration": iteration + 1,
            **metrics,
            **stragglers.report(sections.take(), run.ranks, warn=output.view.warn),
            "timing/iteration": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }
        output.log.metrics(record)
        output.view.sft(record)
        on_iteration_end(iteration + 1)


def with_balance(settings: Settings) -> Settings:
    """Return settings for the engine of the supervised phase, which may balance experts."""
    sft, model = settings.sft, settings.model
    own: dict[str, Any] = {}
    if sft.balance_loss:
        own = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": sft.balance_loss}
    if sft.expert_bias_rate:
        own["moe_router_bias_update_rate"] = sft.expert_bias_rate
    return replace(settings, model=replace(model, megatron={**own, **model.megatron}))


def _batches(
    run: Run, ranks: Ranks, problems: list[Problem], iteration: int
) -> tuple[list[SftBatch], int]:
    """Return this rank's micro-batches, and the tokens of all ranks."""
    settings, size = run.settings, len(problems)
    prompts = encode_prompts(run, task_prompts(run.task, problems, split="train"))
    responses = _padded(run, [problem.solution for problem in problems])
    model, sampling = settings.model, settings.sampling
    lengths = sft_lengths(prompts, responses.shape[1], model, sampling)
    batches = sft_batches(
        prompts,
        responses,
        torch.arange(size, device=ranks.device) + iteration * size,
        my_micro_batches(lengths, model, ranks, budget=settings.train.token_budget),
        mask_id=run.mask_id,
        sft=settings.sft,
        seed=settings.run.seed,
        model=model,
        sampling=sampling,
    )
    return [local_part(batch, ranks) for batch in batches], int(lengths.sum())


def _padded(run: Run, texts: list[str]) -> Tensor:
    """Return solutions as [B, completion length], padded with end-of-text."""
    width = run.settings.sampling.completion_length
    rows = [run.tokenizer.encode(text) for text in texts]
    filled = [row + [run.eos_id] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=run.ranks.device).view(-1, width)


def _loss(vocab: Vocabulary):
    whole = replace(vocab, forbidden=())

    def loss(logits: Tensor, batch: SftBatch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = policy_logits(logits, whole)
        logprobs, _ = token_logprobs(policy, batch.targets, vocab=whole)
        return sft_loss(logprobs, batch), {"scored_tokens": torch.tensor(len(batch.targets))}

    return loss
