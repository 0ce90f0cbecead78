"""The sampler records what it did, scores no more than it needs, and depends on nothing else."""

import functools
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.draw import LogitsForward
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.diffusion.schedule import transfer_schedule
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, rows_at
from agrpo_megatron.trajectories import tensors
from agrpo_megatron.types import Rollout
from tests.diffusion.batching import batches_of, rebuild_state
from tests.diffusion.hashed import (
    EOS,
    MASK,
    SAMPLINGS,
    SIZE,
    HashedModel,
    prompts_of,
    states_by_rollout,
)

torch.set_num_threads(1)
ROWS = 12


@functools.cache
def run(name, **context):
    """Return (model with its calls recorded, prompts, trajectory); treat them as read-only."""
    model, prompts = HashedModel(), prompts_of(ROWS)
    trajectory = sample(
        prompts,
        torch.arange(ROWS) + 500,
        context=model.context(**context),
        sampling=SAMPLINGS[name],
    )
    return model, prompts, trajectory


def schedule_of(sampling):
    blocks = sampling.completion_length // sampling.block_length
    return transfer_schedule(sampling.block_length, sampling.denoising_steps // blocks)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rebuilt_states_are_those_the_sampler_saw(name):
    model, prompts, trajectory = run(name)
    seen = states_by_rollout(model, prompts)
    assert [len(states) for states in seen] == trajectory.num_steps.tolist()
    for rollout, states in enumerate(seen):
        for step, (state, _) in enumerate(states):
            rebuilt = rebuild_state(trajectory, torch.tensor([rollout]), torch.tensor([step]), MASK)
            assert tuple(rebuilt[0].tolist()) == state


@pytest.mark.parametrize("name", SAMPLINGS)
def test_no_position_is_scored_that_is_not_needed(name):
    model, prompts, trajectory = run(name)
    sampling, schedule = SAMPLINGS[name], schedule_of(SAMPLINGS[name])
    exact = sampling.unmasking in ("random", "leftmost") and sampling.threshold is None
    for rollout, states in enumerate(states_by_rollout(model, prompts)):
        for step, (state, scored) in enumerate(states):
            fixed = (trajectory.unmask_step[rollout] == step).nonzero().squeeze(1).tolist()
            block = state.index(MASK) // sampling.block_length
            places = range(block * sampling.block_length, (block + 1) * sampling.block_length)
            masked = [j for j in places if state[j] == MASK]
            assert list(scored) == (fixed if exact else masked)
            assert set(fixed) <= set(masked) and fixed
            if sampling.threshold is None:
                assert len(fixed) == schedule[step % len(schedule)]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_neither_mask_token_nor_vocabulary_padding_is_drawn(name):
    _, _, trajectory = run(name)
    assert int(trajectory.tokens.max()) < min(SIZE, MASK)
    assert torch.isfinite(trajectory.logprobs).all() and float(trajectory.logprobs.max()) <= 0
    if trajectory.support_ids is not None:
        assert int(trajectory.support_ids.max()) < MASK


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_end_after_a_block_of_end_of_text_and_leave_the_batch(name):
    model, _, trajectory = run(name)
    sampling = SAMPLINGS[name]
    blocks = trajectory.tokens.view(ROWS, -1, sampling.block_length)
    ran = trajectory.unmask_step < trajectory.num_steps[:, None]
    ran_blocks = ran.view(blocks.shape).all(2).sum(1)
    empty = (blocks == EOS).all(2)
    first = torch.where(empty.any(1), empty.long().argmax(1) + 1, blocks.shape[1])
    whole = torch.full_like(first, blocks.shape[1])
    assert torch.equal(ran_blocks, first if sampling.early_end else whole)
    assert sampling.early_end == bool((ran_blocks < whole).any())
    assert (trajectory.tokens[~ran] == EOS).all()
    assert (trajectory.unmask_step == trajectory.num_steps[:, None])[~ran].all()
    assert (trajectory.logprobs[~ran] == 0).all() and (trajectory.entropies[~ran] == 0).all()
    assert (trajectory.spreads[~ran] == 0).all()
    assert sum(len(call) for call in model.calls) == int(trajectory.num_steps.sum())


def assert_same(one, other, rows):
    """Rows of `one` equal those of `other`; support rows may be padded to different widths."""
    for field in tensors(one).keys() - {"support_ids", "rollout_ids"}:
        assert torch.equal(getattr(one, field), getattr(other, field)[rows]), field
    if one.support_ids is not None:
        width = max(one.support_ids.shape[-1], other.support_ids.shape[-1])
        padded = [
            torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=-1)
            for ids in (one.support_ids, other.support_ids[rows])
        ]
        ran = one.unmask_step < one.num_steps[:, None]
        assert torch.equal(padded[0][ran], padded[1][ran])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_completions_depend_neither_on_the_batch_nor_on_the_token_budget(name):
    _, prompts, trajectory = run(name)
    _, _, one_by_one = run(name, token_budget=1)
    assert_same(one_by_one, trajectory, torch.arange(ROWS))
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:7]
    part = sample(
        [prompts[r] for r in rows],
        rows + 500,
        context=HashedModel().context(token_budget=10**6),
        sampling=SAMPLINGS[name],
    )
    assert_same(part, trajectory, rows)


