"""Counter-based noise: a hash of (seed, stream, indices), never a generator's state.

The noise of (rollout, denoising step, position, token) is the same under any tensor-parallel
layout, batch size, compaction or resume, and a vocabulary shard computes its own slice.
"""

import functools
import math

import torch
from torch import Tensor

# Streams keep the uses of one seed apart.
TOKENS, POSITIONS, STEPS, PROBLEMS, MASKS, STATES, SKETCH, REPLIES = range(8)

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the splitmix64 increment
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def noise_key(seed: int, stream: int, *indices: Tensor) -> Tensor:
    """Fold int64 index tensors, which broadcast, into one int64 key per element."""
    key: Tensor | int = _root(seed, stream)
    for index in indices:
        key = fold(key, index)
    return key if isinstance(key, Tensor) else torch.tensor(key)


def fold(key: Tensor | int, index: Tensor) -> Tensor:
    """Return the keys of `index` below `key`; shapes broadcast."""
    return _mix(key ^ _mix(index.to(torch.int64) + 1))


def uniform(key: Tensor) -> Tensor:
    """Return float64 numbers in the open interval (0, 1), one per key."""
    bits = _shift_right(_mix(key), 12)
    return (bits.to(torch.float64) + 0.5) * math.ldexp(1.0, -52)


def gumbel(key: Tensor) -> Tensor:
    """Return standard Gumbel noise in float64, one number per key."""
    return -torch.log(-torch.log(uniform(key)))


@functools.cache
def _root(seed: int, stream: int) -> int:
    """Return the key of a stream: a number of the host, as a tensor would be copied to the GPU."""
    start = (seed * 1000003 + stream + 2**63) % 2**64 - 2**63  # wraps around, as `_mix` does
    return int(_mix(torch.tensor(start)))


def _mix(x: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser; int64 products wrap around as uint64 ones do."""
    x = x + GOLDEN
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without the sign: torch shifts int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
