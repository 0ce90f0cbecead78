"""Ours and the reference draw the same tokens and have the same gradient; a difference is found."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agrpo_megatron.benchmark import equality, ours, run, work
from agrpo_megatron.benchmark.equality import Unequal
from agrpo_megatron.benchmark.plan import make_plan
from agrpo_megatron.benchmark.reference.model import Reference
from agrpo_megatron.benchmark.reference.rollout import rollout
from agrpo_megatron.benchmark.report import record
from agrpo_megatron.megatron.parallel import stop_ranks
from tests.benchmark.test_plan import GIVEN
from tests.ranks import run_ranks

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 90, "batch": 5}
SHAPE |= {"completion_length": 24, "block_length": 8, "denoising_steps": 6, "reference": True}
# Large weights, so that no distribution is near uniform.
OVERRIDES = ["model.init_std=0.3", "model.num_query_groups=2"]
CASES = {
    "random": {},
    "cut": {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
    "top-p alone": {"top_p": 0.8},
    "low confidence": {"unmasking": "low_confidence"},
    "entropy": {"unmasking": "entropy", "top_k": 7},
    "leftmost, tempered": {"unmasking": "leftmost", "temperature": 1.3},
    "zero advantages": {"zero_advantage": 0.4},
    "rows that end early": {"vocab": 6, "block_length": 1, "denoising_steps": 24},
}


def plan_of(**options):
    near = ["model.init_std=0.05"] if options.get("vocab") == 6 else []
    return make_plan("iteration", {**GIVEN, **SHAPE, **options}, [*OVERRIDES, *near])


def _measured(cases):
    """Return by case what one measurement found, without its memory, which takes seconds."""
    run.peak_bytes = lambda function, device: 1
    return {name: run.measure(plan_of(**options), lambda _: None) for name, options in cases}


@pytest.fixture(scope="module")
def found():
    return run_ranks(1, _measured, list(CASES.items()))[0]


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_gradients_are_equal(found, name):
    equal = found[name].equality
    assert equal.tokens == 5 * 24
    assert 0 < equal.logprob_error < 1e-5
    assert 0 < equal.gradient_error < 1e-5


def test_in_bfloat16_gradients_are_equal_within_its_rounding():
    """Tokens are compared in float32."""
    case = run_ranks(1, _measured, [("bf16", {"precision": "bf16", "top_k": 20})])[0]["bf16"]
    assert case.equality.tokens == 5 * 24 and case.equality.gradient_error < 1e-5
    assert 1e-4 < case.equality.bf16_error < 0.1


def test_work_is_that_of_the_settings(found):
    """Six steps of five rows of 32 tokens, then two states of each; the reference's head on all."""
    mine, theirs = found["random"].ours.counted, found["random"].reference.counted
    assert (mine.token_forwards, theirs.token_forwards) == (40 * 32, 40 * 32)
    assert (theirs.forwards, theirs.scored_rows) == (6 + 2, 40 * 32)
    assert mine.forwards == 6 + 2
    assert mine.scored_rows == 5 * 24 + 5 * 2 * 4
    assert mine.flops < theirs.flops


def test_updates_leave_out_rollouts_without_an_advantage(found):
    """Two of five have none; the reference scores their states, too."""
    mine, theirs = found["zero advantages"].ours.counted, found["zero advantages"].reference.counted
    assert (mine.token_forwards, theirs.token_forwards) == ((30 + 3 * 2) * 32, (30 + 5 * 2) * 32)


def test_rows_end_early_in_both(found):
    case = found["rows that end early"]
    assert case.ours.counted.token_forwards < (24 + 2) * 5 * 32
    assert case.reference.counted.forwards < 24 + 2


def _body():
    run.peak_bytes = lambda function, device: 1
    options = {**GIVEN, **SHAPE, "reference": False, "ceiling": True}
    found = run.measure(make_plan("rollout", options, OVERRIDES), lambda _: None)
    return found.body, record(make_plan("rollout", options, OVERRIDES), found)["body"]


def test_the_layers_of_a_rollout_are_compared_with_their_products():
    found, recorded = run_ranks(1, _body)[0]
    assert 0 < found.share == found.flops_per_second / found.products == recorded["share"]


def _counted():
    """Return our counts of a rollout and of an update, and torch's."""
    mine = ours.open_ours(plan_of(batch=4))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as sampling:
            trajectory, forward = ours.sample(mine)
        scored = ours.rewarded(mine, trajectory)
        with FlopCounterMode(display=False) as updating:
            part = ours.update(mine, scored)
    rollouts = work.rollout_work(trajectory, forward, mine.settings).flops
    stop_ranks()
    counts = work.update_work(part).flops, updating.get_total_flops()
    return [(rollouts, sampling.get_total_flops()), counts]


def test_our_flops_are_those_that_torch_counts():
    for ours_, torchs in run_ranks(1, _counted)[0]:
        assert ours_ == pytest.approx(torchs, rel=0.02)


def _differences():
    """Return what is said of a changed token, of changed weights, and of a changed log-prob."""
    mine = ours.open_ours(plan_of(top_k=20))
    trajectory, _ = ours.sample(mine)
    scored, said = ours.rewarded(mine, trajectory), []
    reference = Reference(mine.settings.model, ours.weights(mine))
    noise, sampling = equality.counted_noise(mine), mine.settings.sampling
    same = rollout(reference, mine.prompts, sampling, noise)
    other = same.tokens.clone()
    other[3, 2] += 1
    own = equality.own_records(trajectory, mine.prompts, vocab=90)
    for changed in (
        replace(same, tokens=other),
        replace(same, logprobs=same.logprobs + 2e-4),
        replace(same, support=~own.support),
    ):
        with pytest.raises(Unequal) as caught:
            equality.same_rollouts(trajectory, changed)
        said.append(str(caught.value))
    weights = {name: value.requires_grad_() for name, value in reference.weights.items()}
    name = "model.transformer.blocks.1.ff_norm.weight"
    with torch.no_grad():
        weights[name][0] *= 1.01
    with pytest.raises(Unequal) as caught:
        equality.same_gradient(mine, scored, Reference(reference.model, weights), own)
    stop_ranks()
    return [*said, str(caught.value)]


def test_a_difference_is_found():
    token, logprob, support, gradient = run_ranks(1, _differences)[0]
    assert token == "1 of 120 tokens or their steps differ, first at rollout 3, position 2"
    assert logprob == "log-probs or entropies differ by 0.0002 nats"
    assert "candidates of top-k and top-p differ; if they are few" in support
    assert gradient.startswith("the gradients of model.transformer.")
