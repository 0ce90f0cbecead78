"""What the sampler runs rows through: the network, or any function of packed rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.types import PackedRows

# Draw at the scored tokens of this slice, from their logits shard [S, V / tensor parallel].
DrawAt = Callable[[Tensor, slice], Draw]


class Forward(Protocol):
    """What runs packed rows through the network; see `megatron.pipeline`."""

    in_flight: int  # groups of rows that may be under way at once

    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Start on a group; the function that is returned waits for the draws at its scores."""
        ...

    def close(self) -> None:
        """Wait until nothing is under way; called when all draws are known."""
        ...


@dataclass
class AtOnce:
    """A `Forward` over a function from packed rows to logits [S, V / tensor parallel]."""

    score: Callable[[PackedRows], Tensor]
    in_flight: int = 1

    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Draw from what the function returns."""
        draw = draw_at(self.score(rows), slice(None))
        return lambda: draw

    def close(self) -> None:
        """Do nothing: nothing is under way."""
