"""What importance weights correct of rollouts of another policy, by listing all trajectories."""

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps
from tests.diffusion.toy import (
    Toy,
    enumerate_trajectories,
    estimator_gradient,
    relative_error,
    reward_gradient,
    settings_of,
)

TOY = Toy(length=3, tokens=2)
STEPS = {  # denoising steps of a block of three tokens: which levels have the exact gradient
    "a token each": (3, {"token": False, "row": False, "sequence": True}),
    "two tokens, then one": (2, {"token": False, "row": False, "sequence": True}),
    "all at once": (1, {"token": False, "row": True, "sequence": True}),
}


@pytest.mark.parametrize("level", ["token", "row", "sequence"])
@pytest.mark.parametrize("name", STEPS)
def test_weights_correct_what_has_one_ratio(name, level):
    """A token's weight corrects its own draw; only that of a completion corrects all of it."""
    steps, is_exact = STEPS[name]
    sampling = settings_of(TOY, {"block_length": 3, "denoising_steps": steps})
    table = TOY.table(seed=1)
    other = table + 0.5 * TOY.table(seed=2)  # of the policy that samples
    drawn = enumerate_trajectories(other, TOY, sampling)
    found = enumerate_trajectories(table, TOY, sampling).trajectory
    assert torch.equal(found.tokens, drawn.trajectory.tokens)
    assert torch.equal(found.unmask_step, drawn.trajectory.unmask_step)
    own = {"normaliser": "constant", "normaliser_constant": 1.0} if level != "sequence" else {}
    algorithm = AlgorithmSettings(name="full_trajectory", level=level, **own)
    draws = all_steps(found, DrawContext(algorithm, TOY.eos_id, 0))
    gains = drawn.probability * TOY.rewards(found.tokens)
    facts = table, TOY, found, gains, draws, algorithm
    expected = reward_gradient(table, TOY, sampling)
    error = relative_error(estimator_gradient(*facts, sampler=drawn.trajectory), expected)
    assert (error < 1e-10) if is_exact[level] else (0.01 < error < 1)
    assert relative_error(estimator_gradient(*facts), expected) > max(0.1, error), "it helps"
