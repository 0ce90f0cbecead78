"""Draw tokens from a policy: temperature, top-k, top-p and counter-based Gumbel noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.logprobs import (
    Vocabulary,
    entropy,
    policy_logits,
    reduce,
    token_logprobs,
)
from agrpo_megatron.trajectories import concatenate
from agrpo_megatron.types import PackedRows

# Logits processed at a time: each float64 tensor of this size takes 0.5 GiB.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class Draw:
    """Tokens drawn at S scored positions."""

    tokens: Tensor  # [S] int64
    logprobs: Tensor  # [S] nats, under the tempered and truncated policy
    entropies: Tensor  # [S] nats, of that policy
    confidences: Tensor  # [S] rank positions: a log-prob in nats; for `margin`, a probability
    support_ids: Tensor | None  # [S, K] int64 kept candidates, padded with -1


def draw_tokens(
    logits: Tensor, keys: Tensor, *, vocab: Vocabulary, sampling: SamplingSettings
) -> Draw:
    """Draw one token per row of a logits shard [S, shard]; equal on every rank of the group.

    Rows are drawn in parts: the float64 noise for all scored rows of an 8B model's rollout could
    take tens of GiB.

    Args:
        keys: [S] noise keys, see `noise.noise_key`; each token id folds into them.
    """
    rows = max(1, MAX_LOGITS // logits.shape[-1])
    parts = zip(logits.split(rows), keys.split(rows), strict=True)
    return concatenate([_draw(*part, vocab, sampling) for part in parts])


def _draw(logits: Tensor, keys: Tensor, vocab: Vocabulary, sampling: SamplingSettings) -> Draw:
    policy = policy_logits(logits, vocab, temperature=sampling.temperature)
    is_greedy = sampling.temperature == 0
    is_cut = sampling.top_k is not None or sampling.top_p < 1
    support_ids = support = None
    if is_cut and (not is_greedy or sampling.truncation == "top_p_first"):
        support_ids, support = _support(policy, vocab, sampling)
        chosen = torch.zeros_like(support_ids[:, :1])
        if not is_greedy:
            noisy = support + noise.gumbel(noise.fold(keys[:, None], support_ids))
            chosen = noisy.argmax(-1, keepdim=True)
        tokens = support_ids.gather(-1, chosen).squeeze(-1)
        logprobs = support.gather(-1, chosen).squeeze(-1).to(policy.dtype)
        entropies = entropy(support).to(policy.dtype)
    else:
        noisy = policy
        if not is_greedy:
            ids = vocab.start + torch.arange(policy.shape[-1], device=policy.device)
            noisy = policy.double() + noise.gumbel(noise.fold(keys[:, None], ids))
        tokens = _argmax(noisy, vocab)
        logprobs, entropies = token_logprobs(policy, tokens, vocab=vocab)
    confidences = logprobs
    if sampling.confidence == "untempered" and (is_cut or sampling.temperature not in (0, 1)):
        confidences, _ = token_logprobs(policy_logits(logits, vocab), tokens, vocab=vocab)
    if sampling.unmasking == "margin":
        confidences = _margins(policy, support, vocab)
    return Draw(tokens, logprobs, entropies, confidences, support_ids)


def _margins(policy: Tensor, support: Tensor | None, vocab: Vocabulary) -> Tensor:
    """Return the probability of the likeliest token minus that of the second likeliest [S]."""
    if support is None:
        top, _ = _top_candidates(policy, 2, vocab)
        support = top - _log_total(policy, vocab)[:, None]
    chances = F.pad(support.exp(), (0, 1))
    return (chances[:, 0] - chances[:, 1]).to(policy.dtype)


def _argmax(values: Tensor, vocab: Vocabulary) -> Tensor:
    """Return the id of the largest value over all shards; the lowest id wins a tie."""
    best, column = values.max(-1)
    ids = column + vocab.start
    top = reduce(best.clone(), vocab.group, dist.ReduceOp.MAX)
    ids = ids.masked_fill(best < top, torch.iinfo(torch.int64).max)
    return reduce(ids, vocab.group, dist.ReduceOp.MIN)


def _support(
    policy: Tensor, vocab: Vocabulary, sampling: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Return candidate ids [S, K] (-1 where cut) and their renormalised log-probs (-inf there).

    By default top-k comes first and top-p filters its candidates. Without top-k, K grows until
    the candidates hold top-p's mass, so that only the needed part of the vocabulary is gathered.
    Log-probs are float64: rounded to float32, they do not depend on K, the widest support of the
    batch.
    """
    if sampling.top_k is not None:
        values, ids = _top_candidates(policy, sampling.top_k, vocab)
        logprobs = values.log_softmax(-1)
        if sampling.truncation == "top_p_first":
            logprobs = values - _log_total(policy, vocab)[:, None]
    else:
        count = 64
        while True:
            values, ids = _top_candidates(policy, count, vocab)
            logprobs = values - _log_total(policy, vocab)[:, None]
            mass = logprobs.double().exp().sum(-1)
            if count >= vocab.size or bool((mass > sampling.top_p).all()):
                break
            count = min(4 * count, vocab.size)
    before = logprobs.double().exp().cumsum(-1) - logprobs.double().exp()
    cut = (before > sampling.top_p) | (values == float("-inf"))
    width = int((~cut).sum(-1).max())
    ids, cut = ids[:, :width], cut[:, :width]
    kept = values[:, :width].double().masked_fill(cut, float("-inf"))
    return ids.masked_fill(cut, -1), kept.log_softmax(-1)


