"""Groups of equal rewards are replaced by those of other problems, the same at every layout."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.rollout import dynamic_sampling
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import open_session, resolved_run, same_metrics, silent_view

# Two completions of a problem score the same every other time.
PAIRS = ["algorithm.group_size=2", "algorithm.prompts_per_iteration=8"]
MOST = 6
ROUNDS = f"algorithm.resample_rounds={MOST}"
ITERATIONS = 3


def _open(*overrides):
    session, engine = open_session(*PAIRS, *overrides, world_size=dist.get_world_size())
    session.run.task.levels = 2
    return session, engine


def _collect(overrides):
    """Return rewards, ids, problems' prompts and metrics of each iteration."""
    session, engine = _open(*overrides)
    found = []
    for iteration in range(ITERATIONS):
        rollout, metrics = collect_rollout(session, engine, iteration)
        trajectory = rollout.trajectory
        prompts = [tuple(prompt.tolist()) for prompt in trajectory.prompts]
        ids = trajectory.rollout_ids.tolist()
        found.append((rollout.rewards.view(-1, 2), ids, prompts, metrics, trajectory.tokens))
    return found


@pytest.fixture(scope="module")
def plain():
    return run_ranks(1, _collect, [])[0]


@pytest.fixture(scope="module")
def replaced():
    return run_ranks(1, _collect, [ROUNDS])[0]


def _flat(rewards):
    return int((rewards[:, 0] == rewards[:, 1]).sum())


def test_without_rounds_some_groups_have_nothing_to_teach(plain):
    assert sum(_flat(rewards) for rewards, *_ in plain) > 2
    for iteration, (_, ids, _, metrics, _) in enumerate(plain):
        assert ids == list(range(iteration * 16, (iteration + 1) * 16))
        assert not any(name.startswith("rollout/re") for name in metrics)


def test_after_rounds_every_group_has(replaced):
    for rewards, ids, prompts, metrics, _ in replaced:
        assert rewards.shape == (8, 2) and _flat(rewards) == 0
        assert metrics["zero_advantage_fraction"] == 0
        assert len(set(ids)) == 16 and prompts[::2] == prompts[1::2]
        assert metrics["rollout/resampled_groups"] >= metrics["rollout/rounds"]
    assert sum(metrics["rollout/resampled_groups"] for *_, metrics, _ in replaced) > 2


def test_each_iteration_has_rollout_ids_of_its_own(replaced):
    size = 16 * (1 + MOST)
    spans = [set(range(i * size, (i + 1) * size)) for i in range(ITERATIONS)]
    assert all(set(ids) <= span for (_, ids, *_), span in zip(replaced, spans, strict=True))


def test_what_had_something_to_teach_stays_where_it_was(plain, replaced):
    """The first round of the first iteration is that of a run without rounds."""
    (before, ids, *_), (after, others, *_) = plain[0], replaced[0]
    for slot in range(8):
        if before[slot, 0] != before[slot, 1]:
            assert torch.equal(before[slot], after[slot])
            assert ids[2 * slot] == others[2 * slot]
        else:
            assert others[2 * slot] >= 16, "of a later round"


def _all_sampled():
    """Return metrics of an iteration and the rewards of all that was sampled for it."""
    session, engine = _open(ROUNDS)
    own, rewards = dynamic_sampling.generate, []

    def generate(*args):
        rollouts = own(*args)
        rewards.extend(rollouts.rewards)
        return rollouts

    dynamic_sampling.generate = generate
    rollout, metrics = collect_rollout(session, engine, 0)
    return rollout.rewards, rewards, metrics


def test_accuracy_is_of_all_that_was_sampled():
    """What is trained on was chosen by its rewards, and would say something else."""
    ((trained, rewards, metrics),) = run_ranks(1, _all_sampled)
    assert len(rewards) == 16 + 2 * metrics["rollout/resampled_groups"] > 16
    assert metrics["accuracy"] == sum(r.correct for r in rewards) / len(rewards)
    mean = sum(r.score for r in rewards) / len(rewards)
    assert metrics["reward/mean"] == pytest.approx(mean) != float(trained.mean())


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_the_layout_changes_no_group(replaced, layout):
    for result in run_ranks(2, _collect, [ROUNDS, f"parallel={layout}"]):
        for ours, theirs in zip(result, replaced, strict=True):
            assert ours[1:3] == theirs[1:3] and torch.equal(ours[4], theirs[4])


def _hopeless(rounds):
    """Every reward is the same: shapes stay, and no round is skipped."""
    session, engine = _open(f"algorithm.resample_rounds={rounds}")
    session.run.task.constant = 0.5
    rollout, metrics = collect_rollout(session, engine, 0)
    return len(rollout.rewards), rollout.trajectory.rollout_ids.tolist(), metrics


def test_where_nothing_differs_the_first_groups_stay():
    ((count, ids, metrics),) = run_ranks(1, _hopeless, 2)
    assert count == 16 and ids == list(range(16))
    assert (metrics["rollout/rounds"], metrics["rollout/resampled_groups"]) == (2, 16)


RUN = [*PAIRS, ROUNDS, "train.iterations=4", "checkpoint.interval=2", "checkpoint.best=null"]


def _train(run_dir, line=None):
    """Train; return which rounds were sampled."""
    if line is not None:
        kill_after_line(line)
    own, sampled = dynamic_sampling.generate, []

    def generate(session, network, request):
        sampled.append(int(request.rollout_ids[0]) // 16)
        return own(session, network, request)

    dynamic_sampling.generate = generate
    resolved = resolved_run(run_dir, *RUN)
    resolved.task.levels = 2
    train(resolved, silent_view())
    return sampled


def test_a_run_that_was_killed_resumes_and_samples_no_round_again(tmp_path):
    """Killed in the fourth iteration, saved after the second."""
    (whole,) = run_ranks(1, _train, tmp_path / "whole")
    assert len(whole) > 4, "some iteration has more than a round"
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", 5)
    kept = [int(path.stem) for path in (tmp_path / "run" / "rollouts").iterdir()]
    assert sorted(kept) == [number for number in whole if number >= 2 * (1 + MOST)]
    assert run_ranks(1, _train, tmp_path / "run") == [[]]
    ours, theirs = (read(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert len(ours) == 6 and same_metrics(ours, theirs)
    assert list((tmp_path / "run" / "rollouts").iterdir()) == []
