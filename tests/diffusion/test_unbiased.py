"""The policy gradient is unbiased over trajectories, shown by listing all of them (float64)."""

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, full_trajectory
from agrpo_megatron.types import Rollout
from tests.diffusion.toy import (
    Toy,
    assert_listed,
    enumerate_trajectories,
    estimator_gradient,
    mean_gradient,
    relative_error,
    reward_gradient,
    settings_of,
    take,
)

torch.set_num_threads(1)

EXACT = 1e-10  # relative

# name: toy, sampling. No order depends on the weights, so the choice of positions has no gradient.
CASES = {
    "one token a step": (Toy(), {"block_length": 3, "denoising_steps": 3}),
    "two tokens, then one": (Toy(), {"block_length": 3, "denoising_steps": 2}),
    "all tokens at once": (Toy(), {"block_length": 3, "denoising_steps": 1}),
    "blocks that end early": (Toy(eos_id=0), {"block_length": 1, "denoising_steps": 3}),
    "temperature": (Toy(), {"block_length": 3, "denoising_steps": 3, "temperature": 0.6}),
    "top-k": (Toy(), {"block_length": 3, "denoising_steps": 3, "temperature": 1.3, "top_k": 2}),
    "top-p": (Toy(), {"block_length": 3, "denoising_steps": 2, "top_p": 0.7}),
    "top-k and top-p": (
        Toy(eos_id=1),
        {"block_length": 1, "denoising_steps": 3, "temperature": 1.5, "top_k": 2, "top_p": 0.85},
    ),
    "leftmost": (Toy(), {"unmasking": "leftmost", "block_length": 3, "denoising_steps": 3}),
    "leftmost, two tokens, then one": (
        Toy(),
        {"unmasking": "leftmost", "block_length": 3, "denoising_steps": 2},
    ),
    "leftmost, blocks that end early": (
        Toy(length=4, tokens=2, eos_id=0),
        {"unmasking": "leftmost", "block_length": 2, "denoising_steps": 4, "top_p": 0.7},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_probabilities_of_all_trajectories_sum_to_one(name):
    toy, options = CASES[name]
    listed = enumerate_trajectories(toy.table(), toy, settings_of(toy, options))
    assert abs(float(listed.probability.sum()) - 1) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_mean_over_trajectories_is_the_gradient_of_the_expected_reward(name):
    toy, options = CASES[name]
    sampling, table = settings_of(toy, options), toy.table()
    expected = reward_gradient(table, toy, sampling)
    got = mean_gradient(table, toy, sampling)
    assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("baseline, factor", [("none", 1.0), ("leave_one_out", 1.0), ("mean", 0.5)])
@pytest.mark.parametrize("name", ["one token a step", "blocks that end early", "top-p"])
def test_mean_over_pairs_with_a_baseline(name, baseline, factor):
    """`mean` counts a rollout's own reward in its baseline, hence (G - 1) / G = 1/2 here."""
    toy, options = CASES[name]
    toy = Toy(tokens=2, eos_id=toy.eos_id)
    sampling, table = settings_of(toy, options), toy.table(seed=3)
    listed = enumerate_trajectories(table, toy, sampling)
    count = len(listed.probability)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    trajectory = take(listed.trajectory, pairs.reshape(-1))
    rewards = toy.rewards(trajectory.tokens)
    gains = advantages(rewards, AlgorithmSettings(group_size=2, baseline=baseline))
    gains = gains * listed.probability[pairs].prod(1).repeat_interleave(2) / 2
    algorithm = AlgorithmSettings(normaliser="constant", normaliser_constant=1.0, group_size=2)
    draws = all_steps(trajectory, DrawContext(algorithm, toy.eos_id, 0))
    got = estimator_gradient(table, toy, trajectory, gains, draws, algorithm)
    expected = factor * reward_gradient(table, toy, sampling)
    assert relative_error(got, expected) < EXACT


def test_constant_normaliser_divides_by_the_denoising_steps_unless_told():
    toy, options = CASES["blocks that end early"]
    listed = enumerate_trajectories(toy.table(), toy, settings_of(toy, options))
    algorithm = AlgorithmSettings(normaliser="constant")
    gains = toy.rewards(listed.trajectory.tokens)
    rollout = Rollout(listed.trajectory, gains, gains > 0, gains)
    rows = full_trajectory(rollout, DrawContext(algorithm, 0, 0))
    weights = rows.weight[rows.scored]
    assert torch.allclose(weights, torch.tensor(1 / 3, dtype=torch.float64), rtol=1e-15)


def test_live_steps_normaliser_is_the_mean_over_each_rollouts_own_steps():
    """Published: what each trajectory adds is divided by its number of live steps."""
    toy, options = CASES["blocks that end early"]
    sampling, table = settings_of(toy, options), toy.table()
    listed = enumerate_trajectories(table, toy, sampling)
    gains = listed.probability * toy.rewards(listed.trajectory.tokens)
    results = []
    for normaliser, scale in (("live_steps", 1.0), ("constant", listed.trajectory.num_steps)):
        algorithm = AlgorithmSettings(normaliser=normaliser, normaliser_constant=1.0)
        draws = all_steps(listed.trajectory, DrawContext(algorithm, 0, 0))
        results.append(
            estimator_gradient(table, toy, listed.trajectory, gains / scale, draws, algorithm)
        )
    assert relative_error(results[0], results[1]) < EXACT


def test_text_rule_is_biased_where_a_live_step_fixed_end_of_text_only():
    """Published: steps after the last text token are not scored, though the policy took them."""
    toy, options = CASES["blocks that end early"]
    sampling, table = settings_of(toy, options), toy.table()
    expected = reward_gradient(table, toy, sampling)
    got = mean_gradient(table, toy, sampling, live_steps="text")
    assert relative_error(got, expected) > 1e-2


@pytest.mark.parametrize("unmasking", ["low_confidence", "entropy"])
def test_token_only_gradient_is_biased_where_positions_depend_on_the_weights(unmasking):
    """Only tokens are scored; which position was fixed depends on the weights too.

    Entropy ranks positions before tokens are drawn. Its choice is a step function of the weights,
    without gradient, so the token-only gradient stays exact there.
    """
    toy, options = CASES["one token a step"]
    sampling, table = settings_of(toy, options | {"unmasking": unmasking}), toy.table()
    error = relative_error(
        mean_gradient(table, toy, sampling), reward_gradient(table, toy, sampling)
    )
    if unmasking == "entropy":
        assert error < EXACT
    else:
        assert 1e-3 < error < 1


@pytest.mark.parametrize("unmasking", ["random", "low_confidence", "entropy", "leftmost"])
@pytest.mark.parametrize("name", ["one token a step", "two tokens, then one", "top-k and top-p"])
def test_sampler_draws_trajectories_with_their_probabilities(name, unmasking):
    """Chi-square of 20,000 rollouts against the list; the seed is fixed, so this never flakes."""
    toy, options = CASES[name]
    sampling, table = settings_of(toy, options | {"unmasking": unmasking}), toy.table(seed=1)
    listed, count = enumerate_trajectories(table, toy, sampling), 20_000
    drawn = sample(
        [torch.tensor([0])] * count,
        torch.arange(count),
        context=toy.context(table),
        sampling=sampling,
    )
    assert_listed(drawn, listed)
