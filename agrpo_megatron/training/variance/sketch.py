"""A short sketch of the whole gradient, with its inner products, under any layout.

A count sketch is linear, and inner products of sketches estimate those of gradients without bias:
the relative standard deviation is about 1 / sqrt(size). (Source: Charikar, Chen and Farach-Colton,
"Finding frequent items in data streams".)
"""

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.megatron.engine import Engine

SIZE = 2**14  # numbers in a sketch: inner products within 0.8 %
CHUNK = 2**22  # gradient elements that are hashed at a time


def gradient_sketch(engine: Engine) -> Tensor:
    """Return the sketch [SIZE] of the gradient in `main_grad`, float64; called by every rank.

    The optimizer lists the gradients that this rank owns, as for its norm: no tensor counts twice,
    and a distributed optimizer's shards are added up.
    """
    total = torch.zeros(SIZE, dtype=torch.float64, device=engine.ranks.device)
    for number, part in enumerate(engine.optimizers):
        part.prepare_grads()
        group = part.get_grad_stats_parallel_group()
        mine = torch.zeros_like(total)
        for place, gradient in enumerate(part.get_grads_for_grad_norm()):
            _add(mine, gradient, number, place, dist.get_rank(group))
        dist.all_reduce(mine, group=group)
        total += mine
    return total


def _add(sketch: Tensor, gradient: Tensor, *place: int) -> None:
    """Add each element to a hashed place of the sketch, with a hashed sign."""
    known = [torch.tensor(number, device=sketch.device) for number in place]
    for first in range(0, gradient.numel(), CHUNK):
        values = gradient.flatten()[first : first + CHUNK].to(sketch)
        index = first + torch.arange(len(values), device=sketch.device)
        keys = noise.noise_key(0, noise.SKETCH, *known, index)
        sign = 1.0 - 2.0 * ((keys >> 40) & 1)
        sketch.index_add_(0, keys & (SIZE - 1), values * sign)
