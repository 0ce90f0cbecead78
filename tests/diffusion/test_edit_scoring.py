"""What is scored of steps that edit, shown by listing all that they can draw, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps
from agrpo_megatron.trajectories import select
from tests.diffusion.batching import rebuild_state
from tests.diffusion.toy import Toy, estimator_gradient, relative_error

torch.set_num_threads(1)
EXACT = 1e-6  # relative: the sampler records log-probs in float32
EDITS = SamplingSettings(
    completion_length=2,
    block_length=2,
    denoising_steps=2,
    unmasking="low_confidence",
    record_drawn=True,
    edit_threshold=0.4,
    edit_steps=1,
)
CASES = {
    "one more step": (Toy(length=2), EDITS),
    "two more steps": (Toy(length=2, tokens=2), replace(EDITS, edit_steps=2, threshold=0.7)),
    "two blocks": (
        Toy(length=4, tokens=2),
        replace(EDITS, completion_length=4, denoising_steps=2, edit_steps=1),
    ),
}


def _listed(table, toy, sampling):
    """Return all trajectories: the sampler is forced to draw each list of tokens.

    Lists that differ only where no step draws give the same trajectory, which is kept once.
    """
    steps, block = sampling.most_steps, sampling.block_length
    lists = list(itertools.product(range(toy.tokens), repeat=steps * block))
    forced = torch.tensor(lists).view(-1, steps, block).transpose(0, 1)
    places = torch.arange(toy.length) % block
    noise = torch.nn.functional.one_hot(forced[:, :, places], toy.tokens + 2) * 1e9
    context = replace(toy.context(table), gumbels=noise.double())
    prompts = [torch.tensor([0])] * len(lists)
    trajectory = sample(prompts, torch.arange(len(lists)), context=context, sampling=sampling)
    drawn, same = trajectory.drawn_tokens.flatten(1).unique(dim=0, return_inverse=True)
    return select(trajectory, torch.stack([(same == n).long().argmax() for n in range(len(drawn))]))


def _probability(table, toy, trajectory):
    """Return the probabilities of all draws of trajectories, differentiable in the table."""
    rows, steps, place = (trajectory.drawn_tokens >= 0).nonzero(as_tuple=True)
    states = rebuild_state(trajectory, rows, steps, toy.mask_id)
    fixed = trajectory.unmask_step[rows] <= steps[:, None]
    block = (fixed.sum(1) - 1) // trajectory.sampling.block_length  # the last one with a token
    position = block * trajectory.sampling.block_length + place
    logits = table[toy.state_index(states), position][:, : toy.tokens]
    chosen = trajectory.drawn_tokens[rows, steps, place].long()
    logprobs = logits.log_softmax(1).gather(1, chosen[:, None])[:, 0]
    total = torch.zeros(len(trajectory.tokens), dtype=torch.float64)
    return total.index_add(0, rows, logprobs).exp()


@pytest.mark.parametrize("name", CASES)
def test_all_drawn_tokens_give_the_gradient_with_edits(name):
    """Tokens and edits alone are off: whether a token is edited follows from the weights."""
    toy, sampling = CASES[name]
    table = toy.table(seed=4).requires_grad_()
    trajectory = _listed(table.detach(), toy, sampling)
    probability = _probability(table, toy, trajectory)
    assert abs(float(probability.detach().sum()) - 1) < 1e-12
    assert int((trajectory.edit_step >= 0).sum()) > 5
    gains = probability * toy.rewards(trajectory.tokens)
    expected = torch.autograd.grad(gains.sum(), table)[0]
    errors = {}
    for scoring in ("augmented", "token"):
        algorithm = AlgorithmSettings(
            normaliser="constant", normaliser_constant=1.0, scoring=scoring
        )
        draws = all_steps(trajectory, DrawContext(algorithm, None, 0))
        got = estimator_gradient(table, toy, trajectory, gains.detach(), draws, algorithm)
        errors[scoring] = relative_error(got, expected)
    assert errors["augmented"] < EXACT
    assert errors["token"] > 1e-2
