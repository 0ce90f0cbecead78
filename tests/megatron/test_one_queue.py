"""No stages wait for each other in a circle, on the worst devices there can be."""

import pytest
import torch

from tests.megatron.one_queue import Part, Step, stuck
from tests.megatron.recorded import record
from tests.ranks import run_ranks
from tests.training.tiny import tiny

RAGGED = [  # rows end at different steps, and leave their group
    "sampling.completion_length=3",
    "sampling.denoising_steps=3",
    "sampling.block_length=1",
    "model.eos_token_id=6",
]
STAGES = (2, 3, 4, 8)


def _programs(schedule, stages, virtual=1, stop_at=None):
    """Return programs and samples, with as many groups as stages, and 2, 3 and 4 times as many."""
    layout = f"parallel=pp{stages}" + (f"-vpp{virtual}" if virtual > 1 else "")
    overrides = [layout, f"model.num_layers={stages * virtual}", f"rollout.schedule={schedule}"]
    results = []
    for times in (1, 2, 3, 4):
        settings = tiny(*overrides, *RAGGED, f"rollout.groups={times * stages}")
        results.append(record(settings, stages=stages, virtual=virtual, stop_at=stop_at))
    return results


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("schedule", ["ring", "lockstep"])
def test_rollouts_end_with_one_queue_and_sends_that_wait(schedule, stages, virtual):
    for programs, sampled in run_ranks(1, _programs, schedule, stages, virtual)[0]:
        assert stuck(programs) == {}
        assert all(torch.equal(tokens, sampled[0]) for tokens in sampled)


@pytest.mark.parametrize("stages", STAGES)
def test_a_stop_within_a_rollout_ends_too(stages):
    for virtual in (1, 2):
        found = run_ranks(1, _programs, "ring", stages, virtual, stages + 1)[0]
        for programs, sampled in found:
            assert stuck(programs) == {} and sampled == stages * [None]


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
