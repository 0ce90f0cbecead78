"""Dream's schedule and its Bernoulli unmasking; the shift that its predictions need."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.rules import validate_sampling
from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion import schedule
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.diffusion.schedule import (
    bernoulli_plan,
    dream_chances,
    dream_schedule,
    step_counts,
)
from tests.diffusion.hashed import HashedModel, prompts_of

BERNOULLI = SamplingSettings(
    completion_length=8,
    block_length=8,
    denoising_steps=6,
    schedule="dream",
    unmasking="bernoulli",
    early_end=False,
)


def test_the_schedule_is_the_published_one():
    """Tokens of each row and step in the public sampler's own record (24 tokens; 20 of 32)."""
    assert dream_schedule(24, 8) == [2, 3, 3, 3, 3, 3, 3, 4]
    assert dream_schedule(24, 24) == [1] * 22 + [2]
    assert dream_schedule(20, 32) == [1] * 18 + [2]


def test_a_schedule_is_computed_once(monkeypatch):
    """It takes milliseconds, and every rollout asks for it."""
    calls = []
    monkeypatch.setattr(schedule, "dream_chances", lambda n: calls.append(n) or dream_chances(n))
    settings = replace(BERNOULLI, denoising_steps=7)
    first, second = step_counts(settings), step_counts(replace(settings))
    assert calls == [7] and first == second == tuple(dream_schedule(8, 7))


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("steps", [1, 5, 100])
def test_every_token_is_fixed_by_the_schedule(length, steps):
    counts = dream_schedule(length, steps)
    assert sum(counts) == length and min(counts) > 0 and len(counts) <= steps


def test_a_plan_fixes_each_token_at_its_first_success_and_counts_no_empty_step():
    never = 0.9999
    uniforms = torch.full((4, 1, 3), never)
    uniforms[1, 0, 0] = 0.0  # the first token at the second step, the second at the third
    uniforms[2, 0, 1] = 0.0
    assert bernoulli_plan(uniforms).tolist() == [[0, 1, 2]]
    assert dream_chances(4)[-1] == 1


def test_bernoulli_rows_take_no_empty_step_and_depend_on_nothing_but_their_noise():
    model, prompts = HashedModel(), prompts_of(5)
    whole = sample(prompts, torch.arange(5), context=model.context(), sampling=BERNOULLI)
    for row in range(5):
        steps = whole.unmask_step[row]
        assert sorted(set(steps.tolist())) == list(range(int(whole.num_steps[row])))
    assert len(set(whole.num_steps.tolist())) > 1
    alone = sample(
        prompts[2:3], torch.tensor([2]), context=HashedModel().context(), sampling=BERNOULLI
    )
    assert torch.equal(alone.tokens[0], whole.tokens[2])


def test_leftmost_takes_as_many_tokens_a_step_as_dreams_time_gives():
    """Six steps of eight tokens; the shift does not change which positions are fixed."""
    sampling = replace(BERNOULLI, unmasking="leftmost")
    counts = torch.tensor(dream_schedule(8, 6))
    context = replace(HashedModel().context(), model=ModelSettings(shift=True))
    drawn = sample(prompts_of(3), torch.arange(3), context=context, sampling=sampling)
    expected = torch.arange(len(counts)).repeat_interleave(counts)
    assert len(set(counts.tolist())) > 1
    assert torch.equal(drawn.unmask_step, expected.expand(3, -1))


def test_a_shifted_token_is_predicted_from_the_state_before_it():
    canvas = torch.arange(8).view(2, 4)
    scored = torch.tensor([[True, False, True, False], [False, True, False, True]])
    rows = pack(canvas, torch.tensor([4, 4]), scored, shift=True)
    assert rows.scored.tolist() == [0, 1, 4, 6], "a row's first token has none before it"
    assert pack(canvas, torch.tensor([4, 4]), scored).scored.tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "dream", "block_length": 4}, "decodes the completion as one block"),
        ({"unmasking": "bernoulli"}, "takes its rates from Dream's time"),
        ({"unmasking": "margin", "threshold": 0.9}, "is a probability of tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said):
    values = {"completion_length": 8, "block_length": 8, "denoising_steps": 8, **changes}
    with pytest.raises(ValueError, match=said):
        validate_sampling(SamplingSettings(**values), "sampling")
