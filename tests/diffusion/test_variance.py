"""The variance of drawn steps is exact: it equals that of the package's own draws."""

import pytest
import torch

from agrpo_megatron.config.settings import STEP_SAMPLERS
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.steps import step_weights
from tools.estimator_variance import estimator_variance

torch.set_num_threads(1)
REPEATS = 20_000
GROUP = 3


def problem(proposal, *, seed=0):
    """Return contributions, proposal and live steps of two groups of three rollouts."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.tensor([7, 5, 3, 7, 1, 0])
    contributions = torch.randn(6, 7, 2, generator=generator, dtype=torch.float64)
    contributions[1] = 2 * contributions[0]  # rollouts of like profile: `batch` correlates them
    entropies = torch.rand(6, 7, generator=generator, dtype=torch.float64) ** 3
    chances = timesteps.step_proposal(live, entropies, proposal=proposal, uniform_mix=0.1)
    return contributions, chances, live


def drawn_sums(contributions, proposal, live, *, counts, sampler, enumerate_short):
    """Return REPEATS estimates [REPEATS, D] by `draw_uniforms` and `invert`."""
    rows, many = len(live), counts.repeat(REPEATS)
    uniforms = timesteps.draw_uniforms(
        torch.arange(rows * REPEATS), many, sampler=sampler, seed=1, group_size=GROUP
    )
    usable = (proposal > 0).sum(1)
    if sampler == "distinct":
        proposal = timesteps.inclusion(proposal, counts) / counts[:, None]
    repeated = proposal.repeat(REPEATS, 1)
    steps = timesteps.invert(repeated, uniforms)
    weights = step_weights(repeated, live.repeat(REPEATS), steps) / many[:, None]
    weights = weights * (torch.arange(weights.shape[1]) < many[:, None])
    owners = torch.arange(rows).repeat(REPEATS)
    values = (weights[:, :, None] * contributions[owners[:, None], steps]).sum(1)
    values = values.view(REPEATS, rows, -1)
    if enumerate_short or sampler == "distinct":
        values = values * (usable > counts)[:, None]
    return values.sum(1)


@pytest.mark.parametrize("enumerate_short", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, (1, 4, 2, 2, 1, 3)])
@pytest.mark.parametrize("proposal", ["uniform", "entropy"])
@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_variance_equals_that_of_drawn_steps(sampler, proposal, count, enumerate_short):
    contributions, chances, live = problem(proposal)
    counts = torch.tensor(count).expand(6)
    options = {"counts": counts, "sampler": sampler, "enumerate_short": enumerate_short}
    exact = float(
        estimator_variance(contributions, chances, live=live, group_size=GROUP, **options)
    )
    sums = drawn_sums(contributions, chances, live, **options)
    squares = (sums - sums.mean(0)).square().sum(1)
    error = float(squares.std()) / REPEATS**0.5
    assert abs(float(squares.mean()) - exact) < 4 * error + 1e-20
    if not enumerate_short and sampler != "distinct":
        alive = torch.arange(7) < live[:, None]
        expected = (contributions * alive[:, :, None]).sum(1) / live.clamp(min=1)[:, None]
        spread = sums.std(0) / REPEATS**0.5
        assert ((sums.mean(0) - expected.sum(0)).abs() < 4 * spread + 1e-12).all()


@pytest.mark.parametrize("sampler", STEP_SAMPLERS)
def test_enumerated_rollouts_add_no_variance(sampler):
    contributions, chances, live = problem("entropy")
    options = {"live": live, "sampler": sampler, "group_size": GROUP}
    options["counts"] = torch.full((6,), 7)
    none = estimator_variance(contributions, chances, **options)
    assert float(none) == 0
    drawn = estimator_variance(contributions, chances, enumerate_short=False, **options)
    assert float(drawn) > 0.01 or (sampler == "distinct" and float(drawn) == 0)


def test_a_comb_over_all_steps_has_no_variance():
    contributions, chances, live = problem("uniform")
    alone = {"contributions": contributions[:1], "proposal": chances[:1], "live": live[:1]}
    for sampler in ("stratified", "systematic"):
        got = estimator_variance(
            **alone,
            counts=torch.tensor([7]),
            sampler=sampler,
            group_size=1,
            enumerate_short=False,
        )
        assert float(got) < 1e-14


def test_batch_of_one_rollout_is_stratified():
    contributions, chances, live = problem("entropy")
    options = {"live": live, "counts": torch.full((6,), 3), "group_size": 1}
    got = [
        estimator_variance(contributions, chances, sampler=sampler, **options)
        for sampler in ("batch", "stratified")
    ]
    assert float(got[0]) == pytest.approx(float(got[1]), rel=1e-12)


def test_batch_gives_back_what_it_gains_where_a_group_shares_its_profile():
    """Advantages sum to zero: the strata that one rollout gains, another one loses."""
    profile = torch.arange(12.0)[None, :, None].double()
    contributions = torch.tensor([1.0, 1.0, -2.0])[:, None, None].double() * profile
    live = torch.full((3,), 12)
    chances = timesteps.step_proposal(
        live, torch.zeros(3, 12).double(), proposal="uniform", uniform_mix=0.0
    )
    variance = {
        sampler: float(
            estimator_variance(
                contributions,
                chances,
                live=live,
                counts=torch.full((3,), 4),
                sampler=sampler,
                group_size=3,
            )
        )
        for sampler in STEP_SAMPLERS
    }
    assert variance["batch"] > 0.95 * variance["independent"]
    assert variance["stratified"] < 0.1 * variance["independent"]


def test_stratified_is_never_worse_than_independent_and_a_comb_can_be():
    """A signal that repeats as the teeth of the comb do puts all draws on the same phase."""
    beat = torch.tensor([1.0, -1.0, 1.0, -1.0] * 4)[None, :, None].double()
    live = torch.tensor([16])
    chances = torch.full((1, 16), 1 / 16, dtype=torch.float64)
    variance = {
        sampler: float(
            estimator_variance(
                beat,
                chances,
                live=live,
                counts=torch.tensor([8]),
                sampler=sampler,
                group_size=1,
            )
        )
        for sampler in STEP_SAMPLERS
    }
    assert variance["stratified"] <= variance["independent"] + 1e-15
    assert variance["systematic"] > 7 * variance["independent"]
