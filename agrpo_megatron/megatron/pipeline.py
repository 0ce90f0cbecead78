"""Forward passes without gradient, through any number of pipeline stages.

Every rank of a replica runs the same sampler on the same rows. The stage with the head draws, and
sends the draws to the other stages; so every stage knows what comes next without further messages.

`Lockstep` sends all groups of rows through Megatron's schedule, then draws for all: each
denoising step fills and drains the pipeline. `Ring` does not drain it: a denoising step depends
only on its own rows, so a group starts its next step while others are still in the pipeline.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from agrpo_megatron.config.settings import RolloutSettings, SamplingSettings
from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.diffusion.packing import unscored_row
from agrpo_megatron.megatron.forward import Item, RolloutForward, Staged, draw_group
from agrpo_megatron.megatron.graphs import Graphs
from agrpo_megatron.megatron.layers.context import for_schedule, hidden_tokens
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.types import PackedRows


def make_forward(
    network: Network, rollout: RolloutSettings, *, sampling: SamplingSettings
) -> RolloutForward:
    """Return the sampler's forward; build one for each call of `sample`, on every rank."""
    stages = network.ranks.pipeline.size
    if stages == 1:
        return Direct(network, groups=rollout.groups or 1)
    cls = Ring if rollout.schedule == "ring" else Lockstep
    return cls(network, groups=rollout.groups or 2 * stages, sampling=sampling)


@torch.no_grad()
def forward_rows(
    network: Network, batches: Sequence[PackedRows], use: Callable[[int, Tensor], Any]
) -> list[Any]:
    """Return `use(number, logits)` of every batch, on the last pipeline stage; [] on others.

    Called by every rank of a replica with the same batches; `logits` belong to the scored tokens
    that this rank holds. Without a pipeline it is a loop, else Megatron's schedule.
    """
    network.set_training("eval")
    network.for_updates()
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
    def _start(self, item: Item) -> None:
        self.slots.run()
        item.drawn = draw_group(item, self._logits(item.rows), self.network.ranks)

    @torch.no_grad()
    def _idle(self) -> None:
        self.network.chunks[0](self._filler())


class Lockstep(Staged):
    """Megatron's schedule, once per denoising step, for all groups together."""

    def __init__(self, network: Network, *, groups: int, sampling: SamplingSettings):
        super().__init__(network, groups=groups, sampling=sampling)
        self._waiting: list[Item] = []

    def _start(self, item: Item) -> None:
        """Queue a group; it runs when the first draw is requested."""
        self._waiting.append(item)

    def _finish(self, item: Item) -> Draw:
        if item.drawn is None:
            self._run_all()
        return super()._finish(item)

    def _run_all(self) -> None:
        items, ranks = self._waiting, self.network.ranks
        rows = [item.rows for item in items]
        drawn = forward_rows(
            self.network, rows, lambda n, logits: draw_group(items[n], logits, ranks)
        )
        sends = [send for each in drawn for send in self._share(each)]
        for number, item in enumerate(items):
            item.drawn = drawn[number] if drawn else self._receive_draw(item)
        for work, _ in sends:
            work.wait()
        self._count(items)
        self._waiting = []

    def _count(self, items: list[Item]) -> None:
        """Count slots in the schedule's order: as many groups as stages pass a chunk at a time."""
        stages = self.network.ranks.pipeline.size
        for first in range(0, len(items), stages):
            for _ in self.network.chunks:
                for item in items[first : first + stages]:
                    item.through = self.slots.run(item.through)
        self.slots.wait_for_all()


class _Returning(NamedTuple):
    """A hidden state that the last stage sends back to the first."""

    item: Item
    unit: int  # forward passes of the first stage when it sent this one
    turn: int  # groups that it had finished


