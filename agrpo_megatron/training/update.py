"""The updates of one iteration: what the estimator scores, older log-probs, optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.batches import (
    recorded_logprobs,
    row_lengths,
    timestep_batch,
    weights_of,
)
from agrpo_megatron.diffusion.replays.pack import pack_replay
from agrpo_megatron.diffusion.replays.rows import ReplayRow, replayed_rows
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.objective import (
    BatchLoss,
    Tables,
    joint_loss,
    make_loss,
    make_tangent,
)
from agrpo_megatron.estimators.table import (
    is_joint,
    needs_current_pass,
    needs_old_pass,
    scored_rows,
)
from agrpo_megatron.estimators.weights import corrected, effective_share
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.layers.context import local_part
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Ranks, from_last_stage
from agrpo_megatron.rollout.experts import ScoredPart, with_experts
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.scaling.flops import (
    Work,
    forward_cost,
    pattern_work,
    scored_work,
    update_cost,
)
from agrpo_megatron.training.measures.updates import combined
from agrpo_megatron.training.nan_guard import NanGuard, Update, rollout_keys
from agrpo_megatron.training.scoring import score_tables, with_distributions
from agrpo_megatron.training.step import my_micro_batches
from agrpo_megatron.trajectories import iteration_of, parts_of_steps, step_parts
from agrpo_megatron.types import Rollout, ScoredRows, TimestepBatch

APART = 7919  # between two seeds whose draws must not be the same


@dataclass(frozen=True)
class Part:
    """What one update scores, and this rank's micro-batches of it."""

    scored: ScoredRows
    batches: list[TimestepBatch]
    lengths: Tensor  # tokens of each packed row
    old: Tensor | None  # [N, C] log-probs of the policy that sampled; None: of the current one
    work: Work  # of a pass over the rows of all ranks
    flops: int  # of all passes over the rows of all ranks, the one with gradient included
    reference: Tensor | None = None  # [N, C] log-probs of the frozen reference
    passes: int = 0  # forward passes without gradient over the rows
    correction: dict[str, float] = field(default_factory=dict)  # metrics of importance weights


class Packed(NamedTuple):
    """Scored rows in micro-batches."""

    lengths: Tensor  # tokens of each packed row
    work: Work  # of a pass over the rows of all ranks
    batches: list[TimestepBatch]  # of this rank
    parts: list[list[ScoredPart]]  # of each of these, its packed rows


def update_policy(
    session: Session,
    engine: Engine,
    rollout: Rollout,
    reference: Network | None,
    *,
    guard: NanGuard | None = None,
) -> tuple[dict[str, Any], int]:
    """Update the weights on one batch of rollouts; returns metrics and the tokens of all ranks.

    Args:
        guard: counts skipped updates over iterations; None starts from 0.
    """
    run, guard, timed = session.run, guard or NanGuard(session, "rl"), session.safety.sections.timed
    key = rollout_keys(run, rollout.trajectory)
    settings, ranks, network = run.settings, engine.ranks, engine.network
    budget, results = settings.train.token_budget, []
    parts = [
        prepare(settings, ranks, rollout, seed=settings.run.seed + APART * number)
        for number in range(settings.algorithm.updates_per_iteration)
    ]
    shares = [effective_share(part.scored) for part in parts]
    engine.finish_parameters()
    with timed("scoring"):
        parts = [
            with_old_logprobs(network, part, settings, is_first=number == 0)
            for number, part in enumerate(parts)
        ]
    for number, part in enumerate(parts):
        with timed("scoring"):
            if reference is not None:
                part = with_reference(part, reference, settings)
            engine.finish_parameters()
            part, loss = with_loss(engine, part, rollout, settings, is_first=number == 0)
        network.forget_counts()
        metrics = guard.step(
            engine,
            part.batches,
            loss=loss,
            examples=len(rollout.rewards),
            update=Update(iteration_of(rollout), "rollouts", key, number + 1),
        )
        slots = len(part.batches) * ranks.data.size * budget
        filled = int(part.lengths.sum())
        count = len(part.scored.rollout)
        packed: dict[str, float] = {"rows": count, "filled": filled, "slots": slots}
        packed["scoring_rows"] = part.passes * count
        packed["flops"] = part.flops
        if settings.algorithm.rollout_experts is not None:
            packed["changed"] = network.changed_experts()
        results.append({**metrics, **packed, "micro_batches": len(part.batches)})
    own = {"weights/effective_share": sum(shares) / len(shares), **parts[0].correction}
    if ranks.pipeline.size > 1:
        idle = (ranks.pipeline.size - 1) * len(results)
        busy = ranks.parallel.virtual * sum(result["micro_batches"] for result in results)
        own["update/bubble"] = idle / (idle + busy)
    metrics = {**combined(results), **own}
    return metrics, sum(result["filled"] for result in results)


