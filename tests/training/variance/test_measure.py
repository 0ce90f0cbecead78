"""Sketches have the inner products of gradients under any layout; noise falls with the draws."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.step import accumulate_gradients
from agrpo_megatron.training.update import prepare, with_loss
from agrpo_megatron.training.variance.choice import components
from agrpo_megatron.training.variance.command import plan_variants
from agrpo_megatron.training.variance.measure import Gradients, compare, gradients_of
from agrpo_megatron.training.variance.sketch import SIZE, gradient_sketch
from tests.ranks import run_ranks
from tests.training.tiny import open_session, tiny

LAYOUTS = {
    "one rank": (1, []),
    "tp2": (2, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2"]),
    "dp2, shards": (2, ["optimizer.distributed=true"]),
}


def _two_gradients(overrides):
    """Return the inner products of two gradients and of their sketches, [2, 2] each."""
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    settings, sketches, whole = session.run.settings, [], []
    for iteration in range(2):
        rollout, _ = collect_rollout(session, engine, iteration)
        part = prepare(settings, engine.ranks, rollout, seed=0)
        part, loss = with_loss(engine, part, rollout, settings, is_first=True)
        accumulate_gradients(engine, part.batches, loss=loss, examples=12)
        grads = {n: p.main_grad.clone() for n, p in engine.network.named_parameters()}
        named = export_hf(grads, settings.model, engine.ranks)
        whole.append(torch.cat([named[name].flatten().double() for name in sorted(named)]))
        sketches.append(gradient_sketch(engine))
    sketch, exact = torch.stack(sketches), torch.stack(whole)
    return sketch @ sketch.T, exact @ exact.T


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sketches_have_the_inner_products_of_gradients(layout):
    """Within 4 %: five standard deviations of a sketch of 16,384 numbers."""
    size, overrides = LAYOUTS[layout]
    results = run_ranks(size, _two_gradients, overrides)
    exact = results[0][1]
    if layout.startswith("dp2"):  # each rank's main_grad is whole in its own shard only
        exact = run_ranks(1, _two_gradients, [])[0][1]
    for sketched, _ in results:
        assert torch.equal(sketched, results[0][0])
        scale = (exact.diag()[:, None] * exact.diag()).sqrt()
        assert float(((sketched - exact) / scale).abs().max()) < 0.04


def _noise():
    """Return draw noise, angle and work of several estimators on two batches of rollouts."""
    more = ["sampling.denoising_steps=8", "algorithm.prompts_per_iteration=6"]
    session, engine = open_session(*more, "algorithm.group_size=3")
    rollouts = [collect_rollout(session, engine, number)[0] for number in range(2)]
    common = {"group_size": 3, "step_sampler": "independent", "proposal": "uniform"}
    common["allocation"] = "equal"
    variants = {
        "full": AlgorithmSettings(name="full_trajectory", group_size=3),
        "k 1": AlgorithmSettings(mc_samples=1, **common),
        "k 4": AlgorithmSettings(mc_samples=4, **common),
        "all hidden": AlgorithmSettings(name="diffu_grpo", group_size=3),
    }
    found = {
        name: gradients_of(
            session, engine, rollouts, algorithm, reference=None, draws=1 if name == "full" else 12
        )
        for name, algorithm in variants.items()
    }
    return compare(found, found["full"], rollout_work=0.0)


def test_noise_falls_with_the_draws_and_the_bias_of_another_estimator_shows():
    found = run_ranks(1, _noise)[0].qualities
    assert found["full"].draws == 0 and found["full"].cosine > 1 - 1e-9
    assert 2.5 < found["k 1"].draws / found["k 4"].draws < 6  # four times, in expectation
    assert found["k 1"].cosine > 0.9 > found["all hidden"].cosine
    assert found["k 4"].work < found["full"].work


def _measured_twice():
    """Return the draw noise of 12 draws: as `compare` has it, their variance, and by triples.

    The last one is by triples of 12 further draws.
    """
    more = ["sampling.denoising_steps=8", "algorithm.prompts_per_iteration=6"]
    session, engine = open_session(*more, "algorithm.mc_samples=6")
    rollouts = [collect_rollout(session, engine, 0)[0]]
    settings = session.run.settings.algorithm
    every = replace(settings, name="full_trajectory", mc_samples=None)
    of_all = gradients_of(session, engine, rollouts, every, reference=None, draws=1)
    exact = of_all.sketches[0, 0].expand(3, 2, SIZE)
    _, of_rollouts = components(exact, is_exact=True)
    by_triples = []
    for first in (0, 12):
        options = {"reference": None, "draws": 12, "first": first}
        drawn = gradients_of(session, engine, rollouts, settings, **options)
        if first == 0:
            shown = compare({"drawn": drawn}, of_all, rollout_work=0.0).qualities["drawn"].draws
            variance = float(drawn.sketches[0].var(0).sum()) / 4 / of_rollouts
        triples = [drawn.sketches[0, list(t)] for t in permutations(range(12), 3)]
        noise = [components(triple, is_exact=False)[0][0] for triple in triples]
        by_triples.append(sum(noise) / len(noise) / of_rollouts)
    return shown, variance, *by_triples


def test_a_run_measures_the_draw_noise_that_the_command_shows():
    """The command takes both halves together, and the length of the gradient from the draws."""
    shown, variance, by_triples, later = run_ranks(1, _measured_twice)[0]
    assert by_triples == pytest.approx(variance, rel=1e-6)
    assert shown == pytest.approx(variance, rel=0.3)
    assert later != variance and later == pytest.approx(variance, rel=0.4)


def test_variants_are_corrected_for_an_approximate_sampler_and_score_its_states():
    """Without importance weights the full trajectory would not be what others estimate."""
    own = ["sampling.policy=approximate", "algorithm.rollout_correction=2"]
    variants = plan_variants(tiny(*own, "algorithm.prompts_per_iteration=2"), [1], ["egspo"])
    assert [each.rollout_correction for each in variants.values()] == [2, 2, 2]
    cached = tiny("sampling.policy=cached", "algorithm.prompts_per_iteration=2")
    with pytest.raises(ValueError, match="algorithm.name=espo scores states that the sampler did"):
        plan_variants(cached, [1], ["espo"])


def test_noise_and_angle_are_those_of_known_gradients():
    """Draws are the truth plus noise of variance 4 in one of SIZE directions each."""
    generator = torch.Generator().manual_seed(0)
    batches, draws = 40, 50
    truth = torch.randn(batches, 1, 2, SIZE, generator=generator, dtype=torch.float64)
    truth /= SIZE**0.5
    other = torch.zeros_like(truth)
    other[..., 0] = 2.0 * torch.randn(batches, 1, 2, generator=generator)
    noise = torch.zeros(batches, draws, 2, SIZE, dtype=torch.float64)
    noise[..., 0] = 2.0 * torch.randn(batches, draws, 2, generator=generator)
    full = Gradients(truth, work=10.0)
    found = compare(
        {
            "noisy": Gradients(truth + noise, 5.0),
            "biased": Gradients(truth + other, 5.0),
            "lost": Gradients(noise - noise.mean(1, keepdim=True), 5.0),
        },
        full,
        rollout_work=5.0,
    )
    # Halves have variance 1 each, so a batch has 1/2; the mean of two noises has 4/2.
    assert found.qualities["noisy"].draws == pytest.approx(4.0, rel=0.15)
    assert found.qualities["noisy"].cosine == pytest.approx(1.0, abs=0.05)
    assert found.qualities["biased"].cosine == pytest.approx((0.5 / 2.5) ** 0.5, abs=0.1)
    lost = found.qualities["lost"]  # its mean is less than what its noise would leave
    assert math.isnan(lost.cosine) and math.isnan(lost.draws) and lost.per_work == 0
    assert found.signal == pytest.approx(0.0, abs=0.1)
    assert found.qualities["noisy"].work == 10.0