def test_completions_depend_on_seed_and_rollout():
    sampling, prompt = SAMPLINGS["random, one token a step"], torch.tensor([100, 4])
    completions = [
        sample(
            [prompt] * 2,
            torch.tensor([500, 501]),
            context=HashedModel(eos_bonus=0.0).context(seed=seed),
            sampling=sampling,
        ).tokens
        for seed in (0, 0, 1)
    ]
    assert torch.equal(completions[0], completions[1])
    assert not torch.equal(completions[0], completions[2])
    assert not torch.equal(completions[0][0], completions[0][1])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_first_ratio_is_one(name):
    """Scoring every step again gives the log-probs and entropies that the sampler recorded."""
    model, _, trajectory = run(name)
    ones = torch.ones(ROWS)
    draws = all_steps(trajectory, DrawContext(AlgorithmSettings(), EOS, 0))
    rollout = Rollout(trajectory, ones, ones > 0, ones)
    batches = batches_of(rollout, rows_at(trajectory, draws), mask_id=MASK, token_budget=100)
    vocab = model.context().vocab
    trainer = HashedModel()
    for batch in batches:
        policy = policy_logits(
            trainer(batch.rows), vocab, temperature=trajectory.sampling.temperature
        )
        logprobs, _ = token_logprobs(
            policy, batch.targets, vocab=vocab, support_ids=batch.support_ids
        )
        assert float((logprobs - batch.old_logprobs).abs().max()) < 1e-6
        assert int(batch.rows.cu_seqlens[-1]) <= 100
    packed, rolled_out = [[row for call in m.calls for row in call] for m in (trainer, model)]
    assert sorted(tokens for tokens, _ in packed) == sorted(tokens for tokens, _ in rolled_out)
    ran = trajectory.unmask_step < trajectory.num_steps[:, None]
    assert sum(len(scored) for _, scored in packed) == int(ran.sum())


def test_schedule_gives_the_remainder_to_the_first_steps():
    assert transfer_schedule(8, 3) == [3, 3, 2]
    assert transfer_schedule(8, 8) == [1] * 8
    assert transfer_schedule(7, 1) == [7]


def test_leftmost_fixes_positions_from_left_to_right_in_each_block():
    """The schedule of a block of five in three steps is two, two and one."""
    _, _, trajectory = run("leftmost, remainder")
    ran = trajectory.unmask_step < trajectory.num_steps[:, None]
    expected = torch.tensor([0, 0, 1, 1, 2, 3, 3, 4, 4, 5]).expand(ROWS, -1)
    assert torch.equal(trajectory.unmask_step[ran], expected[ran]) and ran.all(1).any()


def test_leftmost_with_one_token_a_step_is_decoding_in_blocks_of_one():
    """One position is masked in a block of one, so every order decodes it from left to right."""
    left = replace(SAMPLINGS["leftmost, one token a step"], block_length=8, early_end=False)
    single = replace(left, unmasking="random", block_length=1)
    one, other = (
        sample(
            prompts_of(ROWS),
            torch.arange(ROWS),
            context=HashedModel().context(),
            sampling=sampling,
        )
        for sampling in (left, single)
    )
    assert_same(one, other, torch.arange(ROWS))
    assert torch.equal(one.unmask_step, torch.arange(8).expand(ROWS, -1))


@pytest.mark.parametrize("unmasking", ["low_confidence", "random", "leftmost"])
def test_threshold_fixes_all_sure_tokens_and_at_least_one(unmasking):
    """Greedy over known probabilities: 2 of 5 are sure, the others follow one by one."""
    sure = torch.tensor([0.5, 0.95, 0.6, 0.91, 0.7]).double()

    def score(rows):
        place = rows.scored % 6 - 1  # a prompt of one token, then the completion of five
        return torch.stack([sure[place], 1 - sure[place], torch.zeros(len(place))], 1).log()

    context = replace(HashedModel().context(), forward=LogitsForward(score), mask_id=2, eos_id=None)
    context = replace(context, vocab=replace(context.vocab, size=3, forbidden=(2,)))
    sampling = SamplingSettings(
        completion_length=5,
        block_length=5,
        denoising_steps=5,
        unmasking=unmasking,
        threshold=0.9,
        temperature=0.0,
    )
    steps = sample(
        [torch.tensor([1])], torch.tensor([0]), context=context, sampling=sampling
    ).unmask_step[0]
    if unmasking == "low_confidence":
        assert steps.tolist() == [3, 0, 2, 0, 1]
    elif unmasking == "leftmost":
        assert steps.tolist() == [0, 0, 1, 0, 2]
    else:
        assert (steps[[1, 3]] == 0).all() and sorted(steps[[0, 2, 4]].tolist())[-1] in (2, 3)


def test_no_prompts_give_an_empty_trajectory():
    name = "random, one token a step"
    trajectory = sample(
        [],
        torch.zeros(0, dtype=torch.int64),
        context=HashedModel().context(),
        sampling=SAMPLINGS[name],
    )
    assert trajectory.tokens.shape == (0, 8) and len(trajectory.num_steps) == 0


def test_no_draws_give_one_batch_without_weight():
    _, _, trajectory = run("random, one token a step")
    none = torch.zeros(0, dtype=torch.int64)
    draws = all_steps(trajectory, DrawContext(AlgorithmSettings(), EOS, 0))
    draws = replace(draws, rollout=none, step=none, weight=draws.weight[:0])
    rollout = Rollout(trajectory, torch.ones(ROWS), torch.ones(ROWS) > 0, torch.ones(ROWS))
    (batch,) = batches_of(rollout, rows_at(trajectory, draws), mask_id=MASK, token_budget=100)
    assert batch.rows.tokens.tolist() == [MASK]
    assert len(batch.rows.scored) == len(batch.targets) == len(batch.weights) == 0