def _top_candidates(values: Tensor, count: int, vocab: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values over all shards, in descending order, and their ids."""
    ids = vocab.start + torch.arange(values.shape[-1], device=values.device)
    top, ids = _largest(values, ids.expand_as(values), count)
    if vocab.group is None or vocab.group.size() == 1:
        return top, ids
    tops = [torch.empty_like(top) for _ in range(vocab.group.size())]
    all_ids = [torch.empty_like(ids) for _ in range(vocab.group.size())]
    dist.all_gather(tops, top, group=vocab.group)
    dist.all_gather(all_ids, ids, group=vocab.group)
    return _largest(torch.cat(tops, -1), torch.cat(all_ids, -1), count)


def _largest(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values, ranked as float32, and their ids; low ids win ties.

    bfloat16 logits tie often, and topk would break ties by layout. So the value's bits, in
    an order that sorts as integers, and the id form one number that is never tied.
    """
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32 - ids
    columns = rank.topk(min(count, values.shape[-1]), dim=-1).indices
    return values.gather(-1, columns), ids.gather(-1, columns)


def _log_total(policy: Tensor, vocab: Vocabulary) -> Tensor:
    top = reduce(policy.amax(-1), vocab.group, dist.ReduceOp.MAX)
    total = reduce((policy - top[:, None]).exp().sum(-1), vocab.group, dist.ReduceOp.SUM)
    return top + total.log()


# Draws at a slice of the scored tokens, from their logits shard [S, V / tensor parallel].
DrawAt = Callable[[Tensor, slice], Draw]


class Forward(Protocol):
    """Runs packed rows through the network; see `megatron.pipeline`."""

    in_flight: int  # maximum number of groups of rows in flight

    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Start a group of rows; the returned function waits for the group's draws."""
        ...

    def close(self) -> None:
        """Wait for all groups in flight; called when all draws are known."""


@dataclass
class LogitsForward:
    """A `Forward` over a function from packed rows to logits [S, V / tensor parallel]."""

    score: Callable[[PackedRows], Tensor]
    in_flight: int = 1

    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Draw from the logits of the function."""
        draw = draw_at(self.score(rows), slice(None))
        return lambda: draw

    def close(self) -> None:
        """Do nothing: no group is in flight."""
