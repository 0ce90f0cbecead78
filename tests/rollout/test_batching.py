"""A completion is the same bits whatever shares its forward passes, so missing ones can be
sampled alone (see `rollout.cache`)."""

import random

import pytest
import torch

from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.requests import encode_prompts
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.trajectories import select, tensors
from tests.ranks import run_ranks
from tests.training.tiny import open_session

ROWS = 24
SAMPLERS = {
    "one token a step": ["sampling.denoising_steps=8"],  # a single row scores a single token
    "low confidence": ["sampling.unmasking=low_confidence"],
    "top-k": ["sampling.top_k=9"],
    "small budget": ["train.token_budget=64"],
    "cached blocks": [
        "model.attention=block_causal",
        "model.block_length=4",
        "sampling.block_origin=row",
    ],
}


def _differing(overrides):
    """Return the subsets of rows whose trajectory differs from that of all rows."""
    session, engine = open_session("train.token_budget=1000", *overrides)
    run, network = session.run, engine.rollout_network()
    problems = [run.task.problems("train")[row] for row in range(ROWS)]
    prompts = encode_prompts(run, task_prompts(run.task, problems, split="train"))
    ids, chance = torch.arange(ROWS), random.Random(0)

    def sampled(rows):
        chosen = [prompts[row] for row in rows]
        return sample_prompts(run, network, chosen, ids[rows], sampling=run.settings.sampling)[0]

    whole, differing = sampled(list(range(ROWS))), []
    for count in (1, 1, 1, 2, 3, 5, 9, 17):
        rows = chance.sample(range(ROWS), count)
        part, expected = tensors(sampled(rows)), tensors(select(whole, torch.tensor(rows)))
        if not all(torch.equal(part[name], tensor) for name, tensor in expected.items()):
            differing.append(rows)
    return differing


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_completion_is_the_same_bits_in_any_batch(name):
    assert run_ranks(1, _differing, SAMPLERS[name]) == [[]]
