"""The data order: each task gets its share of problems, each epoch its own order.

An iteration has a range of places. The problem at a place depends only on the place and the seed,
so a resumed run and any layout pick the same problems.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.tasks.curriculum import epoch_size

type Shares = Sequence[tuple[int, float]]  # problems and weight of each task, one after the other


def pick_problems(shares: Shares, places: range, *, seed: int) -> list[int]:
    """Return the index of the problem at each place; places count from 0 over a phase.

    Tasks alternate by smooth weighted round robin. Each task visits every problem once per epoch,
    in an order that differs between epochs. Skipped places skip their problems, as in
    unused rounds of `resample_rounds`.
    """
    counts = tuple(count for count, _ in shares)
    weights = tuple(weight if count else 0.0 for count, weight in shares)
    picked = []
    for place in places:
        task, turn = _turn(weights, place)
        epoch, offset = divmod(turn, counts[task])
        start = sum(counts[:task])
        picked.append(start + int(_epoch_order(start, counts[task], epoch, seed)[offset]))
    return picked


def epochs(shares: Shares, places: int) -> float:
    """Return how often the first places visit each problem: the mean over the problems in use."""
    return places / epoch_size(shares)


_turns: dict[tuple[float, ...], tuple[list[tuple[int, int]], list[int]]] = {}
_orders: dict[tuple[int, int, int], tuple[int, Tensor]] = {}


def _turn(weights: tuple[float, ...], place: int) -> tuple[int, int]:
    """Return the task of a place, and the number of its earlier places."""
    if len(weights) == 1:
        return 0, place
    turns, had = _turns.setdefault(weights, ([], [0] * len(weights)))
    total = sum(weights)
    while len(turns) <= place:
        ahead = len(turns) + 1
        owed = [weight * ahead - total * h for weight, h in zip(weights, had, strict=True)]
        task = max((k for k, weight in enumerate(weights) if weight), key=owed.__getitem__)
        turns.append((task, had[task]))
        had[task] += 1
    return turns[place]


def _epoch_order(start: int, count: int, epoch: int, seed: int) -> Tensor:
    """Return one epoch's order of the problems from `start` on; caches each task's last."""
    key = (start, count, seed)
    if key not in _orders or _orders[key][0] != epoch:
        numbers = torch.arange(start, start + count)
        chance = noise.noise_key(seed, noise.PROBLEMS, torch.tensor(epoch), numbers)
        _orders[key] = epoch, noise.uniform(chance).argsort()
    return _orders[key][1]
