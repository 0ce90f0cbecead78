"""Draws between ranks: a header with the width of the support, then one float64 tensor.

Token ids and float32 log-probs are exact in float64.
"""

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.trajectories import SUPPORT

COLUMNS = tuple(field.name for field in fields(Draw) if field.name != SUPPORT)  # one each


def send_draw(draw: Draw, receiver: int, ranks: Ranks) -> list[tuple[Any, Tensor]]:
    """Start sending to a global rank; returns the sends with the tensors they read."""
    content = _encode(draw)
    header = torch.tensor([content.shape[1]], device=content.device)
    group = ranks.returning
    return [(dist.isend(t, receiver, group=group), t) for t in (header, content)]


def receive_draw(sender: int, count: int, ranks: Ranks) -> Draw:
    """Wait for the draws of `count` scored tokens from a global rank."""
    header = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    dist.recv(header, sender, group=ranks.returning)
    content = torch.empty(count, int(header), dtype=torch.float64, device=ranks.device)
    dist.recv(content, sender, group=ranks.returning)
    return _decode(content)


def broadcast_draw(draw: Draw | None, count: int, ranks: Ranks) -> Draw:
    """Share the last stage's draws with all stages; the others pass None."""
    last = dist.get_process_group_ranks(ranks.pipeline.group)[-1]
    content = None if draw is None else _encode(draw)
    header = torch.tensor([0 if content is None else content.shape[1]], device=ranks.device)
    dist.broadcast(header, last, group=ranks.pipeline.group)
    if content is None:
        content = torch.empty(count, int(header), dtype=torch.float64, device=ranks.device)
    dist.broadcast(content, last, group=ranks.pipeline.group)
    return _decode(content)


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
    columns = torch.stack([getattr(draw, name).double() for name in COLUMNS], 1)
    return columns if draw.support_ids is None else torch.cat([columns, draw.support_ids], 1)


def _decode(content: Tensor) -> Draw:
    columns = dict(zip(COLUMNS, content[:, : len(COLUMNS)].unbind(1), strict=True))
    support = content[:, len(COLUMNS) :].long()
    values = {name: column.float() for name, column in columns.items()}
    values["tokens"] = columns["tokens"].long()
    return Draw(**values, support_ids=support if support.shape[1] else None)
