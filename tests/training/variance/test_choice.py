"""Which number of draws is chosen, from noise and work that are given."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from agrpo_megatron.training.variance.choice import (
    KEPT,
    MARGIN,
    Candidate,
    State,
    best,
    components,
    from_record,
    ladder,
    learned,
    window,
)

# By draws: variance by them, where completions have a variance of 2; and the work of an iteration.
MEASURED = {1: (2.8, 14.0), 2: (0.78, 18.0), 4: (0.02, 26.0), 8: (0.0, 42.0)}


def _candidates(extra_work=0.0):
    return {k: Candidate(draws, 2.0, w + extra_work, 1.0) for k, (draws, w) in MEASURED.items()}


def test_the_number_of_draws_with_the_least_noise_times_work_is_chosen():
    assert [round(each.cost, 2) for each in _candidates().values()] == [33.6, 25.02, 26.26, 42.0]
    assert best(_candidates(), 8) == 2
    assert best(_candidates(extra_work=100), 1) == 4, "draws pay where rollouts are dear"


def test_of_nearly_equal_numbers_the_lowest_is_chosen():
    found = _candidates()
    found[2] = replace(found[2], draws=0.92)
    assert 1 < found[2].cost / found[4].cost < MARGIN and best(found, 4) == 2
    found[2] = replace(found[2], draws=1.1)
    assert found[2].cost / found[4].cost > MARGIN and best(found, 4) == 4


def test_estimates_below_zero_choose_nothing_absurd():
    found = _candidates()
    found[8] = replace(found[8], draws=-1.0)
    assert found[8].noise == 0.0
    unknown = {k: replace(each, rollouts=-0.1) for k, each in found.items()}
    assert best(unknown, 16) == 16, "noise of the rollouts is not known: nothing changes"


def test_candidates_are_powers_of_two_below_the_live_steps_and_all_steps():
    assert ladder(12, 12) == [1, 2, 4, 8, 12]
    assert ladder(12, 9) == [1, 2, 4, 8, 12]
    assert ladder(12, 8) == [1, 2, 4, 12]
    assert ladder(16, 16) == [1, 2, 4, 8, 16]
    assert ladder(2, 2) == [1, 2] and ladder(1, 1) == [1]


def test_later_measurements_are_of_the_neighbours():
    rungs = ladder(128, 128)
    assert window(rungs, 8) == [4, 8, 16, 32]
    assert window(rungs, 1) == [1, 2, 4, 8]
    assert window(rungs, 128) == window(rungs, 64) == [16, 32, 64, 128]
    assert window(rungs, 24) == [8, 16, 32, 64], "a number between two rungs counts as the lower"
    assert window([1, 2], 8) == [1, 2]


def test_measurements_are_averaged_and_change_only_what_they_measured():
    state = State(8, candidates={16: Candidate(1.0, 1.0, 1.0, 1.0)})
    for noise in (1.0, 3.0):
        state = learned(state, [1, 1, 2], [noise - 0.5, noise + 0.5, 0.2], 2.0, [10.0, 10.0, 11.0])
    assert state.candidates[1] == Candidate(KEPT + 3, 2 * KEPT + 2, 10 * KEPT + 10, KEPT + 1)
    assert state.candidates[2].noise == pytest.approx(0.1)
    assert state.candidates[16] == Candidate(1.0, 1.0, 1.0, 1.0)
    assert state.chosen == 2, "of the measured ones"


def test_a_checkpoint_gives_the_state_back():
    state = replace(learned(State(8), [1, 2], [0.1, 1 / 3], 0.7, [3.0, 4.0]), spent=0.1, made=7.0)
    assert from_record(json.loads(json.dumps(asdict(state)))) == state


@pytest.mark.parametrize("is_exact", [True, False])
def test_noise_is_found_without_bias(is_exact):
    """Halves have variance 1 by rollouts, so a batch has 1/2; draws add 4, 1 and 1/4 to a half."""
    generator = torch.Generator().manual_seed(0)
    batches, size = 4000, 8
    scales = [2.0, 1.0, 0.0 if is_exact else 0.5]

    def normal(*shape):
        return torch.randn(*shape, size, generator=generator, dtype=torch.float64) / size**0.5

    signal = 3 * normal(1, 1)
    found = []
    for _ in range(batches):
        rollouts = signal + normal(1, 2)
        own = torch.stack([scale * normal(2) for scale in scales])
        draws, of_rollouts = components(rollouts + own, is_exact=is_exact)
        found.append([*draws, of_rollouts])
    expected = [scale**2 / 2 for scale in scales] + [0.5]
    table = torch.tensor(found)
    error = (table.mean(0) - torch.tensor(expected)).abs()
    assert bool((error <= 4 * table.std(0) / batches**0.5).all()), table.mean(0)
    assert bool((table.std(0)[[0, 1, 3]] > 0).all()), "these are estimates"


def test_the_gradient_of_all_rollouts_cancels():
    """Noise of the draws is found from differences on the same rollouts, whatever these are."""
    own = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone, _ = components(own, is_exact=False)
    with_rollouts, _ = components(own + 1e3 * torch.ones(1, 2, 16), is_exact=False)
    assert with_rollouts == pytest.approx(alone, rel=1e-9)
