"""Routers that choose other experts in rollouts: updates replay them, and count what changed."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.start import load_model
from agrpo_megatron.megatron.engine import build_reference
from agrpo_megatron.rollout.experts import with_experts
from agrpo_megatron.scaling.memory import rank_memory
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.types import ScoredRows
from tests.ranks import run_ranks
from tests.training.layouts import (
    COMMON,
    DISTRIBUTED,
    RECOMPUTE,
    compare,
    make_start,
    outcome,
    run_at,
)
from tests.training.test_expert_layouts import BLOCKS, EXPERTS, SAMPLING
from tests.training.tiny import open_session

COMPARE = ["algorithm.rollout_experts=compare", "checkpoint.rollouts=false"]
REPLAY = ["algorithm.rollout_experts=replay", "checkpoint.rollouts=false"]
MODES = COMPARE, REPLAY


@contextmanager
def other_choices(network, noise):
    """Let routers add noise to the scores of their choice, but not to the weights.

    Args:
        noise: `layer` for the same in all passes, `pass` for new one in each, or empty.
    """
    hooks, own = [], []
    for router in [router for chunk in network.chunks for router in chunk.routers]:
        own.append((router, router.expert_bias))
        random = torch.Generator().manual_seed(router.number)

        def change(router, _, random=random):
            if noise == "layer":
                random.manual_seed(router.number)
            router.expert_bias = torch.randn(router.moe.experts, generator=random)

        if noise:
            hooks.append(router.register_forward_pre_hook(change))
    yield
    for hook in hooks:
        hook.remove()
    for router, bias in own:
        router.expert_bias = bias


def train(folder, overrides, noise, iterations=2):
    """Return what `tests.training.layouts.train` does, with noise in the rollouts."""
    given, size = (f"model.load={folder}", "task.prompt_tokens=9"), dist.get_world_size()
    session, engine = open_session(*COMMON, *given, *overrides, world_size=size)
    settings = session.run.settings
    tokens, numbers, reference = [], [], None
    if settings.algorithm.needs_reference:
        reference = build_reference(settings, engine.network)
        load_model(reference, settings, None)
    for iteration in range(iterations):
        with other_choices(engine.rollout_network(), noise):
            rollout, _ = collect_rollout(session, engine, iteration)
        metrics, _ = update_policy(session, engine, rollout, reference)
        tokens.append(rollout.trajectory.tokens)
        numbers.append(metrics)
    return outcome(session, engine, tokens, numbers) | {
        "kl": [record["kl"] for record in numbers],
        "changed": [record.get("experts/changed") for record in numbers],
        "bytes": sum(
            part.numel() * part.element_size()
            for record in (rollout.experts or {}).values()
            for part in (*record.context, *record.steps)
        ),
        "most bytes": rank_memory(settings, size, stage=0).host,
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory, EXPERTS)


@pytest.fixture(scope="module")
def alone(start):
    return run_ranks(1, train, start, REPLAY, "layer")[0]


def test_without_replay_other_experts_move_the_ratio(start):
    found = run_ranks(1, train, start, COMPARE, "layer")[0]
    assert found["ratio error"] > 1e-2 and min(found["changed"]) > 0.01


def test_replayed_experts_make_the_ratio_of_the_first_update_one(start, alone):
    """Also where each forward pass of the rollout has its own noise."""
    for found in (alone, run_ranks(1, train, start, REPLAY, "pass")[0]):
        assert found["ratio error"] < 1e-5 and min(found["changed"]) > 0.01
        assert 0.9 * found["most bytes"] < found["bytes"] <= found["most bytes"]


def test_replay_changes_no_bit_where_routers_choose_the_same(start):
    off, on = (run_ranks(1, train, start, mode, "")[0] for mode in ([], REPLAY))
    assert on["changed"] == [0.0, 0.0] and off["changed"] == [None, None]
    assert (on["loss"], on["grad_norm"]) == (off["loss"], off["grad_norm"])
    assert all(torch.equal(on["weights"][name], off["weights"][name]) for name in on["weights"])


LAYOUTS = {
    "tp2-sp": (2, [DISTRIBUTED]),
    "pp2": (2, []),
    "pp2-vpp2": (2, []),
    "cp2": (2, []),
    "ep2": (2, [RECOMPUTE % "recompute_num_layers: 1"]),
    "dp2 rollout tp2": (2, ["rollout.parallel=tp2-sp"]),
    "pp2 recompute": (2, [RECOMPUTE % "recompute_num_layers: 1"]),
    "pp2-ep2 rollout ep2": (4, ["rollout.parallel=ep2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_nothing_of_replayed_experts(start, alone, name):
    """Ranks exchange what they recorded: updates share rows and layers in another way."""
    found = run_at(LAYOUTS, name, train, start, REPLAY, "layer")
    compare(found, alone)
    assert all(result["changed"] == pytest.approx(alone["changed"], abs=1e-3) for result in found)


@pytest.fixture(scope="module")
def block_start(tmp_path_factory):
    return make_start(tmp_path_factory, BLOCKS)


@pytest.mark.parametrize("cached", [True, False])
def test_blocks_replay_the_experts_of_their_context(block_start, cached):
    """With a cache each token's keys are those of one pass, so its noise may be of that pass."""
    own = [*SAMPLING, f"rollout.cached={str(cached).lower()}"]
    noise = "pass" if cached else "layer"
    off, on = (run_ranks(1, train, block_start, [*own, *mode], noise)[0] for mode in MODES)
    assert off["ratio error"] > 1e-2 and min(off["changed"]) > 0.01
    assert on["ratio error"] < 1e-5 and min(on["changed"]) > 0.01
    assert 0.6 * on["most bytes"] < on["bytes"] <= on["most bytes"]