class Ring(Staged):
    """Groups follow each other through the stages without draining between denoising steps.

    Stage s works on one group while stage s + 1 works on the previous group. With as many groups as
    stages, the first stage receives a group's draws exactly when that group's next turn comes.

    No stages wait for each other in a circle, even if a device runs all its kernels in one queue
    and a send lasts until its receiver takes it: all stages pass groups on in the same order, and
    the first stage takes what returns to it before the last stage must have sent it.
    """

    def __init__(self, network: Network, *, groups: int, sampling: SamplingSettings):
        super().__init__(network, groups=groups, sampling=sampling)
        self._under_way: deque[Item] = deque()
        self._returning: deque[_Returning] = deque()  # on the first stage
        self._sent: deque[list[tuple[Any, Tensor]]] = deque()  # sends, and the tensors they read
        self._ready = 0  # slot in which the latest draws were known
        self._unit = self._turn = 0
        stage, members = network.ranks.pipeline.rank, self._members
        self._before, self._after = members[stage - 1], members[(stage + 1) % len(members)]

    def _start(self, item: Item) -> None:
        """Run this stage for a group and pass it on."""
        item.through = self._ready
        self._pass_on(item)
        self._under_way.append(item)

    def close(self) -> None:
        """End the rollout, and wait until everything sent has arrived."""
        super().close()
        self._wait_for_sends(but=0)

    @torch.no_grad()
    def _idle(self) -> None:
        (chunk,), rows = self.network.chunks, self._filler()
        if not chunk.pre_process:
            chunk.set_input_tensor(self._receive(rows))
        output = chunk(rows)
        if not chunk.post_process:
            send = dist.isend(output, self._after, group=self.network.ranks.pipeline.group)
            self._sent.append([(send, output)])
            self._wait_for_sends(but=2 * self.in_flight)

    def _finish(self, item: Item) -> Draw:
        """Return a group's draws; groups with virtual stages left advance first."""
        self._turn += 1
        while item.passes < len(self.network.chunks):
            for other in self._under_way:
                if other.passes <= item.passes:
                    self._pass_on(other)
        self._take_returned()
        self._under_way.remove(item)
        self._ready = item.through
        is_last = self.network.ranks.is_last_stage
        return super()._finish(item) if is_last else self._receive_draw(item)

    @torch.no_grad()
    def _pass_on(self, item: Item) -> None:
        """Run one virtual stage of a group: receive, compute, send to the next stage."""
        ranks, chunk = self.network.ranks, self.network.chunks[item.passes]
        item.passes += 1
        item.through = self.slots.run(item.through)
        self._unit += 1
        if not chunk.pre_process:
            chunk.set_input_tensor(self._input(item))
        output = chunk(item.rows)
        self._take_returned()
        if chunk.post_process:
            item.drawn = draw_group(item, output, ranks)
            self._sent.append(self._share(item.drawn))
        else:
            send = dist.isend(output, self._after, group=ranks.pipeline.group)
            self._sent.append([(send, output)])
            if ranks.pipeline.rank == 0 and item.passes < len(self.network.chunks):
                self._returning.append(_Returning(item, self._unit, self._turn))
        # What was sent two denoising steps ago has arrived.
        self._wait_for_sends(but=2 * len(self.network.chunks) * self.in_flight)

    def _input(self, item: Item) -> Tensor:
        """Return a group's hidden state from the stage before."""
        if self.network.ranks.pipeline.rank > 0:
            return self._receive(item.rows)
        while item.returned is None:
            self._take_first()
        hidden, item.returned = item.returned, None
        return hidden

    def _take_returned(self) -> None:
        """Take the hidden states that the last stage must send back before this one continues.

        In a full pipeline, a send of the first stage ends only after the last stage has sent back
        what entered `lag` passes before. Near the end of a rollout, groups finish and none
        enters; then finished groups count, since no rank gets far ahead in a vote of the replica.
        """
        lag = len(self._members) - 1
        while self._returning:
            first = self._returning[0]
            if self._unit - first.unit < lag and self._turn - first.turn <= lag:
                return
            self._take_first()

    def _take_first(self) -> None:
        item = self._returning.popleft().item
        item.returned = self._receive(item.rows)

    def _receive(self, rows: PackedRows) -> Tensor:
        ranks, config = self.network.ranks, self.network.config
        shape = (hidden_tokens(rows, ranks), 1, config.hidden_size)
        hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=ranks.device)
        dist.recv(hidden, self._before, group=ranks.pipeline.group)
        return hidden

    def _wait_for_sends(self, *, but: int) -> None:
        """Wait for all sends but those of the last `but` passes; frees the tensors they read."""
        while len(self._sent) > but:
            for work, _ in self._sent.popleft():
                work.wait()
