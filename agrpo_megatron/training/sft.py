"""Supervised fine-tuning: masked-diffusion cross-entropy on rows of data or on solutions."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.resilience.stragglers import Stragglers
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.training.nan_guard import NanGuard, Update
from agrpo_megatron.training.supervised.drawn import micro_batches, open_stream
from agrpo_megatron.training.supervised.loss import held_out_loss, make_sft_loss


def run_sft(
    session: Session, engine: Engine, *, start: int, on_iteration_end: Callable[[int], None]
) -> None:
    """Train from `start` (iterations finished) to `sft.iterations`; called by every rank.

    Args:
        on_iteration_end: called after each iteration with the number finished; saves checkpoints.
    """
    run, output, sections = session.run, session.output, session.safety.sections
    settings, loss, stream = run.settings.sft, make_sft_loss(engine.network.vocab), open_stream(run)
    size, guard, stragglers = settings.batch_size, NanGuard(session, "sft"), Stragglers()
    for iteration in range(start, settings.iterations):
        started = time.perf_counter()
        sections.at("sft", iteration + 1)
        places = range(iteration * size, (iteration + 1) * size)
        drawn = stream.draw(places)
        ids = torch.arange(places.start, places.stop, device=run.ranks.device)
        batches, tokens = micro_batches(run, drawn, ids, seed=run.settings.run.seed)
        update = Update(iteration + 1, "examples", drawn.names.__getitem__)
        with sections("update"):
            metrics = guard.step(engine, batches, loss=loss, examples=size, update=update)
        if _is_due(session, iteration + 1):
            with sections("evaluation"):
                found = metrics["held_out_loss"] = held_out_loss(run, engine.network)
            output.view.note(f"sft iteration {iteration + 1}: held-out loss {found:.4f}")
        seconds = time.perf_counter() - started
        record = {
            "phase": "sft",
            "iteration": iteration + 1,
            "epoch": places.stop / stream.epoch,
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


def _is_due(session: Session, iteration: int) -> bool:
    """Return whether the held-out loss is measured after an iteration."""
    settings, data = session.run.settings.sft, session.run.supervised
    if data is None or not data.held_out:
        return False
    every = settings.eval_interval
    return iteration == settings.iterations or bool(every and iteration % every == 0)
