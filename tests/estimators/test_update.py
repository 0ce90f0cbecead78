"""Updates of any torch module: gradients by hand, every estimator, a reference, and refusals."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from agrpo_megatron.config.settings.estimators import ENTRIES
from agrpo_megatron.diffusion import SamplingSettings, module_context, sample, timestep_batch
from agrpo_megatron.estimators import (
    AlgorithmSettings,
    DrawContext,
    drawn_steps,
    make_loss,
    make_rollout,
    rows_at,
    update_losses,
)

MASK, LENGTH = 7, 4
SAMPLING = SamplingSettings(completion_length=LENGTH, block_length=LENGTH, denoising_steps=LENGTH)
PROMPTS = [torch.tensor(ids) for ids in ([1], [1], [2, 3, 4], [2, 3, 4])]
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0])
PAIRS = AlgorithmSettings(group_size=2, mc_samples=2)


def bert(seed: int = 0) -> BertForMaskedLM:
    """Return a model in float64, so that a gradient by hand agrees closely."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=8, intermediate_size=16, initializer_range=0.5, **size)
    return BertForMaskedLM(config).double().eval()


def rollout_of(context, algorithm=PAIRS, **changes):
    sampling = replace(SAMPLING, **changes)
    trajectory = sample(PROMPTS, torch.arange(4), context=context, sampling=sampling)
    return make_rollout(trajectory, REWARDS, algorithm)


def gradient(module, losses):
    """Return the gradient of the sum of losses by the last layer, and the sum."""
    module.zero_grad()
    total = 0.0
    for part in losses:
        part.loss.backward()
        total += float(part.loss.detach())
    return module.cls.predictions.transform.dense.weight.grad.clone(), total


def test_the_full_trajectory_has_the_policy_gradient():
    """By hand: each token's log-prob in its own state times the advantage, over four live steps."""
    module = bert()
    context = module_context(module, mask_id=MASK, token_budget=9)
    rollout = rollout_of(context)
    algorithm = AlgorithmSettings(name="full_trajectory", group_size=2)
    losses = list(update_losses(rollout, algorithm, context=context))
    assert len(losses) > 3, "a small token budget makes several micro-batches"
    assert all(float(part.metrics["ratio_max_error"]) < 1e-6 for part in losses)
    ours, _ = gradient(module, losses)

    module.zero_grad()
    found, total = rollout.trajectory, 0.0
    gains = [0.5, -0.5, -0.375, 0.375]
    for row, prompt in enumerate(PROMPTS):
        for place in range(LENGTH):
            hidden = found.unmask_step[row] >= found.unmask_step[row, place]
            state = torch.cat([prompt, found.tokens[row].masked_fill(hidden, MASK)])
            logits = module(state[None]).logits[0, len(prompt) + place, :MASK]
            total = total - gains[row] * logits.log_softmax(-1)[found.tokens[row, place]]
    (total / LENGTH / len(PROMPTS)).backward()
    theirs = module.cls.predictions.transform.dense.weight.grad
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_the_parts_by_hand_make_the_same_loss():
    """Drawn steps, their states, their scores and the loss, as docs/library.md shows them."""
    module, algorithm = bert(), replace(PAIRS, allocation="equal")
    context = module_context(module, mask_id=MASK)
    rollout = rollout_of(context)
    ours, total = gradient(module, update_losses(rollout, algorithm, context=context))

    draws = drawn_steps(rollout.trajectory, DrawContext(algorithm, eos_id=None, seed=0))
    scored = rows_at(rollout.trajectory, draws)
    batch = timestep_batch(rollout, scored, torch.arange(len(draws.step)), mask_id=MASK)
    loss, _ = make_loss(context.vocab, SAMPLING, algorithm)(
        context.forward.score(batch.rows), batch
    )
    module.zero_grad()
    (loss / len(REWARDS)).backward()
    theirs = module.cls.predictions.transform.dense.weight.grad
    assert abs(float(loss.detach()) / len(REWARDS) - total) < 1e-9
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "block_just_grpo"])
def test_every_estimator_updates_a_module(name):
    module, changes = bert(), {}
    if name == "just_grpo":
        changes = {"unmasking": "leftmost"}
    context = module_context(module, mask_id=MASK, token_budget=20)
    reference = module_context(bert(), mask_id=MASK)
    algorithm = AlgorithmSettings(name=name, group_size=2)
    if name == "step_merge":
        algorithm = replace(algorithm, mc_samples=2)
    rollout = rollout_of(context, algorithm, **changes)
    losses = list(update_losses(rollout, algorithm, context=context, reference=reference))
    found, _ = gradient(module, losses)
    assert found.isfinite().all()
    assert found.abs().max() > 0


@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_the_kl_of_equal_policies_is_0_and_grows_with_their_distance(kl):
    module = bert()
    context = module_context(module, mask_id=MASK)
    algorithm = replace(PAIRS, kl_coefficient=0.1, kl=kl)
    rollout, sums = rollout_of(context), []
    for seed in (0, 1):
        reference = module_context(bert(seed), mask_id=MASK)
        losses = update_losses(rollout, algorithm, context=context, reference=reference)
        sums.append(sum(float(part.metrics["kl_sum"]) for part in losses))
    assert abs(sums[0]) < 1e-9 < 0.1 < sums[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mc_samples": "auto"}, "algorithm.mc_samples=auto needs `agrpo train`; give a number"),
        ({"rollout_correction": 2.0}, "algorithm.rollout_correction=2.0 needs `agrpo train`"),
        ({"kl_coefficient": 0.1}, "algorithm.kl_coefficient=0.1 needs the frozen policy; give"),
        ({"clip": "pro"}, "algorithm.clip=pro must be one of"),
        ({"name": "grpo"}, "algorithm.name=grpo"),
        ({"resample_rounds": 2}, "algorithm.resample_rounds=2 needs `agrpo train`"),
        ({"name": "block_just_grpo", "mc_samples": None}, "block_just_grpo .*use just_grpo"),
    ],
)
def test_settings_without_a_meaning_here_are_refused(changes, said):
    context = module_context(bert(), mask_id=MASK)
    with pytest.raises(ValueError, match=said):
        next(update_losses(rollout_of(context), replace(PAIRS, **changes), context=context))


def test_rewards_are_one_for_each_completion_in_whole_groups():
    context = module_context(bert(), mask_id=MASK)
    trajectory = rollout_of(context).trajectory
    with pytest.raises(ValueError, match=r"4 completions and rewards of shape \[3\]: give one"):
        make_rollout(trajectory, torch.zeros(3), PAIRS)
    with pytest.raises(ValueError, match="in groups of group_size=3"):
        make_rollout(trajectory, torch.zeros(4), replace(PAIRS, group_size=3))
