"""FLOPs of training are what torch counts, under any layout; a budget of them ends a run."""

from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.megatron.engine import build_reference
from agrpo_megatron.megatron.layers import scored as scored_module
from agrpo_megatron.runs.directory import is_finished
from agrpo_megatron.scaling.flops import update_cost, update_factor
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.runs.test_early_stopping import _last
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import (
    HashedReward,
    open_session,
    resolved_run,
    same_metrics,
    silent_view,
    tiny,
)

NULL = "algorithm.mc_samples=null"
PAIRS = ["algorithm.group_size=2", "algorithm.prompts_per_iteration=16"]
LORA = ["lora.rank=3"]
EXPERTS = ["model.family=llada_moe", "model.moe.experts=4", "model.moe.ffn_hidden_size=24"]
# Settings, and the passes over the rows of each update; a pass with gradient counts as 3.
VARIANTS = {
    "agrpo": ([], [3]),
    "agrpo, another round": (["algorithm.resample_rounds=1", *PAIRS], [3]),
    "full_trajectory": (["algorithm.name=full_trajectory", NULL], [3]),
    "to a reference": (["algorithm.kl_coefficient=0.1"], [4]),
    "cached": (["sampling.policy=cached", "train.token_budget=40"], [3]),
    "approximate": (["sampling.policy=approximate", "algorithm.rollout_correction=2.0"], [4]),
    "cached, shifted": (
        ["sampling.policy=cached", "model.shift=true", "algorithm.step_sampler=blocks"],
        [3],
    ),
    "corrected": (["algorithm.rollout_correction=2.0"], [4]),
    "of sequences": (["algorithm.name=espo", NULL], [4]),
    "of sequences, twice": (
        ["algorithm.name=espo", NULL, "algorithm.updates_per_iteration=2"],
        [4, 5],
    ),
    "adapters": (LORA, [3]),
    "merged adapters": ([*LORA, "lora.merge_rollouts=true"], [3]),
    "some adapters, to a reference": (
        [
            *("lora.rank=2", "lora.modules=[q_proj, attn_out, ff_out]"),
            *("algorithm.kl_coefficient=0.1", "algorithm.rollout_correction=2.0"),
        ],
        [5],
    ),
    "adapters and tables": ([*LORA, "lora.train_embedding=true", "lora.train_head=true"], [3]),
    "without tails": (["algorithm.name=vrpo", NULL, "algorithm.tail=first"], [5]),
    "experts": (EXPERTS, [3]),
    "experts with adapters": ([*EXPERTS, *LORA], [3]),
}


def _counted(names, layout=()):
    """Return by variant: our count of rollouts and updates, torch's on this rank, metrics."""
    scored_module.LEAST_ROWS, scored_module.QUERY_MULTIPLE = 0, 1  # no row is filled up
    HashedReward.levels = 2  # so that some groups have equal rewards
    found = {}
    for name in names:
        session, engine = open_session(
            *VARIANTS[name][0], *layout, world_size=dist.get_world_size()
        )
        settings, reference = session.run.settings, None
        if settings.algorithm.needs_reference:
            reference = build_reference(settings, engine.network)
            if not reference.is_reference:
                load_start_weights(reference, settings)
        engine.network.for_rollouts()
        with _counting() as rollouts:
            rollout, sampled = collect_rollout(session, engine, 0)
        with _counting() as updates:
            updated, _ = update_policy(session, engine, rollout, reference)
        torchs = [rollouts.get_total_flops(), updates.get_total_flops()]
        metrics = {**sampled, **updated, "is_scored": (rollout.advantages != 0).tolist()}
        metrics["lengths"] = [len(prompt) + 8 for prompt in rollout.trajectory.prompts]
        found[name] = [sampled["flops"], updated["flops"]], torchs, metrics
    return found


