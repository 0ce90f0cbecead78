"""The order of problems: epochs, shares of a mixture, nothing but seed and place."""

from collections import Counter

import pytest

from agrpo_megatron.rollout.data_order import pick_problems


def test_one_task_walks_through_its_epochs_each_in_an_order_of_its_own():
    picked = pick_problems([(7, 1.0)], range(21), seed=3)
    epochs = [picked[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert picked != pick_problems([(7, 1.0)], range(21), seed=4)


def test_the_order_is_that_of_earlier_versions():
    assert pick_problems([(5, 1.0)], range(10), seed=0) == [0, 2, 3, 4, 1, 2, 3, 4, 1, 0]


SHARES = [(6, 3.0), (50, 1.5), (11, 0.5)]
STARTS = [0, 6, 56, 67]


def _task(index):
    return next(k for k in range(3) if STARTS[k] <= index < STARTS[k + 1])


def test_a_place_does_not_depend_on_how_it_was_come_to():
    whole = pick_problems(SHARES, range(300), seed=1)
    again = pick_problems(SHARES, range(290, 300), seed=1)
    assert again == whole[290:]
    pieces = [pick_problems(SHARES, range(a, a + 30), seed=1) for a in range(0, 300, 30)]
    assert [index for piece in pieces for index in piece] == whole


def test_every_task_has_its_share_of_every_stretch():
    """After n places no task is as much as one place off its share of them."""
    picked, counts = pick_problems(SHARES, range(1000), seed=1), Counter()
    for ahead, index in enumerate(picked, start=1):
        counts[_task(index)] += 1
        for task, share in enumerate((0.6, 0.3, 0.1)):
            assert abs(counts[task] - share * ahead) < 1


def test_every_task_walks_through_its_own_epochs():
    picked = pick_problems(SHARES, range(500), seed=1)
    for task, (count, _) in enumerate(SHARES):
        mine = [index - STARTS[task] for index in picked if _task(index) == task]
        whole = len(mine) // count
        assert whole > 2
        for epoch in range(whole):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize("shares", [[(4, 1.0), (0, 5.0)], [(0, 5.0), (4, 1.0)]])
def test_a_task_without_problems_has_no_turn(shares):
    assert sorted(pick_problems(shares, range(4), seed=0)) == [0, 1, 2, 3]
