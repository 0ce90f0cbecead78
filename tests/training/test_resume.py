"""A run that is killed with SIGKILL and started again ends as if nothing had happened."""

import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from agrpo_megatron.config.schema import load, to_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line, kill_in_save
from tests.training.test_run import read
from tests.training.tiny import resolved_run, same_metrics, silent_view, tiny

# Metric lines: sft 1-4, evaluation before, rl 1, rl 2, evaluation, rl 3, rl 4, evaluation after.
RUN = [
    "sft.iterations=4",
    "sft.optimizer.decay=cosine",
    "sft.optimizer.warmup_iterations=2",
    "train.iterations=4",
    "optimizer.decay=linear",
    "algorithm.kl_coefficient=0.01",
    "algorithm.updates_per_iteration=2",
    "evaluation.interval=2",
    "checkpoint.interval=2",
]
LINES = 11
BACKGROUND = ["checkpoint.background=true"]
KILLS = {  # settings, and after how many lines, or in which save at which moment
    "after the supervised phase, before RL's first checkpoint": ([], 6, None),
    "in an iteration after a checkpoint": ([], 9, None),
    "before the first RL checkpoint is written": ([], None, (4, "_write")),
    "before its checksums are": ([], None, (4, "seal")),
    "before it is pointed at": ([], None, (4, "point")),
    "before old ones are removed": ([], None, (4, "pointed")),
    "in an iteration, while the background writes": (BACKGROUND, 9, None),
    "before a background save is sealed": (BACKGROUND, None, (3, "seal")),
}
DISTRIBUTED = ["optimizer.distributed=true", "sft.optimizer.distributed=true"]


def _train(run_dir, overrides, line=None, save=None):
    if line is not None:
        kill_after_line(line)
    if save is not None:
        kill_in_save(*save)
    resolved = resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size())
    train(resolved, silent_view())


def _assert_same(ours, theirs):
    metrics, expected = read(ours / "metrics.jsonl"), read(theirs / "metrics.jsonl")
    assert len(expected) == LINES
    assert same_metrics(metrics, expected)
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()
    assert not list((ours / "checkpoints").glob(".partial-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ranks(1, _train, directory, [])
    return directory


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path, name):
    run_dir, (overrides, *kill) = tmp_path / "run", KILLS[name]
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, run_dir, overrides, *kill)
    left = (run_dir / "metrics.jsonl").read_text()
    assert 0 < len(left.splitlines()) <= LINES
    run_dir = run_dir.rename(tmp_path / "renamed")
    run_ranks(1, _train, run_dir, overrides)
    _assert_same(run_dir, whole)


def test_ranks_that_share_an_optimizer_resume_to_the_same_bits(tmp_path):
    run_ranks(2, _train, tmp_path / "whole", DISTRIBUTED)
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(2, _train, tmp_path / "run", DISTRIBUTED, None, (4, "seal"))
    run_ranks(2, _train, tmp_path / "run", DISTRIBUTED)
    _assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_was_killed_three_times_ends_the_same(whole, tmp_path):
    """Before any checkpoint, between two of the supervised phase, and right after it."""
    for line in (2, 4, 3):  # lines that an attempt writes before it dies
        with pytest.raises(AssertionError, match="killed by signal 9"):
            run_ranks(1, _train, tmp_path / "run", [], line)
    run_ranks(1, _train, tmp_path / "run", [])
    _assert_same(tmp_path / "run", whole)


def _train_as_graded(run_dir, file):
    """Train as the command does, with the task's own reward, but without the report."""
    resolved = resolve(load(Settings, file, [f"run.dir={run_dir}"]), world_size=1)
    train(resolved, silent_view())


@pytest.mark.slow
def test_the_command_resumes_after_kill_9(tmp_path):
    """A process of `python -m agrpo_megatron train`, killed from outside at no chosen moment."""
    file, run_dir = tmp_path / "settings.yaml", tmp_path / "run"
    file.write_text(to_yaml(tiny(*RUN)))
    command = [sys.executable, "-m", "agrpo_megatron", "train", str(file), f"run.dir={run_dir}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 7:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline, "it wrote no metrics"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    run_ranks(1, _train_as_graded, run_dir, file)
    run_ranks(1, _train_as_graded, tmp_path / "whole", file)
    _assert_same(run_dir, tmp_path / "whole")
