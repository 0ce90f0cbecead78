"""Weights for rollouts in a layout of their own: in small groups, after the optimizer."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.megatron.reshard import GroupedCopy
from tests.megatron.one_queue import Part, Step, stuck
from tests.ranks import run_ranks
from tests.training.tiny import open_session

MOST = 256  # transfers of a group
DEEP = [  # as many tensors as LLaDA-8B has; no rows of the vocabulary are padding
    "model.num_layers=32",
    "model.num_query_groups=4",
    "model.vocab_size=84",
]


def _step(operations, isend):
    parts = (
        Part("send" if each.op is isend else "receive", each.peer, "", each.tensor.numel())
        for each in operations
    )
    return Step("exchange", parts=tuple(parts))


def _update(overrides):
    """Return what this rank does to copy the weights, and the weights of its rollout network."""
    session, engine = open_session(*DEEP, *overrides, world_size=dist.get_world_size())
    program, batch, isend = [], dist.batch_isend_irecv, dist.isend
    order, synchronize, submit = [], torch.cuda.synchronize, GroupedCopy.submit_send

    def batched(operations):
        program.append(_step(operations, isend))
        return batch(operations)

    def submitted(self, *args, **kwargs):
        order.append("send")
        submit(self, *args, **kwargs)

    def synchronized():
        order.append("synchronize")
        synchronize()

    dist.batch_isend_irecv, GroupedCopy.submit_send = batched, submitted
    torch.cuda.synchronize = synchronized
    network = engine.rollout_network()
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    return program, order, weights


@pytest.mark.parametrize(
    ("training", "rollouts", "transfers"),  # the last: of each rank
    [
        ("tp2", "tp1", [324, 324]),
        ("tp4", "tp2", [324, 648, 648, 324]),
        ("tp2-pp2", "tp1", [551, 551, 551, 551]),
    ],
)
def test_weights_are_copied_in_small_groups(training, rollouts, transfers):
    overrides = [f"parallel={training}", f"rollout.parallel={rollouts}"]
    results = run_ranks(len(transfers), _update, overrides)
    programs = [program for program, _, _ in results]
    sizes = [[len(step.parts) for step in program] for program in programs]
    assert [sum(each) for each in sizes] == transfers
    assert max(max(each) for each in sizes) <= MOST
    assert stuck(programs) == {}


def test_the_copy_is_exact_and_follows_the_optimizer():
    (_, _, alone), *_ = run_ranks(1, _update, [])
    for _, order, weights in run_ranks(2, _update, ["parallel=tp2", "rollout.parallel=tp1"]):
        assert order[0] == "synchronize" and "send" in order
        assert weights.keys() == alone.keys()
        assert all(torch.equal(weights[name], alone[name]) for name in alone)


def test_groups_that_each_rank_cuts_for_itself_hang():
    """First all sends, then all receives, cut by their number: the second rank does the same."""

    def program(peer):
        ways = ["send"] * MOST + ["receive"] * MOST
        parts = [Part(way, peer, "", 1) for way in ways]
        groups = (parts[:MOST], parts[MOST:])
        return [Step("exchange", parts=tuple(group)) for group in groups]

    assert set(stuck([program(1), program(0)])) == {0, 1}
