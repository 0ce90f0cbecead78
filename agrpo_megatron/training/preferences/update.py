"""Learning from preference pairs, through Megatron's schedule.

The log-sigmoid of a pair joins all masks of both its texts, which other micro-batches and ranks
hold. So passes without gradient score all of them first; see `estimators.objective`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.estimators.objective import BatchLoss, Slopes, make_tangent
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import from_last_stage
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.training.nan_guard import NanGuard, Update
from agrpo_megatron.training.preferences.loss import (
    Pairs,
    as_pairs,
    pair_rows,
    preference_loss,
    row_elbos,
    scoring_of,
)
from agrpo_megatron.training.scoring import score_tables
from agrpo_megatron.training.supervised.drawn import Drawn, held_out_rows, open_stream
from agrpo_megatron.training.supervised.learning import Learning
from agrpo_megatron.training.supervised.loss import SEED
from agrpo_megatron.training.update import APART, Part, packed_part


class Scored(NamedTuple):
    """Pairs as the policy scores them, and their log-likelihoods under the reference."""

    part: Part
    logprobs: Tensor  # [N, C] under the policy
    reference: Tensor  # [masks, P, 2] shares of the ELBOs under the frozen start
    lengths: Tensor  # [P, 2] trained tokens


def preference_learning(session: Session, engine: Engine, reference: Network) -> Learning:
    """Return learning from the run's pairs.

    Args:
        reference: the frozen policy that the phase starts from.
    """
    run, guard, stream = session.run, NanGuard(session, "sft"), open_stream(session.run)

    def update(iteration: int, places: range) -> tuple[dict[str, float], int]:
        """Make an update on the pairs at some places."""
        drawn = stream.draw(places)
        engine.finish_parameters()
        scored = score_pairs(
            engine.network,
            reference,
            drawn,
            run.settings,
            first=2 * places.start,
            seed=run.settings.run.seed,
        )
        here = Update(iteration, "examples", drawn.names.__getitem__)
        loss = tangent(engine, scored, run.settings)
        metrics = guard.step(
            engine, scored.part.batches, loss=loss, examples=len(places), update=here
        )
        return metrics, int(scored.part.lengths.sum())

    def held_out() -> dict[str, float]:
        """Return the metrics of the held-out pairs under names of their own."""
        assert run.supervised is not None
        engine.finish_parameters()
        drawn = held_out_rows(run, run.supervised.held_out)
        found = held_out_metrics(engine.network, reference, drawn, run.settings)
        return {"held_out_loss": found.pop("loss")} | {
            f"held_out_{name}": value for name, value in found.items()
        }

    return Learning(stream.epoch, update, held_out)


def score_pairs(
    network: Network,
    reference: Network,
    drawn: Drawn,
    settings: Settings,
    *,
    first: int,
    seed: int,
) -> Scored:
    """Score pairs under both policies, without gradient; called by every rank.

    The numbers are those of the last pipeline stage; other stages have zeros for log-probs.

    Args:
        drawn: chosen and rejected text of each pair in turn.
        first: number of the first text: with the seed, masks follow from it.
    """
    trained = drawn.responses.trained
    ids = first + torch.arange(len(trained), device=trained.device)
    pairs = as_pairs(drawn.prompts, drawn.responses.tokens, trained, ids, settings.sampling)
    part = _part(pairs, settings, network, seed=seed)
    is_shared = settings.sft.preferences.shared_masks
    apart = part if is_shared else _part(pairs, settings, network, seed=seed + APART)
    frozen = row_elbos(_logprobs(reference, apart, settings), apart.scored)
    return Scored(part, _logprobs(network, part, settings), frozen, trained.sum(1).view(-1, 2))


def tangent(engine: Engine, scored: Scored, settings: Settings) -> BatchLoss:
    """Return the loss of micro-batches whose gradient is that of the loss of pairs."""
    metrics, slopes = _differentiated(scored, settings)
    return make_tangent(
        slopes,
        metrics,
        engine.network.vocab,
        settings.sampling,
        scoring_of(settings.sft.preferences),
        speaker=scored.part.batches[0] if engine.ranks.data_context.rank == 0 else None,
    )


def held_out_metrics(
    network: Network, reference: Network, drawn: Drawn, settings: Settings
) -> dict[str, float]:
    """Return loss and metrics of pairs, under the same masks at any time; called by every rank.

    Args:
        drawn: chosen and rejected text of each pair in turn.
    """
    scored = score_pairs(network, reference, drawn, settings, first=0, seed=SEED)
    metrics, _ = _differentiated(scored, settings)
    metrics["loss"] = metrics["loss"] / len(scored.lengths)
    mine = {name: float(value.double()) for name, value in metrics.items()}
    return from_last_stage(mine, network.ranks)


def _part(pairs: Pairs, settings: Settings, network: Network, *, seed: int) -> Part:
    rows = pair_rows(pairs, settings.sft.preferences, seed=seed)
    settings = replace(settings, algorithm=scoring_of(settings.sft.preferences))
    return packed_part(settings, network.ranks, pairs.rollout, rows)


def _logprobs(network: Network, part: Part, settings: Settings) -> Tensor:
    algorithm, shape = scoring_of(settings.sft.preferences), part.scored.scored.shape
    return score_tables(network, part.batches, shape, settings.sampling, algorithm)[0]


def _differentiated(scored: Scored, settings: Settings) -> tuple[dict[str, Tensor], Slopes]:
    """Return the metrics with the loss summed over pairs, and its derivatives by log-probs."""
    leaf = scored.logprobs.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = preference_loss(
            row_elbos(leaf, scored.part.scored),
            scored.reference,
            scored.lengths,
            settings.sft.preferences,
        )
        (slope,) = torch.autograd.grad(loss, leaf)
    return {**metrics, "loss": loss.detach()}, Slopes(slope, None)
