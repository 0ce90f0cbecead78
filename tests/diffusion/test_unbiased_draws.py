"""Drawn steps estimate the full trajectory without bias: integrals over all draws (float64).

A draw is a function of uniform numbers that is constant between the breakpoints of the inverse
CDF. Each test lists those cells, runs the package's own drawing code on one number of each, and
weighs the result by the cell's size; nothing is left to chance.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import (
    PROPOSALS,
    STEP_SAMPLERS,
    AlgorithmSettings,
    SamplingSettings,
)
from agrpo_megatron.diffusion import noise
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import (
    all_steps,
    draw_counts,
    drawn_steps,
    proposal_of,
    step_weights,
)
from agrpo_megatron.types import Rollout
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


def cells(points, low=0.0, high=1.0):
    """Return (middle, width) of the cells that `points` cut out of [low, high]."""
    edges = sorted({low, high, *(p for p in points if low < p < high)})
    pairs = zip(edges, edges[1:], strict=False)
    return [((a + b) / 2, b - a) for a, b in pairs if b - a > 1e-13]


def integrate(sampler, cdfs, counts):
    """List (own, order, weight): every cell of the uniforms behind one group's draws.

    `own` and `order` have `counts` [G] numbers in each row: what `noise.uniform` returns for the
    numbers inside a part and for the shuffle of parts. Weights sum to 1.
    """
    if sampler == "batch":
        yield from _integrate_batch(cdfs, counts)
        return
    (cdf,), (count,) = cdfs, counts
    if sampler in ("systematic", "distinct", "blocks"):
        combs = [[count * c - place for c in cdf] for place in range(count)]
        for middle, width in cells(itertools.chain.from_iterable(combs)):
            yield [[middle] * count], None, width
        return
    parts = [[count * c - place for c in cdf] for place in range(count)]
    axes = [cells(part if sampler == "stratified" else cdf) for part in parts]
    for combination in itertools.product(*axes):
        middles, widths = [m for m, _ in combination], [w for _, w in combination]
        yield [middles], None, float(torch.tensor(widths, dtype=torch.float64).prod())


def _integrate_batch(cdfs, counts):
    size, owners = sum(counts), [row for row, count in enumerate(counts) for _ in range(count)]
    permutations = list(itertools.permutations(range(size)))
    for shuffled in permutations:
        axes = []
        for row, part in zip(owners, shuffled, strict=True):
            axes.append(cells([size * c - part for c in cdfs[row]]))
        for combination in itertools.product(*axes):
            middles, widths = [m for m, _ in combination], [w for _, w in combination]
            weight = float(torch.tensor(widths, dtype=torch.float64).prod()) / len(permutations)
            yield _rows(middles, counts), _rows(shuffled, counts), weight


def _rows(values, counts):
    ends = list(itertools.accumulate(counts))
    return [list(values[end - n : end]) for n, end in zip(counts, ends, strict=True)]


def listed_draws(trajectory, context, counts):
    """Repeat each group once for each cell of its draws: (rows, own, order, weights)."""
    algorithm = context.algorithm
    counts = timesteps.unit_counts(counts, trajectory, context.algorithm.step_sampler)
    proposal, _ = timesteps.in_units(
        proposal_of(trajectory, context), trajectory, algorithm.step_sampler
    )
    if algorithm.step_sampler in ("distinct", "blocks"):
        proposal = timesteps.inclusion(proposal, counts) / counts.clamp(min=1)[:, None]
    size = algorithm.group_size if algorithm.step_sampler == "batch" else 1
    rows, own, order, weights = [], [], [], []
    for first in range(0, len(proposal), size):
        cdfs = proposal[first : first + size].cumsum(1).tolist()
        here = counts[first : first + size].tolist()
        for numbers, shuffle, weight in integrate(algorithm.step_sampler, cdfs, here):
            rows += range(first, first + size)
            own += numbers
            order += shuffle or []
            weights += [weight] * size
    order = _table(order, int(counts.max())) / 1e3 if order else None
    weights = torch.tensor(weights, dtype=torch.float64)
    return torch.tensor(rows), _table(own, int(counts.max())), order, weights


def _table(rows, width):
    """Pad rows of numbers; those past a rollout's draws must not matter."""
    return torch.tensor([[*row, *[0.37] * (width - len(row))] for row in rows]).double()


