"""Draw from the whole vocabulary in one read of the logits: a Triton kernel for GPUs.

The kernel serves draws without top-k and top-p, for every unmasking; `margin` ranks positions by
another read of the logits, see `draw`. Each program takes BLOCK columns of one scored row. In
registers it tempers the logits, shuts out the impossible ids, hashes the noise, takes the maximum,
and sums what log-probs, entropies and spreads need. Small tensor operations then combine the blocks
of a row, and the shards of a vocabulary-parallel group. Blocks do not depend on the batch, so
neither do the results of a row.

Exactness. The noise is `noise`'s: the same integers, and the same float64 operations. So a token is
the one that tensor operations draw on the same device. Between devices the logarithm may differ in
its last bit, 1e-16: two candidates closer than that could change places. Log-probs and entropies
are float32 sums in another order than theirs: equal up to rounding, within 1e-6 of their size.

Imported only where it is used: machines without a GPU need no Triton.
"""

import torch
import torch.distributed as dist
import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.logprobs import (
    Vocabulary,
    impossible_columns,
    lowest_of_best,
    reduce,
    spread,
)

BLOCK = 2048  # columns of a program
WARPS = 8

# Tokens, log-probs, entropies, spreads, log-probs at temperature 1: [S] each.
type Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_GOLDEN = tl.constexpr(noise.GOLDEN % 2**64)
_MIX_1 = tl.constexpr(noise.MIX_1 % 2**64)
_MIX_2 = tl.constexpr(noise.MIX_2 % 2**64)


def draw_whole(logits: Tensor, keys: Tensor, *, vocab: Vocabulary, temperature: float) -> Drawn:
    """Draw one token per row of a logits shard [S, shard]; equal on every rank of the group.

    Returns the tokens [S] int64, and as [S] float32: their log-probs and the entropies in nats, the
    spreads, and the tokens' log-probs at temperature 1 in nats.

    Args:
        logits: [S, shard] bfloat16, float16 or float32, from the network.
        keys: [S] noise keys; each token id folds into them.
        temperature: 0 takes the likeliest token, and measures at temperature 1.
    """
    rows, width = logits.shape
    blocks = triton.cdiv(width, BLOCK)
    parts = torch.empty(9, rows, blocks, dtype=torch.float64, device=logits.device)
    ids = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    # As torch divides by a number on a GPU: by its reciprocal, in float32.
    scale = float(torch.tensor(temperature or 1.0).reciprocal())
    if rows:
        _kernel[rows, blocks](
            logits.contiguous(),
            impossible_columns(width, vocab, logits.device).view(torch.uint8),
            keys.contiguous(),
            parts,
            ids,
            scale,
            vocab.start,
            width,
            rows * blocks,
            HAS_NOISE=temperature != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,  # type: ignore[reportCallIssue]
        )
    return _combine(parts, ids, vocab)


def _combine(parts: Tensor, ids: Tensor, vocab: Vocabulary) -> Drawn:
    """Join what the kernel wrote for the blocks [9, S, blocks] of all shards."""
    noisy, chosen, raw, top, total, mean, raw_top, raw_total, mixed = parts.unbind(0)
    best, block = noisy.max(-1, keepdim=True)  # the first, so the lowest id, of equal ones
    mine = torch.cat([best, top.amax(-1, keepdim=True), raw_top.amax(-1, keepdim=True)], 1)
    tops = reduce(mine.clone(), vocab.group, dist.ReduceOp.MAX)
    own = ids.gather(-1, block).squeeze(-1)
    tokens = lowest_of_best(own, mine[:, 0] < tops[:, 0], vocab.group)
    picked = [values.gather(-1, block).squeeze(-1) for values in (chosen, raw)]
    gap, raw_gap = top - tops[:, 1:2], raw_top - tops[:, 2:3]
    scale = gap.exp()  # 0 where a block holds no possible id
    lowered = mean + total * gap.masked_fill(scale == 0, 0.0)
    # Of w (1 - w) with w lower by `scale`: no difference of large numbers.
    mixed = scale * (scale * mixed - total * torch.expm1(gap))
    sums = [(total * scale).sum(-1), (lowered * scale).sum(-1), (raw_total * raw_gap.exp()).sum(-1)]
    sums += [mixed.sum(-1)]
    sums += [values.masked_fill(own != tokens, 0.0) for values in picked]
    whole, mean, raw_whole, mixed, chosen, raw = reduce(
        torch.stack(sums), vocab.group, dist.ReduceOp.SUM
    ).unbind(0)
    logprobs = chosen - tops[:, 1] - whole.log()
    entropies = whole.log() - mean / whole
    untempered = raw - tops[:, 2] - raw_whole.log()
    floats = [logprobs, entropies, spread(whole, mixed), untempered]
    return tokens, *(values.float() for values in floats)


@triton.jit
def _kernel(
    logits,  # [rows, width]
    impossible,  # [width] uint8
    keys,  # [rows] int64
    parts,  # [9, rows, blocks] float64, written
    ids,  # [rows, blocks] int64, written
    scale,  # float32, 1 / temperature
    start,  # id of the first column
    width,
    count,  # rows * blocks
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    column = block * BLOCK + lane
    is_possible = column < width
    is_possible &= tl.load(impossible + column, mask=is_possible, other=1) == 0
    raw = tl.load(logits + row * width + column, mask=is_possible, other=float("-inf"))
    raw = raw.to(tl.float32)
    policy = raw * scale
    noisy = policy.to(tl.float64)
    if HAS_NOISE:
        key = tl.load(keys + row).to(tl.uint64, bitcast=True)
        index = (start + column).to(tl.uint64)
        noisy += _gumbel(_mix(key ^ _mix(index + 1)))
    best = tl.max(noisy, 0)
    place = tl.min(tl.where(noisy < best, BLOCK - 1, lane), 0)
    top, raw_top = tl.max(policy, 0), tl.max(raw, 0)
    # A block without a possible id has the maximum -inf, and sums of 0.
    shifted = policy - tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(shifted)
    raw_weight = tl.exp(raw - tl.where(raw_top == float("-inf"), 0.0, raw_top))
    out = parts + row * tl.num_programs(1) + block
    tl.store(ids + row * tl.num_programs(1) + block, (block * BLOCK + place).to(tl.int64) + start)
    tl.store(out, best)
    is_drawn = lane == place
    tl.store(out + count, tl.max(tl.where(is_drawn, policy, float("-inf")), 0))
    tl.store(out + 2 * count, tl.max(tl.where(is_drawn, raw, float("-inf")), 0))
    tl.store(out + 3 * count, top)
    tl.store(out + 4 * count, tl.sum(weight, 0))
    tl.store(out + 5 * count, tl.sum(tl.where(weight == 0, 0.0, weight * shifted), 0))
    tl.store(out + 6 * count, raw_top)
    tl.store(out + 7 * count, tl.sum(raw_weight, 0))
    tl.store(out + 8 * count, tl.sum(weight * (1 - weight), 0))


@triton.jit
def _gumbel(key):
    """`noise.gumbel`."""
    uniform = ((_mix(key) >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mix(x):
    """`noise._mix`; unsigned, so that shifts bring in zeros."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)
