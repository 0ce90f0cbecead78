"""Forward passes without gradient, through any number of pipeline stages.

Every rank of a replica runs the same sampler on the same rows. The stage with the head draws, and
sends the draws back to the other stages; so every stage knows what comes next without further
messages.

`Lockstep` sends all groups of rows through Megatron's schedule, then draws for all: each
denoising step fills and drains the pipeline. `Ring` does not drain it: a denoising step depends
only on its own rows, so a group starts its next step while others are still in the pipeline.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from agrpo_megatron.config.settings import RolloutSettings
from agrpo_megatron.diffusion.draw import Draw, DrawAt, Forward
from agrpo_megatron.diffusion.packing import unscored_row
from agrpo_megatron.megatron.graphs import Graphs
from agrpo_megatron.megatron.layers.context import for_schedule, hidden_tokens, scored_slices
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.megatron.wire import broadcast_draw, gather_draw, receive_draw, send_draw
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
class _Item:
    """A group of rows in the pipeline."""

    rows: PackedRows
    draw_at: DrawAt
    passes: int = 0  # virtual stages of each rank it has passed
    through: int = 0  # slot in which it left the last stage
    drawn: Draw | None = None  # on the last stage only, until it is shared


class RolloutForward(Forward):
    """Runs the rows of a rollout, and counts its work."""

    def __init__(self, network: Network, *, groups: int):
        self.network, self.in_flight = network, groups
        self.tokens = 0  # packed tokens so far
        self.slots = Slots(network.ranks.pipeline.size)
        network.set_training("eval")
        network.renew_casts()

    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Start a group of rows; the returned function waits for the group's draws."""
        self.tokens += len(rows.tokens)
        item = _Item(rows, draw_at)
        self._start(item)
        return partial(self._finish, item)

    def close(self) -> None:
        """Do nothing: no group is in flight once its draws are known."""

    def _start(self, item: _Item) -> None:
        raise NotImplementedError

    def _finish(self, item: _Item) -> Draw:
        assert item.drawn is not None
        return item.drawn


def make_forward(network: Network, rollout: RolloutSettings) -> RolloutForward:
    """Return the sampler's forward; build one for each call of `sample`."""
    stages = network.ranks.pipeline.size
    if stages == 1:
        return Direct(network, groups=rollout.groups or 1)
    cls = Ring if rollout.schedule == "ring" else Lockstep
    return cls(network, groups=rollout.groups or 2 * stages)


@torch.no_grad()
def forward_rows(
    network: Network, batches: Sequence[PackedRows], use: Callable[[int, Tensor], Any]
) -> list[Any]:
    """Return `use(number, logits)` of every batch, on the last pipeline stage; [] on others.

    Called by every rank of a replica with the same batches; `logits` belong to the scored tokens
    that this rank holds. Without a pipeline it is a loop, else Megatron's schedule.
    """
    network.set_training("eval")
    ranks, parallel = network.ranks, network.ranks.parallel
    if parallel.pipeline == 1:
        network.renew_casts()
        return [use(number, network.chunks[0](rows)) for number, rows in enumerate(batches)]
    if not batches:
        return []
    multiple = parallel.pipeline if parallel.virtual > 1 else 1
    fillers = [unscored_row(0, ranks.device)] * (-len(batches) % multiple)
    padded, tokens = for_schedule([*batches, *fillers], ranks)
    items = list(enumerate(padded))

    def forward_step(iterator: Iterator[tuple[int, PackedRows]], model: torch.nn.Module):
        """Run one micro-batch; the schedule passes the last stage's output to the function."""
        number, rows = next(iterator)

        def collect(logits: Tensor, non_loss_data: bool = True):  # noqa: FBT001, FBT002
            return use(number, logits) if number < len(batches) else None

        return model(rows), collect

    virtual = parallel.virtual if parallel.virtual > 1 else None
    schedule = get_forward_backward_func(parallel.pipeline, virtual)
    results = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in network.chunks],
        model=list(network.chunks),
        num_microbatches=len(items),
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(ranks.pipeline.group, network.config),
        pg_collection=ranks.groups,
    )
    return results[: len(batches)]


class Direct(RolloutForward):
    """No pipeline: draw immediately."""

    def __init__(self, network: Network, *, groups: int):
        super().__init__(network, groups=groups)
        self._logits = Graphs(network.chunks[0]) if network.has_graphs else network.chunks[0]

    @torch.no_grad()
    def _start(self, item: _Item) -> None:
        self.slots.run()
        item.drawn = _draw(item, self._logits(item.rows), self.network.ranks)


