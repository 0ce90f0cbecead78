"""What an iteration of the supervised phase does: an update, and the held-out loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from agrpo_megatron.config.annealing import Attention, attention_at
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.training.nan_guard import NanGuard, Update
from agrpo_megatron.training.supervised.drawn import micro_batches, open_stream
from agrpo_megatron.training.supervised.loss import held_out_loss, make_sft_loss


@dataclass(frozen=True)
class Learning:
    """A loss with its data; every rank calls the functions."""

    epoch: float  # examples in one epoch
    # (iteration from 1, places of its examples) -> metrics, tokens of all ranks
    update: Callable[[int, range], tuple[dict[str, float], int]]
    held_out: Callable[[], dict[str, float]]  # metrics of the held-out rows


def denoising(session: Session, engine: Engine) -> Learning:
    """Return learning by the cross-entropy of masked tokens."""
    run, guard = session.run, NanGuard(session, "sft")
    loss, stream = make_sft_loss(engine.network.vocab), open_stream(run)

    def update(iteration: int, places: range) -> tuple[dict[str, float], int]:
        """Make an update on the examples at some places."""
        drawn = stream.draw(places)
        ids = torch.arange(places.start, places.stop, device=run.ranks.device)
        attention, seed = attention_at(run.settings, iteration), run.settings.run.seed
        batches, tokens = micro_batches(run, drawn, ids, seed=seed, attention=attention)
        here = Update(iteration, "examples", drawn.names.__getitem__)
        metrics = guard.step(engine, batches, loss=loss, examples=len(places), update=here)
        return {**metrics, **_shown(run.settings, attention)}, tokens

    def held_out() -> dict[str, float]:
        """Return the loss of the held-out rows."""
        engine.finish_parameters()
        return {"held_out_loss": held_out_loss(run, engine.network)}

    return Learning(stream.epoch, update, held_out)


def _shown(settings: Settings, attention: Attention) -> dict[str, float]:
    """Return the metrics of attention that follows a schedule."""
    if settings.sft.anneal_iterations:
        return {"attention/ahead": 1.0 if attention.ahead is None else attention.ahead}
    if settings.sft.block_schedule:
        return {"attention/block_length": attention.model.block_length or 0}
    return {}
