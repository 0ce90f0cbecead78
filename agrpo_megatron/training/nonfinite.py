"""Find the cause of a non-finite update: micro-batches of each rank, rows, and weights.

Runs only after a failure, so it may take a second forward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.parallel import gather_objects
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.trajectories import map_tensors
from agrpo_megatron.types import SftBatch, TimestepBatch

type Metrics = dict[str, Tensor]
type Loss[Batch] = Callable[[Tensor, Batch], tuple[Tensor, Metrics]]
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
    """A loss, gradient or weight is not finite; the update is not made, or not saved."""

    def __init__(self, text: str, finding: Finding, *, phase: str = "", iteration: int = 0):
        super().__init__(text)
        self.finding, self.phase, self.iteration = finding, phase, iteration


def find_in_loss[Batch: (SftBatch, TimestepBatch)](
    engine: Engine, batches: Sequence[Batch], computed: Sequence[Metrics], *, loss: Loss[Batch]
) -> Finding:
    """Find the micro-batches whose loss was not finite, and their rows; called by every rank.

    Args:
        batches: of this rank.
        computed: the loss and the metrics of each, if this rank has them.
    """
    bad = [n for n, m in enumerate(computed) if not _all_finite(m)]
    found, count = gather_objects(bad), len(batches)
    places = {rank: _numbered(mine, count) for rank, mine in enumerate(found) if mine}
    # Ranks that share experts run the same micro-batches, whosever they are.
    again = sorted({number for mine in found for number in mine})

    def rows_of(number: int, logits: Tensor) -> list[int]:
        """Return the rows of a micro-batch with a non-finite loss."""
        batch = batches[again[number]]
        rows = batch.sources.unique().tolist()
        return [row for row in rows if not _all_finite(_share(row, logits, batch, loss))]

    engine.finish_parameters()
    results = forward_rows(engine.network, [batches[number].rows for number in again], rows_of)
    rows = sorted({row for mine in gather_objects(results) for rows in mine for row in rows})
    guilty = rows or _from_batches([batches[number] for number in bad])
    return Finding("loss", places, guilty, bool(rows), _bad_weights(engine))


def find_in_gradient(engine: Engine, batches: Sequence[SftBatch | TimestepBatch]) -> Finding:
    """Find the parameters whose gradient is not finite; called by every rank."""
    grads = ((name, p.main_grad) for name, p in engine.network.trained_parameters())  # type: ignore[attr-defined]
    places = _not_finite(grads)
    return Finding("gradient", places, _from_batches(batches), True, _bad_weights(engine))


def find_in_weights(engine: Engine) -> Finding | None:
    """Find weights that are not finite; called by every rank."""
    engine.finish_parameters()
    weights = _bad_weights(engine)
    return Finding("weights", weights, [], True, weights) if weights else None


def _share[Batch: (SftBatch, TimestepBatch)](
    row: int, logits: Tensor, batch: Batch, loss: Loss[Batch]
) -> Metrics:
    """Return the loss and the metrics of one row; called by all ranks of a tensor group."""
    mine = batch.sources == row
    total, metrics = loss(logits[mine], map_tensors(batch, lambda tensor: tensor[mine]))
    return {**metrics, "loss": total}


def _from_batches(batches: Sequence[SftBatch | TimestepBatch]) -> list[int]:
    """Return the rows of these micro-batches of all ranks."""
    mine = {row for batch in batches for row in batch.sources.tolist()}
    return sorted(set().union(*gather_objects(mine)))


def _bad_weights(engine: Engine) -> dict[int, str]:
    return _not_finite(engine.network.named_parameters())


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """Name the first non-finite tensors of each rank that has any; called by every rank."""
    bad = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    more = f" and {len(bad) - NAMES} more" if len(bad) > NAMES else ""
    named = gather_objects(", ".join(bad[:NAMES]) + more)
    return {rank: names for rank, names in enumerate(named) if names}


def _numbered(bad: list[int], count: int) -> str:
    shown = ", ".join(str(number + 1) for number in bad[:8]) + (", ..." if len(bad) > 8 else "")
    return f"micro-batch {shown} of {count}"


def _all_finite(metrics: Metrics) -> bool:
    return all(bool(value.isfinite().all()) for value in metrics.values())
