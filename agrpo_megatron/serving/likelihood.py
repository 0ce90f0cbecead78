"""Log-likelihoods of texts by the evidence lower bound, as LLaDA's evaluation has it.

    ELBO(x) = E over k ~ U{1..L} and masks of k of the L tokens: L / k * sum of log p(masked)

Masks are drawn as the `counts` and `coupled_counts` states of `estimators.masks`: k is spread
evenly, and their noise is counted, so that a score depends on nothing but its texts, the seed and
the number of masks. Where listing all 2^L - 1 masks costs no more than drawing, they are listed:
the value is then exact. Source: LLaDA (arXiv 2502.09992), appendix on conditional likelihood.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.masks import MaskedStates, draw_states
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.session import Run
from agrpo_megatron.training.scoring import score_tables
from agrpo_megatron.training.update import packed_part
from agrpo_megatron.trajectories import given_texts
from agrpo_megatron.types import Rollout, ScoredRows

MASKS = ("counts", "coupled_counts")
BATCHES = 16  # micro-batches of a replica that are packed at once


@dataclass(frozen=True)
class Scoring:
    """Continuations to score, each after its context."""

    contexts: Sequence[Sequence[int]]
    continuations: Sequence[Sequence[int]]  # none is empty
    samples: int  # masks of each
    masks: str = "counts"
    decodes: bool = True  # also whether greedy decoding writes them


@dataclass(frozen=True)
class Score:
    """A scored continuation."""

    logprob: float  # nats, of all its tokens
    is_greedy: bool  # greedy decoding of one token a step writes it; False: not asked


def listed(length: int, samples: int) -> bool:
    """Return whether all masks of so many tokens are listed in place of drawn ones."""
    return length < 32 and 2**length - 1 <= samples


def noise_of(ids: Sequence[int]) -> int:
    """Return a noise index that depends on ids alone: equal contexts share their masks."""
    text = ",".join(map(str, ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())


@torch.no_grad()
def score(run: Run, network: Network, job: Scoring) -> list[Score]:
    """Score continuations; called by every rank, and the same on each."""
    scores: list[Score | None] = [None] * len(job.continuations)
    for places in _chunks(run, network, job):
        continuations = [list(job.continuations[place]) for place in places]
        contexts = [list(job.contexts[place]) for place in places]
        texts = _as_rollout(run, contexts, continuations)
        bounds = _bounds(run, network, texts, job).tolist()
        greedy = _greedy(run, network, texts) if job.decodes else [False] * len(places)
        for place, bound, is_greedy in zip(places, bounds, greedy, strict=True):
            scores[place] = Score(bound, is_greedy)
    return [found for found in scores if found is not None]


def _chunks(run: Run, network: Network, job: Scoring) -> Iterator[list[int]]:
    """Yield continuations of one length that are scored together."""
    lengths = [len(continuation) for continuation in job.continuations]
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    for length, same in itertools.groupby(order, key=lambda place: lengths[place]):
        places = list(same)
        rows = 2**length - 1 if listed(length, job.samples) else job.samples
        longest = length + max(len(job.contexts[place]) for place in places)
        tokens = BATCHES * network.ranks.data.size * run.settings.train.token_budget
        size = max(1, tokens // (rows * longest))
        yield from ([*part] for part in itertools.batched(places, size))


def _as_rollout(
    run: Run, contexts: Sequence[list[int]], continuations: Sequence[list[int]]
) -> Rollout:
    """Return given texts as completions: of them only the prompts, tokens and ids are real."""
    device = run.ranks.device
    tokens = torch.tensor(continuations, dtype=torch.int64, device=device)
    ids = [noise_of(context) for context in contexts]
    sampling = run.settings.sampling
    if not run.settings.model.has_blocks:
        sampling = replace(sampling, block_length=tokens.shape[1])
    prompts = [torch.tensor(c, dtype=torch.int64, device=device) for c in contexts]
    numbers = torch.tensor(ids, dtype=torch.int64, device=device)
    trajectory = given_texts(prompts, tokens, numbers, sampling)
    rewards = torch.zeros(len(tokens), device=device)
    return Rollout(trajectory, rewards, rewards.bool(), rewards)


def _bounds(run: Run, network: Network, texts: Rollout, job: Scoring) -> Tensor:
    """Return the bound of each text, [R] float64."""
    states = masked_states(texts, job, seed=run.settings.run.seed)
    zeros = torch.zeros(states.hidden.shape, device=states.hidden.device)
    rows = ScoredRows(states.rollout, states.hidden, states.hidden, zeros, is_sampled=False)
    algorithm = _algorithm(job)
    settings = replace(run.settings, algorithm=algorithm)
    part = packed_part(settings, network.ranks, texts, rows)
    found, _ = score_tables(network, part.batches, zeros.shape, settings.sampling, algorithm)
    if network.ranks.pipeline.size > 1:  # only its last stage has logits
        dist.all_reduce(found, group=network.ranks.pipeline.group)
    each = states.likelihood.double() * found.double().sum(1)
    return torch.zeros(len(texts.rewards), dtype=torch.float64, device=each.device).index_add_(
        0, states.rollout, each
    )


def masked_states(texts: Rollout, job: Scoring, *, seed: int) -> MaskedStates:
    """Return the masks of every text, listed or drawn, with the likelihood of each."""
    length = texts.trajectory.tokens.shape[1]
    if listed(length, job.samples):
        return _every_mask(len(texts.rewards), length, texts.trajectory.tokens.device)
    context = DrawContext(_algorithm(job).filled, eos_id=None, seed=seed)
    return draw_states(texts, context)


def _every_mask(rows: int, length: int, device: torch.device) -> MaskedStates:
    """List all masks but the empty one; one of k tokens has the chance 1 / (L * (L choose k))."""
    numbers = torch.arange(1, 2**length, device=device)
    hidden = (numbers[:, None] >> torch.arange(length, device=device)) % 2 == 1
    count = hidden.sum(1).double()
    ways = torch.exp(
        torch.lgamma(torch.tensor(length + 1.0, dtype=torch.float64, device=device))
        - torch.lgamma(count + 1)
        - torch.lgamma(length - count + 1)
    )
    return MaskedStates(
        rollout=torch.arange(rows, device=device).repeat_interleave(len(numbers)),
        hidden=hidden.repeat(rows, 1),
        likelihood=(1 / (count * ways)).repeat(rows),
        draw=torch.arange(len(numbers), device=device).repeat(rows),
    )


def _algorithm(job: Scoring) -> AlgorithmSettings:
    """Return the settings by which masks are drawn, and scored under the plain model."""
    draws = job.samples if job.masks == "counts" else job.samples // 2
    return AlgorithmSettings(name="vrpo", states=job.masks, mc_samples=draws)


def _greedy(run: Run, network: Network, texts: Rollout) -> list[bool]:
    """Return whether decoding the likeliest token of all, one a step, writes each text."""
    trajectory, data = texts.trajectory, network.ranks.data
    length, block = trajectory.tokens.shape[1], trajectory.sampling.block_length
    whole = -(-length // block) * block
    steps = SamplingSettings(
        completion_length=whole,
        block_length=block,
        block_origin=trajectory.sampling.block_origin,
        denoising_steps=whole,
        unmasking="low_confidence",
        temperature=0.0,
        early_end=False,
    )
    rows = range(len(trajectory.prompts))[data.rank :: data.size]
    prompts = [trajectory.prompts[row] for row in rows]
    noise = trajectory.rollout_ids[data.rank :: data.size]
    found, _ = sample_prompts(run, network, prompts, noise, sampling=steps)
    same = torch.zeros(len(trajectory.prompts), dtype=torch.int64, device=noise.device)
    mine = (found.tokens[:, :length] == trajectory.tokens[data.rank :: data.size]).all(1)
    same[data.rank :: data.size] = mine.long()
    dist.all_reduce(same, group=data.group)
    return [bool(value) for value in same.tolist()]
