"""A policy so small that all its trajectories can be listed: a table of logits.

`enumerate_trajectories` is written from the definition of the sampler, shares no code with the
package, and keeps the probability of every trajectory differentiable in the table.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.batches import recorded_logprobs
from agrpo_megatron.diffusion.draw import LogitsForward
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.diffusion.sampler import SamplerContext
from agrpo_megatron.estimators import objective
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.losses import LOSSES, of_tokens
from agrpo_megatron.estimators.scoring import score_tokens
from agrpo_megatron.estimators.steps import all_steps, at_level
from agrpo_megatron.estimators.table import is_joint
from agrpo_megatron.estimators.weights import corrected
from agrpo_megatron.trajectories import select, tensors
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
    one = torch.ones_like(table[0, 0, 0])
    start = _Leaf((toy.mask_id,) * toy.length, (-1,) * toy.length, one)
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
    drawn: tuple[tuple[int, ...], ...] = ()  # of each step by place in the block, if recorded
    turns: tuple[int, ...] = ()  # of each position within its step, if drawn
    turn_chances: tuple[Tensor, ...] = ()  # probability of each position at its turn, likewise

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
    for drawn in itertools.product(range(toy.tokens), repeat=len(masked)):
        draw = dict(zip(masked, drawn, strict=True))
        for chosen, chances in _choices(masked, count, draw, probs, sampling):
            sure = [j for j in masked if _is_sure(probs[j][draw[j]], sampling)]
            kept = {*chosen, *sure}
            others = [probs[j][draw[j]] for j in masked if j not in kept]
            rest = torch.stack(others).prod() if others else 1.0
            fixed = _fix(leaf, {j: draw[j] for j in kept}, probs, rest * math.prod(chances))
            if sampling.position_temperature is not None:
                fixed = _with_turns(fixed, chosen, chances, toy)
            if sampling.record_drawn and masked:
                record = tuple(draw.get(j, -1) for j in places)
                fixed = replace(fixed, drawn=(*leaf.drawn, record))
            yield fixed


def _choices(masked: list[int], count: int, draw: dict[int, int], probs, sampling):
    """Return the positions that a step may choose, and probabilities whose product is theirs."""
    count = min(count, len(masked))
    if sampling.position_temperature is not None:
        wish = {j: (-_entropy(probs[j]) / sampling.position_temperature).exp() for j in masked}
        choices = []
        for chosen in itertools.permutations(masked, count):
            left = [[j for j in masked if j not in chosen[:turn]] for turn in range(count)]
            turns = zip(chosen, left, strict=True)
            choices.append((chosen, [wish[j] / sum(wish[i] for i in rest) for j, rest in turns]))
        return choices
    if sampling.unmasking == "random":
        sets = list(itertools.combinations(masked, count))
        return [(chosen, [1 / len(sets)]) for chosen in sets]
    rank = {j: float(_confidence(probs[j].detach(), draw[j], sampling.unmasking)) for j in masked}
    return [(sorted(masked, key=lambda j: (-rank[j], j))[:count], [1.0])]


def _with_turns(leaf: _Leaf, chosen, chances, toy: Toy) -> _Leaf:
    """Note the turns of a step's positions, and their probabilities."""
    turns = list(leaf.turns or [0] * toy.length)
    known = list(leaf.turn_chances or [torch.ones(())] * toy.length)
    for turn, (j, chance) in enumerate(zip(chosen, chances, strict=True)):
        turns[j], known[j] = turn, chance.detach()
    return replace(leaf, turns=tuple(turns), turn_chances=tuple(known))


def _confidence(probs: Tensor, token: int, unmasking: str) -> Tensor | float:
    if unmasking == "leftmost":
        return 0.0
    if unmasking == "entropy":
        return -_entropy(probs)
    if unmasking == "margin":
        top = probs.topk(2).values
        return top[0] - top[1]
    return probs[token]


