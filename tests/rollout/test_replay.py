"""A run that updates on the rollouts of another: the same bits where both do the same."""

import hashlib
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from agrpo_megatron.rollout import generate as sampling
from agrpo_megatron.training import run as training
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_nan_guard import _spoil_rl
from tests.training.test_run import read
from tests.training.tiny import resolved_run, same_metrics, silent_view

# Rewards of 0 and 1, so that some groups are replaced and iterations have several rounds.
# Metric lines: sft 1-2, evaluation before, rl 1, rl 2, evaluation, rl 3, rl 4, evaluation after.
RUN = [
    "algorithm.group_size=2",
    "algorithm.prompts_per_iteration=8",
    "algorithm.resample_rounds=2",
    "sampling.unmasking=low_confidence",
    "sampling.record_drawn=true",
    "algorithm.scoring=augmented",
    "sft.iterations=2",
    "train.iterations=4",
    "evaluation.interval=2",
    "checkpoint.interval=2",
    "checkpoint.best=null",
]
EDITED = [
    "sampling.record_drawn=false",
    "algorithm.scoring=token",
    "model.attention=block_causal",
    "model.block_length=4",
    "sampling.block_origin=row",
    "sampling.edit_threshold=0.04",
    "sampling.edit_steps=2",
    "train.iterations=2",
]
KEEP = ["checkpoint.keep_rollouts=true"]
OF_ROLLOUTS = ("reward/mean", "accuracy", "entropy", "live_steps/mean", "zero_advantage_fraction")


def _train(run_dir, overrides, line=None, spoilt=None):
    """Train; return the weights at the end, the splits that were sampled, notes and warnings."""
    if line is not None:
        kill_after_line(line)
    if spoilt is not None:
        _spoil_rl(spoilt, times=1)
    build, sample, engines, splits, said = training.build_engine, sampling.share_of, [], [], []

    def build_engine(*args, **options):
        engines.append(build(*args, **options))
        return engines[-1]

    def share(run, safety, network, request):
        splits.append(request.split)
        return sample(run, safety, network, request)

    training.build_engine, sampling.share_of = build_engine, share
    resolved = resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size())
    resolved.task.levels = 2
    view = silent_view()
    view.note = view.warn = said.append
    training.train(resolved, view)
    named = engines[-1].network.named_parameters()
    weights = [parameter.detach().clone() for _, parameter in named]
    return weights, splits, said


def _state(source):
    """Return the digest and the time of each file of a run's rollouts."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted((source / "rollouts").iterdir())
    }


def _rl(run_dir):
    return [record for record in read(run_dir / "metrics.jsonl") if record["phase"] == "rl"]


def _same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return a run that kept its rollouts, its weights, and the state of its files."""
    source = tmp_path_factory.mktemp("runs") / "source"
    ((weights, splits, _),) = run_ranks(1, _train, source, KEEP)
    assert splits.count("train") == len(list((source / "rollouts").iterdir())) > 4
    return source, weights, _state(source)


@pytest.fixture(scope="module")
def replayed(stored, tmp_path_factory):
    """Return a replay with fewer drawn steps: its directory, and what `_train` returned."""
    run_dir = tmp_path_factory.mktemp("runs") / "replay"
    overrides = [f"train.from_rollouts={stored[0]}", "algorithm.mc_samples=1"]
    return run_dir, overrides, run_ranks(1, _train, run_dir, overrides)[0]


def test_a_run_that_keeps_its_rollouts_has_each_round(stored):
    """Checkpoints were saved after iterations 2 and 4; parts and evaluations are removed."""
    source, _, files = stored
    records = _rl(source)
    assert sum(record["rollout/rounds"] for record in records) > 0
    numbers = [3 * i + k for i, r in enumerate(records) for k in range(1 + r["rollout/rounds"])]
    assert list(files) == [f"{number:06d}.safetensors" for number in numbers]


def test_a_replay_with_the_same_settings_ends_at_the_same_bits(stored, tmp_path):
    source, weights, files = stored
    overrides = [f"train.from_rollouts={source}"]
    ((ends, splits, said),) = run_ranks(1, _train, tmp_path / "run", overrides)
    assert _same(ends, weights)
    assert splits == ["eval"] * 3, "evaluations sample, training does not"
    records, others = (read(run / "metrics.jsonl") for run in (tmp_path / "run", source))
    counts = [r.pop("rollout/replayed") for r in records if r["phase"] == "rl"]
    assert counts == [16 + 2 * r["rollout/resampled_groups"] for r in _rl(source)]
    for ours, theirs in zip(records, others, strict=True):  # nothing is spent on sampling
        for name in ("flops", "totals/flops"):
            assert ours.pop(name, 0) <= theirs.pop(name, 0)
    assert same_metrics(records, others)
    samples = [(folder / "samples.jsonl").read_text() for folder in (tmp_path / "run", source)]
    assert samples[0] == samples[1]
    note = f"replays the rollouts of {source} (train.from_rollouts); nothing is sampled"
    assert note in said and note in (tmp_path / "run" / "notes.txt").read_text()
    assert list((tmp_path / "run" / "rollouts").iterdir()) == [] and _state(source) == files


