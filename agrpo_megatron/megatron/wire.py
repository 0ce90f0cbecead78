"""Messages between the stages of a pipeline.

Hidden states travel between devices. Draws travel between hosts, over the replica's gloo group:
they are small, and no kernel of any stage waits for them. A draw is one message whose size the
settings give, so its receiver needs no header first.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.trajectories import SUPPORT

COLUMNS = tuple(field.name for field in fields(Draw) if field.name != SUPPORT)  # one each
NUCLEUS = 64  # columns for the support where only top-p bounds it; the rest follows


def connect(ranks: Ranks) -> None:
    """Open the channels of a pipeline's devices, and wait for them; called by every stage.

    NCCL opens a channel at its first message, where both ends wait for each other. Every stage
    opens its channels in the same order, before rollouts use them in theirs.
    """
    group, stage = ranks.pipeline.group, ranks.pipeline.rank
    members = dist.get_process_group_ranks(group)
    element = torch.zeros(1, device=ranks.device)
    dist.all_reduce(element, group=group)
    if stage > 0:
        dist.recv(element, members[stage - 1], group=group)
    if stage < len(members) - 1:
        dist.send(element, members[stage + 1], group=group)
    if ranks.parallel.virtual > 1 and ranks.is_last_stage:
        dist.send(element, members[0], group=group)
    if ranks.parallel.virtual > 1 and stage == 0:
        dist.recv(element, members[-1], group=group)
    element.item()


def support_room(sampling: SamplingSettings) -> int:
    """Return how many support ids of a token fit into a draw's message."""
    if sampling.top_k is not None:
        return sampling.top_k
    return NUCLEUS if sampling.top_p < 1 else 0


def send_draw(
    draw: Draw, receivers: Sequence[int], ranks: Ranks, *, room: int
) -> list[tuple[Any, Tensor]]:
    """Start sending to global ranks; returns the sends with the tensors they read.

    A support wider than `room` columns, see `support_room`, is completed by a second message.
    """
    table = _encode(draw).cpu()
    width = table.shape[1] - len(COLUMNS)
    usual, rest = table.split([len(COLUMNS) + min(width, room), max(0, width - room)], 1)
    usual = F.pad(usual, (0, max(0, room - width)), value=-1)
    messages = [torch.cat([table.new_tensor([width]), usual.flatten()])]
    if width > room:
        messages.append(rest.contiguous())
    return [
        (dist.isend(message, receiver, group=ranks.replica), message)
        for receiver in receivers
        for message in messages
    ]


def receive_draw(sender: int, count: int, ranks: Ranks, *, room: int) -> Draw:
    """Wait for the draws of `count` scored tokens from a global rank."""
    columns = len(COLUMNS) + room
    message = torch.empty(1 + count * columns, dtype=torch.int32)
    dist.recv(message, sender, group=ranks.replica)
    width, table = int(message[0]), message[1:].view(count, columns)
    if width > room:
        rest = table.new_empty(count, width - room)
        dist.recv(rest, sender, group=ranks.replica)
        table = torch.cat([table, rest], 1)
    return _decode(table[:, : len(COLUMNS) + width].to(ranks.device))


def gather_draw(draw: Draw, counts: list[int], ranks: Ranks) -> Draw:
    """Concatenate the draws of the context-parallel ranks, which drew `counts` tokens each."""
    context = ranks.context
    if context.size == 1:
        return draw
    mine = _encode(draw)
    width = torch.tensor([mine.shape[1]], device=ranks.device)
    dist.all_reduce(width, dist.ReduceOp.MAX, group=context.group)
    most, wide = max(counts), int(width)
    mine = F.pad(mine, (0, wide - mine.shape[1], 0, most - len(mine)), value=-1)
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine, group=context.group)
    return _decode(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))


def _encode(draw: Draw) -> Tensor:
    """Return a draw as a table [S, columns] of int32: ids, and the bits of float32 values."""
    values = [getattr(draw, name) for name in COLUMNS]
    columns = [v.float().view(torch.int32) if v.is_floating_point() else v.int() for v in values]
    table = torch.stack(columns, 1)
    return table if draw.support_ids is None else torch.cat([table, draw.support_ids.int()], 1)


def _decode(table: Tensor) -> Draw:
    columns = dict(zip(COLUMNS, table[:, : len(COLUMNS)].unbind(1), strict=True))
    support = table[:, len(COLUMNS) :].long()
    values = {name: column.view(torch.float32) for name, column in columns.items()}
    values["tokens"] = columns["tokens"].long()
    return Draw(**values, support_ids=support if support.shape[1] else None)
