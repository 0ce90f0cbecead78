"""What a plan counts is what a run counts: passes, tokens, FLOPs, micro-batches and bubbles."""

from contextlib import contextmanager

import pytest
import torch.distributed as dist

from agrpo_megatron.config.parallel import data_ranks
from agrpo_megatron.planning.cluster import Given, read_cluster
from agrpo_megatron.planning.passes import rollout_passes, update_passes
from agrpo_megatron.scaling.forecast.work import count_flops
from agrpo_megatron.scaling.memory import worst_rank
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.update import update_policy
from tests.ranks import run_ranks
from tests.training.tiny import open_session

# All denoising steps run, and each completion is scored, whatever its reward.
WHOLE = [
    *("sampling.early_end=false", "algorithm.kl_coefficient=0.01", "algorithm.kl_target=old"),
    *("algorithm.allocation=equal", "algorithm.proposal=uniform"),
]
BLOCKS = ["model.attention=block_causal", "model.block_length=4"]
# On one rank, 12 rows of 20 tokens; a budget of 90 tokens holds four of them.
ALONE = {
    "passes of equal rows": ["train.token_budget=60"],
    "a last pass that is not full": ["rollout.rows=5", "train.token_budget=110"],
    "no room for a second row": ["train.token_budget=30"],
    "two updates": ["algorithm.updates_per_iteration=2"],
    "blocks": BLOCKS,
    "uncached blocks": [*BLOCKS, "rollout.cached=false"],
    "cached policy": ["sampling.policy=cached"],
}
# Of two ranks; the last pass is not full in any of them.
SPLIT = {
    "data": [],
    "tensors": ["parallel=tp2"],
    "ring": ["parallel=pp2", "rollout.groups=3", "train.token_budget=66"],
    "ring of too few groups": ["parallel=pp2", "rollout.groups=1"],
    "virtual stages": ["parallel=pp2-vpp2", "model.num_layers=4"],
    "lockstep": ["parallel=pp2", "rollout.schedule=lockstep"],
}


@contextmanager
def _sums(width):
    """Yield a list that receives the bytes of each sum of hidden states of this width."""
    found, own = [], dist.all_reduce

    def noted(tensor, *args, **kwargs):
        if tensor.dim() == 3 and tensor.shape[-1] == width:
            found.append(tensor.nbytes)
        return own(tensor, *args, **kwargs)

    dist.all_reduce = noted
    yield found
    dist.all_reduce = own


def _counts(variants, ranks):
    """Return by variant what a run counts, and what the plan counts."""
    found = {}
    for name, overrides in variants.items():
        session, engine = open_session(*WHOLE, *overrides, world_size=ranks)
        settings = session.run.settings
        with _sums(settings.model.hidden_size) as sums:
            rollout, sampled = collect_rollout(session, engine, 0)
            trained, tokens = update_policy(session, engine, rollout, None)
        budget, updates = settings.train.token_budget, settings.algorithm.updates_per_iteration
        replicas = data_ranks(settings.parallel, ranks)
        prompts = [len(p) for p in rollout.trajectory.prompts][:: settings.algorithm.group_size]
        flops = count_flops(settings, prompts, ())
        cluster = read_cluster(f"{ranks}xCPU", "fp32", Given(peak=1.0))
        weights = worst_rank(settings, ranks).weights
        one = rollout_passes(settings, flops, cluster, weights, prompts=prompts)
        two = update_passes(settings, flops, cluster, weights)
        batches, micro_batches = one.batches, updates * two.micro_batches
        work = one.of.work.times(batches.count).plus(two.of.work.times(micro_batches))
        has_sums = settings.parallel.tensor > 1
        share = settings.parallel.pipeline * settings.parallel.tensor / ranks
        ran = {
            "rollout FLOPs": sampled["flops"],
            "rollout tokens": sampled["tokens"],
            "passes": sampled["tokens"] / sampled["rollout/packing_efficiency"] / budget / replicas,
            "rollout bubble": sampled.get("rollout/bubble", 0.0),
            "update FLOPs": trained["flops"],
            "update tokens": tokens,
            "micro-batches": trained["micro_batches"],
            "update bubble": trained.get("update/bubble", 0.0),
            "sums": len(sums),
            "bytes of sums": sum(sums),  # two ranks: each sends half of them twice
        }
        planned = {
            "rollout FLOPs": batches.count * one.of.work.flops * ranks,
            "rollout tokens": batches.count * one.of.tokens / share,
            "passes": batches.count,
            "rollout bubble": batches.waits / (1 + batches.waits),
            "update FLOPs": flops.update,
            "update tokens": micro_batches * two.of.tokens / share,
            "micro-batches": micro_batches,
            "update bubble": two.bubble / (two.bubble + two.micro_batches),
            "sums": work.messages * has_sums,
            "bytes of sums": work.sent * has_sums,
        }
        found[name] = ran, planned
    return found


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _counts, ALONE, 1)[0]


@pytest.mark.parametrize("name", ALONE)
def test_counts_of_one_rank_are_those_of_a_run(alone, name):
    ran, planned = alone[name]
    assert planned == pytest.approx(ran)


@pytest.mark.parametrize("name", SPLIT)
def test_counts_of_two_ranks_are_those_of_a_run(name):
    (ran, planned), _ = (found[name] for found in run_ranks(2, _counts, {name: SPLIT[name]}, 2))
    assert planned == pytest.approx(ran)


def test_rows_of_a_prompt_begin_one_step_later_than_its_first():
    """A cached prompt is computed once on each replica; a run has one more pass than the plan."""
    found = run_ranks(2, _counts, {"blocks": BLOCKS}, 2)
    ran, planned = found[0]["blocks"]
    assert planned["passes"] == 4 and ran["passes"] == pytest.approx(5)
    apart = {"passes", "rollout tokens"}
    assert {k: v for k, v in planned.items() if k not in apart} == pytest.approx(
        {k: v for k, v in ran.items() if k not in apart}
    )
