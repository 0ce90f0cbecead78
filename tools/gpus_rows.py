"""The rows of `gpus_check.py`, in order; imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALONE = "one"


@dataclass(frozen=True)
class Row:
    """One layout, or a checkpoint that moves from one layout to another."""

    name: str
    ranks: int
    overrides: tuple[str, ...] = ()  # settings
    then: tuple[str, ...] | None = None  # settings of the layout that resumes the checkpoint
    seconds: float = 60  # after which it has failed


DISTRIBUTED = "optimizer.distributed=true"


def _layout(name: str, ranks: int, *more: str) -> Row:
    """Return the row of a layout, which its name begins with."""
    return Row(name, ranks, (f"parallel={name.partition(' ')[0]}", *more))


def _checkpoint(saved: str, resumed: str, ranks: int) -> Row:
    overrides = [(f"parallel={layout}", DISTRIBUTED) for layout in (saved, resumed)]
    return Row(f"checkpoint {saved} to {resumed}", ranks, overrides[0], overrides[1])


# The first is what all others are compared with. Rows that the time does not reach are cut.
ROWS = (
    Row(ALONE, 1),
    _layout("tp2", 2),
    _layout("tp2-sp", 2),
    _layout("pp2", 2),  # rollouts in a ring
    _layout("pp2 lockstep", 2, "rollout.schedule=lockstep"),
    _layout("cp2", 2),
    _layout("dp2 distributed optimizer", 2, DISTRIBUTED),
    _layout("tp2-sp rollout dp2", 2, "rollout.parallel=dp2"),
    _layout("pp2 rollout tp2", 2, "rollout.parallel=tp2"),
    _checkpoint("tp2-sp", "pp2", 2),
    _layout("tp2-sp-dp2 distributed optimizer", 4, DISTRIBUTED),
    _layout("tp2-sp-pp2", 4),
    _layout("pp4 rollout tp2-pp2", 4, "rollout.parallel=tp2-pp2"),
    _checkpoint("tp2-pp2", "dp4", 4),
    _layout("tp2-sp-dp4 distributed optimizer", 8, DISTRIBUTED),  # that of the LLaDA-8B recipes
    _layout("tp4-sp-pp2", 8),
    _layout("tp4-sp-dp2 rollout tp2", 8, DISTRIBUTED, "rollout.parallel=tp2"),
)


def by_ranks(rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of each number of ranks, in order: they share processes."""
    for ranks in dict.fromkeys(row.ranks for row in rows):
        yield tuple(row for row in rows if row.ranks == ranks)
