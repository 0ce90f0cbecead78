"""Rollouts ahead of their update: one update stale, corrected, and the same bits after a kill."""

import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.rules.rollouts import validate_ahead
from agrpo_megatron.rollout import ahead
from agrpo_megatron.rollout.dynamic_sampling import sample_groups
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.run import train
from agrpo_megatron.trajectories import iteration_of
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line, kill_in_call, kill_in_save
from tests.training.test_run import read
from tests.training.tiny import (
    open_session,
    resolved_run,
    same_metrics,
    silent_view,
    tiny,
    unknown_metrics,
)

AHEAD = [
    "train.async_steps=1",
    "algorithm.rollout_correction=2",
    "train.iterations=5",
    "algorithm.updates_per_iteration=2",
    "train.mismatch_alarm=100",  # its weights change fast
    "train.mismatch_tail_alarm=100",
    "evaluation.interval=2",
    "checkpoint.interval=2",
]
LINES = 9  # evaluation, 1, 2, evaluation, 3, 4, evaluation, 5, evaluation


def _train(run_dir, overrides, line=None, save=None, size=1):
    """Train; return what was warned of."""
    if line is not None:
        kill_after_line(line)
    if save is not None and save[1] == "spent_on":
        kill_in_call(save[0], ahead, save[1])
    elif save is not None:
        kill_in_save(*save)
    view, warned = silent_view(), []
    view.warn = warned.append  # type: ignore[method-assign]
    train(resolved_run(run_dir, *AHEAD, *overrides, world_size=size), view)
    return warned


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert run_ranks(1, _train, directory, []) == [[]]
    return directory


def _rl(run_dir):
    return [r for r in read(run_dir / "metrics.jsonl") if r["phase"] == "rl"]


def test_every_batch_but_the_first_is_one_iteration_old(whole):
    records = _rl(whole)
    assert [r["rollout/staleness"] for r in records] == [0, 2, 2, 2, 2]
    assert not list((whole / "rollouts").iterdir()), "a finished run keeps no rollouts"
    assert all(r["ratio/max_error"] < 1e-4 for r in records), "old log-probs are recomputed"
    errors = [abs(r["correction/mean"] - 1) for r in records]
    assert errors[0] < 1e-6 and min(errors[1:]) > 1e-4, "only older rollouts have other weights"
    assert all(0 < r["rollout/packing_efficiency"] <= 1 for r in records)
    assert unknown_metrics(read(whole / "metrics.jsonl")) == set()


KILLS = {  # settings, and after how many lines, or at which moment of a save or an iteration
    "before the first checkpoint": ([], 2, None),
    "after a checkpoint": ([], 5, None),
    # Iteration 3: the rewards of its batch are outstanding, and the next one is sampled.
    "between two batches": ([], None, (4, "spent_on")),
    "in a save": ([], None, (2, "seal")),
    "in a save in the background": (["checkpoint.background=true"], None, (2, "seal")),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path, name):
    run_dir, (overrides, *kill) = tmp_path / "run", KILLS[name]
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, run_dir, overrides, *kill)
    assert run_ranks(1, _train, run_dir, overrides) == [[]]
    metrics, expected = read(run_dir / "metrics.jsonl"), read(whole / "metrics.jsonl")
    assert len(expected) == LINES and same_metrics(metrics, expected)
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def _stopped(run_dir, overrides=(), line=None):
    """Ask for a stop in an iteration without a checkpoint; return the reason, and the rest.

    Args:
        overrides, line: of the run that resumes, see `_train`.
    """
    view = silent_view()

    def rl(record):
        if record["iteration"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    view.rl = rl  # type: ignore[method-assign]
    reason = train(resolved_run(run_dir, *AHEAD), view)
    saved = (run_dir / "checkpoints" / "latest").read_text()
    return reason, saved, _train(run_dir, overrides, line)


def test_a_stopped_run_resumes_to_the_same_bits(whole, tmp_path):
    ((reason, saved, warned),) = run_ranks(1, _stopped, tmp_path)
    assert reason is not None and saved == "rl-000003" and warned == []
    assert same_metrics(read(tmp_path / "metrics.jsonl"), read(whole / "metrics.jsonl"))


def test_older_rollouts_stay_under_a_new_learning_rate(whole, tmp_path):
    """The checkpoint's own were sampled before the change, and their files name other settings."""
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path, [], 5)
    assert run_ranks(1, _train, tmp_path, ["optimizer.learning_rate=3e-3"]) == [[]]
    ours, theirs = _rl(tmp_path), _rl(whole)
    assert [r["rollout/staleness"] for r in ours] == [0, 2, 2, 2, 2]
    # The weights of iteration 2's end, and those before, sampled iterations 3 and 4.
    same = [mine["entropy"] == other["entropy"] for mine, other in zip(ours, theirs, strict=True)]
    assert same == [True, True, True, True, False]


def test_a_second_kill_under_a_new_learning_rate_loses_no_rollouts(tmp_path):
    """Files name the settings that sampled them, also once a later attempt has graded them."""
    faster = ["optimizer.learning_rate=3e-3"]
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _stopped, tmp_path, faster, 1)
    assert run_ranks(1, _train, tmp_path, faster) == [[]]
    assert [r["rollout/staleness"] for r in _rl(tmp_path)] == [0, 2, 2, 2, 2]


