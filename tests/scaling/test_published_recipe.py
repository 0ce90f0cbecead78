"""The work of AGRPO's published recipe on LLaDA-8B under the cached policy, by counting."""

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.batches import row_lengths
from agrpo_megatron.diffusion.replays.rows import replayed_rows
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.table import scored_rows
from agrpo_megatron.scaling.flops import _cached_work
from agrpo_megatron.scaling.forecast.rollouts import whole_rollout
from agrpo_megatron.scaling.forecast.work import count_flops

# 256 tokens of prompt, 128 steps for 384 tokens in blocks of 12, 24 draws (probablyabot/agrpo).
RECIPE = [
    "model.num_layers=32",
    "model.hidden_size=4096",
    "model.ffn_hidden_size=12288",
    "model.num_attention_heads=32",
    "model.vocab_size=126464",
    "model.max_sequence_length=4096",
    "sampling.completion_length=384",
    "sampling.block_length=12",
    "sampling.denoising_steps=128",
    "algorithm.mc_samples=24",
    "algorithm.group_size=8",
    "algorithm.prompts_per_iteration=16",
]
CACHED = ["sampling.policy=cached", "algorithm.step_sampler=blocks"]
EXACT_TOKENS = 640 * (128 + 24)  # of a rollout and its update


def _work(overrides):
    """Return the packed tokens of a rollout and its update, and the FLOPs of both."""
    settings = load(Settings, None, [*RECIPE, *overrides])
    rollout = whole_rollout([256], settings.model, settings.sampling, group_size=8)
    rows = scored_rows(rollout, DrawContext(settings.algorithm, eos_id=None, seed=0))
    packed = replayed_rows(rows, rollout, settings.model, budget=settings.train.token_budget)
    if packed is None:
        sampled, updated = 8 * 128 * 640, int(row_lengths(rollout, rows).sum())
    else:
        work = _cached_work(rollout.trajectory, settings.model)
        sampled, updated = sum(tokens for tokens, _ in work), sum(row.length for row in packed)
    flops = count_flops(settings, [256] * 16, [])
    return (sampled + updated) / 8, flops.rollout + flops.update


def test_an_iteration_of_the_cached_policy_takes_over_three_and_a_half_times_fewer_tokens():
    exact, exact_flops = _work([])
    cached, cached_flops = _work(CACHED)
    assert exact == EXACT_TOKENS
    assert cached == 32 * (640 + 3 * 12) + 6 * (640 + 3 * 12)
    assert exact / cached > 3.5
    assert exact_flops / cached_flops > 3.5


def test_spread_draws_save_less_of_an_update():
    """Steps of many blocks need the context of each: nothing of an update is saved."""
    spread, _ = _work(["sampling.policy=cached"])
    together, _ = _work(CACHED)
    assert spread - 32 * (640 + 3 * 12) == pytest.approx(24 * 640, rel=0.02)
    assert spread > together


def test_larger_blocks_of_more_steps_save_more_of_a_rollout():
    """32 tokens in 32 steps: the figure of docs/cached.md."""
    sampling = ["sampling.block_length=32", "sampling.denoising_steps=384"]
    settings = load(Settings, None, [*RECIPE, *CACHED, *sampling])
    rollout = whole_rollout([256], settings.model, settings.sampling, group_size=2)
    ((tokens, _), _) = _cached_work(rollout.trajectory, settings.model)
    assert 384 * 640 / tokens == pytest.approx(12.5, abs=0.05)
