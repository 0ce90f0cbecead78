"""Updates of a module with blocks: each scored block sees the finished text before it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from agrpo_megatron.config.rules.blocks import ACROSS
from agrpo_megatron.config.settings.estimators import ENTRIES
from agrpo_megatron.diffusion import SamplingSettings, module_context, sample, timestep_batch
from agrpo_megatron.diffusion.patterns import block_causal, places_of, visible
from agrpo_megatron.diffusion.replays.pack import pack_replay
from agrpo_megatron.diffusion.replays.rows import replayed_rows
from agrpo_megatron.estimators import (
    AlgorithmSettings,
    DrawContext,
    make_rollout,
    micro_batches,
    score_tokens,
    scored_rows,
    update_losses,
)

MASK, VOCABULARY, BLOCK = 9, 10, 2
PROMPTS = [torch.tensor(ids) for ids in ([1], [1], [2, 3, 4, 5], [2, 3, 4, 5])]
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0])
NAMES = [name for name in ENTRIES if name not in ACROSS]


class Blocks(nn.Module):
    """One layer of attention in which a token sees earlier blocks and its own."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(32, width)
        self.head = nn.Linear(width, VOCABULARY)
        self.double().eval()

    def attend(self, ids, position, mask):
        x = self.tokens(ids) + self.places(position)
        scores = (x @ x.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
        return self.head(x + scores.softmax(-1) @ x)

    def forward(self, ids):
        return self.attend(ids, torch.arange(ids.shape[1]), seen([block_causal(len(ids.T), BLOCK)]))


def seen(rows):
    """Return which tokens of packed rows see which, by the definition of the patterns."""
    tokens, places = (
        torch.arange(sum(s.length for row in rows for s in row)),
        places_of(rows, torch.device("cpu")),
    )
    return visible(places, tokens[:, None], tokens[None])


def rollout_of(context, algorithm):
    leftmost = "just_grpo" in algorithm.name
    sampling = SamplingSettings(
        completion_length=6,
        block_length=BLOCK,
        denoising_steps=6 if leftmost else 3,
        block_origin="row",
        unmasking="leftmost" if leftmost else "random",
    )
    trajectory = sample(PROMPTS, torch.arange(4), context=context, sampling=sampling)
    return make_rollout(trajectory, REWARDS, algorithm)


def table(scored, batches, logits, context, algorithm, sampling):
    """Return the log-probs [N, C] of all scored tokens."""
    found = torch.full(scored.scored.shape, float("nan"), dtype=torch.float64)
    for batch, values in zip(batches, logits, strict=True):
        scores = score_tokens(values, batch, context.vocab, sampling, algorithm)
        found[batch.row, batch.position] = scores.logprobs.detach()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_scored_blocks_are_those_of_replayed_rows(name):
    """A replayed row has one copy of the text; its tokens see each other by the patterns."""
    module, algorithm = Blocks(), AlgorithmSettings(name=name, group_size=2)
    context = module_context(
        module, mask_id=MASK, vocab_size=VOCABULARY, block_length=BLOCK, token_budget=30
    )
    rollout = rollout_of(context, algorithm)
    sampling, model = rollout.trajectory.sampling, context.model
    scored = scored_rows(rollout, DrawContext(algorithm, eos_id=None, seed=0))
    batches = micro_batches(rollout, scored, context=context)
    logits = [context.forward.score(batch.rows) for batch in batches]
    ours = table(scored, batches, logits, context, algorithm, sampling)

    replayed, logits = replayed_rows(scored, rollout, model, budget=1000), []
    packed = pack_replay(replayed, rollout, scored, mask_id=MASK)
    states = torch.tensor([state for row in replayed for state in row.states])
    patterns = [row.pattern for row in replayed]
    position = places_of(patterns, torch.device("cpu")).position
    whole = module.attend(packed.tokens, position, seen(patterns))[packed.scored]
    batch = timestep_batch(rollout, scored, states, mask_id=MASK, packed=packed)
    theirs = table(scored, [batch], [whole], context, algorithm, sampling)
    assert torch.equal(ours.isfinite(), scored.scored)
    assert (ours - theirs)[scored.scored].abs().max() < 1e-12
    if scored.is_sampled:  # a state of the sampler itself
        assert (ours - rollout.trajectory.logprobs[scored.rollout])[
            scored.scored
        ].abs().max() < 1e-6


@pytest.mark.parametrize("name", ENTRIES)
def test_every_estimator_updates_a_module_with_blocks_or_is_refused(name):
    context, reference = (
        module_context(Blocks(), mask_id=MASK, vocab_size=VOCABULARY, block_length=BLOCK)
        for _ in range(2)
    )
    algorithm = AlgorithmSettings(name=name, group_size=2)
    if name == "step_merge":
        algorithm = AlgorithmSettings(name=name, group_size=2, mc_samples=2)
    rollout = rollout_of(context, algorithm)
    losses = update_losses(rollout, algorithm, context=context, reference=reference)
    if name in ACROSS:
        with pytest.raises(ValueError, match=f"algorithm.name={name} scores tokens from a state"):
            next(losses)
        return
    for part in losses:
        part.loss.backward()
    grad = context.forward.module.head.weight.grad
    assert grad.isfinite().all() and grad.abs().max() > 0


def test_a_policy_of_other_blocks_is_refused():
    made, algorithm = {"mask_id": MASK, "vocab_size": VOCABULARY}, AlgorithmSettings(group_size=2)
    context = module_context(Blocks(), block_length=BLOCK, **made)
    rollout = rollout_of(context, algorithm)
    other = module_context(Blocks(), block_length=3, **made)
    with pytest.raises(ValueError, match="block_length=2 differs from model.block_length=3"):
        next(update_losses(rollout, algorithm, context=other))
    plain, with_kl = module_context(Blocks(), **made), replace(algorithm, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="the reference has block_length=None, and the policy"):
        next(update_losses(rollout, with_kl, context=context, reference=plain))
