"""Rollouts of random weights, and how far the training forward is from them."""

import torch
from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.batches import row_lengths, timestep_batch
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import full_trajectory
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import make_forward
from agrpo_megatron.training.step import accumulate_gradients, my_micro_batches
from agrpo_megatron.types import Rollout, TimestepBatch, Trajectory
from tests.gpu.common import SCALE
from tools.gpu_model import random_prompts


def sampled(network: Network, settings: Settings) -> Trajectory:
    """Sample a completion of each prompt, with the sampler that training uses."""
    model, device = settings.model, network.ranks.device
    assert model.mask_token_id is not None
    prompts = random_prompts(SCALE, seed=7, device=device)
    context = SamplerContext(
        forward=make_forward(network, settings.rollout, sampling=settings.sampling),
        vocab=network.vocab,
        mask_id=model.mask_token_id,
        eos_id=None,
        seed=settings.run.seed,
        token_budget=settings.train.token_budget,
    )
    ids = torch.arange(len(prompts), device=device)
    return sample(prompts, ids, context=context, sampling=settings.sampling)


def mismatch(engine: Engine, settings: Settings) -> Tensor:
    """Return the difference of every sampled token's log-prob between training and rollout [n].

    Training packs the states of all denoising steps again, with other neighbours.
    """
    trajectory = sampled(engine.rollout_network(), settings)
    count, device = len(trajectory.tokens), trajectory.tokens.device
    ones = torch.ones(count, device=device)
    rollout = Rollout(trajectory, rewards=ones, correct=ones > 0, advantages=ones)
    scored = full_trajectory(rollout, DrawContext(settings.algorithm, eos_id=None, seed=0))
    lengths, budget = row_lengths(rollout, scored), settings.train.token_budget
    order = my_micro_batches(lengths, settings.model, engine.ranks, budget=budget)
    mask_id = settings.model.mask_token_id
    assert mask_id is not None
    batches = [timestep_batch(rollout, scored, rows, mask_id=mask_id) for rows in order]
    found: list[Tensor] = []

    def loss(logits: Tensor, batch: TimestepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = policy_logits(logits, engine.network.vocab)
        logprobs, _ = token_logprobs(policy, batch.targets, vocab=engine.network.vocab)
        found.append(logprobs.detach() - batch.old_logprobs)
        return -logprobs.sum(), {}

    accumulate_gradients(engine, batches, loss=loss, examples=count)
    differences = torch.cat(found)
    assert len(differences) == trajectory.tokens.numel()
    return differences