def test_the_layout_changes_nothing_of_replayed_blocks(block_start):
    """Rollouts in a pipeline have several groups of rows under way, which share prompts."""
    own, layout = [*SAMPLING, *REPLAY], ["parallel=tp2-sp", "rollout.parallel=pp2"]
    alone = run_ranks(1, train, block_start, own, "layer")[0]
    compare(run_ranks(2, train, block_start, [*own, *layout], "layer"), alone)
    found = run_ranks(2, train, block_start, [*own, *layout], "pass")
    assert all(result["ratio error"] < 1e-5 for result in found)


ALL_STEPS = ["algorithm.mc_samples=null"]
ESTIMATORS = {"full_trajectory": ALL_STEPS, "cj_grpo": ALL_STEPS, "egspo": []}
ESTIMATORS |= {
    "just_grpo": [*ALL_STEPS, "sampling.unmasking=leftmost", "sampling.denoising_steps=8"]
}
ESTIMATORS |= {"step_merge": [], "tracerl": ALL_STEPS, "rldf": []}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_state_has_the_experts_of_its_own_step(start, name):
    """Without noise, a router chooses for another state otherwise, but not for the same one."""
    own = [*COMPARE, f"algorithm.name={name}", *ESTIMATORS[name]]
    assert run_ranks(1, train, start, own, "", 1)[0]["changed"] == [0.0]


def test_the_frozen_reference_chooses_its_own_experts(start):
    """Before the first update it is the policy: a KL comes from the experts alone."""
    own = ["algorithm.kl_coefficient=0.1", "algorithm.kl=k2"]
    found = [run_ranks(1, train, start, [*REPLAY, *own], noise, 1)[0] for noise in ("", "layer")]
    assert found[0]["kl"] == [0.0] and found[1]["kl"][0] > 1e-3


def test_an_estimator_that_names_no_step_is_refused():
    none = torch.zeros(0, dtype=torch.int64)
    scored = ScoredRows(none, none, none, none, is_sampled=False)
    with pytest.raises(ValueError, match="ScoredRows.step=None; set it"):
        with_experts([], [], scored, None, is_replayed=True)  # type: ignore[arg-type]
