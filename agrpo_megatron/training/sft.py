"""Supervised fine-tuning: on rows of data, on solutions, or on preference pairs."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.resilience.stragglers import Stragglers
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.training.measures.devices import forget_peak, memory_peaks
from agrpo_megatron.training.measures.totals import Totals
from agrpo_megatron.training.preferences.update import preference_learning
from agrpo_megatron.training.supervised.learning import Learning, denoising

SHOWN = {"held-out loss": "held_out_loss", "pairs right": "held_out_preference/accuracy"}


def run_sft(
    session: Session,
    engine: Engine,
    reference: Network | None = None,
    *,
    start: int,
    on_iteration_end: Callable[[int], None],
) -> None:
    """Train from `start` (iterations finished) to `sft.iterations`; called by every rank.

    Args:
        reference: the frozen policy of preference pairs; None: the loss needs none.
        on_iteration_end: called after each iteration with the number finished; saves checkpoints.
    """
    run, output, sections = session.run, session.output, session.safety.sections
    settings, stragglers = run.settings.sft, Stragglers()
    totals = Totals(output.log.last("sft"))
    learning = (
        denoising(session, engine)
        if reference is None
        else preference_learning(session, engine, reference)
    )
    for iteration in range(start, settings.iterations):
        sections.at("sft", iteration + 1)
        started = time.perf_counter()
        forget_peak(run.ranks)
        places = range(iteration * settings.batch_size, (iteration + 1) * settings.batch_size)
        with sections("update"):
            metrics, tokens = learning.update(iteration + 1, places)
        seconds = time.perf_counter() - started
        metrics |= _held_out(session, learning, iteration + 1)
        record = {
            "phase": "sft",
            "iteration": iteration + 1,
            "epoch": places.stop / learning.epoch,
            **metrics,
            **stragglers.report(sections.take(), run.ranks, warn=output.view.warn),
            "timing/iteration": seconds,
            "perf/tokens_per_second": tokens / seconds,
            **memory_peaks(run.ranks),
            **totals.add({"totals/tokens": tokens}),
        }
        output.log.metrics(record)
        output.view.sft(record)
        on_iteration_end(iteration + 1)


def _held_out(session: Session, learning: Learning, iteration: int) -> dict[str, float]:
    """Measure and show the held-out rows after an iteration, if it is due."""
    if not _is_due(session, iteration):
        return {}
    started = time.perf_counter()
    with session.safety.sections("evaluation"):
        found = learning.held_out()
    shown = [f"{text} {found[key]:.4f}" for text, key in SHOWN.items() if key in found]
    session.output.view.note(f"sft iteration {iteration}: {', '.join(shown)}")
    return {**found, "timing/evaluation": time.perf_counter() - started}


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
