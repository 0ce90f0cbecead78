"""Greedy completions equal those of LLaDA's sampler, written down here from its description.

Full logits of the whole sequence at every step, confidence from the un-tempered softmax of all
ids (the mask token included), no early end, one row at a time.
"""

import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.types import PackedRows
from tests.diffusion.hashed import EOS, MASK, SIZE, HashedModel, prompts_of

torch.set_num_threads(1)


def llada_generate(model, prompt, *, length, block_length, steps):
    """Return the completion [length] of one prompt at temperature 0."""
    row = torch.cat([prompt, torch.full((length,), MASK)])
    start, blocks = len(prompt), length // block_length
    steps_per_block = steps // blocks
    for block in range(blocks):
        left = start + block * block_length
        right = left + block_length
        remaining = int((row[left:right] == MASK).sum())
        for step in range(steps_per_block):
            extra = 1 if step < remaining % steps_per_block else 0
            count = remaining // steps_per_block + extra
            everywhere = PackedRows(row, torch.tensor([0, len(row)]), torch.arange(len(row)))
            logits = model.logits(everywhere)[:, :SIZE]
            proposal = logits.argmax(-1)
            confidence = logits.softmax(-1)[torch.arange(len(row)), proposal]
            confidence[row != MASK] = float("-inf")
            confidence[right:] = float("-inf")
            chosen = confidence.topk(count).indices
            row[chosen] = proposal[chosen]
    return row[start:]


@pytest.mark.parametrize(
    "length, block_length, steps", [(16, 8, 8), (16, 8, 6), (12, 12, 12), (24, 4, 12), (10, 5, 2)]
)
def test_greedy_completions_equal_llada(length, block_length, steps):
    model, prompts = HashedModel(eos_bonus=1.0, forbidden_bonus=-4.0), prompts_of(8)
    sampling = SamplingSettings(
        completion_length=length,
        block_length=block_length,
        denoising_steps=steps,
        unmasking="low_confidence",
        temperature=0.0,
        confidence="untempered",
        early_end=False,
    )
    got = sample(
        prompts, torch.arange(8), context=model.context(forbid=False), sampling=sampling
    ).tokens
    for prompt, completion in zip(prompts, got, strict=True):
        expected = llada_generate(
            model, prompt, length=length, block_length=block_length, steps=steps
        )
        assert expected.tolist() == completion.tolist()


def test_a_drawn_mask_token_is_kept_as_a_token():
    """Published samplers may draw the mask token; a position that was fixed stays fixed."""
    model = HashedModel(forbidden_bonus=100.0)
    sampling = SamplingSettings(
        completion_length=6, block_length=3, denoising_steps=6, temperature=0.0
    )
    trajectory = sample(
        prompts_of(2), torch.arange(2), context=model.context(forbid=False), sampling=sampling
    )
    assert (trajectory.tokens == MASK).all() and trajectory.num_steps.tolist() == [6, 6]


def test_early_end_changes_only_what_follows_the_end():
    model, prompts = HashedModel(eos_bonus=3.0), prompts_of(20)
    options = {"completion_length": 12, "block_length": 2, "denoising_steps": 12}
    runs = [
        sample(
            prompts,
            torch.arange(20),
            context=model.context(),
            sampling=SamplingSettings(early_end=early_end, **options),
        )
        for early_end in (True, False)
    ]
    ran = runs[0].unmask_step < runs[0].num_steps[:, None]
    assert 0.2 < float(ran.double().mean()) < 0.95
    for field in ("tokens", "unmask_step", "logprobs", "entropies"):
        assert torch.equal(getattr(runs[0], field)[ran], getattr(runs[1], field)[ran])
    assert (runs[0].tokens[~ran] == EOS).all()