def _is_sure(chance: Tensor, sampling: SamplingSettings) -> bool:
    return sampling.threshold is not None and float(chance.detach()) >= sampling.threshold


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-300).log()).sum()


def _fix(leaf: _Leaf, fixed: dict[int, int], probs, factor) -> _Leaf:
    tokens, steps, step = list(leaf.tokens), list(leaf.unmask_step), leaf.step
    probability = leaf.probability * factor
    for j, token in fixed.items():
        tokens[j], steps[j] = token, step
        probability = probability * probs[j][token]
    return replace(leaf, tokens=tuple(tokens), unmask_step=tuple(steps), probability=probability)


def _merge(leaves) -> list[_Leaf]:
    """Add up the probabilities of equal states, and drop the impossible ones."""
    merged: dict[tuple, _Leaf] = {}
    for leaf in leaves:
        if float(leaf.probability.detach()) == 0:
            continue
        key = (leaf.tokens, leaf.unmask_step, leaf.drawn, leaf.turns)
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
    if sampling.position_temperature is not None:
        chances = torch.stack([torch.stack(leaf.turn_chances) for leaf in leaves]).double()
        turns = torch.tensor([leaf.turns for leaf in leaves], dtype=torch.int32)
        trajectory = replace(trajectory, turns=turns, turn_logprobs=chances.log())
    if sampling.record_drawn:
        trajectory = _with_drawn(trajectory, leaves, table.detach(), toy)
    return Enumerated(trajectory, torch.stack([leaf.probability for leaf in leaves]))


def _with_drawn(trajectory: Trajectory, leaves: list[_Leaf], table: Tensor, toy: Toy) -> Trajectory:
    """Add all that each step drew, as the sampler records it."""
    sampling = trajectory.sampling
    shape = (len(leaves), sampling.denoising_steps, sampling.block_length)
    drawn = torch.full(shape, -1, dtype=torch.int32)
    logprobs = torch.zeros(shape, dtype=torch.float64)
    spreads = torch.zeros_like(logprobs)
    for r, leaf in enumerate(leaves):
        for step, record in enumerate(leaf.drawn):
            steps = trajectory.unmask_step[r]
            state = trajectory.tokens[r].masked_fill(steps >= step, toy.mask_id)
            block = int((steps == step).long().argmax()) // sampling.block_length
            for place, token in enumerate(record):
                if token < 0:
                    continue
                row = table[int(toy.state_index(state)), block * sampling.block_length + place]
                probs = policy(row, toy, sampling)
                drawn[r, step, place], logprobs[r, step, place] = token, probs[token].log()
                spreads[r, step, place] = 1 - probs.square().sum()
    return replace(trajectory, drawn_tokens=drawn, drawn_logprobs=logprobs, drawn_spreads=spreads)


def take(trajectory: Trajectory, rows: Tensor) -> Trajectory:
    """Return the trajectories of these rows, with rollout ids of their own."""
    return replace(select(trajectory, rows), rollout_ids=torch.arange(len(rows)))


def estimator_gradient(
    table: Tensor,
    toy: Toy,
    trajectory: Trajectory,
    advantages: Tensor,
    draws: StepDraws,
    algorithm: AlgorithmSettings,
    *,
    sampler: Trajectory | None = None,
) -> Tensor:
    """Return the ascent direction of the package's loss, summed over rollouts.

    Args:
        sampler: the trajectory with log-probs of another policy, which sampled it; None: its own.
    """
    table = table.detach().requires_grad_()
    rollout = Rollout(trajectory, advantages, advantages > 0, advantages)
    rows = at_level(draws, rollout, DrawContext(algorithm, toy.eos_id, 0))
    if sampler is not None:
        change = (trajectory.logprobs - sampler.logprobs)[rows.rollout]
        rows, _ = corrected(rows, change, limit=math.inf, kl=algorithm.kl)
    score, total = toy.score(table), table.sum() * 0
    batches = batches_of(rollout, rows, mask_id=toy.mask_id, token_budget=4096)
    if is_joint(rows, algorithm):
        loss = _joint_loss(rollout, rows, batches, score, toy, algorithm)
        total = torch.stack([loss(score(batch.rows), batch)[0] for batch in batches]).sum()
        return torch.autograd.grad(-total, table)[0]
    for batch in batches:
        temperature = trajectory.sampling.temperature
        logits = policy_logits(score(batch.rows), toy.vocab, temperature=temperature)
        logprobs, _ = token_logprobs(
            logits, batch.targets, vocab=toy.vocab, support_ids=batch.support_ids
        )
        total = total - LOSSES["policy"](of_tokens(logprobs, batch), algorithm).loss
    return torch.autograd.grad(total, table)[0]


