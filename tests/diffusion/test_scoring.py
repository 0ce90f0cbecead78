"""What is scored of a step whose positions depend on the weights, shown by listing all rollouts.

Each case compares with the gradient of the expected reward, by brute force, in float64.
"""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, proposal_of, rows_at
from tests.diffusion import test_unbiased_draws as draws
from tests.diffusion.toy import (
    Toy,
    assert_listed,
    enumerate_trajectories,
    mean_gradient,
    relative_error,
    reward_gradient,
    rows_of,
    settings_of,
)

torch.set_num_threads(1)

EXACT = 1e-10  # relative
ONE, TWO = ({"block_length": 3, "denoising_steps": steps} for steps in (3, 2))
# name: toy, sampling, whether the kept tokens alone give a wrong gradient. A margin is one of the
# state, so positions do not depend on the drawn tokens, and their choice has no gradient.
CASES = {
    "low confidence": (Toy(tokens=2), ONE | {"unmasking": "low_confidence"}, True),
    "low confidence, two tokens, then one": (Toy(), TWO | {"unmasking": "low_confidence"}, True),
    "low confidence, cold blocks that end early": (
        Toy(length=4, tokens=2, eos_id=0),
        {
            "unmasking": "low_confidence",
            "block_length": 2,
            "denoising_steps": 4,
            "temperature": 0.6,
        },
        True,
    ),
    "margin": (Toy(), TWO | {"unmasking": "margin"}, False),
    "entropy": (Toy(), TWO | {"unmasking": "entropy"}, False),
    "threshold": (Toy(), TWO | {"unmasking": "low_confidence", "threshold": 0.6}, True),
    "threshold in blocks": (
        Toy(length=4, tokens=2),
        {
            "unmasking": "low_confidence",
            "block_length": 2,
            "denoising_steps": 4,
            "threshold": 0.7,
        },
        True,
    ),
    "random with threshold": (Toy(tokens=2), ONE | {"threshold": 0.6}, True),
    "leftmost with threshold": (
        Toy(tokens=2),
        ONE | {"unmasking": "leftmost", "threshold": 0.6},
        True,
    ),
}


POSITIONS = {
    "one position a step": (
        Toy(),
        TWO | {"unmasking": "entropy", "position_temperature": 0.4, "denoising_steps": 3},
    ),
    "two positions, then one": (
        Toy(),
        TWO | {"unmasking": "entropy", "position_temperature": 1.0},
    ),
    "cold positions in blocks that end early": (
        Toy(length=4, tokens=2, eos_id=0),
        {
            "unmasking": "entropy",
            "position_temperature": 0.1,
            "block_length": 2,
            "denoising_steps": 4,
            "temperature": 0.6,
        },
    ),
}


def case_of(name):
    toy, options, is_biased = CASES[name]
    return toy, settings_of(toy, options | {"record_drawn": True}), is_biased


@pytest.mark.parametrize("name", CASES)
def test_all_drawn_tokens_give_the_gradient_of_the_expected_reward(name):
    toy, sampling, is_biased = case_of(name)
    table = toy.table(seed=4)
    expected = reward_gradient(table, toy, sampling)
    got = mean_gradient(table, toy, sampling, scoring="augmented")
    assert relative_error(got, expected) < EXACT
    error = relative_error(mean_gradient(table, toy, sampling), expected)
    assert error > 1e-2 if is_biased else error < EXACT


@pytest.mark.parametrize("name", POSITIONS)
def test_tokens_and_drawn_positions_give_the_gradient_of_the_expected_reward(name):
    toy, options = POSITIONS[name]
    sampling, table = settings_of(toy, options), toy.table(seed=4)
    assert abs(float(enumerate_trajectories(table, toy, sampling).probability.sum()) - 1) < 1e-12
    expected = reward_gradient(table, toy, sampling)
    got = mean_gradient(table, toy, sampling, scoring="positions")
    assert relative_error(got, expected) < EXACT
    assert relative_error(mean_gradient(table, toy, sampling), expected) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_what_is_recorded_changes_no_probability(name):
    toy, sampling, _ = case_of(name)
    with_record, without = (
        reward_gradient(toy.table(seed=4), toy, replace(sampling, record_drawn=recorded))
        for recorded in (True, False)
    )
    assert relative_error(with_record, without) < EXACT


