"""`algorithm.mc_samples: auto`: runs that measure how many steps to draw, resumed, on layouts."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.run import train
from agrpo_megatron.training.variance.auto import AutoDraws
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_nan_guard import _spoilt, _useful
from tests.training.test_run import read
from tests.training.tiny import (
    open_session,
    resolved_run,
    same_metrics,
    silent_view,
    unknown_metrics,
)

AUTO = [
    "algorithm.mc_samples=auto",
    "algorithm.prompts_per_iteration=4",
    "sampling.denoising_steps=8",
]
SHARE = 0.8
RUN = [*AUTO, f"algorithm.auto_share={SHARE}", "train.iterations=6", "checkpoint.interval=2"]
RUN += ["evaluation.interval=0", "checkpoint.best=null", "checkpoint.keep_rollouts=true"]
OF_DRAWS = ("mc_samples", "measuring_rows", "rows")
DROPOUT = "model.megatron={attention_dropout: 0.2, hidden_dropout: 0.2}"


def _train(run_dir, overrides, line=None, constant=None):
    """Train; return what was shown."""
    if line is not None:
        kill_after_line(line)
    resolved = resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size())
    resolved.task.constant = constant
    view, said = silent_view(), []
    view.note = said.append
    train(resolved, view)
    return [text for text in said if "mc_samples" in text]


def _rl(run_dir):
    return [record for record in read(run_dir / "metrics.jsonl") if record["phase"] == "rl"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run of six iterations on one rank, and what it showed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return directory, run_ranks(1, _train, directory, [])[0]


def test_a_run_measures_chooses_and_reports(whole):
    directory, said = whole
    records = _rl(directory)
    assert unknown_metrics(records) == set()
    measured = [r["iteration"] for r in records if r["measuring_rows"]]
    assert measured[0] == 1 and len(measured) >= 3
    first = records[0]
    assert {f"auto/signal/{k}" for k in (1, 2, 4, 8)} <= first.keys()
    signals = {k: first[f"auto/signal/{k}"] for k in (1, 2, 4, 8)}
    assert signals[first["mc_samples"]] == 1.0 and max(signals.values()) <= 1.05
    for r in records:  # measuring is part of the count of FLOPs
        assert (r["measuring_flops"] > 0) == (r["measuring_rows"] > 0)
        assert r["flops"] > 3 * r["measuring_flops"] / 2
    assert first["auto/draw_noise"] == first[f"auto/draw_noise/{first['mc_samples']}"]
    assert first["auto/draw_noise/8"] == 0.0, "all steps"
    assert said[0].startswith(f"iteration 1: algorithm.mc_samples is {first['mc_samples']} (auto)")
    pairs = zip(records, records[1:], strict=False)
    changes = [b["iteration"] for a, b in pairs if a["mc_samples"] != b["mc_samples"]]
    assert len(said) == 1 + len(changes) and set(changes) <= set(measured)
    steady = [r for r in records if r["iteration"] not in measured]
    assert steady and not any("auto/signal/8" in r or "timing/measure" in r for r in steady)


def test_measuring_stays_within_its_share_of_the_work(whole):
    """Rows have nearly equal lengths: a pass over one is 1 of work, with its gradient 3."""
    records, spent, made, paid = _rl(whole[0]), 0.0, 0.0, []
    for r in records:
        before = made
        spent += 3 * r["measuring_rows"]
        made += 3 * r["rows"] + 16 * r["live_steps/mean"]
        assert r["auto/share"] == pytest.approx(spent / made, rel=0.1)
        if r["measuring_rows"] and r["iteration"] > 1:
            paid.append(spent / before)
    assert len(paid) >= 2 and all(0.6 * SHARE < share < 1.03 * SHARE for share in paid), paid


@pytest.mark.parametrize("line", [3, 6])
def test_a_killed_run_chooses_what_it_would_have(whole, tmp_path, line):
    """Killed before its first checkpoint, and between two: the averages and the work are kept."""
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", [], line)
    run_ranks(1, _train, tmp_path / "run", [])
    assert same_metrics(*(read(at / "metrics.jsonl") for at in (tmp_path / "run", whole[0])))


def test_a_replay_chooses_what_the_run_chose_that_sampled(whole, tmp_path):
    replay = [f"train.from_rollouts={whole[0]}", "checkpoint.keep_rollouts=false"]
    run_ranks(1, _train, tmp_path / "run", replay)
    records, others = (read(run / "metrics.jsonl") for run in (tmp_path / "run", whole[0]))
    for record in (*records, *others):  # a replay spends nothing on sampling
        for name in ("rollout/replayed", "flops", "totals/flops"):
            record.pop(name, None)
    assert same_metrics(records, others)


LAYOUTS = {  # tolerance, and settings
    "dp2": (1e-3, ["parallel=dp2"]),
    "dp2, shards": (0.06, ["parallel=dp2", "optimizer.distributed=true"]),
    "pp2": (0.06, ["parallel=pp2"]),
    "tp2-sp": (0.06, ["parallel=tp2-sp"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_choice(whole, tmp_path, layout):
    """A layout that splits gradients hashes them otherwise: inner products differ by 0.8 %."""
    tolerance, more = LAYOUTS[layout]
    run_ranks(2, _train, tmp_path / "run", [*more, "train.iterations=3"])
    for ours, theirs in zip(_rl(tmp_path / "run"), _rl(whole[0])[:3], strict=True):
        assert [ours[key] for key in OF_DRAWS] == [theirs[key] for key in OF_DRAWS]
        for key in (key for key in theirs if key.startswith("auto/")):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), key


def test_without_advantages_nothing_is_spent(tmp_path):
    run_ranks(1, _train, tmp_path / "run", ["train.iterations=2"], None, 0.5)
    found = [[r[k] for k in (*OF_DRAWS, "auto/share")] for r in _rl(tmp_path / "run")]
    assert found == [[8, 0.0, 0, 0.0]] * 2


OTHERS = {
    "a reference, two updates, an odd batch": [
        "algorithm.kl_coefficient=0.01",
        "algorithm.updates_per_iteration=2",
        "algorithm.prompts_per_iteration=3",
    ],
    "k by advantage, one ratio per step": [
        "algorithm.allocation=advantage",
        "algorithm.level=row",
        "algorithm.resample_rounds=1",
    ],
    "two steps, drawn with replacement": [
        "sampling.denoising_steps=2",
        "algorithm.step_sampler=independent",
        "algorithm.enumerate_short=false",
    ],
    "one step": ["sampling.block_length=8", "sampling.denoising_steps=1"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_measured_too(tmp_path, name):
    run_ranks(1, _train, tmp_path / "run", [*OTHERS[name], "train.iterations=2"])
    for record in _rl(tmp_path / "run"):
        assert (record["auto/share"] > 0) == (name != "one step")
        assert record["mc_samples"] in (1, 2, 4, 8) and record["grad_norm"] > 0


def _updated(overrides, *, measures):
    """Return the weights and metrics after an update, measured before it or not."""
    session, engine = open_session(*AUTO, *overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    tracker = get_cuda_rng_tracker()
    states = [torch.get_rng_state(), *tracker.get_states().values()]
    if measures:
        auto = AutoDraws(session.run.settings.algorithm, {})
        session = auto.before_update(session, engine, rollout, None, sampled=1.0)
        assert auto.state["spent"] > 0
        assert not any(p.main_grad.any() for _, p in engine.network.named_parameters())
    same = zip(states, [torch.get_rng_state(), *tracker.get_states().values()], strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    metrics, _ = update_policy(session, engine, rollout, None)
    weights = [p.detach().clone() for _, p in engine.network.named_parameters()]
    return weights, metrics, session.run.settings.algorithm.mc_samples


@pytest.mark.parametrize("more", [[], [DROPOUT], ["optimizer.distributed=true"]])
def test_measuring_changes_nothing_else(more):
    """An update with the chosen number of draws has the bits of one that nothing preceded."""
    size = 2 if "optimizer.distributed=true" in more else 1
    measured = run_ranks(size, _with_and_without, more)
    for weights, metrics, count, expected, expected_metrics in measured:
        assert count == measured[0][2]
        assert metrics == expected_metrics and metrics["rows"] > 0
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def _with_and_without(more):
    weights, metrics, count = _updated(more, measures=True)
    plain, expected, _ = _updated([*more, f"algorithm.mc_samples={count}"], measures=False)
    return weights, metrics, count, plain, expected


def _measured_on_nan():
    """Return the states before and after a measurement of rollouts that are not finite."""
    session, engine = open_session(*AUTO)
    rollout, _ = collect_rollout(session, engine, 0)
    auto = AutoDraws(session.run.settings.algorithm, {})
    auto.before_update(session, engine, rollout, None, sampled=1.0)
    known = auto.state
    auto = AutoDraws(session.run.settings.algorithm, {**known, "made": 1e9})
    auto.before_update(session, engine, _spoilt(rollout, _useful(rollout)[:1]), None, sampled=1.0)
    return known, auto.state


def test_a_measurement_that_is_not_finite_changes_no_choice():
    known, after = run_ranks(1, _measured_on_nan)[0]
    assert after["spent"] > known["spent"]
    assert (after["candidates"], after["chosen"]) == (known["candidates"], known["chosen"])
