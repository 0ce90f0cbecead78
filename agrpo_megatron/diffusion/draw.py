"""Draw tokens from a policy: temperature, top-k, top-p and counter-based Gumbel noise."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from subprocess import SubprocessError
from types import ModuleType
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.logprobs import (
    Vocabulary,
    draw_statistics,
    entropy,
    lowest_of_best,
    policy_logits,
    reduce,
    support_spread,
    token_logprobs,
)
from agrpo_megatron.trajectories import concatenate
from agrpo_megatron.types import PackedRows

# Logits processed at a time: each float64 tensor of this size takes 0.5 GiB.
MAX_LOGITS = 2**26

# Likeliest tokens that are searched for top-p's mass, and the factor for another search: the host
# waits after each, four times for a vocabulary of 2**17.
FIRST_CANDIDATES, MORE_CANDIDATES = 64, 16


@dataclass(frozen=True)
class Draw:
    """Tokens drawn at S scored positions."""

    tokens: Tensor  # [S] int64
    logprobs: Tensor  # [S] nats, under the tempered and truncated policy
    entropies: Tensor  # [S] nats, of that policy
    spreads: Tensor  # [S] 1 - sum of squared probabilities; 0 only if one token may be drawn
    confidences: Tensor  # [S] rank positions: a log-prob in nats; for `margin`, a probability
    support_ids: Tensor | None  # [S, K] int64 kept candidates, padded with -1


def draw_tokens(
    logits: Tensor, keys: Tensor, *, vocab: Vocabulary, sampling: SamplingSettings
) -> Draw:
    """Draw one token per row of a logits shard [S, shard]; equal on every rank of the group.

    Rows are drawn in parts: the float64 noise for all scored rows of an 8B model's rollout could
    take tens of GiB.

    Args:
        keys: [S] noise keys, see `noise.noise_key`; each token id folds into them. Or the Gumbel
            noise itself, [S, vocabulary] float.
    """
    rows = max(1, MAX_LOGITS // logits.shape[-1])
    parts = zip(logits.split(rows), keys.split(rows), strict=True)
    return concatenate([_draw(*part, vocab, sampling) for part in parts])


def _draw(logits: Tensor, keys: Tensor, vocab: Vocabulary, sampling: SamplingSettings) -> Draw:
    support = None
    if sampling.is_cut and (sampling.temperature > 0 or sampling.truncation == "top_p_first"):
        draw, support = _draw_kept(logits, keys, vocab, sampling)
    elif (kernel := kernel_for(logits)) is not None and not keys.is_floating_point():
        tokens, logprobs, entropies, spreads, untempered = kernel.draw_whole(
            logits, keys, vocab=vocab, temperature=sampling.temperature
        )
        confidences = untempered if _is_ranked_untempered(sampling) else logprobs
        draw = Draw(tokens, logprobs, entropies, spreads, confidences, None)
    else:
        draw = _draw_whole(logits, keys, vocab, sampling)
    if sampling.unmasking != "margin":
        return draw
    if support is None:
        policy = policy_logits(logits, vocab, temperature=sampling.temperature)
        support = _top_candidates(policy, 2, vocab)[0] - _log_total(policy, vocab)[:, None]
    chances = F.pad(support.exp(), (0, 1))
    margins = chances[:, 0] - chances[:, 1]  # of the likeliest and the second likeliest token
    return replace(draw, confidences=margins.to(draw.logprobs.dtype))


def kernel_for(logits: Tensor) -> ModuleType | None:
    """Return the module whose kernel draws from such logits; None: tensor operations do."""
    return _gpu_kernel() if logits.is_cuda and logits.dtype != torch.float64 else None


@functools.cache
def _gpu_kernel() -> ModuleType | None:
    """Return `fused_draw`, once Triton has shown that it can start kernels here."""
    try:
        from triton.runtime import driver  # type: ignore[reportMissingImports]

        assert driver.active  # compiles the part that starts kernels
        from agrpo_megatron.diffusion import fused_draw
    except (ImportError, AssertionError, OSError, RuntimeError, SubprocessError) as error:
        warnings.warn(
            f"tokens are drawn without Triton, which is slower: {error}; Triton needs a C compiler "
            "and Python's headers",
            stacklevel=2,
        )
        return None
    return fused_draw


def _draw_whole(
    logits: Tensor, keys: Tensor, vocab: Vocabulary, sampling: SamplingSettings
) -> Draw:
    """Draw from the whole vocabulary, as `fused_draw` does on a GPU."""
    policy = policy_logits(logits, vocab, temperature=sampling.temperature)
    noisy = policy
    if sampling.temperature > 0:
        ids = vocab.start + torch.arange(policy.shape[-1], device=policy.device)
        noisy = policy.double() + _gumbel(keys, ids)
    best, column = noisy.max(-1)
    top = reduce(best.clone(), vocab.group, dist.ReduceOp.MAX)
    tokens = lowest_of_best(column + vocab.start, best < top, vocab.group)
    logprobs, entropies, spreads = draw_statistics(policy, tokens, vocab=vocab)
    confidences = _confidences(logits, tokens, logprobs, vocab, sampling)
    return Draw(tokens, logprobs, entropies, spreads, confidences, None)


def _draw_kept(
    logits: Tensor, keys: Tensor, vocab: Vocabulary, sampling: SamplingSettings
) -> tuple[Draw, Tensor]:
    """Draw from what top-k and top-p keep; also return the log-probs [S, K] of the candidates."""
    policy = policy_logits(logits, vocab, temperature=sampling.temperature)
    support_ids, support = _support(policy, vocab, sampling)
    chosen = torch.zeros_like(support_ids[:, :1])
    if sampling.temperature > 0:
        noisy = support + _gumbel(keys, support_ids)
        chosen = noisy.argmax(-1, keepdim=True)
    tokens = support_ids.gather(-1, chosen).squeeze(-1)
    logprobs = support.gather(-1, chosen).squeeze(-1).to(policy.dtype)
    entropies = entropy(support).to(policy.dtype)
    spreads = support_spread(support).to(policy.dtype)
    confidences = _confidences(logits, tokens, logprobs, vocab, sampling)
    return Draw(tokens, logprobs, entropies, spreads, confidences, support_ids), support


def _gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Return the noise [S, K] of token ids, [K] or [S, K] with -1 where there is none."""
    if keys.is_floating_point():
        return keys.gather(1, ids.clamp(min=0).expand(len(keys), -1))
    return noise.gumbel(noise.fold(keys[:, None], ids))


