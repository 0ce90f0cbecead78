"""State samplers: what they hide, the weights of the evidence lower bound, counted noise."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.family import weighed
from agrpo_megatron.estimators.masks import STATES, draw_states
from agrpo_megatron.estimators.table import scored_rows
from agrpo_megatron.types import Rollout, Trajectory

torch.set_num_threads(1)
LENGTH, BLOCK, EOS, ROLLOUTS = 12, 4, 0, 400
# Estimates of the evidence lower bound that have no bias, and how many masks of a rollout they
# need. `quadrature` is exact for what a polynomial of its degree can be.
UNBIASED = {"random": 1, "coupled": 1, "counts": 3, "random_count": 2, "full": 1}


def make_rollout(rollouts=ROLLOUTS, ends=12):
    """Return completions whose first end-of-text stands at `ends`, if that is within them."""
    tokens = torch.randint(1, 9, (rollouts, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, ends:] = EOS
    zeros = torch.zeros(rollouts, LENGTH)
    trajectory = Trajectory(
        prompts=tuple(torch.arange(1 + row % 5) for row in range(rollouts)),
        tokens=tokens,
        unmask_step=torch.arange(LENGTH).expand(rollouts, -1),
        logprobs=zeros,
        entropies=zeros,
        spreads=zeros,
        support_ids=None,
        num_steps=torch.full((rollouts,), LENGTH),
        rollout_ids=torch.arange(rollouts),
        sampling=SamplingSettings(
            completion_length=LENGTH, block_length=BLOCK, denoising_steps=LENGTH
        ),
    )
    ones = torch.ones(rollouts)
    return Rollout(trajectory, ones, ones > 0, ones)


def make_context(states, *, seed=0, **more):
    name = {"full": "diffu_grpo", "blocks": "spg"}.get(states, "unigrpo")
    settings = {"states": states, "tail": "first", "mask_low": 0.0, "mask_high": 1.0, **more}
    own = AlgorithmSettings(name=name).filled
    kept = {key: value for key, value in settings.items() if getattr(own, key) is not None}
    return DrawContext(AlgorithmSettings(name=name, **kept), EOS, seed)


@pytest.mark.parametrize("states", UNBIASED)
def test_the_weights_integrate_the_evidence_lower_bound(states):
    """For log-probs that do not depend on the state, the bound is their sum: 1 + ... + 12."""
    rollout = make_rollout(20000)
    found = draw_states(rollout, make_context(states, mc_samples=UNBIASED[states]))
    values = found.hidden * torch.arange(1.0, LENGTH + 1)
    sums = torch.zeros(20000, dtype=torch.float64)
    sums.index_add_(0, found.rollout, values.sum(1) * found.likelihood)
    spread = float(sums.std()) / 20000**0.5
    assert float(sums.mean()) == pytest.approx(78.0, abs=max(1e-9, 5 * min(spread, 2.0)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_quadrature_integrates_a_polynomial_of_the_masking_rate(count):
    """Its weights sum to one, so that a bound which is linear in the rate comes out right."""
    found = draw_states(make_rollout(), make_context("quadrature", mc_samples=count))
    share = torch.zeros(ROLLOUTS, dtype=torch.float64)
    rate = found.hidden.double().mean(1)
    share.index_add_(0, found.rollout, found.likelihood * rate)
    assert len(found.rollout) == count * ROLLOUTS
    assert torch.allclose(share, torch.ones_like(share), atol=0.15)  # counts are rounded down


@pytest.mark.parametrize("states", STATES)
def test_a_mask_follows_from_seed_rollout_and_number_alone(states):
    rollout, context = make_rollout(60), make_context(states, prompt_mask=0.5)
    whole = draw_states(rollout, context)
    again = draw_states(rollout, context)
    other = draw_states(rollout, replace(context, seed=1))
    assert torch.equal(whole.hidden, again.hidden)
    assert states == "full" or not torch.equal(whole.hidden, other.hidden)
    assert whole.hidden_prompt is not None
    for ours, theirs in zip(whole.hidden_prompt, again.hidden_prompt or (), strict=True):
        assert torch.equal(ours, theirs)
    share = torch.cat(whole.hidden_prompt).double().mean()
    assert float(share) == pytest.approx(0.5, abs=0.15)  # of at least 180 tokens


def test_a_pair_hides_each_counted_token_once():
    rows = scored_rows(make_rollout(ends=7), make_context("coupled", mc_samples=1))
    times = torch.zeros(ROLLOUTS, LENGTH).index_add(0, rows.rollout, rows.scored.float())
    assert (times[:, :8] == 1).all() and (times[:, 8:] == 0).all()  # seven, and the first end
    assert float((rows.weight * rows.scored).sum()) == pytest.approx(ROLLOUTS)


def test_counts_are_spread_evenly_over_the_masks_of_a_rollout():
    found = draw_states(make_rollout(), make_context("counts", mc_samples=LENGTH))
    counts = found.hidden.sum(1).view(LENGTH, ROLLOUTS).sort(0).values
    assert torch.equal(counts, torch.arange(1, LENGTH + 1)[:, None].expand(-1, ROLLOUTS))


def test_blocks_hide_later_tokens_and_differ_between_masks():
    found = draw_states(make_rollout(), make_context("blocks", mc_samples=3, prompt_mask=0.0))
    first = found.hidden.long().argmax(1) // BLOCK
    assert torch.equal(first.view(3, -1).sort(0).values, torch.arange(3)[:, None].expand(-1, 400))
    for row in range(len(first)):
        assert found.hidden[row, (int(first[row]) + 1) * BLOCK :].all()
        assert not found.hidden[row, : int(first[row]) * BLOCK].any()


def test_rows_that_hide_no_counted_token_are_left_out():
    rollout, context = make_rollout(ends=0), make_context("random", tail="no_ends", mc_samples=1)
    rows = weighed(draw_states(rollout, context), rollout, context)
    assert len(rows.rollout) == 0 and rows.weight.shape == (0, LENGTH)
