"""A policy so small that all its trajectories can be listed: a table of logits.

`enumerate_trajectories` is written from the definition of the sampler, shares no code with the
package, and keeps the probability of every trajectory differentiable in the table.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.draw import LogitsForward
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.diffusion.sampler import SamplerContext
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.losses import LOSSES, of_tokens
from agrpo_megatron.estimators.steps import at_level
from agrpo_megatron.types import PackedRows, Rollout, StepDraws, Trajectory
from tests.diffusion.batching import batches_of


@dataclass(frozen=True)
class Toy:
    """Ids 0 .. tokens - 1, then the mask token, then one column of vocabulary padding."""

    length: int = 3  # tokens of a completion
    tokens: int = 3
    eos_id: int | None = None

    @property
    def mask_id(self) -> int:
        return self.tokens

    @property
    def vocab(self) -> Vocabulary:
        return Vocabulary(self.tokens + 1, forbidden=(self.mask_id,))

    def table(self, seed: int = 0, scale: float = 1.5) -> Tensor:
        """Return random logits [states, length, padded vocabulary], float64."""
        states = (self.tokens + 1) ** self.length
        generator = torch.Generator().manual_seed(seed)
        shape = (states, self.length, self.tokens + 2)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def rewards(self, completions: Tensor, seed: int = 0) -> Tensor:
        """Return a random but fixed reward for every token string [R, length], float64."""
        generator = torch.Generator().manual_seed(1000 + seed)
        values = torch.randn(
            (self.tokens + 1) ** self.length, generator=generator, dtype=torch.float64
        )
        return values[self.state_index(completions)]

    def state_index(self, completions: Tensor) -> Tensor:
        places = (self.tokens + 1) ** torch.arange(self.length)
        return (completions * places).sum(-1)

    def score(self, table: Tensor):
        """Return the score function of the table: packed rows -> logits of scored positions."""

        def score(rows: PackedRows) -> Tensor:
            if not len(rows.scored):
                return table.new_zeros(0, table.shape[-1]) + table.sum() * 0
            first = rows.cu_seqlens[1:].long() - self.length
            completions = rows.tokens[first[:, None] + torch.arange(self.length)]
            row = torch.bucketize(rows.scored, rows.cu_seqlens[1:].long(), right=True)
            return table[self.state_index(completions)[row], rows.scored - first[row]]

        return score

    def context(self, table: Tensor, *, seed: int = 0, token_budget: int = 10**9):
        return SamplerContext(
            LogitsForward(self.score(table)),
            self.vocab,
            self.mask_id,
            self.eos_id,
            seed,
            token_budget,
        )


@dataclass(frozen=True)
class Enumerated:
    """All N trajectories of a prompt, as one record, with their probabilities."""

    trajectory: Trajectory
    probability: Tensor  # [N], differentiable in the table


def policy(table_row: Tensor, toy: Toy, sampling: SamplingSettings) -> Tensor:
    """Return the probabilities [tokens]: tempered, then top-k, then top-p; 0 where cut."""
    probs = (table_row[: toy.tokens] / sampling.temperature).softmax(0)
    keep = torch.zeros_like(probs)
    mass = 0.0
    order = sorted(range(toy.tokens), key=lambda v: -float(probs[v].detach()))
    order = order[: sampling.top_k or toy.tokens]
    total = sum(float(probs[v].detach()) for v in order)
    for v in order:
        if mass <= sampling.top_p:
            keep[v] = 1.0
        mass += float(probs[v].detach()) / total
    return probs * keep / (probs * keep).sum()


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """Return how many tokens each step of a block fixes, earlier steps taking the remainder."""
    counts = [0] * steps
    for token in range(block_length):
        counts[token % steps] += 1
    return counts


def enumerate_trajectories(table: Tensor, toy: Toy, sampling: SamplingSettings) -> Enumerated:
    """List every trajectory of the sampler with its probability."""
    blocks = toy.length // sampling.block_length
    counts = transfer_counts(sampling.block_length, sampling.denoising_steps // blocks)
    start = _Leaf((toy.mask_id,) * toy.length, (-1,) * toy.length, torch.ones_like(table[0, 0, 0]))
    live, finished = [start], []
    for block, count in itertools.product(range(blocks), counts):
        places = range(block * sampling.block_length, (block + 1) * sampling.block_length)
        stepped = [_steps(leaf, places, count, table, toy, sampling) for leaf in live]
        live = _merge(itertools.chain.from_iterable(stepped))
        if sampling.early_end and block + 1 < blocks:
            finished += [leaf for leaf in live if _ended(leaf, places, toy)]
            live = [leaf for leaf in live if not _ended(leaf, places, toy)]
    return _record(live + finished, table, toy, sampling)


@dataclass(frozen=True)
class _Leaf:
    tokens: tuple[int, ...]
    unmask_step: tuple[int, ...]
    probability: Tensor

    @property
    def step(self) -> int:
        return max(self.unmask_step) + 1


def _ended(leaf: _Leaf, places, toy: Toy) -> bool:
    complete = all(leaf.unmask_step[j] >= 0 for j in places)
    return complete and all(leaf.tokens[j] == toy.eos_id for j in places)


def _steps(leaf: _Leaf, places, count: int, table: Tensor, toy: Toy, sampling: SamplingSettings):
    """Yield all that one denoising step can make of a state."""
    masked = [j for j in places if leaf.unmask_step[j] < 0]
    rows = table[int(toy.state_index(torch.tensor(leaf.tokens)))]
    probs = {j: policy(rows[j], toy, sampling) for j in masked}
    if sampling.unmasking in ("random", "leftmost"):
        choices = list(itertools.combinations(masked, count))  # the leftmost places come first
        choices = choices[:1] if sampling.unmasking == "leftmost" else choices
        for chosen in choices:
            for drawn in itertools.product(range(toy.tokens), repeat=count):
                yield _fix(leaf, dict(zip(chosen, drawn, strict=True)), probs, 1 / len(choices))
        return
    for drawn in itertools.product(range(toy.tokens), repeat=len(masked)):
        draw = dict(zip(masked, drawn, strict=True))
        rank = {j: float(_confidence(probs[j], draw[j], sampling.unmasking)) for j in masked}
        chosen = sorted(masked, key=lambda j: (-rank[j], j))[:count]
        others = [probs[j][draw[j]] for j in masked if j not in chosen]
        rest = torch.stack(others).prod() if others else 1.0
        yield _fix(leaf, {j: draw[j] for j in chosen}, probs, rest)


def _confidence(probs: Tensor, token: int, unmasking: str) -> Tensor:
    if unmasking == "entropy":
        return -_entropy(probs.detach())
    return probs[token].detach()


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-300).log()).sum()


def _fix(leaf: _Leaf, fixed: dict[int, int], probs, factor) -> _Leaf:
    tokens, steps, step = list(leaf.tokens), list(leaf.unmask_step), leaf.step
    probability = leaf.probability * factor
    for j, token in fixed.items():
        tokens[j], steps[j] = token, step
        probability = probability * probs[j][token]
    return _Leaf(tuple(tokens), tuple(steps), probability)


def _merge(leaves) -> list[_Leaf]:
    """Add up the probabilities of equal states, and drop the impossible ones."""
    merged: dict[tuple, _Leaf] = {}
    for leaf in leaves:
        if float(leaf.probability.detach()) == 0:
            continue
        key = (leaf.tokens, leaf.unmask_step)
        before = merged.get(key)
        total = leaf.probability + before.probability if before else leaf.probability
        merged[key] = replace(leaf, probability=total)
    return list(merged.values())


def _record(leaves: list[_Leaf], table: Tensor, toy: Toy, sampling: SamplingSettings) -> Enumerated:
    """Write leaves as a float64 `Trajectory`, with the numbers the sampler records."""
    count, steps = len(leaves), torch.tensor([leaf.unmask_step for leaf in leaves])
    tokens = torch.tensor([leaf.tokens for leaf in leaves])
    num_steps = steps.amax(1) + 1
    logprobs = torch.zeros(count, toy.length, dtype=torch.float64)
    entropies, spreads = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    support = torch.full((count, toy.length, toy.tokens), -1, dtype=torch.int32)
    for r, j in itertools.product(range(count), range(toy.length)):
        if steps[r, j] < 0:
            continue
        state = tokens[r].masked_fill((steps[r] >= steps[r, j]) | (steps[r] < 0), toy.mask_id)
        probs = policy(table.detach()[int(toy.state_index(state)), j], toy, sampling)
        logprobs[r, j], entropies[r, j] = probs[tokens[r, j]].log(), _entropy(probs)
        spreads[r, j] = 1 - probs.square().sum()
        kept = probs.nonzero().squeeze(1)
        support[r, j, : len(kept)] = kept.int()
    tail = steps < 0
    if toy.eos_id is not None:
        tokens = tokens.masked_fill(tail, toy.eos_id)
    truncated = sampling.top_k is not None or sampling.top_p < 1
    trajectory = Trajectory(
        prompts=tuple(torch.arange(1 + r % 3) for r in range(count)),
        tokens=tokens,
        unmask_step=torch.where(tail, num_steps[:, None], steps),
        logprobs=logprobs,
        entropies=entropies,
        spreads=spreads,
        support_ids=support if truncated else None,
        num_steps=num_steps,
        rollout_ids=torch.arange(count),
        sampling=sampling,
        weights_version=0,
    )
    return Enumerated(trajectory, torch.stack([leaf.probability for leaf in leaves]))


def take(trajectory: Trajectory, rows: Tensor) -> Trajectory:
    """Return the trajectories of these rows, with rollout ids of their own."""
    support = trajectory.support_ids
    return replace(
        trajectory,
        prompts=tuple(trajectory.prompts[r] for r in rows.tolist()),
        tokens=trajectory.tokens[rows],
        unmask_step=trajectory.unmask_step[rows],
        logprobs=trajectory.logprobs[rows],
        entropies=trajectory.entropies[rows],
        spreads=trajectory.spreads[rows],
        support_ids=None if support is None else support[rows],
        num_steps=trajectory.num_steps[rows],
        rollout_ids=torch.arange(len(rows)),
    )


def estimator_gradient(
    table: Tensor,
    toy: Toy,
    trajectory: Trajectory,
    advantages: Tensor,
    draws: StepDraws,
    algorithm: AlgorithmSettings,
) -> Tensor:
    """Return the ascent direction of the package's loss, summed over rollouts."""
    table = table.detach().requires_grad_()
    rollout = Rollout(trajectory, advantages, advantages > 0, advantages)
    rows = at_level(draws, rollout, DrawContext(algorithm, toy.eos_id, 0))
    score, total = toy.score(table), table.sum() * 0
    for batch in batches_of(rollout, rows, mask_id=toy.mask_id, token_budget=4096):
        temperature = trajectory.sampling.temperature
        logits = policy_logits(score(batch.rows), toy.vocab, temperature=temperature)
        logprobs, _ = token_logprobs(
            logits, batch.targets, vocab=toy.vocab, support_ids=batch.support_ids
        )
        total = total - LOSSES["policy"](of_tokens(logprobs, batch), algorithm).loss
    return torch.autograd.grad(total, table)[0]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
