"""Routers that choose other experts in rollouts: updates replay them, and count what changed."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.layouts import COMMON, DISTRIBUTED, compare, write_start
from tests.training.test_expert_layouts import BLOCKS, EXPERTS, SAMPLING
from tests.training.tiny import open_session

COMPARE = ["algorithm.rollout_experts=compare"]
REPLAY = ["algorithm.rollout_experts=replay"]


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
    load, size = f"model.load={folder}", dist.get_world_size()
    session, engine = open_session(*COMMON, load, *overrides, world_size=size)
    tokens, numbers = [], []
    for iteration in range(iterations):
        with other_choices(engine.rollout_network(), noise):
            rollout, _ = collect_rollout(session, engine, iteration)
        metrics, _ = update_policy(session, engine, rollout, None)
        tokens.append(rollout.trajectory.tokens)
        numbers.append(metrics)
    engine.finish_parameters()
    weights = {name: p.detach() for name, p in engine.network.named_weights()}
    return {
        "tokens": tokens,
        "loss": [record["loss"] for record in numbers],
        "grad_norm": [record["grad_norm"] for record in numbers],
        "ratio error": max(record["ratio/max_error"] for record in numbers),
        "changed": [record.get("experts/changed") for record in numbers],
        "weights": export_hf(weights, session.run.settings.model, session.run.ranks),
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    run_ranks(1, write_start, folder, EXPERTS)
    return folder


@pytest.mark.parametrize("noise", ["layer", "pass"])
def test_replayed_experts_make_the_ratio_of_the_first_update_one(start, noise):
    off = run_ranks(1, train, start, COMPARE, noise)[0]
    on = run_ranks(1, train, start, REPLAY, noise)[0]
    print(off["ratio error"], off["changed"], on["ratio error"], on["changed"])
    assert off["ratio error"] > 1e-3 and min(off["changed"]) > 0.01
    assert on["ratio error"] < 1e-5 and min(on["changed"]) > 0.01