@pytest.mark.parametrize("allocation", ["equal", "advantage"])
@pytest.mark.parametrize("proposal", ["uniform", "gradient"])
@pytest.mark.parametrize("sampler", ["distinct", "independent"])
@pytest.mark.parametrize("scoring", ["augmented", "augmented, threshold", "positions"])
def test_drawn_steps_give_it_too(monkeypatch, scoring, sampler, proposal, allocation):
    """Two of three steps, over all rollouts and all draws; with a threshold some have fewer."""
    toy, scoring, has_threshold = Toy(tokens=2), *scoring.partition(",")[::2]
    options = {"unmasking": "entropy", "position_temperature": 0.3}
    if scoring == "augmented":
        options = {"unmasking": "low_confidence", "record_drawn": True}
        options["threshold"] = 0.7 if has_threshold else None
    sampling, table = settings_of(toy, ONE | options), toy.table(seed=5)
    listed = enumerate_trajectories(table, toy, sampling)
    gains = listed.probability * toy.rewards(listed.trajectory.tokens)
    algorithm = AlgorithmSettings(
        mc_samples=2,
        step_sampler=sampler,
        proposal=proposal,
        allocation=allocation,
        scoring=scoring,
        normaliser="constant",
        normaliser_constant=1.0,
    )
    got, full = draws.mean_gradient(
        monkeypatch, listed.trajectory, gains, algorithm, toy=toy, table=table
    )
    assert relative_error(got, full) < EXACT
    assert relative_error(got, reward_gradient(table, toy, sampling)) < EXACT


def test_the_proposal_follows_all_drawn_tokens():
    """A step that kept a token without an alternative may have put others back that had some."""
    toy, sampling, _ = case_of("low confidence")
    trajectory = enumerate_trajectories(toy.table(), toy, sampling).trajectory
    alone = replace(trajectory, spreads=trajectory.spreads.masked_fill(step_of(trajectory, 0), 0.0))
    token, augmented = (
        proposal_of(alone, DrawContext(AlgorithmSettings(scoring=scoring), None, 0))
        for scoring in ("token", "augmented")
    )
    assert (token[:, 0] == 0).all() and (augmented > 0).all()
    lengths = []
    for step in range(3):  # of the gradient by the logits of all drawn tokens
        rows = rows_at(trajectory, draws_of(trajectory, step), scoring="augmented")
        chances = trajectory.drawn_logprobs[:, step].exp()
        spreads = trajectory.drawn_spreads[:, step]
        squares = (2 * (1 - chances) - spreads) * rows.scored
        lengths.append(squares.sum(1).sqrt())
    wanted = torch.stack(lengths, 1)
    shares = 0.9 * wanted / wanted.sum(1, keepdim=True) + 0.1 / 3
    assert torch.allclose(augmented, shares, atol=1e-7)


def step_of(trajectory, step):
    return trajectory.unmask_step == step


def draws_of(trajectory, step):
    """Return one step of every rollout."""
    every = all_steps(trajectory, DrawContext(AlgorithmSettings(), None, 0))
    chosen = every.step == step
    return replace(
        every,
        rollout=every.rollout[chosen],
        step=every.step[chosen],
        weight=every.weight[chosen],
    )


@pytest.mark.parametrize("name", [*CASES, *POSITIONS])
def test_the_sampler_draws_and_records_what_is_listed(name):
    """Chi-square of 20,000 rollouts; the seed is fixed, so this never flakes."""
    toy, sampling = case_of(name)[:2] if name in CASES else POSITIONS[name]
    if name in POSITIONS:
        sampling = settings_of(toy, sampling)
    table, count = toy.table(seed=4), 20_000
    listed = enumerate_trajectories(table, toy, sampling)
    drawn = sample(
        [torch.tensor([0])] * count,
        torch.arange(count),
        context=toy.context(table),
        sampling=sampling,
    )
    assert_listed(drawn, listed)
    rows = rows_of(drawn, listed)
    recorded = ("turn_logprobs",) if name in POSITIONS else ("drawn_logprobs", "drawn_spreads")
    for field in ("logprobs", *recorded):
        found, known = (getattr(of, field) for of in (drawn, listed.trajectory))
        assert float((found - known[rows]).abs().max()) < 1e-5, field
