"""Rollouts under a pipeline: the same tokens by either schedule; the ring keeps stages busy."""

import time

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.diffusion.draw import Draw
from agrpo_megatron.megatron.forward import Slots
from agrpo_megatron.megatron.wire import receive_draw, send_draw
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.tiny import open_session, tiny

FOUR_LAYERS = "model.num_layers=4"
LONG = ["sampling.completion_length=16", "sampling.denoising_steps=8", "sampling.block_length=8"]
SAMPLINGS = {
    "long": LONG,
    "ragged": [  # rows end at different steps, and leave their group
        "sampling.block_length=1",
        "sampling.denoising_steps=8",
        "model.eos_token_id=39",
    ],
    "truncated": ["sampling.top_p=0.7", "sampling.unmasking=low_confidence"],
}
# Groups in flight: fewer than stages, no multiple of them, one for each row.
CASES = [("ragged", 1), ("ragged", 3), ("ragged", 16), ("truncated", 3), ("long", 16)]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("steps", [1, 10])
def test_slots_count_the_bubble_of_a_pipeline(stages, groups, steps):
    """Lockstep fills and drains at each step: (p - 1) / (m + p - 1); the ring once for all."""
    lockstep, ring = Slots(stages), Slots(stages)
    through = [0] * groups
    for _ in range(steps):
        for group in range(groups):
            lockstep.run()
            through[group] = ring.run(through[group])
        lockstep.wait_for_all()
    assert lockstep.bubble == pytest.approx((stages - 1) / (groups + stages - 1))
    if groups >= stages:
        assert ring.bubble == pytest.approx((stages - 1) / (groups * steps + stages - 1))


def _rollouts(overrides):
    """Return completions and the bubble of each sampling and number of groups."""
    results = {}
    for name, groups in CASES:
        session, engine = open_session(
            FOUR_LAYERS,
            *SAMPLINGS[name],
            *overrides,
            f"rollout.groups={groups}",
            "algorithm.prompts_per_iteration=4",
            world_size=dist.get_world_size(),
        )
        rollout, metrics = collect_rollout(session, engine, 0)
        trajectory = rollout.trajectory
        kept = trajectory.tokens, trajectory.unmask_step, trajectory.support_ids
        results[name, groups] = kept, metrics.get("rollout/bubble")
    return results


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _rollouts, [])[0]


def _same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2", "pp4"])
def test_ring_and_lockstep_sample_the_tokens_of_one_rank(alone, layout):
    size = int(layout[2])
    by_schedule = {}
    for schedule in ("ring", "lockstep"):
        overrides = [f"parallel={layout}", f"rollout.schedule={schedule}"]
        ranks = run_ranks(size, _rollouts, overrides)
        for result in ranks:
            assert all(_same(result[case][0], alone[case][0]) for case in alone)
        by_schedule[schedule] = {case: bubble for case, (_, bubble) in ranks[0].items()}
    ring, lockstep = (by_schedule[name]["long", 16] for name in ("ring", "lockstep"))
    assert ring < lockstep
    if layout == "pp4":  # 16 groups of 8 steps each, at most
        assert ring < 0.03 and lockstep > 0.15


def test_the_cases_are_what_they_say(alone):
    (_, steps, _), bubble = alone["ragged", 1]
    assert len(set(steps.max(1).values.tolist())) > 1 and bubble is None
    assert alone["truncated", 3][0][2] is not None


class _Done:
    """A message that has arrived."""

    def wait(self):
        pass


def _let_sends_wait(ranks):
    """Let each send of a device last until its receiver takes it; mutates torch.distributed."""
    begin, operation, batch = dist.isend, dist.P2POp, dist.batch_isend_irecv

    def isend(tensor, dst, group=None):
        work = begin(tensor, dst, group=group)
        if group is ranks.replica:
            return work
        assert work is not None
        work.wait()
        return _Done()

    def batched(operations):
        for work in batch(operations):
            work.wait()
        return [_Done() for _ in operations]

    dist.isend, dist.batch_isend_irecv = isend, batched
    dist.P2POp = lambda op, *rest: operation(begin if op is isend else op, *rest)


def _patient(overrides):
    """Sample and train where sends wait; returns the completions and the loss."""
    session, engine = open_session(
        FOUR_LAYERS,
        *SAMPLINGS["ragged"],
        *overrides,
        "algorithm.prompts_per_iteration=4",
        world_size=dist.get_world_size(),
    )
    _let_sends_wait(engine.ranks)
    rollout, _ = collect_rollout(session, engine, 0)
    metrics, _ = update_policy(session, engine, rollout, None)
    return rollout.trajectory.tokens, metrics["loss"]


def _ends(first):
    """Return the order in which a send ends and its receiver begins, by rank."""
    from agrpo_megatron.megatron.parallel import start_ranks

    _let_sends_wait(start_ranks(tiny("parallel=pp2", FOUR_LAYERS)))
    started = time.monotonic()
    if dist.get_rank() == first:
        dist.isend(torch.zeros(4), 1 - first)
    else:
        time.sleep(1.0)
        dist.recv(torch.zeros(4), first)
    return time.monotonic() - started


def test_a_send_waits_for_its_receiver():
    assert run_ranks(2, _ends, 0)[0] > 0.8


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2", "pp4"])
@pytest.mark.parametrize("schedule", ["ring", "lockstep"])
def test_iterations_end_where_sends_wait_for_their_receivers(layout, schedule):
    expected, loss = run_ranks(1, _patient, [])[0]
    overrides = [f"parallel={layout}", f"rollout.schedule={schedule}"]
    for tokens, ours in run_ranks(int(layout[2]), _patient, overrides):
        # A sum of advantages that nearly cancel: what is left is rounding of their size, about 1.
        assert torch.equal(tokens, expected) and ours == pytest.approx(loss, abs=1e-7)


def _exchange():
    """Send draws back, with more room than they need, the same and less; return what arrived."""
    from agrpo_megatron.megatron.parallel import start_ranks

    ranks = start_ranks(tiny("parallel=pp2", FOUR_LAYERS))
    huge = torch.tensor([2**31 - 5, 0, 126463])
    some = torch.tensor([-1e-7, float("-inf"), -90.0])
    support = torch.tensor([[2**31 - 5, 7, -1], [0, -1, -1], [126463, 1, 2]])
    whole = [Draw(huge, some, some.exp(), some / 5, some * 3, ids) for ids in (None, support)]
    empty = Draw(huge[:0], *[some[:0]] * 4, None)
    arrived = []
    for draw in (*whole, empty):
        for room in (0, 2, 3, 5):
            if ranks.is_last_stage:
                sent = send_draw(draw, [0], ranks, room=room)
                assert len(sent) == (2 if draw.support_ids is not None and room < 3 else 1)
                for work, _ in sent:
                    work.wait()
            else:
                arrived.append(receive_draw(1, len(draw.tokens), ranks, room=room))
    return arrived, (huge, some, support)


def test_draws_travel_without_loss():
    (arrived, (huge, some, support)), _ = run_ranks(2, _exchange)
    for number, draw in enumerate(arrived[:8]):
        assert torch.equal(draw.tokens, huge) and torch.equal(draw.logprobs, some)
        assert torch.equal(draw.entropies, some.exp()) and torch.equal(draw.confidences, some * 3)
        assert torch.equal(draw.spreads, some / 5)
        assert (draw.support_ids is None) == (number < 4)
        assert draw.support_ids is None or torch.equal(draw.support_ids, support)
    for draw in arrived[8:]:
        assert len(draw.tokens) == 0 and draw.support_ids is None