class Lockstep(RolloutForward):
    """Megatron's schedule, once per denoising step, for all groups together."""

    def __init__(self, network: Network, *, groups: int):
        super().__init__(network, groups=groups)
        self._waiting: list[_Item] = []

    def _start(self, item: _Item) -> None:
        """Queue a group; it runs when the first draw is requested."""
        self._waiting.append(item)

    def _finish(self, item: _Item) -> Draw:
        if item.drawn is None:
            self._run_all()
        return super()._finish(item)

    def _run_all(self) -> None:
        items, ranks = self._waiting, self.network.ranks
        rows = [item.rows for item in items]
        drawn = forward_rows(self.network, rows, lambda n, logits: _draw(items[n], logits, ranks))
        for number, item in enumerate(items):
            count = len(item.rows.scored)
            item.drawn = broadcast_draw(drawn[number] if drawn else None, count, ranks)
        self._count(items)
        self._waiting = []

    def _count(self, items: list[_Item]) -> None:
        """Count slots in the schedule's order: as many groups as stages pass a chunk at a time."""
        stages = self.network.ranks.pipeline.size
        for first in range(0, len(items), stages):
            for _ in self.network.chunks:
                for item in items[first : first + stages]:
                    item.through = self.slots.run(item.through)
        self.slots.wait_for_all()


class Ring(RolloutForward):
    """Groups follow each other through the stages without draining between denoising steps.

    Stage s works on one group while stage s + 1 works on the previous group. With as many groups as
    stages, the first stage receives a group's draws exactly when that group's next turn comes.
    """

    def __init__(self, network: Network, *, groups: int):
        super().__init__(network, groups=groups)
        self._under_way: deque[_Item] = deque()
        self._sent: deque[tuple[Any, ...]] = deque()  # sends, and the tensors they read
        self._ready = 0  # slot in which the latest draws were known
        members = dist.get_process_group_ranks(network.ranks.pipeline.group)
        stage = network.ranks.pipeline.rank
        self._before, self._after = members[stage - 1], members[(stage + 1) % len(members)]
        *self._others, self._last = members

    def _start(self, item: _Item) -> None:
        """Run this stage for a group and pass it on."""
        item.through = self._ready
        self._pass_on(item)
        self._under_way.append(item)

    def close(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _finish(self, item: _Item) -> Draw:
        """Return a group's draws; groups with virtual stages left advance first."""
        while item.passes < len(self.network.chunks):
            for other in self._under_way:
                if other.passes <= item.passes:
                    self._pass_on(other)
        self._under_way.remove(item)
        self._ready = item.through
        if self.network.ranks.is_last_stage:
            return super()._finish(item)
        return receive_draw(self._last, len(item.rows.scored), self.network.ranks)

    @torch.no_grad()
    def _pass_on(self, item: _Item) -> None:
        """Run one virtual stage of a group: receive, compute, send to the next stage."""
        ranks, chunk = self.network.ranks, self.network.chunks[item.passes]
        item.passes += 1
        item.through = self.slots.run(item.through)
        if not chunk.pre_process:
            chunk.set_input_tensor(self._receive(item.rows))
        output = chunk(item.rows)
        if chunk.post_process:
            item.drawn = _draw(item, output, ranks)
            for other in self._others:
                self._keep(*send_draw(item.drawn, other, ranks))
        else:
            group = ranks.returning if ranks.is_last_stage else ranks.pipeline.group
            self._keep((dist.isend(output, self._after, group=group), output))

    def _receive(self, rows: PackedRows) -> Tensor:
        ranks, config = self.network.ranks, self.network.config
        shape = (hidden_tokens(rows, ranks), 1, config.hidden_size)
        hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=ranks.device)
        group = ranks.returning if ranks.pipeline.rank == 0 else ranks.pipeline.group
        dist.recv(hidden, self._before, group=group)
        return hidden

    def _keep(self, *sends: tuple[Any, ...]) -> None:
        """Keep tensors alive while they are sent; sends two denoising steps old have arrived."""
        self._sent.extend(sends)
        each = len(self.network.chunks) + 2 * len(self._others)
        while len(self._sent) > 2 * each * self.in_flight:
            self._sent.popleft()[0].wait()


def _draw(item: _Item, logits: Tensor, ranks: Ranks) -> Draw:
    """Draw at the scored tokens of all context-parallel ranks; called on the last stage."""
    slices = scored_slices(item.rows, ranks)
    mine = item.draw_at(logits, slices[ranks.context.rank])
    return gather_draw(mine, [part.stop - part.start for part in slices], ranks)
