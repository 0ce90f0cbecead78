"""Rewards in worker processes begin while others are sampled; no completion depends on it."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.rollout.generate import generate
from agrpo_megatron.rollout.requests import Request
from agrpo_megatron.tasks.grading import Grader
from tests.ranks import run_ranks
from tests.training.tiny import open_session

NAMES = ("tokens", "unmask_step", "logprobs", "entropies", "support_ids", "num_steps")
RAGGED = [  # rows end at different steps, and leave the batch
    "sampling.block_length=1",
    "sampling.denoising_steps=8",
    "model.eos_token_id=39",
    "sampling.top_k=20",
]
ROWS = 12
LAYOUTS = {"dp1": 1, "dp2": 2, "pp2": 2, "tp2": 2}


def _answer(overrides, is_bounded):
    """Return answers to the first problems, and how many rows were handed in at each time."""
    session, engine = open_session(*RAGGED, *overrides, world_size=dist.get_world_size())
    task = session.run.task.task  # its own reward: the workers build it from the settings
    task.is_bounded = is_bounded
    grader = Grader(task, session.run.settings.task)
    session = replace(session, run=replace(session.run, task=task, grader=grader))
    own, handed_in = grader.start, []

    def start(calls, **options):
        handed_in.append(len(calls))
        return own(calls, **options)

    grader.start = start
    problems = list(task.problems("train")[:ROWS])
    request = Request(problems, torch.arange(ROWS), session.run.settings.sampling)
    rollouts = generate(session, engine.rollout_network(), request)
    grader.close()
    return rollouts, handed_in


def _both(layout):
    return [_answer([f"parallel={layout}"], is_bounded) for is_bounded in (True, False)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_completions_are_the_same_bits_whether_grading_goes_on_beside_or_not(layout):
    size = LAYOUTS[layout]
    results = run_ranks(size, _both, layout)
    for (here, _), (beside, _) in results:
        for name in NAMES:
            assert torch.equal(getattr(here.trajectory, name), getattr(beside.trajectory, name))
        assert here.rewards == beside.rewards and len(here.rewards) == ROWS
        assert "timing/reward_hidden" not in here.seconds
    replicas = 2 if layout == "dp2" else 1
    graders = [(here, beside) for (_, here), (_, beside) in results if here]
    assert len(graders) == replicas, "each replica grades once"
    for here, beside in graders:
        assert here == [ROWS // replicas]
        assert len(beside) > 1 and sum(beside) == ROWS // replicas
    assert results[0][1][0].seconds["timing/reward_hidden"] >= 0


def _with_rows():
    return [_answer([f"rollout.rows={rows}"], False) for rows in ("null", 1, 5)]


def test_fewer_rows_in_a_forward_change_no_token():
    (((whole, _), (single, ones), (few, _)),) = run_ranks(1, _with_rows)
    assert ones == [1] * ROWS
    assert single.passes == int(single.trajectory.num_steps.sum()) > whole.passes
    for answers in (single, few):
        assert torch.equal(answers.trajectory.tokens, whole.trajectory.tokens)
        assert torch.equal(answers.trajectory.unmask_step, whole.trajectory.unmask_step)
        assert answers.rewards == whole.rewards
        assert answers.tokens == whole.tokens


def _asked_while_sampling():
    """Return the order of denoising steps and of a service that answers late."""
    session, engine = open_session(*RAGGED)
    events, asked, stepped = [], threading.Event(), threading.Event()

    class Slow:
        """A service whose first answer comes after a further denoising step."""

        def add(self, found, rewards, *, closed):
            events.append("asked")
            asked.set()
            assert stepped.wait(60), "no step was made while the service computed"
            events.append("answered")
            return list(rewards)

    task = session.run.task
    task.services = Slow()
    grader = Grader(task, session.run.settings.task)
    session = replace(session, run=replace(session.run, grader=grader))
    own = grader.start

    def start(calls, **options):
        found = own(calls, **options)
        assert asked.wait(60), "the service was not asked when the first completion was there"
        return found

    def on_step(_):
        events.append("step")
        if asked.is_set():
            stepped.set()

    grader.start = start
    problems, sampling = list(task.problems("train")[:ROWS]), session.run.settings.sampling
    request = Request(problems, torch.arange(ROWS), sampling, on_step=on_step)
    rollouts = generate(session, engine.rollout_network(), request)
    grader.close()
    expected = [
        task.reward(p, session.run.tokenizer.decode(ids))
        for p, ids in zip(problems, rollouts.trajectory.tokens.tolist(), strict=True)
    ]
    return events, rollouts.rewards == expected


def test_rows_are_sampled_while_a_service_grades_others():
    ((events, is_same),) = run_ranks(1, _asked_while_sampling)
    first = events.index("asked")
    assert events[:first] == ["step"] * first and first > 0
    assert "step" in events[first : events.index("answered")], "the sampler did not wait"
    assert is_same