@contextmanager
def _counting():
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _counted, list(VARIANTS))[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_flop_of_rollouts_and_updates_is_counted(alone, name):
    ours, torchs, metrics = alone[name]
    assert ours == torchs and min(ours) > 0
    passes = VARIANTS[name][1]
    if len(passes) == 1:
        assert metrics["scoring_rows"] == (passes[0] - 3) * metrics["rows"]


def test_resampled_groups_count(alone):
    assert alone["agrpo, another round"][2]["rollout/resampled_groups"] > 0


def test_a_count_by_hand(alone):
    """Rollouts of eight tokens in four steps; those with an advantage are scored at every step."""
    (sampled, updated), _, metrics = alone["full_trajectory"]
    width, keys, inner, layers, vocab = 16, 8, 32, 2, 83
    matrices = 2 * (2 * width * width + 2 * width * keys + 3 * width * inner)  # FLOPs of a token
    end = 2 * (2 * width * width + 3 * width * inner)  # of a scored token in the last layer
    of_rollout = [
        4 * layers * n * matrices
        - 4 * n * end
        + 8 * (2 * width * vocab + end)
        + (4 * (layers - 1) * n + 8) * n * 4 * width
        for n in metrics["lengths"]
    ]
    scored = [f for f, is_scored in zip(of_rollout, metrics["is_scored"], strict=True) if is_scored]
    assert len(of_rollout) == 12 and 0 < len(scored) < 12
    assert (sampled, updated) == (sum(of_rollout), 3 * sum(scored))


def test_adapters_by_hand(alone):
    """Rank 3 on all of two layers: frozen matrices twice, attention and adapters three times.

    Of the last layer, all tokens meet the queries, keys and values only; without adapters, the keys
    and values.
    """
    width, keys, inner, rank = 16, 8, 32, 3
    sizes = [(width, width), (width, keys), (width, keys), (width, width)]
    sizes += [(width, inner), (width, inner), (inner, width)]
    met = [*sizes, *sizes[:3]]
    token = sum(2 * rank * (inputs + outputs) for inputs, outputs in met)
    scored = sum(2 * rank * (inputs + outputs) for inputs, outputs in sizes[3:])
    matrices = sum(2 * inputs * outputs for inputs, outputs in met)
    counts = {name: alone[name][0] for name in ("agrpo", "adapters", "merged adapters")}
    lengths = alone["adapters"][2]["lengths"]
    assert lengths == alone["agrpo"][2]["lengths"]
    assert counts["merged adapters"][0] == counts["agrpo"][0]
    more = 4 * token * sum(lengths) + 8 * scored * len(lengths)
    more += 2 * width * width * (4 * sum(lengths) - 8 * len(lengths))
    assert counts["adapters"][0] - counts["agrpo"][0] == more
    model, lora = tiny().model, tiny(*LORA).lora
    assert update_cost(model, lora).token == 2 * matrices + 3 * token
    assert update_cost(model).token == 3 * (matrices - 2 * width * width)
    assert update_factor(model, lora) == (2 * matrices + 3 * token) / (matrices + token)


LAYOUTS = {
    "dp2": ["parallel.data=2"],
    "tp2": ["parallel.tensor=2"],
    "pp2": ["parallel.pipeline=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_count(alone, layout):
    names = ["agrpo", "to a reference", "of sequences, twice", "some adapters, to a reference"]
    for found in run_ranks(2, _counted, names, LAYOUTS[layout]):
        for name in names:
            assert found[name][0] == alone[name][0], name


# Metric lines: the evaluation before, rl 1 to 3, the evaluation after 2 comes third.
RUN = ["train.iterations=9", "evaluation.interval=2", "checkpoint.interval=1"]


def _train(run_dir, budget, line=None):
    """Return what was said, and the evaluations of this attempt."""
    if line is not None:
        kill_after_line(line)
    view, said, evaluated = silent_view(), [], []
    view.note = said.append
    view.evaluation = lambda metrics: evaluated.append((metrics["stage"], metrics["iteration"]))
    overrides = [*RUN, f"train.flops={budget}"]
    train(resolved_run(run_dir, *overrides, world_size=dist.get_world_size()), view)
    return said, evaluated


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run of three iterations: its budget is what they take, and their FLOPs."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, _train, root / "long", 1e30)
    flops = [r["flops"] for r in read(root / "long" / "metrics.jsonl") if r["phase"] == "rl"]
    assert len(flops) == 9
    budget = sum(flops[:3])
    return root / "whole", budget, flops, run_ranks(1, _train, root / "whole", budget)[0]


def test_a_budget_ends_a_run_after_the_iteration_that_reaches_it(whole):
    directory, budget, flops, (said, evaluated) = whole
    records = read(directory / "metrics.jsonl")
    assert [r["flops"] for r in records if r["phase"] == "rl"] == flops[:3]
    assert evaluated == [("before", 0), ("interval", 2), ("after", 3)]
    assert [r["stage"] for r in records if r["phase"] == "eval"] == ["before", "interval", "after"]
    done = _last(directory)
    assert (done.iteration, done.flops) == (3, budget)
    assert said[-1] == f"ending early, after iteration 3: {done.stopped}"
    assert is_finished(tiny(*RUN, f"train.flops={budget}"), done)
    assert all(r["timing/cpu"] > 0 for r in records if r["phase"] == "rl")


def test_a_budget_just_above_takes_one_more_iteration(whole, tmp_path):
    _, budget, _, _ = whole
    run_ranks(1, _train, tmp_path / "run", budget + 1)
    assert _last(tmp_path / "run").iteration == 4


@pytest.mark.parametrize("line", [4, 5], ids=["in the last iteration", "before its evaluation"])
def test_a_killed_run_ends_where_it_would_have(whole, tmp_path, line):
    directory, budget, _, _ = whole
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", budget, line)
    ((_, evaluated),) = run_ranks(1, _train, tmp_path / "run", budget)
    assert evaluated[-1] == ("after", 3)
    lines = read(directory / "metrics.jsonl")
    assert same_metrics(read(tmp_path / "run" / "metrics.jsonl"), lines)
    assert _last(tmp_path / "run").flops == budget
    ((_, evaluated),) = run_ranks(1, _train, tmp_path / "run", budget)
    assert evaluated == [], "a finished run is not taken up again"


def test_all_ranks_end_together(whole, tmp_path):
    _, budget, _, _ = whole
    for _, evaluated in run_ranks(2, _train, tmp_path / "run", budget):
        assert evaluated == [("before", 0), ("interval", 2), ("after", 3)]
