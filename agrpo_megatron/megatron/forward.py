"""What the forwards of a rollout share: groups of rows, their draws, and the count of the work."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.draw import Draw, DrawAt, Forward
from agrpo_megatron.diffusion.packing import unscored_row
from agrpo_megatron.diffusion.patterns import full
from agrpo_megatron.megatron.layers.context import scored_slices
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.megatron.wire import (
    connect,
    gather_draw,
    receive_draw,
    send_draw,
    support_room,
)
from agrpo_megatron.types import PackedRows


class Slots:
    """Count the slots of the stages; one slot is a forward pass of one group on a virtual stage.

    Each stage works in order; a group enters a stage after it left the previous stage.
    """

    def __init__(self, stages: int):
        self.ends = [0] * stages
        self.busy = 0

    def run(self, ready: int = 0) -> int:
        """Send a group through all stages from slot `ready`; returns the slot where it leaves."""
        for stage, free in enumerate(self.ends):
            ready = max(ready, free) + 1
            self.ends[stage] = ready
        self.busy += len(self.ends)
        return ready

    def wait_for_all(self) -> None:
        """Let every stage start only after all stages have ended."""
        self.ends = [max(self.ends)] * len(self.ends)

    @property
    def bubble(self) -> float:
        """Return the share of slots in which a stage was idle."""
        total = len(self.ends) * max(self.ends)
        return 1 - self.busy / total if total else 0.0


@dataclass(eq=False)
class Item:
    """A group of rows in the pipeline."""

    rows: PackedRows
    draw_at: DrawAt
    passes: int = 0  # virtual stages of each rank it has passed
    through: int = 0  # slot in which it left the last stage
    drawn: Draw | None = None  # on the last stage only, until it is shared
    returned: Tensor | None = None  # on the first stage: its hidden state for the next pass


class RolloutForward(Forward):
    """Runs the rows of a rollout, and counts its work.

    Replicas that share experts run their forward passes together. One whose rollout is over runs
    passes without rows until the others are over too.
    """

    # Receives rows with the experts of this stage for their tokens; None: nothing is noted.
    record: Callable[[PackedRows], None] | None = None

    def __init__(self, network: Network, *, groups: int):
        self.network, self.in_flight = network, groups
        self.tokens = self.passes = 0  # packed tokens and forward passes so far
        self.slots = Slots(network.ranks.pipeline.size)
        network.set_training("eval")
        network.for_rollouts()
        network.renew_casts()

    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Start a group of rows; the returned function waits for the group's draws."""
        self._meet(is_working=True)
        self.tokens, self.passes = self.tokens + len(rows.tokens), self.passes + 1
        item = Item(rows if self.record is None else replace(rows, seen={}), draw_at)
        self._start(item)
        return partial(self._end, item)

    def close(self) -> None:
        """End the rollout; no group is in flight once its draws are known."""
        while self._meet(is_working=False):
            self._idle()

    def _meet(self, *, is_working: bool) -> bool:
        """Return whether a replica that shares experts is still at work; each one calls it."""
        expert, device = self.network.ranks.expert, self.network.ranks.device
        if expert.size == 1:
            return False
        found = torch.tensor(int(is_working), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=expert.group)
        return is_working or bool(found)

    def _idle(self) -> None:
        """Run a forward pass of one token, whose result is of no use."""
        raise NotImplementedError

    def _filler(self) -> PackedRows:
        """Return the row of a forward pass without rows."""
        model, device = self.network.chunks[0].settings, self.network.ranks.device
        assert model.mask_token_id is not None
        row = unscored_row(model.mask_token_id, device)
        return replace(row, patterns=(full(1),)) if model.has_blocks else row

    def _start(self, item: Item) -> None:
        raise NotImplementedError

    def _end(self, item: Item) -> Draw:
        """Return a group's draws, after its experts are noted."""
        drawn = self._finish(item)
        if self.record is not None:
            self.record(item.rows)
        return drawn

    def _finish(self, item: Item) -> Draw:
        assert item.drawn is not None
        return item.drawn


class Staged(RolloutForward):
    """Several stages, to which the last one sends its draws."""

    def __init__(self, network: Network, *, groups: int, sampling: SamplingSettings):
        super().__init__(network, groups=groups)
        self._room = support_room(sampling)
        self._members = dist.get_process_group_ranks(network.ranks.pipeline.group)
        connect(network.ranks)

    def _share(self, drawn: Draw) -> list[tuple[Any, Tensor]]:
        return send_draw(drawn, self._members[:-1], self.network.ranks, room=self._room)

    def _receive_draw(self, item: Item) -> Draw:
        count, last = len(item.rows.scored), self._members[-1]
        return receive_draw(last, count, self.network.ranks, room=self._room)


def draw_group(item: Item, logits: Tensor, ranks: Ranks) -> Draw:
    """Draw at the scored tokens of all context-parallel ranks; called on the last stage."""
    slices = scored_slices(item.rows, ranks)
    mine = item.draw_at(logits, slices[ranks.context.rank])
    return gather_draw(mine, [part.stop - part.start for part in slices], ranks)