def _joint_loss(rollout: Rollout, rows, batches, score, toy: Toy, algorithm: AlgorithmSettings):
    """Return the loss of micro-batches that join tokens, as `training.update` makes it."""
    sampling = rollout.trajectory.sampling
    logprobs = torch.zeros(rows.scored.shape, dtype=torch.float64)
    entropies = torch.zeros_like(logprobs)
    for batch in batches:
        scores = score_tokens(score(batch.rows).detach(), batch, toy.vocab, sampling, algorithm)
        logprobs[batch.row, batch.position] = scores.logprobs
        entropies[batch.row, batch.position] = scores.entropies
    old = recorded_logprobs(rollout, rows)
    assert old is not None
    tables = objective.Tables(logprobs, old, None, entropies)
    metrics, slopes = objective.joint_loss(rows, tables, rollout, algorithm)
    assert float(metrics["ratio_max_error"]) < 1e-12, "recorded log-probs are those of a new pass"
    return objective.make_tangent(slopes, metrics, toy.vocab, sampling, algorithm, speaker=None)


def settings_of(toy: Toy, options) -> SamplingSettings:
    return SamplingSettings(completion_length=toy.length, **options)


def reward_gradient(table: Tensor, toy: Toy, sampling: SamplingSettings) -> Tensor:
    """Differentiate the expected reward, sum over trajectories of p R, by brute force."""
    table = table.clone().requires_grad_()
    listed = enumerate_trajectories(table, toy, sampling)
    expected = (listed.probability * toy.rewards(listed.trajectory.tokens)).sum()
    return torch.autograd.grad(expected, table)[0]


def mean_gradient(table: Tensor, toy: Toy, sampling: SamplingSettings, **options) -> Tensor:
    """Average `full_trajectory` over single trajectories, with reward as advantage."""
    listed = enumerate_trajectories(table, toy, sampling)
    algorithm = AlgorithmSettings(normaliser="constant", normaliser_constant=1.0, **options)
    context = DrawContext(algorithm, toy.eos_id, 0)
    draws = all_steps(listed.trajectory, context)
    gains = listed.probability * toy.rewards(listed.trajectory.tokens)
    return estimator_gradient(table, toy, listed.trajectory, gains, draws, algorithm)


def rows_of(drawn: Trajectory, listed: Enumerated) -> Tensor:
    """Return which of the listed trajectories each drawn one is."""
    names = ("tokens", "unmask_step", "drawn_tokens", "turns")
    keys, seen = (
        torch.cat([tensors(of)[n].long().flatten(1) for n in names if n in tensors(of)], 1).tolist()
        for of in (listed.trajectory, drawn)
    )
    row = {tuple(key): index for index, key in enumerate(keys)}
    return torch.tensor([row[tuple(key)] for key in seen])


def assert_listed(drawn: Trajectory, listed: Enumerated) -> None:
    """Check by chi-square that rollouts were drawn with the probabilities of the list."""
    rows = rows_of(drawn, listed)
    count = len(rows)
    found = torch.bincount(rows, minlength=len(listed.probability))
    expected = listed.probability.detach() * count
    large = expected >= 5
    found = torch.cat([found[large], found[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    chi_square = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = len(expected) - 1
    assert abs(float(chi_square) - freedom) < 4 * (2 * freedom) ** 0.5


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
