"""Proposals, inclusion chances and allocations against their definitions."""

import itertools
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import draw_counts, drawn_steps
from agrpo_megatron.types import Rollout
from tests.diffusion.toy import Toy, enumerate_trajectories, policy

torch.set_num_threads(1)
TOY = Toy(eos_id=0)
TABLE = TOY.table(seed=2)


def trajectories(**options):
    sampling = SamplingSettings(
        completion_length=3, **{"block_length": 3, "denoising_steps": 2, **options}
    )
    return enumerate_trajectories(TABLE, TOY, sampling).trajectory


def random_proposal(rows, steps, *, power=3.0, seed=0):
    """Return live steps and a proposal with steps of zero probability and of large ones."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.randint(1, steps + 1, (rows,), generator=generator)
    scores = torch.rand(rows, steps, generator=generator, dtype=torch.float64) ** power
    usable = torch.rand(rows, steps, generator=generator) < 0.8
    options = {"proposal": "gradient", "uniform_mix": 0.05, "usable": usable}
    return live, timesteps.step_proposal(live, scores, **options)


def test_length_of_a_step_is_that_of_its_gradient_by_the_logits():
    trajectory = trajectories(temperature=0.8, top_k=2)
    lengths = timesteps.step_lengths(trajectory, 2)
    expected = torch.zeros_like(lengths)
    for r, t in itertools.product(range(len(lengths)), range(2)):
        state = trajectory.tokens[r].masked_fill(trajectory.unmask_step[r] >= t, TOY.mask_id)
        for j in (trajectory.unmask_step[r] == t).nonzero()[:, 0].tolist():
            probs = policy(TABLE[int(TOY.state_index(state)), j], TOY, trajectory.sampling)
            one = torch.zeros(3).double()
            one[trajectory.tokens[r, j]] = 1
            expected[r, t] += (one - probs).square().sum()
    assert torch.allclose(lengths, expected.sqrt(), atol=1e-12)


def test_lengths_of_sure_tokens_are_not_lost_in_float32():
    """At 1 - p = 1e-5 the squared length is 1e-10: rounding of the records is as large."""
    logits = torch.zeros(1, 4)
    logits[0, 0] = 12.5
    kept = policy_logits(logits, TOY.vocab)
    logprobs, _ = token_logprobs(kept, torch.tensor([0]), vocab=TOY.vocab)
    chances = kept.double().softmax(-1)[0]
    expected = ((1 - chances[0]) ** 2 + chances[1:].square().sum()).sqrt()
    trajectory = trajectories()
    for spread in (0.0, 2e-5, 1.0):  # whatever the rounding of the second number
        one = replace(
            trajectory,
            unmask_step=torch.tensor([[0, 5, 5]]),
            num_steps=torch.tensor([1]),
            logprobs=logprobs.expand(1, 3),
            spreads=torch.full((1, 3), spread),
        )
        length = float(timesteps.step_lengths(one, 1))
        assert 0.6 * float(expected) < length < 1.5 * float(expected)


@pytest.mark.parametrize("power", [0.0, 1.0, 8.0])
def test_inclusion_is_the_capped_proposal(power):
    live, proposal = random_proposal(200, 24, power=power)
    counts = torch.arange(200) % 26
    chances = timesteps.inclusion(proposal, counts)
    usable = (proposal > 0).sum(1)
    assert torch.allclose(chances.sum(1), torch.minimum(counts, usable).double(), atol=1e-12)
    assert float(chances.min()) >= 0 and float(chances.max()) <= 1
    assert ((chances > 0) == (proposal > 0))[counts > 0].all()
    is_all = counts >= usable
    assert (chances[is_all] == (proposal[is_all] > 0).double()).all()
    factor = chances / proposal.clamp(min=1e-300)
    for row in (~is_all & (counts > 0)).nonzero()[:, 0].tolist():
        free = (chances[row] < 1 - 1e-12) & (proposal[row] > 0)
        scale = factor[row][free]
        assert float(scale.max() - scale.min()) < 1e-9 * float(scale.max())
        # A step that is always drawn would exceed 1 under the factor of the others.
        certain = chances[row] >= 1
        assert (proposal[row][certain] * scale.max() >= 1 - 1e-12).all()


@pytest.mark.parametrize("proposal", ["uniform", "entropy", "gradient"])
def test_distinct_draws_are_as_many_different_steps(proposal):
    trajectory = trajectories(block_length=1, denoising_steps=3, early_end=False, temperature=0.5)
    for count, seed in itertools.product((1, 2, 3), range(5)):
        algorithm = AlgorithmSettings(
            mc_samples=count, step_sampler="distinct", proposal=proposal, uniform_mix=0.02
        )
        draws = drawn_steps(trajectory, DrawContext(algorithm, TOY.eos_id, seed))
        assert (torch.bincount(draws.rollout) == count).all()


def test_allocation_is_the_best_of_all_splits():
    """By listing every split of the total in which each drawn rollout has at least one draw."""
    for seed in range(12):
        _, proposal = random_proposal(4, 5, power=4.0, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        squares = torch.rand(4, 5, generator=generator, dtype=torch.float64) ** 4
        is_drawn = torch.tensor([True, True, seed % 3 > 0, True])
        usable = (proposal > 0).sum(1)
        got = timesteps.allocate(proposal, squares, is_drawn=is_drawn, mean=2)
        most = int(torch.minimum(usable[is_drawn], torch.tensor(5)).sum())
        total = min(2 * int((is_drawn & (usable > 0)).sum()), most)
        assert int(got.sum()) == total
        assert (got[is_drawn & (usable > 0)] >= 1).all() and (got[~is_drawn] == 0).all()
        assert (got <= usable).all()

        def variance(counts, proposal=proposal, squares=squares, is_drawn=is_drawn):
            chances = timesteps.inclusion(proposal, counts)
            each = torch.where(chances > 0, squares / chances.clamp(min=1e-300), 0.0).sum(1)
            return float(each[is_drawn].sum())

        ranges = [
            range(1, int(n) + 1) if drawn and n > 0 else [0]
            for n, drawn in zip(usable, is_drawn, strict=True)
        ]
        splits = [torch.tensor(s) for s in itertools.product(*ranges) if sum(s) == total]
        assert variance(got) <= min(map(variance, splits)) * (1 + 1e-12)


@pytest.mark.parametrize(("kl", "loss"), [(0.0, "policy"), (0.1, "policy"), (0.0, "linear_bound")])
def test_draws_by_advantage_keep_their_total(kl, loss):
    """A rollout without advantage gets a draw only where it has a gradient: by the KL."""
    trajectory = trajectories(block_length=1, denoising_steps=3, early_end=False)
    count = len(trajectory.tokens)
    gains = torch.linspace(-3, 5, count) ** 3
    gains[:9] = 0
    algorithm = AlgorithmSettings(
        mc_samples=2, allocation="advantage", proposal="gradient", kl_coefficient=kl, loss=loss
    )
    rollout = Rollout(trajectory, gains, gains > 0, gains)
    counts = draw_counts(rollout, DrawContext(algorithm, TOY.eos_id, 0))
    drawn = count if kl > 0 else count - 9
    assert int(counts.sum()) == 2 * drawn and int((counts > 0).sum()) == drawn
    assert float(counts[gains.abs() > 20].double().mean()) > 2.5
    equal = replace(algorithm, allocation="equal")
    assert (draw_counts(rollout, DrawContext(equal, TOY.eos_id, 0)) == 2).all()
