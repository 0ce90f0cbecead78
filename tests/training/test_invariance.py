"""The gradient of an update: the same for any budget, order of rows and number of data ranks."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.evaluation.evaluate import evaluate
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.trajectories import select
from agrpo_megatron.types import Rollout
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
    "dp4, another budget": (4, ["train.token_budget=40"], 1e-6),
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
    _, results, _ = other
    expected = alone[sampling]
    for result in results:
        for key in ("tokens", "unmask_step"):
            pairs = zip(result[sampling][key], expected[key], strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        if expected["support_ids"] is not None:
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
    update, _ = update_policy(session, engine, rollout, None)
    evaluation = evaluate(session, engine.network, iteration=1, stage="after")
    keys = ("reward/hash", "rows", "loss", "grad_norm")
    numbers = [{**metrics, **update}[key] for key in keys]
    return len(rollout.rewards), numbers, evaluation["reward/mean"]


def test_a_rank_without_problems_waits_for_the_others():
    ((_, numbers, evaluation),) = run_ranks(1, _one_problem_for_two_ranks)
    for count, ours, reward in run_ranks(2, _one_problem_for_two_ranks):
        assert count == 4, "every rank knows all rollouts"
        assert ours == pytest.approx(numbers, rel=1e-5, abs=1e-6)
        assert reward == evaluation


def _in_two_orders():
    """Return metrics and gradient of the same rollouts in two orders."""
    session, engine = open_session("algorithm.updates_per_iteration=1")
    rollout, _ = collect_rollout(session, engine, 0)
    order = torch.randperm(len(rollout.rewards), generator=torch.Generator().manual_seed(0))
    other = Rollout(
        select(rollout.trajectory, order),
        *(part[order] for part in (rollout.rewards, rollout.correct, rollout.advantages)),
    )
    return gradient(session, engine, rollout), gradient(session, engine, other)


def test_the_gradient_does_not_depend_on_the_order_of_the_rollouts():
    ((metrics, grads), (other, others)), = run_ranks(1, _in_two_orders)  # fmt: skip
    assert metrics["rows"] == other["rows"] > 12
    assert relative_error(others, grads) < 1e-6
    assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-7)


def _packing(overrides):
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    rollout, first = collect_rollout(session, engine, 0)
    update, _ = update_policy(session, engine, rollout, None)
    return first.get("rollout/bubble"), update["perf/packing_efficiency"], update["micro_batches"]


def test_packing_and_the_bubble_are_metrics():
    """Rows of 14 or 15 tokens: six to a budget of 90."""
    ((bubble, packing, count),) = run_ranks(1, _packing, [])
    assert bubble is None and 0.5 < packing <= 1
    for bubble, packing, _ in run_ranks(2, _packing, ["parallel=pp2"]):
        assert 0 < bubble < 0.5 and 0.5 < packing <= 1
    for _, _, other in run_ranks(2, _packing, ["parallel=dp2"]):
        assert other == -(-count // 2)
