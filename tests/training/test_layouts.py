"""One seed, one outcome: completions, gradients and metrics under any layout and any budget."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.training.evaluation import evaluate
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.tiny import gradient, open_session, relative_error

# Truncated sampling has the most to go wrong: candidates are gathered over vocabulary shards.
SAMPLINGS = {
    "random": [],
    "top-k and top-p": [
        "sampling.unmasking=low_confidence",
        "sampling.top_k=20",
        "sampling.top_p=0.9",
        "sampling.temperature=0.9",
    ],
    "ragged": [  # rows end at different steps, and leave the batch
        "sampling.block_length=1",
        "sampling.denoising_steps=8",
        "model.eos_token_id=39",
        "algorithm.kl_coefficient=0",
    ],
}
# name: ranks, overrides, bound on the gradient relative to one rank with the default budget
LAYOUTS = {
    "one row at a time": (1, ["train.token_budget=1"], 1e-6),
    "one micro-batch": (1, ["train.token_budget=100000"], 1e-6),
    "dp2": (2, [], 1e-6),
    "tp2": (2, ["parallel.tensor=2"], 1e-5),
    "tp2 with sequence parallelism": (2, ["parallel.tensor=2", "parallel.sequence=true"], 1e-5),
}
SUMMED = ("reward/mean", "reward/std", "accuracy", "reward/hash", "zero_advantage_fraction")


def _run(overrides):
    """Return, per sampling, this rank's rollouts, the gradient, a step's metrics, an evaluation."""
    results = {}
    for name, sampling in SAMPLINGS.items():
        session, engine = open_session(*sampling, *overrides, world_size=dist.get_world_size())
        rollout, metrics = collect_rollout(session, engine, 0)
        update, grads = gradient(session, engine, rollout, is_applied=True)
        again, _ = collect_rollout(session, engine, 1)
        evaluation = evaluate(session, engine.network, iteration=1, stage="after")
        first = rollout.trajectory
        results[name] = {
            "tokens": [first.tokens, again.trajectory.tokens],
            "unmask_step": [first.unmask_step, again.trajectory.unmask_step],
            "support_ids": first.support_ids,
            "gradient": grads,
            "metrics": {**metrics, **update},
            "evaluation": evaluation,
            "num_steps": first.num_steps,
        }
    return results


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _run, [])[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def other(request):
    """Return (name, results by rank, the gradient's bound)."""
    ranks, overrides, bound = LAYOUTS[request.param]
    return request.param, run_ranks(ranks, _run, overrides), bound


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_completions_are_token_identical(alone, other, sampling):
    """Also those of the second iteration, sampled by weights that the first one updated."""
    name, results, _ = other
    expected = alone[sampling]
    for key in ("tokens", "unmask_step"):
        for number, whole in enumerate(expected[key]):
            parts = [result[sampling][key][number] for result in results]
            if name == "dp2":
                assert [len(part) for part in parts] == [4, 8]
                parts = [torch.cat(parts)]
            assert all(torch.equal(part, whole) for part in parts)
    if expected["support_ids"] is not None and name != "dp2":
        for result in results:
            assert torch.equal(result[sampling]["support_ids"], expected["support_ids"])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_gradient_is_the_same(alone, other, sampling):
    _, results, bound = other
    for result in results:
        error = relative_error(result[sampling]["gradient"], alone[sampling]["gradient"])
        assert error < bound


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_metrics_are_of_all_ranks(alone, other, sampling):
    _, results, _ = other
    expected = alone[sampling]
    for result in results:
        ours = result[sampling]["metrics"]
        for key in SUMMED:
            assert ours[key] == pytest.approx(expected["metrics"][key], rel=1e-9), key
        for key in ("loss", "grad_norm", "ratio/mean", "entropy", "rows", "live_steps/mean"):
            assert ours[key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-6), key
        assert ours["ratio/max_error"] < 1e-5
        for key in ("accuracy", "reward/mean", "problems"):
            assert result[sampling]["evaluation"][key] == expected["evaluation"][key]


def test_the_ragged_case_is_ragged(alone):
    assert len(set(alone["ragged"]["num_steps"].tolist())) > 1


def _one_problem_for_two_ranks():
    """One rank has no problem at all, in training and in evaluation."""
    few = ["algorithm.prompts_per_iteration=1", "task.eval_problems=1", "sampling.top_k=20"]
    batch = ["algorithm.step_sampler=batch", "algorithm.proposal=entropy"]
    session, engine = open_session(*few, *batch, world_size=dist.get_world_size())
    rollout, metrics = collect_rollout(session, engine, 0)
    update, _ = update_policy(session, engine, rollout, None, 0)
    evaluation = evaluate(session, engine.network, iteration=1, stage="after")
    keys = ("reward/hash", "rows", "loss", "grad_norm")
    numbers = [{**metrics, **update}[key] for key in keys]
    return len(rollout.rewards), numbers, evaluation["reward/mean"]


def test_a_rank_without_problems_waits_for_the_others():
    ((_, numbers, evaluation),) = run_ranks(1, _one_problem_for_two_ranks)
    results = run_ranks(2, _one_problem_for_two_ranks)
    assert sorted(count for count, _, _ in results) == [0, 4]
    for _, ours, reward in results:
        assert ours == pytest.approx(numbers, rel=1e-5, abs=1e-6)
        assert reward == evaluation