def prepare(settings: Settings, ranks: Ranks, rollout: Rollout, *, seed: int) -> Part:
    """Draw what an update scores, the same on every rank, and pack this rank's share."""
    model = settings.model
    assert model.mask_token_id is not None
    context = DrawContext(settings.algorithm, eos_id=model.eos_token_id, seed=seed)
    return packed_part(settings, ranks, rollout, scored_rows(rollout, context))


def packed_part(settings: Settings, ranks: Ranks, rollout: Rollout, scored: ScoredRows) -> Part:
    """Pack this rank's share of scored rows into micro-batches."""
    model = settings.model
    assert model.mask_token_id is not None
    rows = replayed_rows(scored, rollout, model, budget=settings.train.token_budget)
    facts = settings, ranks, rollout, scored, model.mask_token_id
    lengths, work, batches, parts = _whole(*facts) if rows is None else _replayed(rows, *facts)
    mode = settings.algorithm.rollout_experts
    if mode is not None:
        batches = with_experts(batches, parts, scored, rollout, is_replayed=mode == "replay")
    batches = [local_part(batch, ranks) for batch in batches]
    flops = update_cost(model, settings.lora).of(work)
    return Part(scored, batches, lengths, recorded_logprobs(rollout, scored), work, flops)


def _whole(
    settings: Settings, ranks: Ranks, rollout: Rollout, scored: ScoredRows, mask_id: int
) -> Packed:
    """Pack each scored row for itself."""
    model, lengths = settings.model, row_lengths(rollout, scored)
    plan = my_micro_batches(lengths, model, ranks, budget=settings.train.token_budget)
    batches = [
        timestep_batch(rollout, scored, rows, mask_id=mask_id, shift=model.shift) for rows in plan
    ]
    parts = [[ScoredPart(0, [row]) for row in rows.tolist()] for rows in plan]
    work = scored_work(lengths.tolist(), scored.scored.sum(1).tolist())
    return Packed(lengths, work, batches, parts)


def _replayed(
    rows: Sequence[ReplayRow],
    settings: Settings,
    ranks: Ranks,
    rollout: Rollout,
    scored: ScoredRows,
    mask_id: int,
) -> Packed:
    """Pack states after the context that they share."""
    model, budget = settings.model, settings.train.token_budget
    lengths = torch.tensor([row.length for row in rows], dtype=torch.int64)
    batches, parts = [], []
    for plan in my_micro_batches(lengths, model, ranks, budget=budget):
        mine = [rows[number] for number in plan.tolist()]
        states = torch.tensor([state for row in mine for state in row.states], dtype=torch.int64)
        facts = {"mask_id": mask_id, "shift": model.shift}
        packed = pack_replay(mine, rollout, scored, **facts) if mine else None
        batches.append(timestep_batch(rollout, scored, states, mask_id=mask_id, packed=packed))
        parts.append([ScoredPart(row.context, row.states) for row in mine])
    patterns = [row.pattern for row in rows]
    return Packed(lengths, pattern_work(patterns, int(scored.scored.sum())), batches, parts)