def test_a_replay_of_edited_completions_ends_at_the_same_bits(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    ((weights, *_),) = run_ranks(1, _train, source, [*KEEP, *EDITED])
    ((ends, *_),) = run_ranks(1, _train, run, [f"train.from_rollouts={source}", *EDITED])
    assert _same(ends, weights)
    with safe_open(source / "rollouts" / "000000.safetensors", framework="pt") as file:
        assert (file.get_tensor("edit_step") >= 0).sum() > 5


def test_another_estimator_learns_otherwise_from_the_same_tokens(stored, replayed):
    """From iteration 2 on other weights sampled: the ratio shows it, and its alarm is silent."""
    source, weights, files = stored
    run_dir, _, (ours, _, said) = replayed
    assert not _same(ours, weights)
    for mine, theirs in zip(_rl(run_dir), _rl(source), strict=True):
        assert [mine[key] for key in OF_ROLLOUTS] == [theirs[key] for key in OF_ROLLOUTS]
    completions = [
        [s["completion"] for s in read(folder / "samples.jsonl") if s["phase"] == "rl"]
        for folder in (run_dir, source)
    ]
    assert completions[0] == completions[1]
    errors = [record["ratio/max_error"] for record in _rl(run_dir)]
    assert errors[0] < 1e-5 and min(errors[1:]) > 1e-3, errors
    assert [record["alarm/ratio"] for record in _rl(run_dir)] == [0, 0, 0, 0]
    assert not [text for text in said if "policy ratio" in text]
    assert _state(source) == files


def test_a_replay_that_was_killed_resumes_to_the_same_bits(stored, replayed, tmp_path):
    """Killed in the fourth iteration, saved after the second."""
    whole, overrides, (weights, *_) = replayed
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", overrides, 7)
    ((ours, splits, _),) = run_ranks(1, _train, tmp_path / "run", overrides)
    assert _same(ours, weights) and splits == ["eval"]
    assert same_metrics(*(read(at / "metrics.jsonl") for at in (tmp_path / "run", whole)))
    assert _state(stored[0]) == stored[2]


def test_a_roll_back_leaves_the_other_runs_rollouts(stored, replayed, tmp_path):
    """The fourth update is not finite: the run continues after the second, with the same rounds."""
    whole, overrides, (weights, *_) = replayed
    changes = [*overrides, "resilience.roll_backs=1"]
    ((ours, _, said),) = run_ranks(1, _train, tmp_path / "run", changes, None, 4)
    assert sum("rolling back" in text for text in said) == 1
    assert _same(ours, weights)
    assert same_metrics(*(read(at / "metrics.jsonl") for at in (tmp_path / "run", whole)))
    assert _state(stored[0]) == stored[2]


def test_each_replica_reads_the_same_rounds(stored, replayed, tmp_path):
    whole, overrides, (weights, *_) = replayed
    results = run_ranks(2, _train, tmp_path / "run", [*overrides, "parallel=dp2"])
    assert _same(results[0][0], results[1][0])
    assert all(splits == ["eval"] * 3 for _, splits, _ in results)
    for mine, theirs in zip(_rl(tmp_path / "run"), _rl(whole), strict=True):
        assert [mine[key] for key in OF_ROLLOUTS] == [theirs[key] for key in OF_ROLLOUTS]
    for ours, one in zip(results[0][0], weights, strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=1e-4)
    assert _state(stored[0]) == stored[2]


def test_other_start_weights_are_an_alarm_of_the_first_iteration(stored, tmp_path):
    overrides = [f"train.from_rollouts={stored[0]}", "sft.iterations=1", "train.iterations=2"]
    ((*_, said),) = run_ranks(1, _train, tmp_path / "run", overrides)
    assert [record["alarm/ratio"] for record in _rl(tmp_path / "run")] == [1, 0]
    assert sum("policy ratio" in text for text in said) == 1


def test_a_round_that_is_gone_ends_the_run_with_its_name(stored, tmp_path):
    """A later round of an iteration, which only the rewards of its first one ask for."""
    source = shutil.copytree(stored[0], tmp_path / "source")
    iteration = next(i for i, r in enumerate(_rl(source)) if r["rollout/rounds"])
    gone = source / "rollouts" / f"{3 * iteration + 1:06d}.safetensors"
    gone.unlink()
    with pytest.raises(AssertionError, match=f"{gone.name} is missing, damaged, or of another run"):
        run_ranks(1, _train, tmp_path / "run", [f"train.from_rollouts={source}"])
