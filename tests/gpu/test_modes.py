"""Modes of the kernels: deterministic updates, and rollouts that are replayed as CUDA graphs."""

import time
from contextlib import suppress

import pytest
import torch

from agrpo_megatron.megatron.graphs import Graphs
from agrpo_megatron.megatron.pipeline import make_forward
from tests.gpu.common import (
    REHEARSES,
    engine_of,
    in_fresh_process,
    local,
    scaled,
    te,
    update,
    weights_of,
)
from tests.gpu.rollouts import sampled

pytestmark = pytest.mark.gpu

UPDATES = 3
DETERMINISTIC = "kernels.deterministic=true"


# The te layers need a GPU, and are left out where they cannot be.
CASES = {"local bf16": local("bf16"), "te bf16": te("bf16"), "te fp8": te("fp8 blockwise")}


def _twice(overrides):
    """Train the same weights on the same batches twice; returns what each run ended with."""
    ends = []
    for _ in range(2):
        with engine_of(*overrides, DETERMINISTIC) as (engine, settings):
            metrics = [update(engine, settings, seed=seed) for seed in range(UPDATES)]
            weights = {name: w.cpu() for name, w in weights_of(engine.network).items()}
            ends.append((metrics, weights))
    assert REHEARSES or torch.are_deterministic_algorithms_enabled()
    return ends


def _all_twice():
    found = {}
    for name, overrides in CASES.items():
        with suppress(pytest.skip.Exception):
            found[name] = _twice(overrides)
    return found


@pytest.fixture(scope="module")
def trained_twice():
    """Return the ends of all cases, from one process that is deterministic throughout."""
    return in_fresh_process(_all_twice)


@pytest.mark.parametrize("case", CASES)
def test_deterministic_updates_repeat_to_the_bit(case, trained_twice):
    scaled(*CASES[case], DETERMINISTIC)
    (first, weights), (second, other_weights) = trained_twice[case]
    assert first == second and len(first) == UPDATES
    assert first[0] != first[1]  # it does train
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


def test_graphs_give_the_same_completions(record_property):
    with engine_of(*te("bf16")) as (engine, settings):
        plain, plain_seconds = _rollout(engine, settings)
    with engine_of(*te("bf16", "kernels.cuda_graphs=true")) as (engine, settings):
        forward = make_forward(
            engine.rollout_network(), settings.rollout, sampling=settings.sampling
        )
        assert isinstance(forward._logits, Graphs)  # type: ignore[attr-defined]
        replayed, seconds = _rollout(engine, settings)
    record_property("graphs/seconds of a rollout without", plain_seconds)
    record_property("graphs/seconds of a rollout with", seconds)
    # Rows of padding change the sums of attention by their rounding, a step of a bf16 logit: up to
    # a token in a hundred is drawn differently for it, and many after it in its row.
    assert float((plain.tokens == replayed.tokens).double().mean()) > 0.5
    first = plain.unmask_step == 0
    assert torch.equal(plain.unmask_step, replayed.unmask_step)
    same = first & (plain.tokens == replayed.tokens)
    assert int(same.sum()) >= int(first.sum()) - max(1, int(first.sum()) // 10)
    torch.testing.assert_close(plain.logprobs[same], replayed.logprobs[same], atol=0.1, rtol=0)


def _rollout(engine, settings):
    sampled(engine.rollout_network(), settings)
    started = time.perf_counter()
    trajectory = sampled(engine.rollout_network(), settings)
    trajectory.tokens.cpu()
    return trajectory, time.perf_counter() - started


@pytest.mark.skipif(REHEARSES, reason="there are no launches to count on a CPU")
def test_graphs_launch_less():
    """Rollouts with graphs are launches of graphs, and far fewer of kernels."""
    counts = {}
    for has_graphs in ("false", "true"):
        with engine_of(*te("bf16", f"kernels.cuda_graphs={has_graphs}")) as (engine, settings):
            sampled(engine.rollout_network(), settings)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                sampled(engine.rollout_network(), settings)
            names = {event.key: event.count for event in profile.key_averages()}
            launches = sum(count for name, count in names.items() if "LaunchKernel" in name)
            replays = sum(count for name, count in names.items() if "GraphLaunch" in name)
            counts[has_graphs] = launches, replays
    if counts["false"][0] == 0:
        pytest.skip("the profiler sees no launches on this machine")
    assert counts["false"][1] == 0 and counts["true"][1] > 0
    assert counts["true"][0] < counts["false"][0]
