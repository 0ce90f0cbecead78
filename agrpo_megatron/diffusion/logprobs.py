"""Vocabulary-parallel log-probabilities and entropies; the vocabulary is never gathered.

Every function takes this rank's shard of the logits, [S, V / tensor parallel], and a
`Vocabulary` that describes its columns. Results are equal on all ranks of the group.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LEAST = -1e4  # nats: finite in place of -inf, and its probability is 0
LEAST_SPREAD = torch.finfo(torch.float32).tiny  # of more than one token, however unlikely


@dataclass(frozen=True)
class Vocabulary:
    """The columns of a logits shard: their token ids, and the group that holds the others."""

    size: int  # true vocabulary; columns from here on are padding
    start: int = 0  # id of the shard's first column
    forbidden: tuple[int, ...] = ()  # ids that are never drawn, such as the mask token
    group: dist.ProcessGroup | None = None  # tensor-parallel group; None: the shard is all

    @property
    def drawable(self) -> int:
        """Return how many ids may be drawn."""
        return self.size - len({id for id in self.forbidden if id < self.size})


def policy_logits(logits: Tensor, vocab: Vocabulary, *, temperature: float = 1.0) -> Tensor:
    """Return the shard in float32 (float64 stays), tempered; impossible ids are -inf.

    Temperature 0 (greedy) leaves logits un-tempered: its log-probs are those of the model.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    width, end = logits.shape[-1], vocab.start + logits.shape[-1]
    if end <= vocab.size and not any(vocab.start <= i < end for i in vocab.forbidden):
        return logits
    return logits.masked_fill(impossible_columns(width, vocab, logits.device), float("-inf"))


def impossible_columns(width: int, vocab: Vocabulary, device: torch.device) -> Tensor:
    """Mark the columns [width] of a shard that hold padding or a forbidden id."""
    ids = vocab.start + torch.arange(width, device=device)
    impossible = ids >= vocab.size
    for forbidden in vocab.forbidden:  # few; a list of them would be copied to the GPU
        impossible |= ids == forbidden
    return impossible