def _counted():
    """Return FLOPs and tokens that each of two iterations counts, and the FLOPs of its batch."""
    session, engine = open_session(*AHEAD, "train.iterations=2", world_size=2)
    source, found = ahead.Ahead(session, engine, sampled_by=None), []
    for iteration in range(2):
        groups = source.groups(iteration)
        own = sum(completion_flops(groups.rollouts.trajectory, session.run.settings))
        found.append((groups.metrics["flops"], groups.tokens, own, groups.rollouts.tokens))
    return found


def test_work_counts_where_it_is_done():
    """So a run that ends early, after any iteration, has counted the batch that it leaves."""
    for (flops, tokens, *first), (later, none, *second) in run_ranks(2, _counted):
        assert (flops, tokens) == (first[0] + second[0], first[1] + second[1])
        assert later == none == 0


def test_lost_rollouts_are_sampled_again_with_a_warning(tmp_path):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path, [], 5)
    shutil.rmtree(tmp_path / "rollouts")
    ((warned,),) = run_ranks(1, _train, tmp_path, [])
    assert warned.startswith("iteration 3: its rollouts, which were sampled before")
    assert [r["rollout/staleness"] for r in _rl(tmp_path)] == [0, 2, 0, 2, 2]


def _with_slow_judge():
    """Return the order of events, and whether the second batch is the start weights' own."""
    session, engine = open_session(*AHEAD, "algorithm.updates_per_iteration=1")
    expected = sample_groups(session, engine, 1)
    keys = [{p.key for p in sample_groups(session, engine, n).problems} for n in range(2)]
    assert not keys[0] & keys[1]
    events, opened = [], [threading.Event(), threading.Event(), threading.Event()]
    opened[2].set()

    class Judge:
        """A service that answers on a batch only after an event."""

        def add(self, asked, rewards, *, closed):
            owners = {next((n for n in range(2) if p.key in keys[n]), 2) for p, _ in asked}
            assert len(owners) == 1, "a batch waits for no other"
            owner = owners.pop()
            events.append(f"asked {owner}")
            assert opened[owner].wait(60), "the rewards are awaited too early"
            events.append(f"answered {owner}")
            return list(rewards)

    session.run.task.services = Judge()
    grader = Grader(session.run.task, session.run.settings.task)
    session = replace(session, run=replace(session.run, grader=grader))
    plain = ahead.sample_request

    def sample_request(session, network, request):
        sampled = plain(session, network, request)
        number = int(request.rollout_ids[0]) // len(request.problems)
        events.append(f"sampled {number}")
        if number == 1:
            opened[0].set()
        return sampled

    ahead.sample_request = sample_request
    source = ahead.Ahead(session, engine, sampled_by=None)
    rollout, first = collect_rollout(session, engine, 0, ahead=source)
    update_policy(session, engine, rollout, None)
    events.append("updated 0")
    opened[1].set()
    rollout, metrics = collect_rollout(session, engine, 1, ahead=source)
    grader.close()
    spent = sum(end - begin for begin, end in grader.spans)
    hidden = first["timing/reward_hidden"] + metrics["timing/reward_hidden"]
    assert 0 < hidden < spent + 0.01, "the grading of a batch counts once"
    is_same = torch.equal(rollout.trajectory.tokens, expected.rollouts.trajectory.tokens)
    return events, is_same, metrics["rollout/staleness"], iteration_of(rollout)


def test_rewards_arrive_while_the_next_rollout_and_the_update_run():
    ((events, is_same, staleness, iteration),) = run_ranks(1, _with_slow_judge)
    at = events.index
    assert at("sampled 0") < at("sampled 1") < at("answered 0") < at("updated 0")
    assert at("updated 0") < at("answered 1")
    assert is_same and staleness == 1 and iteration == 2


REFUSED = {
    "algorithm.name=diffu_grpo": "use agrpo, full_trajectory, just_grpo, egspo, cj_grpo, or",
    "algorithm.rollout_correction=null": "use for example algorithm.rollout_correction=2",
    "algorithm.resample_rounds=1": "use algorithm.resample_rounds=0",
    "algorithm.rollout_experts=compare": "use null",
    "checkpoint.rollouts=false": "needs checkpoint.rollouts=true",
    "train.from_rollouts=there": "samples nothing",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_ahead_is_refused(override):
    validate(tiny(*AHEAD))
    with pytest.raises(ValueError, match=r"^train\.async_steps=1 ") as caught:
        validate_ahead(tiny(*AHEAD, override))
    message = str(caught.value)
    assert override.partition("=")[0] in message and REFUSED[override] in message


def test_stages_and_measured_draws_run_ahead_too(whole, tmp_path):
    """The importance weights are known on the last stage, and logged by the first."""
    stages = ["parallel=pp2", "train.iterations=2"]
    run_ranks(2, _train, tmp_path / "stages", stages, None, None, 2)
    run_ranks(1, _train, tmp_path / "auto", ["algorithm.mc_samples=auto", "train.iterations=3"])
    for ours, theirs in zip(_rl(tmp_path / "stages"), _rl(whole), strict=False):
        assert ours["correction/mean"] == pytest.approx(theirs["correction/mean"], rel=1e-4)
        assert ours["rollout/staleness"] == theirs["rollout/staleness"]
        # Two stages: in each of two updates, one waits for one slot at either end.
        assert ours["update/bubble"] == 2 / (2 + ours["micro_batches"])
    assert [r["rollout/staleness"] for r in _rl(tmp_path / "auto")] == [0, 2, 2]
    assert all(r["measuring_rows"] >= 0 for r in _rl(tmp_path / "auto"))
