"""Find the cause of a non-finite update: micro-batches of each rank, rows, and weights.

Runs only after a failure, so it may take a second forward pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.parallel import gather_objects
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.types import SftBatch, TimestepBatch

Metrics = dict[str, Tensor]
NAMES = 3  # parameters that a rank names


@dataclass(frozen=True)
class Finding:
    """The non-finite values of an update; the same on every rank."""

    what: str  # "loss", "gradient" or "weights"
    places: dict[int, str]  # by rank: its micro-batches, or its parameters
    rows: list[int]  # affected rollouts or examples; for a gradient, all of the update
    is_again: bool  # also not finite in a second computation of the loss
    weights: dict[int, str]  # by rank: non-finite parameters


class NotFinite(RuntimeError):
    """An update whose loss or gradient is not finite, or weights that are not; nothing is kept."""

    def __init__(self, text: str, finding: Finding, *, phase: str = "", iteration: int = 0):
        super().__init__(text)
        self.finding, self.phase, self.iteration = finding, phase, iteration


def find_in_loss[Batch: (SftBatch, TimestepBatch)](
    engine: Engine,
    batches: Sequence[Batch],
    computed: Sequence[Metrics],
    *,
    loss: Callable[[Tensor, Batch], tuple[Tensor, Metrics]],
) -> Finding:
    """Find the micro-batches whose loss was not finite, and their rows; called by every rank.

    Args:
        batches: of this rank.
        computed: the loss and the metrics of each, if this rank has them.
    """
    data, bad = engine.ranks.data.rank, [n for n, m in enumerate(computed) if not _all_finite(m)]
    found: list[tuple[int, list[int]]] = gather_objects((data, bad))
    places = {rank: _micro_batches(mine, len(batches)) for rank, (_, mine) in enumerate(found)}
    again = sorted({number for other, mine in found if other == data for number in mine})

    def rows_of(number: int, logits: Tensor) -> list[int]:
        """Return the rows of a micro-batch with a non-finite loss."""
        batch = batches[again[number]]
        return [row for row in _rows(batch) if not _all_finite(_share(row, logits, batch, loss))]

    engine.finish_parameters()
    results = forward_rows(engine.network, [batches[number].rows for number in again], rows_of)
    rows = sorted({row for mine in gather_objects(results) for rows in mine for row in rows})
    guilty = rows or _from_batches([batches[number] for number in bad])
    return Finding("loss", _said(places), guilty, bool(rows), _bad_weights(engine))


def find_in_gradient(engine: Engine, batches: Sequence[SftBatch | TimestepBatch]) -> Finding:
    """Find the parameters whose gradient is not finite; called by every rank."""
    grads = ((name, p.main_grad) for name, p in engine.network.named_parameters())  # type: ignore[attr-defined]
    places = dict(enumerate(gather_objects(_bad_names(grads))))
    return Finding("gradient", _said(places), _from_batches(batches), True, _bad_weights(engine))


def find_in_weights(engine: Engine) -> Finding | None:
    """Find weights that are not finite; called by every rank."""
    engine.finish_parameters()
    weights = _bad_weights(engine)
    return Finding("weights", weights, [], True, weights) if weights else None


def _share[Batch: (SftBatch, TimestepBatch)](
    row: int,
    logits: Tensor,
    batch: Batch,
    loss: Callable[[Tensor, Batch], tuple[Tensor, Metrics]],
) -> Metrics:
    """Return the loss and the metrics of one row alone; ranks of one tensor group together."""
    mine = batch.sources == row
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "rows"}
    part = replace(batch, **{n: v[mine] if v is not None else None for n, v in values.items()})
    total, metrics = loss(logits[mine], part)
    return {**metrics, "loss": total}


def _rows(batch: SftBatch | TimestepBatch) -> list[int]:
    return batch.sources.unique().tolist()


def _from_batches(batches: Sequence[SftBatch | TimestepBatch]) -> list[int]:
    """Return the rows of these micro-batches of all ranks."""
    mine = {row for batch in batches for row in _rows(batch)}
    return sorted(set().union(*gather_objects(mine)))


def _bad_weights(engine: Engine) -> dict[int, str]:
    return _said(dict(enumerate(gather_objects(_bad_names(engine.network.named_parameters())))))


def _bad_names(tensors: Any) -> str:
    """Name the first non-finite tensors; empty if all are finite."""
    bad = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    more = f" and {len(bad) - NAMES} more" if len(bad) > NAMES else ""
    return ", ".join(bad[:NAMES]) + more


def _micro_batches(bad: list[int], count: int) -> str:
    if not bad:
        return ""
    shown = ", ".join(str(number + 1) for number in bad[:8]) + (", ..." if len(bad) > 8 else "")
    return f"micro-batch {shown} of {count}"


def _said(places: dict[int, str]) -> dict[int, str]:
    return {rank: text for rank, text in places.items() if text}


def _all_finite(metrics: Metrics) -> bool:
    return all(math.isfinite(float(value)) for value in metrics.values())