def token_logprobs(
    logits: Tensor, targets: Tensor, *, vocab: Vocabulary, support_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probs of `targets` [S] and entropies [S], in nats.

    Both have gradients. With `support_ids` [S, K] (padded with -1) the
    distribution is renormalised over these candidates, which must include the target.

    Args:
        logits: [S, shard], from `policy_logits`.
    """
    if support_ids is None:
        return _VocabParallelLogProb.apply(logits, targets, vocab.start, vocab.group)  # type: ignore
    candidates = gather_logits(logits, support_ids, vocab)
    logprobs = candidates.log_softmax(-1)
    chosen = (support_ids == targets[:, None]).to(torch.int64).argmax(-1, keepdim=True)
    return logprobs.gather(-1, chosen).squeeze(-1), entropy(logprobs)


def draw_statistics(
    logits: Tensor, tokens: Tensor, *, vocab: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs of `tokens` [S], entropies and spreads [S], without gradients.

    Args:
        logits: [S, shard], from `policy_logits`.
    """
    _, sums, _, _ = _sums(logits, tokens, vocab.start, vocab.group, has_spread=True)
    total, mean_part, chosen, mixed = sums
    log_total = total.log()
    return chosen - log_total, log_total - mean_part / total, spread(total, mixed)


def spread(total: Tensor, mixed: Tensor) -> Tensor:
    """Return 1 - sum p^2 of p = w / sum w, where the largest w is 1; accurate near 0.

    It is the expected squared length of the gradient of a drawn token's log-prob by its logits.

    Args:
        total: sum of w. mixed: sum of w (1 - w), to which the likeliest token adds exactly 0.
    """
    others = torch.maximum(total - 1, mixed)  # total - 1 rounds to 0 where the others are unlikely
    return ((total * others + mixed) / total.square()).clamp(min=LEAST_SPREAD)


def support_spread(logprobs: Tensor) -> Tensor:
    """Return 1 - sum p^2 of normalised log-probs [S, K], the largest first; -inf where cut.

    It is 0 exactly where one candidate is left, whose log-prob has no gradient.
    """
    chances = logprobs.exp()
    first, others = chances[:, 0], chances[:, 1:]
    spreads = first * others.sum(-1) + (others * (1 - others)).sum(-1)
    is_single = (logprobs[:, 1:] == float("-inf")).all(-1)
    return spreads.clamp(min=LEAST_SPREAD).masked_fill(is_single, 0.0)


def shard_logprobs(logits: Tensor, vocab: Vocabulary) -> Tensor:
    """Return the log-probs of all of this rank's ids, [S, shard]; the sum is over all ranks.

    Args:
        logits: [S, shard], from `policy_logits`.
    """
    top = reduce(logits.amax(-1), vocab.group, dist.ReduceOp.MAX)[:, None]
    total = reduce((logits - top).exp().sum(-1), vocab.group, dist.ReduceOp.SUM)
    return (logits - top - total.log()[:, None]).clamp(min=LEAST)


def exact_kl(logits: Tensor, target: Tensor, vocab: Vocabulary) -> Tensor:
    """Return the KL [S] of the policy from a target over the whole vocabulary, in nats.

    Has a gradient by the logits.

    Args:
        logits: [S, shard], from `policy_logits`.
        target: [S, shard], from `shard_logprobs`.
    """
    return _VocabParallelKL.apply(logits, target, vocab)  # type: ignore


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of each row of normalised log-probs, in nats; -inf counts as 0."""
    logprobs = logprobs.clamp(min=LEAST)
    return -(logprobs.exp() * logprobs).sum(-1)


def gather_logits(logits: Tensor, ids: Tensor, vocab: Vocabulary) -> Tensor:
    """Return the logits of `ids` [S, K] from the ranks that hold them; -inf where the id is -1."""
    local = ids.to(torch.int64) - vocab.start
    here = (local >= 0) & (local < logits.shape[-1]) & (ids >= 0)
    picked = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1))
    picked = _SumOverShards.apply(picked.masked_fill(~here, 0.0), vocab.group)
    return picked.masked_fill(ids < 0, float("-inf"))  # type: ignore[union-attr]


def reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> Tensor:
    """All-reduce in place over a group; None changes nothing."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def lowest_of_best(ids: Tensor, is_less: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the lowest of the shards' ids [S], without those whose value is less than the best."""
    ids = ids.masked_fill(is_less, torch.iinfo(torch.int64).max)
    return reduce(ids, group, dist.ReduceOp.MIN)


def _sums(
    logits: Tensor, targets: Tensor, start: int, group, *, has_spread: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what log-probs, entropies and spreads need, in two reductions.

    These are the largest logits [S], and sums [3 or 4, S] of w = exp(logit - largest), of
    w log w, of the target's log w, and of w (1 - w). Then each target's column in this shard [S],
    and whether it is in this shard [S].
    """
    top = reduce(logits.amax(-1), group, dist.ReduceOp.MAX)
    shifted = logits - top[:, None]
    weights = shifted.exp()
    local = targets - start
    here = (local >= 0) & (local < logits.shape[-1])
    local = local.clamp(0, logits.shape[-1] - 1)
    chosen = shifted.gather(-1, local[:, None]).squeeze(-1)
    # In place, as each further copy is as large as the logits.
    mean_part = shifted.masked_fill_(weights == 0, 0.0).mul_(weights).sum(-1)
    parts = [weights.sum(-1), mean_part, chosen.masked_fill(~here, 0.0)]
    if has_spread:
        parts.append((weights * (1 - weights)).sum(-1))
    return top, reduce(torch.stack(parts), group, dist.ReduceOp.SUM), local, here


class _SumOverShards(torch.autograd.Function):
    """Sum over ranks; the gradient of a replicated result is each rank's own."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # type: ignore
        return reduce(tensor.clone(), group, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


class _VocabParallelLogProb(torch.autograd.Function):
    """Log-prob and entropy in two reductions; the softmax is rebuilt in the backward pass."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, start: int, group):  # type: ignore
        """Return log-probs and entropies, [S] each, equal on every rank."""
        top, sums, local, here = _sums(logits, targets, start, group)
        log_total = sums[0].log()
        entropies = log_total - sums[1] / sums[0]
        ctx.save_for_backward(logits, top + log_total, local, here, entropies)
        ctx.set_materialize_grads(False)
        return sums[2] - log_total, entropies

    @staticmethod
    def backward(ctx, grad: Tensor | None, of_entropy: Tensor | None):  # type: ignore[override]
        """Return the gradient by the shard, from those by log-probs and by entropies."""
        logits, log_total, local, here, entropies = ctx.saved_tensors
        logprobs = logits - log_total[:, None]
        if grad is None:
            grad = torch.zeros_like(entropies)
        factor = -grad[:, None]
        if of_entropy is not None:
            factor = factor - of_entropy[:, None] * (logprobs.clamp(min=LEAST) + entropies[:, None])
        result = logprobs.exp_().mul_(factor)
        return result.scatter_add_(-1, local[:, None], (grad * here)[:, None]), None, None, None


class _VocabParallelKL(torch.autograd.Function):
    """Sum of p (log p - log q) over the ids of all ranks; p is rebuilt in the backward pass."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, vocab: Vocabulary) -> Tensor:  # type: ignore
        """Return the KL, [S], equal on every rank."""
        logprobs = shard_logprobs(logits, vocab)
        terms = (logprobs.exp() * (logprobs - target)).sum(-1)
        kl = reduce(terms, vocab.group, dist.ReduceOp.SUM)
        ctx.save_for_backward(logits, target, kl)
        ctx.vocab = vocab
        return kl

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        logits, target, kl = ctx.saved_tensors
        logprobs = shard_logprobs(logits, ctx.vocab)
        slope = logprobs.exp() * (logprobs - target - kl[:, None])
        return grad[:, None] * slope, None, None
