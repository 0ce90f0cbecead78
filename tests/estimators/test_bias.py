"""The expected gradient of every estimator against the exact one, by listing all rollouts."""

import pytest
import torch

from agrpo_megatron.config.settings.estimators import ENTRIES
from tools.estimator_bias import VARIANTS, angle, expected_gradient, make_case, measured

torch.set_num_threads(1)
EXACT = 1e-9  # relative
# An estimator, the order that it claims, and what its normaliser divides by: three steps.
CLAIMED = [
    ("full_trajectory", "random", {}),
    ("full_trajectory", "leftmost", {}),
    ("full_trajectory", "random", {"level": "row"}),
    ("full_trajectory", "random", {"level": "sequence"}),
    ("full_trajectory", "random", {"loss": "reinforce"}),
    ("just_grpo", "leftmost", {}),
    ("block_just_grpo", "leftmost", {}),
    ("cj_grpo", "random", {}),
    ("agrpo", "random", {"mc_samples": 3}),
]


@pytest.mark.parametrize(("name", "unmasking", "more"), CLAIMED)
def test_an_estimator_is_unbiased_for_what_it_claims(name, unmasking, more):
    case = make_case(unmasking)
    got, _ = expected_gradient(case, {"name": name, **more}, seeds=1)
    steps = 1 if more.get("level") == "sequence" else case.toy.length
    error = float((got * steps - case.exact).norm() / case.exact.norm())
    assert error < EXACT


OTHERS = sorted(set(ENTRIES) - {name for name, *_ in CLAIMED} - {"vrpo", "wd1"})


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_estimator_is_biased_by_more_than_its_noise(name):
    """Nothing in docs/estimators.md calls an estimator biased that is not."""
    on_table, noise, on_shared, its_noise, _ = measured(make_case(), VARIANTS[name], seeds=20)
    assert on_table > max(8.0, noise) and on_shared > max(8.0, its_noise)


def test_the_angle_notices_a_wrong_sign_and_a_lost_rollout():
    case = make_case()
    got, rows = expected_gradient(case, VARIANTS["full_trajectory"], seeds=1)
    assert angle(-got, case.exact) == pytest.approx(180.0, abs=1e-3) and rows == 3
    assert angle(got * (torch.arange(got.shape[0]) > 20)[:, None, None], case.exact) > 5