def with_old_logprobs(network: Network, part: Part, settings: Settings, *, is_first: bool) -> Part:
    """Score a part under the weights that sampled, where the rollout has no such log-probs.

    Must run before the first update. Called by every rank.
    """
    algorithm, scored, recorded = settings.algorithm, part.scored, part.old
    limit = algorithm.rollout_correction
    if limit is not None and recorded is None:
        raise ValueError(
            f"algorithm.rollout_correction={limit:g} compares log-probs with the sampler's, and "
            f"the rows of algorithm.name={algorithm.name} have none (is_sampled=False); use "
            "algorithm.rollout_correction=null, or score states of the sampler"
        )
    facts = {"is_recorded": recorded is not None, "is_first": is_first}
    if not needs_old_pass(scored, algorithm, **facts):
        return part
    old, _ = _tables(network, part, settings)
    if limit is not None and recorded is not None:
        scored, found = corrected(scored, old - recorded, limit=limit, kl=algorithm.kl)
        part = replace(part, correction=from_last_stage(found, network.ranks))
    return replace(_passed(part, settings), scored=scored, old=old)


def with_reference(part: Part, reference: Network, settings: Settings) -> Part:
    """Score a part under the frozen reference, with its own experts; called by every rank."""
    own = [replace(batch, rows=replace(batch.rows, experts=None)) for batch in part.batches]
    if settings.algorithm.kl == "exact":
        found = with_distributions(reference, own, settings.sampling, settings.algorithm)
        batches = [
            replace(batch, reference_shard=other.reference_shard)
            for batch, other in zip(part.batches, found, strict=True)
        ]
        return replace(_passed(part, settings, is_frozen=True), batches=batches)
    table, _ = _tables(reference, replace(part, batches=own), settings)
    return replace(_passed(part, settings, is_frozen=True), reference=table)


def with_loss(
    engine: Engine, part: Part, rollout: Rollout, settings: Settings, *, is_first: bool
) -> tuple[Part, BatchLoss]:
    """Return a part with all values in its micro-batches, and their loss; called by every rank.

    Args:
        is_first: the weights are still those that sampled.
    """
    scored, algorithm = part.scored, settings.algorithm
    values = {"old_logprobs": part.old, "reference_logprobs": part.reference}
    batches = [
        replace(
            batch,
            **weights_of(scored, batch.row, batch.position, dtype=batch.advantages.dtype),
            **{n: t if t is None else t[batch.row, batch.position] for n, t in values.items()},
        )
        for batch in part.batches
    ]
    part = replace(part, batches=batches)
    vocab, sampling = engine.network.vocab, settings.sampling
    if not is_joint(scored, algorithm):
        part_of, count = parts_of_steps(rollout.trajectory, scored), step_parts(rollout.trajectory)
        return part, make_loss(vocab, sampling, algorithm, part=part_of, parts=count)
    current, entropies = part.old, None
    if needs_current_pass(scored, algorithm, is_first=is_first):
        current, entropies = _tables(engine.network, part, settings)
        part = _passed(part, settings)
    assert current is not None
    assert part.old is not None
    tables = Tables(current, part.old, part.reference, entropies)
    metrics, slopes = joint_loss(scored, tables, rollout, algorithm)
    speaker = part.batches[0] if engine.ranks.data_context.rank == 0 else None
    return part, make_tangent(slopes, metrics, vocab, sampling, algorithm, speaker=speaker)


def _passed(part: Part, settings: Settings, *, is_frozen: bool = False) -> Part:
    """Return a part after one more forward pass without gradient; frozen: without adapters."""
    cost = forward_cost(settings.model, None if is_frozen else settings.lora)
    return replace(part, passes=part.passes + 1, flops=part.flops + cost.of(part.work))


def _tables(network: Network, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
    return score_tables(
        network, part.batches, part.scored.scored.shape, settings.sampling, settings.algorithm
    )
