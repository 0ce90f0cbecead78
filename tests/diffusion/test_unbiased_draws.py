"""Drawn steps estimate the full trajectory without bias: integrals over all draws (float64).

A draw is a function of uniform numbers that is constant between the breakpoints of the inverse
CDF. Each test lists those cells, runs the package's own drawing code on one number of each, and
weighs the result by the cell's size; nothing is left to chance.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import STEP_SAMPLERS, AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, drawn_steps, step_weights
from tests.diffusion.toy import (
    Toy,
    enumerate_trajectories,
    estimator_gradient,
    relative_error,
    take,
)

torch.set_num_threads(1)

EXACT = 1e-10  # relative
TOY = Toy(eos_id=0)
TABLE = TOY.table(seed=2)


def trajectories(**options):
    """Return all trajectories of blocks that end early: 1, 2 or 3 live steps."""
    options = {"block_length": 1, "denoising_steps": 3, **options}
    sampling = SamplingSettings(completion_length=3, **options)
    return enumerate_trajectories(TABLE, TOY, sampling).trajectory


def proposal_of(trajectory, algorithm):
    live = trajectory.num_steps
    entropies = timesteps.step_entropies(trajectory, int(live.max()))
    proposal = timesteps.step_proposal(
        live, entropies, proposal=algorithm.proposal, uniform_mix=algorithm.uniform_mix
    )
    return live, proposal


def cells(points, low=0.0, high=1.0):
    """Return (middle, width) of the cells that `points` cut out of [low, high]."""
    edges = sorted({low, high, *(p for p in points if low < p < high)})
    pairs = zip(edges, edges[1:], strict=False)
    return [((a + b) / 2, b - a) for a, b in pairs if b - a > 1e-13]


def integrate(sampler, cdfs, count):
    """List (own, order, weight): every cell of the uniforms behind one group's draws.

    `own` [G, count] and `order` [G, count] are what `noise.uniform` returns for the numbers inside
    a part and for the shuffle of parts. Weights sum to 1.
    """
    if sampler == "batch":
        yield from _integrate_batch(cdfs, count)
        return
    (cdf,) = cdfs
    if sampler == "systematic":
        combs = [[count * c - place for c in cdf] for place in range(count)]
        for middle, width in cells(itertools.chain.from_iterable(combs)):
            yield [[middle] * count], None, width
        return
    parts = [[count * c - place for c in cdf] for place in range(count)]
    axes = [cells(part if sampler == "stratified" else cdf) for part in parts]
    for combination in itertools.product(*axes):
        middles, widths = zip(*combination, strict=True)
        yield [list(middles)], None, float(torch.tensor(widths, dtype=torch.float64).prod())


def _integrate_batch(cdfs, count):
    size = len(cdfs) * count
    permutations = list(itertools.permutations(range(size)))
    for shuffled in permutations:
        axes = []
        for place, part in enumerate(shuffled):
            axes.append(cells([size * c - part for c in cdfs[place // count]]))
        for combination in itertools.product(*axes):
            middles, widths = zip(*combination, strict=True)
            weight = float(torch.tensor(widths, dtype=torch.float64).prod()) / len(permutations)
            yield _rows(middles, count), _rows(shuffled, count), weight


def _rows(values, count):
    return [list(values[i : i + count]) for i in range(0, len(values), count)]


def listed_draws(trajectory, algorithm):
    """Repeat each group once for each cell of its draws: (trajectory, own, order, weights)."""
    _, proposal = proposal_of(trajectory, algorithm)
    size = algorithm.group_size if algorithm.step_sampler == "batch" else 1
    rows, own, order, weights = [], [], [], []
    for first in range(0, len(proposal), size):
        cdfs = proposal[first : first + size].cumsum(1).tolist()
        for numbers, shuffle, weight in integrate(
            algorithm.step_sampler, cdfs, algorithm.mc_samples
        ):
            rows += range(first, first + size)
            own += numbers
            order += shuffle or []
            weights += [weight] * size
    repeated = take(trajectory, torch.tensor(rows))
    double = torch.float64
    return (
        torch.tensor(rows),
        repeated,
        torch.tensor(own, dtype=double),
        torch.tensor(order, dtype=double) / 1e3 if order else None,
        torch.tensor(weights, dtype=double),
    )


def replay(monkeypatch, own, order):
    """Let `draw_uniforms` read these numbers instead of its noise: first `own`, then `order`."""
    queue = [own] if order is None else [own, order]
    monkeypatch.setattr(timesteps.noise, "uniform", lambda _key: queue.pop(0))
    return queue


@pytest.mark.parametrize("enumerate_short", [False, True])
@pytest.mark.parametrize("proposal", ["uniform", "entropy"])
@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_mean_over_all_draws_is_the_full_trajectory_gradient(
    monkeypatch, sampler, proposal, enumerate_short
):
    algorithm = AlgorithmSettings(
        mc_samples=2,
        step_sampler=sampler,
        proposal=proposal,
        enumerate_short=enumerate_short,
        group_size=2,
    )
    context = DrawContext(algorithm, TOY.eos_id, 0)
    trajectory = trajectories(temperature=0.9)
    if sampler == "batch":  # pairs that mix lengths; listing all draws of one takes 24 shuffles
        trajectory = take(trajectory, torch.tensor([0, 14, 7, 13, 5, 14]))
    gains = torch.randn(len(trajectory.tokens), generator=torch.Generator().manual_seed(1))
    gains = gains.double()
    rows, repeated, own, order, weights = listed_draws(trajectory, algorithm)
    queue = replay(monkeypatch, own, order)
    draws = drawn_steps(repeated, context)
    assert not queue
    got = estimator_gradient(TABLE, TOY, repeated, gains[rows] * weights, draws, algorithm)
    full = all_steps(trajectory, context)
    expected = estimator_gradient(TABLE, TOY, trajectory, gains, full, algorithm)
    assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_mean_over_draws_of_a_truncated_policy_with_many_tokens_a_step(monkeypatch, sampler):
    options = {"block_length": 3, "denoising_steps": 2, "top_k": 2, "temperature": 1.4}
    trajectory = take(trajectories(**options), torch.tensor([1, 8, 3, 0]))
    algorithm = AlgorithmSettings(
        mc_samples=2, step_sampler=sampler, proposal="entropy", enumerate_short=False, group_size=2
    )
    context = DrawContext(algorithm, TOY.eos_id, 0)
    gains = torch.tensor([1.0, -0.3, 0.7, 2.0], dtype=torch.float64)
    rows, repeated, own, order, weights = listed_draws(trajectory, algorithm)
    replay(monkeypatch, own, order)
    draws = drawn_steps(repeated, context)
    got = estimator_gradient(TABLE, TOY, repeated, gains[rows] * weights, draws, algorithm)
    full = all_steps(trajectory, context)
    expected = estimator_gradient(TABLE, TOY, trajectory, gains, full, algorithm)
    assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("count", [3, 4, 50])
@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_as_many_draws_as_live_steps_are_the_full_trajectory(sampler, count):
    trajectory = take(trajectories(), torch.arange(14))
    algorithm = AlgorithmSettings(
        mc_samples=count, step_sampler=sampler, proposal="entropy", group_size=2
    )
    context = DrawContext(algorithm, TOY.eos_id, 5)
    drawn = drawn_steps(trajectory, context)
    full = all_steps(trajectory, context)
    for name in ("rollout", "step", "weight"):
        assert torch.equal(getattr(drawn, name), getattr(full, name))


def test_only_short_rollouts_are_enumerated():
    """At two draws, rollouts of one or two live steps are scored once each, longer ones drawn."""
    trajectory = trajectories()
    for enumerate_short in (True, False):
        algorithm = AlgorithmSettings(mc_samples=2, enumerate_short=enumerate_short)
        draws = drawn_steps(trajectory, DrawContext(algorithm, TOY.eos_id, 5))
        rows = torch.bincount(draws.rollout, minlength=15)
        short = trajectory.num_steps <= 2
        assert (rows <= 2).all() and (rows >= 1).all()
        assert torch.equal(rows[short], trajectory.num_steps[short])


@pytest.mark.parametrize("sampler", ["stratified", "systematic"])
def test_a_comb_of_all_steps_is_the_full_trajectory_without_enumeration(sampler):
    trajectory = trajectories()
    trajectory = take(trajectory, (trajectory.num_steps == 3).nonzero().squeeze(1))
    algorithm = AlgorithmSettings(mc_samples=3, step_sampler=sampler, enumerate_short=False)
    context = DrawContext(algorithm, TOY.eos_id, 5)
    drawn = drawn_steps(trajectory, context)
    full = all_steps(trajectory, context)
    assert torch.equal(drawn.step, full.step)
    assert torch.allclose(drawn.weight, full.weight, rtol=1e-14)


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.5, 1.0])
def test_step_weights_average_one_and_the_mix_bounds_them(mix):
    trajectory = trajectories(temperature=0.4)
    algorithm = AlgorithmSettings(proposal="entropy", uniform_mix=mix)
    live, proposal = proposal_of(trajectory, algorithm)
    steps = torch.arange(proposal.shape[1]).expand_as(proposal)
    weights = step_weights(proposal, live, steps)
    assert torch.allclose((proposal * weights).sum(1), torch.ones(15).double(), atol=1e-13)
    assert torch.allclose(proposal.sum(1), torch.ones(15).double(), atol=1e-13)
    if mix > 0:
        assert float(weights.max()) <= 1 / mix + 1e-9
    else:
        assert float(weights.max()) > 2


def test_steps_are_those_of_the_cells_up_to_their_very_edges():
    generator = torch.Generator().manual_seed(0)
    live = torch.randint(1, 40, (200,), generator=generator)
    entropies = torch.rand(200, 40, generator=generator, dtype=torch.float64) ** 8
    proposal = timesteps.step_proposal(live, entropies, proposal="entropy", uniform_mix=0.0)
    cdf = proposal.cumsum(1)
    low, high = torch.cat([cdf[:, :1] * 0, cdf[:, :-1]], 1), cdf
    wide = (high - low > 1e-9) & (proposal > 0)
    for inside in (low + 1e-12, (low + high) / 2, high - 1e-12):
        steps = timesteps.invert(proposal, inside)
        assert torch.equal(steps[wide], torch.arange(40).expand_as(steps)[wide])
    quarters = torch.full((1, 4), 0.25, dtype=torch.float64)
    edges = torch.tensor([[0.25, 0.5, 0.75]], dtype=torch.float64)
    assert timesteps.invert(quarters, edges).tolist() == [[1, 2, 3]]  # as floor(4 u), published
    top = timesteps.invert(proposal, torch.ones(200, 1, dtype=torch.float64))
    assert torch.equal(top[:, 0], live - 1)


@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_each_uniform_is_uniform_and_spread_as_its_name_says(sampler):
    count, groups, size = 4, 3000, 2
    draws = timesteps.draw_uniforms(
        torch.arange(groups * size), count, sampler=sampler, seed=3, group_size=size
    )
    assert float(draws.min()) > 0 and float(draws.max()) < 1
    own = draws * count % 1 if sampler in ("stratified", "systematic") else draws
    for column in own.T:
        ordered = column.sort().values
        expected = (torch.arange(groups * size) + 0.5) / (groups * size)
        assert float((ordered - expected).abs().max()) < 1.95 / (groups * size) ** 0.5
    parts = {"stratified": count, "systematic": count, "batch": size * count}.get(sampler)
    if parts:
        held = (draws * parts).long().view(-1, parts).sort(1).values
        assert torch.equal(held, torch.arange(parts).expand_as(held))
    if sampler == "systematic":
        assert torch.allclose(draws.diff(dim=1), torch.tensor(1 / count).double(), rtol=1e-12)


@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_drawn_steps_do_not_depend_on_the_other_groups(sampler):
    ids = torch.tensor([40, 41, 6, 7, 100, 101])
    options = {"sampler": sampler, "seed": 3, "group_size": 2}
    together = timesteps.draw_uniforms(ids, 5, **options)
    alone = timesteps.draw_uniforms(ids[2:4], 5, **options)
    assert torch.equal(together[2:4], alone)


def test_rollouts_without_live_steps_weigh_nothing():
    trajectory = trajectories()
    empty = replace(trajectory, tokens=torch.zeros_like(trajectory.tokens))
    algorithm = AlgorithmSettings(live_steps="text", group_size=3)
    for sampler, steps in itertools.product(STEP_SAMPLERS, (all_steps, drawn_steps)):
        chosen = replace(algorithm, step_sampler=sampler, mc_samples=1, proposal="entropy")
        draws = steps(empty, DrawContext(chosen, 0, 0))
        assert len(draws.rollout) == 0
        gradient = estimator_gradient(TABLE, TOY, empty, torch.ones(15).double(), draws, chosen)
        assert float(gradient.abs().max()) == 0


def test_streams_of_the_shuffle_and_of_the_places_are_apart():
    """`batch` hashes its shuffle beside its numbers; equal keys would tie the two together."""
    ids, count = torch.arange(2000), 2
    keys = noise.noise_key(0, noise.STEPS, ids[:, None], torch.arange(2 * count))
    numbers = noise.uniform(keys)
    correlation = torch.corrcoef(numbers.T)
    assert float((correlation - torch.eye(4).double()).abs().max()) < 0.09
