"""No stages wait for each other in a circle, on the worst devices there can be."""

import pytest
import torch

from tests.megatron.one_queue import Part, Step, stuck
from tests.megatron.recorded import record
from tests.ranks import run_ranks
from tests.training.tiny import tiny

SAMPLING = [
    "sampling.completion_length=3",
    "sampling.denoising_steps=3",
    "sampling.block_length=1",
]
STAGES = (2, 3, 4, 8)


def _prompts(kind, stages, groups):
    """Return lengths of prompts; those of one token end at once, and leave their group."""
    if kind == "one stays":  # it is in flight while all others only finish
        return [8, *[1] * (groups - 1)]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 9, (groups + stages,), generator=generator).tolist()


def _programs(schedule, stages, virtual, kind="ragged", stop_at=None):
    """Return programs and samples, with as many groups as stages, and 2, 3 and 4 times as many."""
    layout = f"parallel=pp{stages}" + (f"-vpp{virtual}" if virtual > 1 else "")
    overrides = [layout, f"model.num_layers={stages * virtual}", f"rollout.schedule={schedule}"]
    results = []
    for groups in range(stages, 5 * stages, stages):
        settings = tiny(*overrides, *SAMPLING, f"rollout.groups={groups}")
        results.append(record(settings, _prompts(kind, stages, groups), stop_at=stop_at))
    return results


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("schedule", ["ring", "lockstep"])
def test_rollouts_end_with_one_queue_and_sends_that_wait(schedule, stages, virtual):
    for programs, sampled in run_ranks(1, _programs, schedule, stages, virtual)[0]:
        assert stuck(programs) == {}
        assert all(torch.equal(tokens, sampled[0]) for tokens in sampled)


def test_channels_are_opened_in_one_order_before_they_are_used():
    """NCCL opens a channel at its first message; the first ones have one element."""
    for programs, _ in run_ranks(1, _programs, "ring", 3, 2)[0]:
        for rank, program in enumerate(programs):
            assert program[0].kind == "meet"
            parts = [part for step in program for part in step.parts]
            opened = [part.peer for part in parts if part.size == 1]
            assert opened == [[1, 2], [0, 2], [1, 0]][rank]
            assert {part.peer for part in parts} == set(opened)
            assert all(part.size == 1 for part in parts[: len(opened)])


@pytest.mark.parametrize("stages", STAGES)
def test_so_do_groups_that_finish_while_none_enters(stages):
    for programs, _ in run_ranks(1, _programs, "ring", stages, 2, "one stays")[0]:
        assert stuck(programs) == {}


@pytest.mark.parametrize("virtual", [1, 2])
def test_so_does_a_rollout_that_is_stopped(virtual):
    for programs, sampled in run_ranks(1, _programs, "ring", 3, virtual, "ragged", 5)[0]:
        assert stuck(programs) == {} and sampled == 3 * [None]


def _send(peer):
    return Step("exchange", parts=(Part("send", peer, "", 1),))


def _receive(peer):
    return Step("exchange", parts=(Part("receive", peer, "", 1),))


def test_a_circle_is_found():
    first, second = [_send(1), _receive(1)], [_send(0), _receive(0)]
    assert stuck([first, second]) == {0: _send(1), 1: _send(0)}
    assert stuck([first, second[::-1]]) == {}
    together = [
        [Step("exchange", parts=_send(peer).parts + _receive(peer).parts)] for peer in (1, 0)
    ]
    assert stuck(together) == {}
    assert set(stuck([[_send(1)], []])) == {0}
    assert stuck([[Step("post", 1)], []]) == {} and set(stuck([[Step("take", 1)], []])) == {0}
    assert set(stuck([[Step("meet")], []])) == {0}
    vote, count = Step("vote"), Step("count")
    assert stuck([[vote, count], [vote]]) == {}
    assert set(stuck([[vote, vote, count, count], [vote]])) == {0}
