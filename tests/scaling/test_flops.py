"""FLOPs of completions equal what torch counts in the operators that ran."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.megatron.layers import scored as scored_module
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.scaling.flops import Work, completion_flops, forward_cost
from tests.ranks import run_ranks
from tests.training.tiny import open_session

PROMPTS = 24
DREAM = {"schedule": "dream", "block_length": 8}
SAMPLERS = {
    "random": {"unmasking": "random"},
    "low confidence": {"unmasking": "low_confidence"},
    "entropy": {"unmasking": "entropy", "denoising_steps": 2},
    "threshold": {"unmasking": "low_confidence", "threshold": 0.03, "denoising_steps": 8},
    "random with threshold": {"unmasking": "random", "threshold": 0.03, "denoising_steps": 8},
    "leftmost": {"unmasking": "leftmost", "denoising_steps": 8},
    "leftmost with threshold": {"unmasking": "leftmost", "threshold": 0.04, "denoising_steps": 8},
    "Dream": {"unmasking": "entropy", **DREAM},
    "Dream's own order": {"unmasking": "bernoulli", "denoising_steps": 6, **DREAM},
    "rows that end early": {"unmasking": "random", "block_length": 1, "denoising_steps": 8},
    "rows that end early, all scored": {
        "unmasking": "margin",
        "block_length": 1,
        "denoising_steps": 8,
    },
}

ENDS_EARLY = [name for name in SAMPLERS if "threshold" in name]
ENDS_EARLY += ["Dream's own order", "rows that end early"]


def _count(samplers, *overrides):
    """Return by sampler: our count of each completion, torch's of all, and the steps that ran."""
    found = {}
    likeliest = 0
    scored_module.LEAST_ROWS, scored_module.QUERY_MULTIPLE = 0, 1  # no row is filled up
    session, engine = open_session("train.token_budget=200", *overrides)
    prompts = [torch.arange(3, 7 + row % 5) for row in range(PROMPTS)]
    for name, changes in samplers.items():
        sampling = replace(session.run.settings.sampling, **changes)
        model = replace(session.run.settings.model, shift="schedule" in changes)
        if changes.get("block_length") == 1:  # the likeliest token ends the text
            model = replace(model, eos_token_id=likeliest)
        inner = replace(session.run, settings=replace(session.run.settings, model=model))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trajectory, _ = sample_prompts(
                inner, engine.network, prompts, torch.arange(PROMPTS), sampling=sampling
            )
        likeliest = int(trajectory.tokens.flatten().mode().values)
        counted = counter.get_flop_counts()["Global"]
        by_operator = {str(operator): flops for operator, flops in counted.items()}
        ours = completion_flops(trajectory, inner.settings)
        found[name] = ours, by_operator, trajectory.num_steps.tolist()
    return found


@pytest.fixture(scope="module")
def counts():
    return run_ranks(1, _count, SAMPLERS)[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_flop_of_a_sampler_is_counted(counts, name):
    """Matrices and head are products of matrices, attention is batched ones."""
    ours, by_operator, _ = counts[name]
    assert set(by_operator) == {"aten.mm", "aten.bmm"} and min(by_operator.values()) > 0
    assert sum(ours) == sum(by_operator.values())


def test_every_flop_of_heads_of_their_own_width_is_counted(counts):
    """Heads of 6 in place of 4, in a residual stream of 16 for four of them."""
    samplers = {"random": SAMPLERS["random"]}
    ours, by_operator, _ = run_ranks(1, _count, samplers, "model.head_dim=6")[0]["random"]
    assert sum(ours) == sum(by_operator.values()) > sum(counts["random"][0])


EXPERTS = ["model.family=llada_moe", "model.moe.experts=4", "model.moe.ffn_hidden_size=24"]
SHARED = ["model.moe.shared_ffn_hidden_size=8", "model.moe.dense_layers=1", "model.moe.topk=3"]
SHARED += ["model.moe.score=sigmoid", "model.moe.expert_bias=true"]


@pytest.mark.parametrize("overrides", [EXPERTS, [*EXPERTS, *SHARED]], ids=["all", "all kinds"])
def test_every_flop_of_routed_tokens_is_counted(counts, overrides):
    """Two or three experts of each token; a first layer without, and an expert for all tokens."""
    samplers = {"random": SAMPLERS["random"]}
    ours, by_operator, _ = run_ranks(1, _count, samplers, *overrides)[0]["random"]
    assert sum(ours) == sum(by_operator.values()) > sum(counts["random"][0])


def test_the_samplers_do_different_work(counts):
    """Rows that end early, and blocks that a threshold ends early, or the test above is hollow."""
    steps = {name: ran for name, (_, _, ran) in counts.items()}
    assert set(steps["random"]) == {4}
    for name in ENDS_EARLY:
        assert len(set(steps[name])) > 1
    assert len({sum(ours) for ours, _, _ in counts.values()}) >= len(SAMPLERS) - 1


def test_a_row_of_llada_8b():
    """4096 wide, 32 layers, 12288 in SwiGLU: 6.98 billion weights in matrices, and the head."""
    model = ModelSettings(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        vocab_size=126464,
    )
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    assert weights == 6_979_321_856
    cost, end = forward_cost(model), 2 * 4096**2 + 3 * 4096 * 12288
    assert cost.of(Work(1, 1, 1, 1, 1)) == 2 * (weights + 4096 * 126464) + 32 * 4 * 4096
    assert cost.of(Work(512, 512**2)) == 512 * 2 * (weights - end) + 512**2 * 31 * 4 * 4096