def _confidences(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, vocab: Vocabulary, sampling: SamplingSettings
) -> Tensor:
    if _is_ranked_untempered(sampling):
        temperature = 1.0
    elif sampling.confidence == "tempered" and sampling.is_cut:
        temperature = sampling.temperature
    else:
        return logprobs
    whole = policy_logits(logits, vocab, temperature=temperature)
    return token_logprobs(whole, tokens, vocab=vocab)[0]


def _is_ranked_untempered(sampling: SamplingSettings) -> bool:
    """Whether positions are ranked by other log-probs than the policy's."""
    is_other = sampling.is_cut or sampling.temperature not in (0, 1)
    return sampling.confidence == "untempered" and is_other


def _support(
    policy: Tensor, vocab: Vocabulary, sampling: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Return candidate ids [S, K] (-1 where cut) and their renormalised log-probs (-inf there).

    By default top-k comes first and top-p filters its candidates. Without top-k, K grows until
    the candidates hold top-p's mass, so that only the needed part of the vocabulary is gathered.
    Log-probs are float64: rounded to float32, they do not depend on K, the widest support of the
    batch. The host waits for K under top-p alone; top-k keeps as many of every row.
    """
    top_k, top_p, total = sampling.top_k, sampling.top_p, None
    if top_k is None or sampling.truncation == "top_p_first":
        total = _log_total(policy, vocab)[:, None]
    count = FIRST_CANDIDATES if top_k is None else top_k
    while True:
        values, ids = _top_candidates(policy, count, vocab)
        logprobs = values.log_softmax(-1) if total is None else values - total
        chances = logprobs.double().exp()
        cut = (chances.cumsum(-1) - chances > top_p) | (values == float("-inf"))
        if top_p == 1 and top_k is not None:
            width = min(top_k, vocab.drawable)
            break
        is_enough = (chances.sum(-1) > top_p).all()
        is_enough, width = torch.stack([is_enough.long(), (~cut).sum(-1).max()]).tolist()
        if top_k is not None or is_enough or count >= vocab.size:
            break
        count = min(MORE_CANDIDATES * count, vocab.size)
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
