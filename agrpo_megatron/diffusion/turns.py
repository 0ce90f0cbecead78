"""Positions drawn one after another, with a log-prob that has a gradient: Plackett-Luce.

The first position is drawn with probability proportional to exp(score), each further one likewise
among the rest. Equally, scores plus Gumbel noise are sorted. Source: Kool, van Hoof and Welling,
"Stochastic Beams and Where to Find Them" (arXiv 1903.06059).
"""

import torch
from torch import Tensor

NEVER = -1e30  # score of a position that cannot be drawn: finite, so that gradients are


def position_scores(entropies: Tensor, temperature: float) -> Tensor:
    """Return scores in float64: the surer the model is of a position, the earlier its turn."""
    return -entropies.double() / temperature


def turn_logprobs(scores: Tensor, turns: Tensor, allowed: Tensor) -> Tensor:
    """Return the log-prob [n, B] of each drawn position at its turn, in nats; 0 for others.

    Their sum over a row is the log-prob of the row's draw.

    Args:
        scores: [n, B] from `position_scores`; has a gradient.
        turns: [n, B] int64, from 0 in each row; -1 where a position was not drawn.
        allowed: [n, B] positions among which the draw was.
    """
    width = scores.shape[1]
    key = turns.masked_fill(turns < 0, width).masked_fill(~allowed, 2 * width)
    order = key.argsort(1)
    ranked = torch.where(allowed, scores, NEVER).gather(1, order)
    rest = ranked.flip(1).logcumsumexp(1).flip(1)
    found = (ranked - rest).gather(1, order.argsort(1))
    return found.masked_fill(turns < 0, 0.0)


def best(rank: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` [n, 1] highest of each row of `rank` [n, B]; the leftmost wins a tie."""
    return places_of(rank) < counts


def places_of(rank: Tensor) -> Tensor:
    """Return the place of each position in the descending order of its row, [n, B] from 0."""
    order = torch.argsort(rank, dim=1, descending=True, stable=True)
    places = torch.empty_like(order)
    return places.scatter_(
        1, order, torch.arange(rank.shape[1], device=rank.device).expand_as(order)
    )
