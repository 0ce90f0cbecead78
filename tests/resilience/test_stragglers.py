"""Every rank learns which rank is slow in which section."""

import time

import pytest
import torch.distributed as dist

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stragglers import LEAST, SLOW, STREAK, Stragglers
from tests.ranks import run_ranks


def _reports(slow, count):
    """Return the reports of a rank; in each iteration `slow` maps a rank to seconds of sleep."""
    ranks = start_ranks(Settings())
    stragglers, sections, reports = Stragglers(), Sections(), []
    for iteration in range(count):
        dist.barrier()
        with sections("rollout"):
            time.sleep(0.05 + slow[iteration % len(slow)].get(dist.get_rank(), 0.0))
        with sections("update"):
            pass
        warnings: list[str] = []
        metrics = stragglers.report(sections.take(), ranks, warn=warnings.append)
        reports.append((metrics, warnings))
    return reports


@pytest.mark.slow
def test_the_rank_that_is_slow_is_named_by_all_and_spoken_of_once():
    first, *others = run_ranks(3, _reports, [{1: 0.2}], STREAK + 2)
    assert all(other == first for other in others)
    for metrics, _ in first:
        assert set(metrics) == {"section/rollout", "straggler/rollout", "straggler/rollout_rank"}
        assert metrics["straggler/rollout_rank"] == 1
        assert metrics["section/rollout"] >= 0.25
        assert metrics["straggler/rollout"] > SLOW
    spoken = [bool(warnings) for _, warnings in first]
    assert spoken == [number == STREAK for number in range(1, STREAK + 3)]
    [sentence] = first[STREAK - 1][1]
    assert sentence.startswith("rank 1 was the slowest in section rollout 5 times in a row, now 0.")


@pytest.mark.slow
def test_ranks_that_take_turns_at_being_slow_are_not_spoken_of():
    reports = run_ranks(3, _reports, [{0: 0.2}, {1: 0.2}, {2: 0.2}], STREAK + 1)[0]
    assert [metrics["straggler/rollout_rank"] for metrics, _ in reports] == [0, 1, 2, 0, 1, 2]
    assert not any(warnings for _, warnings in reports)


def _equal():
    ranks, warnings = start_ranks(Settings()), []
    seconds = {"reward": 2.0, "update": LEAST / 2}
    return Stragglers().report(seconds, ranks, warn=warnings.append), warnings


def test_equal_ranks_have_the_ratio_1_and_short_sections_are_left_out():
    for metrics, warnings in run_ranks(2, _equal):
        assert metrics == {
            "section/reward": 2.0,
            "straggler/reward": 1.0,
            "straggler/reward_rank": 0.0,
        }
        assert warnings == []
    assert run_ranks(1, _equal) == [({}, [])], "a single rank has no other to compare with"