def mean_gradient(monkeypatch, trajectory, gains, algorithm, *, toy=TOY, table=TABLE):
    """Return the mean of the estimate over all draws, and the full trajectory's gradient."""
    context = DrawContext(algorithm, toy.eos_id, 0)
    counts = draw_counts(Rollout(trajectory, gains, gains > 0, gains), context)
    rows, own, order, weights = listed_draws(trajectory, context, counts)
    repeated = take(trajectory, rows)
    queue = replay(monkeypatch, own, order)
    draws = drawn_steps(repeated, context, counts[rows])
    assert not queue
    got = estimator_gradient(table, toy, repeated, gains[rows] * weights, draws, algorithm)
    full = all_steps(trajectory, context)
    return got, estimator_gradient(table, toy, trajectory, gains, full, algorithm)


def replay(monkeypatch, own, order):
    """Let `draw_uniforms` read these numbers instead of its noise: first `own`, then `order`."""
    queue = [own] if order is None else [own, order]
    monkeypatch.setattr(timesteps.noise, "uniform", lambda _key: queue.pop(0))
    return queue


@pytest.mark.parametrize("enumerate_short", [False, True])
@pytest.mark.parametrize("allocation", ["equal", "advantage"])
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_mean_over_all_draws_is_the_full_trajectory_gradient(
    monkeypatch, sampler, proposal, allocation, enumerate_short
):
    algorithm = AlgorithmSettings(
        mc_samples=2,
        step_sampler=sampler,
        proposal=proposal,
        enumerate_short=enumerate_short,
        allocation=allocation,
        group_size=2,
    )
    trajectory = trajectories(temperature=0.9)
    if sampler == "batch":  # pairs that mix lengths; listing all draws of one takes 24 shuffles
        trajectory = take(trajectory, torch.tensor([0, 14, 7, 13, 5, 14]))
    gains = torch.randn(len(trajectory.tokens), generator=torch.Generator().manual_seed(1))
    gains = gains.double()
    gains[2] = 0
    got, expected = mean_gradient(monkeypatch, trajectory, gains, algorithm)
    assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("proposal", ["entropy", "gradient"])
@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_mean_over_draws_of_a_truncated_policy_with_many_tokens_a_step(
    monkeypatch, sampler, proposal
):
    options = {"block_length": 3, "denoising_steps": 2, "top_k": 2, "temperature": 1.4}
    trajectory = take(trajectories(**options), torch.tensor([1, 8, 3, 0]))
    algorithm = AlgorithmSettings(
        mc_samples=2, step_sampler=sampler, proposal=proposal, enumerate_short=False, group_size=2
    )
    gains = torch.tensor([1.0, -0.3, 0.7, 2.0], dtype=torch.float64)
    got, expected = mean_gradient(monkeypatch, trajectory, gains, algorithm)
    assert relative_error(got, expected) < EXACT


def test_a_block_is_drawn_with_all_of_its_steps(monkeypatch):
    """Two of four steps are one of two blocks; a row that ended early has one block."""
    toy = Toy(length=4, tokens=2, eos_id=0)
    table = toy.table(seed=4)
    sampling = SamplingSettings(completion_length=4, block_length=2, denoising_steps=4)
    trajectory = enumerate_trajectories(table, toy, sampling).trajectory
    short = (trajectory.num_steps == 2).nonzero()[:2, 0]
    trajectory = take(trajectory, torch.cat([short, torch.arange(4, len(trajectory.tokens), 2)]))
    steps = trajectory.num_steps
    assert steps.unique().tolist() == [2, 4]
    algorithm = AlgorithmSettings(mc_samples=2, step_sampler="blocks", group_size=2)
    draws = drawn_steps(trajectory, DrawContext(algorithm, toy.eos_id, 3))
    assert torch.bincount(draws.rollout).tolist() == [2] * len(steps)
    first, second = draws.step.view(-1, 2).T
    assert (first % 2 == 0).all() and torch.equal(second, first + 1)
    assert set(first[steps == 4].tolist()) == {0, 2}
    gains = torch.linspace(-1, 2, len(steps)).double()
    facts = {"toy": toy, "table": table}
    got, expected = mean_gradient(monkeypatch, trajectory, gains, algorithm, **facts)
    assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("mix", [0.0, 0.1])
