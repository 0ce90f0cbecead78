"""What drawn steps cost on stored trajectories, with the gradient of every weight."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, live_of, rows_at
from agrpo_megatron.types import Rollout
from tests.diffusion.batching import batches_of
from tools.draw_variance import WAYS, group_variances, match, ratios
from tools.variance import PROPOSALS, variance_of
from tools.variance_cases import (
    below,
    sampled_case,
    stored_cases,
    stored_model,
    stored_trajectory,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent.parent
STORED = ROOT / "tests" / "fixtures" / "llada_tiny" / "golden.safetensors"


@pytest.fixture(scope="module")
def cases():
    return list(stored_cases(STORED))


@pytest.mark.parametrize("enumerate_short", [False, True])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_default_is_never_worse_than_the_published_sampler(cases, proposal, enumerate_short):
    default = AlgorithmSettings().step_sampler
    for case in cases:
        for count in range(2, 17):
            options = {"mix": 0.1, "mc_samples": count, "enumerate_short": enumerate_short}
            ours = variance_of(case, proposal, step_sampler=default, **options)
            published = variance_of(case, proposal, step_sampler="batch", **options)
            assert ours <= published * (1 + 1e-9) + 1e-18


@pytest.mark.parametrize("count", [4, 8])
def test_defaults_as_a_whole_beat_the_published_choice(cases, count):
    """Sampler, proposal, mix and enumeration together; then as many draws, split by advantage."""
    chosen = AlgorithmSettings()
    for case in cases:
        ours, by_advantage = (
            variance_of(
                case,
                chosen.proposal,
                mix=chosen.uniform_mix,
                step_sampler=chosen.step_sampler,
                mc_samples=count,
                allocation=allocation,
            )
            for allocation in ("equal", "advantage")
        )
        published = variance_of(
            case,
            "entropy, mix 0",
            mix=0.0,
            step_sampler="batch",
            mc_samples=count,
            enumerate_short=False,
        )
        assert ours < 0.7 * published
        assert by_advantage < 0.65 * published and by_advantage < ours


def test_contributions_add_up_to_the_full_trajectory_gradient(cases):
    """Their span was rotated, so lengths are compared: with the golden file's own machinery."""
    model = stored_model(STORED.parent / "hf")
    weights = {name: weight.requires_grad_() for name, weight in model.weights.items()}
    stored = below(load_file(STORED), "agrpo.1.")
    trajectory = stored_trajectory(stored, {"temperature": 0.6})
    gains = stored["advantages"].double()
    draws = all_steps(trajectory, DrawContext(AlgorithmSettings(), 158, 0))
    rollout = Rollout(trajectory, gains, gains > 0, gains)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches_of(rollout, rows_at(trajectory, draws), mask_id=159, token_budget=10**6):
        logits = policy_logits(model.score(batch.rows), model.vocab, temperature=0.6)
        logprobs, _ = token_logprobs(
            logits, batch.targets, vocab=model.vocab, support_ids=batch.support_ids
        )
        total = total + (logprobs * batch.advantages * batch.weights).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(weights.values()))])
    case = cases[1]
    live, _ = live_of(trajectory, DrawContext(AlgorithmSettings(), 158, 0))
    got = (case.contributions.sum(1) / live[:, None]).sum(0)
    assert float(got.norm()) == pytest.approx(float(expected.norm()), rel=1e-9)


def test_sampled_rollouts_gain_as_well():
    case = sampled_case("random", 0)
    assert case.rollout.trajectory.num_steps.tolist() == [16] * 16
    options = {"mix": 0.1, "mc_samples": 8, "enumerate_short": True}
    variance = {
        sampler: variance_of(case, "uniform", step_sampler=sampler, **options)
        for sampler in ("independent", "batch", "stratified", "systematic")
    }
    assert variance["systematic"] < variance["batch"] < variance["independent"]
    assert variance["stratified"] < variance["batch"]


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "variance.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        check=False,
    )


def test_tool_prints_a_table_of_stored_trajectories():
    result = run_tool("--trajectories", str(STORED), "--draws", "8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("systematic") == 12 and "golden.safetensors" in result.stdout


def test_tool_names_a_missing_file():
    result = run_tool("--trajectories", "nowhere.safetensors")
    assert result.returncode != 0
    assert "nowhere.safetensors: no such file" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("way", WAYS)
def test_the_variances_of_groups_add_up(way):
    case = sampled_case("random", 0)
    drawing = {**WAYS[way], "mc_samples": 4}
    found = group_variances(case, AlgorithmSettings(group_size=case.group_size, **drawing))
    published = way == "published"
    whole = variance_of(
        case,
        "entropy, mix 0" if published else AlgorithmSettings().proposal,
        mix=AlgorithmSettings().uniform_mix,
        mc_samples=4,
        allocation="advantage" if way == "by advantage" else "equal",
        enumerate_short=not published,
        step_sampler="batch" if published else AlgorithmSettings().step_sampler,
    )
    assert len(found) == 2 and float(found.sum()) == pytest.approx(whole)


def test_a_ratio_lies_in_its_interval():
    found = ratios(sampled_case("random", 0), [4])
    assert found["published"][4] == (1.0, 1.0, 1.0)
    assert (
        found["by advantage"][4].low
        <= found["by advantage"][4].value
        <= found["by advantage"][4].high
    )


@pytest.mark.parametrize("way", ["equal draws", "by advantage"])
def test_fewer_draws_are_as_precise_as_the_published_ones(way):
    """One draw less would not be. Only rollouts with an advantage are scored."""
    case = sampled_case("random", 0)
    found = match(case, way, 8)
    assert found is not None and 1 < found.draws < 8
    variances = {}
    for draws in (found.draws - 1, found.draws):
        algorithm = AlgorithmSettings(mc_samples=draws, group_size=case.group_size, **WAYS[way])
        variances[draws] = float(group_variances(case, algorithm).sum())
    published = AlgorithmSettings(mc_samples=8, group_size=case.group_size, **WAYS["published"])
    limit = float(group_variances(case, published).sum())
    assert variances[found.draws] <= limit < variances[found.draws - 1]
    share = float((case.rollout.advantages != 0).double().mean())
    assert found.states == pytest.approx(8 / (found.draws * share), rel=0.1)
