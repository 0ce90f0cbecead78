"""The experts that a rollout chose for its tokens: kept on the host, and given to its updates.

A denoising step's forward pass chooses experts for all tokens of a row in all layers. In a block
model, the keys of finished blocks stay: a token's experts are those of the first pass in which its
block was finished, and each step adds its open block. So a record is a context that grows from
block to block, and the open part of each step; without blocks the open part is the whole row.
Each pipeline stage keeps its own layers, of its replica's rows. Updates share rows in another way,
so all ranks exchange the records of what is scored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.types import (
    CachedRows,
    PackedRows,
    Rollout,
    ScoredRows,
    TimestepBatch,
)

type Key = tuple[int, int]  # rollout id, and denoising step or CONTEXT
CONTEXT = -1


@dataclass
class Record:
    """The experts of one completion in some layers; tensors are [tokens, layers, topk]."""

    layers: tuple[int, ...]  # by their number among the layers with experts
    context: list[Tensor] = field(default_factory=list)  # parts, in the order of the tokens
    steps: list[Tensor] = field(default_factory=list)  # of each denoising step

    def at(self, step: int) -> Tensor:
        """Return the experts of a step's open part, or of the context."""
        open_part = self.steps[max(step, 0)]
        return torch.cat([open_part[:0], *self.context]) if step == CONTEXT else open_part


@dataclass(frozen=True)
class ScoredPart:
    """A packed row of an update: finished text of a rollout, and states of it."""

    context: int  # tokens of the finished text
    states: Sequence[int]  # scored rows

    def pieces(self, keys: Sequence[Key]) -> Iterator[tuple[Key, int | None]]:
        """Yield what the row consists of: the keys of records, and how many tokens; None: all.

        Args:
            keys: of each scored row.
        """
        yield (keys[self.states[0]][0], CONTEXT), self.context
        for state in self.states:
            yield keys[state], None


@dataclass
class Recorder:
    """Keeps the experts of the rows that a rollout's forward passes hand to it.

    Args:
        rollout_ids: of the rows, by their number.
    """

    rollout_ids: Sequence[int]
    records: dict[int, Record] = field(default_factory=dict)  # by rollout id
    _holders: dict[int, Record] = field(default_factory=dict)  # by slot of the cache

    def __call__(self, rows: PackedRows) -> None:
        """Add a pass; passes come in the order in which they began."""
        if not rows.seen:
            return
        assert rows.owners is not None
        layers, cached, holders = tuple(sorted(rows.seen)), rows.cached, {}
        chosen = torch.stack([rows.seen[layer] for layer in layers], 1).cpu()
        for place, (number, start) in enumerate(rows.owners):
            own = chosen[rows.bounds[place] : rows.bounds[place + 1]]
            name = self.rollout_ids[number]
            if name not in self.records:
                self.records[name] = Record(layers, self._copied(cached, place))
            record = self.records[name]
            before = 0 if cached is None else cached.before[place]
            # Clones, as views would keep all that is not theirs.
            known = sum(map(len, record.context))
            if known < start:
                record.context.append(own[known - before : start - before].clone())
            record.steps.append(own[start - before :].clone())
            if cached is not None:
                holders[cached.slots[place]] = record
        self._holders |= holders

    def _copied(self, cached: CachedRows | None, place: int) -> list[Tensor]:
        """Return the context of a new row: of the row whose keys it starts with, if it does."""
        if cached is None or not cached.before[place]:
            return []
        slot = cached.slots[place]
        source = next((first for first, to, _ in cached.copies if to == slot), slot)
        return [torch.cat(self._holders[source].context)[: cached.before[place]]]


def make_recorder(settings: Settings, ranks: Ranks, rollout_ids: Tensor) -> Recorder | None:
    """Return the recorder of a rollout, on every rank; None unless the settings need one.

    The first tensor- and context-parallel rank keeps the records, and the others none.
    """
    if settings.algorithm.rollout_experts is None:
        return None
    keeps = ranks.tensor.rank == ranks.context.rank == 0
    return Recorder(rollout_ids.tolist()) if keeps else _Nothing(())


class _Nothing(Recorder):
    """A recorder that keeps nothing."""

    def __call__(self, rows: PackedRows) -> None:
        """Do nothing."""


def with_experts(
    batches: Sequence[TimestepBatch],
    parts: Sequence[Sequence[ScoredPart]],
    scored: ScoredRows,
    rollout: Rollout,
    *,
    is_replayed: bool,
) -> list[TimestepBatch]:
    """Return micro-batches with the experts that the rollout chose; called by every rank.

    Args:
        parts: of each micro-batch, its packed rows.

    Raises:
        ValueError: an estimator scores states that no denoising step saw.
    """
    if scored.step is None:
        raise ValueError(
            "algorithm.rollout_experts needs the denoising step of each scored row, and the "
            "estimator returns ScoredRows.step=None; set it, or use algorithm.rollout_experts=null"
        )
    names = rollout.trajectory.rollout_ids[scored.rollout].tolist()
    keys = list(zip(names, scored.step.tolist(), strict=True))
    found = _exchange(rollout.experts or {}, sorted({*keys, *((name, CONTEXT) for name in names)}))
    result = []
    for batch, rows in zip(batches, parts, strict=True):
        if found:
            pieces = [found[key][:count] for row in rows for key, count in row.pieces(keys)]
            chosen = _joined_pieces(pieces, batch.rows, like=next(iter(found.values())))
            packed = replace(batch.rows, experts=chosen, is_replayed=is_replayed)
            batch = replace(batch, rows=packed)
        result.append(batch)
    return result


def _joined_pieces(pieces: Sequence[Tensor], rows: PackedRows, *, like: Tensor) -> Tensor:
    """Return the experts [T, layers, topk] of packed rows; those of a filler are not known."""
    if not pieces:
        return like.new_full((len(rows.tokens), *like.shape[1:]), -1)
    if sum(map(len, pieces)) != len(rows.tokens):
        raise ValueError(
            "algorithm.rollout_experts is for rows of one denoising step, with the open block of a "
            "block model, and the estimator scores other states; use algorithm.rollout_experts=null"
        )
    return torch.cat(list(pieces))


def _exchange(records: Mapping[int, Record], keys: Sequence[Key]) -> dict[Key, Tensor]:
    """Return the experts of all layers [tokens, layers, topk] int16; called by every rank.

    Args:
        records: that this rank keeps.
    """
    mine = {(name, step): records[name].at(step) for name, step in keys if name in records}
    sent = None
    if mine:
        layers = next(iter(records.values())).layers
        # One tensor is sent faster than many.
        sent = (
            layers,
            [(key, len(part)) for key, part in mine.items()],
            torch.cat(list(mine.values())),
        )
    parts: dict[Key, list[tuple[tuple[int, ...], Tensor]]] = {key: [] for key in keys}
    for received in gather_objects(sent):
        if received is not None:
            layers, sizes, table = received
            for (key, _), part in zip(sizes, table.split([n for _, n in sizes]), strict=True):
                parts[key].append((layers, part))
    return {key: _joined(of_stages) for key, of_stages in parts.items()}


def _joined(of_stages: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Join the layers of all pipeline stages, in their order."""
    order = torch.tensor([layer for layers, _ in of_stages for layer in layers]).argsort()
    return torch.cat([part for _, part in of_stages], 1)[:, order].to(torch.int16)