@pytest.mark.parametrize("sampler", ["distinct", "systematic", "independent"])
def test_steps_without_an_alternative_are_left_out_exactly(monkeypatch, sampler, mix):
    """Top-p leaves some steps one candidate: no gradient, so no row, and no share of uniform."""
    trajectory = trajectories(temperature=0.8, top_p=0.8, early_end=False)
    algorithm = AlgorithmSettings(
        mc_samples=2, step_sampler=sampler, proposal="gradient", uniform_mix=mix
    )
    context = DrawContext(algorithm, TOY.eos_id, 0)
    alone = timesteps.step_entropies(trajectory, 3) == 0
    assert int(alone.sum()) == 6 and alone.shape == (12, 3)
    proposal = proposal_of(trajectory, context)
    assert (proposal[alone] == 0).all()
    assert torch.allclose(proposal.sum(1), (proposal > 0).any(1).double(), atol=1e-13)
    draws = drawn_steps(trajectory, context)
    assert not alone[draws.rollout, draws.step].any()
    gains = torch.linspace(-1, 2, len(alone)).double()
    got, expected = mean_gradient(monkeypatch, trajectory, gains, algorithm)
    assert relative_error(got, expected) < EXACT
    scored_by_model = replace(context, algorithm=replace(algorithm, scored_policy="model"))
    assert (proposal_of(trajectory, scored_by_model)[alone] > 0).all()


@pytest.mark.parametrize("count", [3, 4, 50])
@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_as_many_draws_as_live_steps_are_the_full_trajectory(sampler, count):
    trajectory = take(trajectories(), torch.arange(14))
    algorithm = AlgorithmSettings(
        mc_samples=count,
        step_sampler=sampler,
        proposal="entropy",
        group_size=2,
        enumerate_short=sampler not in ("distinct", "blocks"),
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
    algorithm = AlgorithmSettings(
        mc_samples=3, step_sampler=sampler, proposal="uniform", enumerate_short=False
    )
    context = DrawContext(algorithm, TOY.eos_id, 5)
    drawn = drawn_steps(trajectory, context)
    full = all_steps(trajectory, context)
    assert torch.equal(drawn.step, full.step)
    assert torch.allclose(drawn.weight, full.weight, rtol=1e-14)


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.5, 1.0])
def test_step_weights_average_one_and_the_mix_bounds_them(mix):
    trajectory = trajectories(temperature=0.4)
    algorithm = AlgorithmSettings(proposal="entropy", uniform_mix=mix)
    live, proposal = trajectory.num_steps, proposal_of(trajectory, DrawContext(algorithm, 0, 0))
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
        torch.arange(groups * size),
        torch.full((groups * size,), count),
        sampler=sampler,
        seed=3,
        group_size=size,
    )
    assert float(draws.min()) > 0 and float(draws.max()) < 1
    is_grid = sampler in ("systematic", "distinct", "blocks")
    own = draws * count % 1 if is_grid or sampler == "stratified" else draws
    for column in own.T:
        ordered = column.sort().values
        expected = (torch.arange(groups * size) + 0.5) / (groups * size)
        assert float((ordered - expected).abs().max()) < 1.95 / (groups * size) ** 0.5
    parts = {"independent": 0, "batch": size * count}.get(sampler, count)
    if parts:
        held = (draws * parts).long().view(-1, parts).sort(1).values
        assert torch.equal(held, torch.arange(parts).expand_as(held))
    if is_grid:
        assert torch.allclose(draws.diff(dim=1), torch.tensor(1 / count).double(), rtol=1e-12)


@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_drawn_steps_do_not_depend_on_the_other_groups(sampler):
    ids = torch.tensor([40, 41, 6, 7, 100, 101])
    options = {"sampler": sampler, "seed": 3, "group_size": 2}
    counts = torch.tensor([5, 5, 3, 4, 2, 5])
    together = timesteps.draw_uniforms(ids, counts, **options)
    alone = timesteps.draw_uniforms(ids[2:4], counts[2:4], **options)
    drawn = torch.arange(4) < counts[2:4, None]
    if sampler != "batch":  # whose shuffle counts the places of the widest rollout
        assert torch.equal(together[2:4, :4][drawn], alone[drawn])
    equal = torch.full((6,), 5)
    together = timesteps.draw_uniforms(ids, equal, **options)
    assert torch.equal(together[2:4], timesteps.draw_uniforms(ids[2:4], equal[2:4], **options))


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
    """`batch` hashes its shuffle and its numbers; equal keys would tie the two together."""
    ids, count = torch.arange(2000), 2
    keys = noise.noise_key(0, noise.STEPS, ids[:, None], torch.arange(2 * count))
    numbers = noise.uniform(keys)
    correlation = torch.corrcoef(numbers.T)
    assert float((correlation - torch.eye(4).double()).abs().max()) < 0.09
