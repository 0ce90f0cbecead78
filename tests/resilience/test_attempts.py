"""Attempts without progress end, only one attempt writes, and each reports how it ended."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch.distributed as dist

from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.resilience import attempts, exit_status
from agrpo_megatron.resilience.attempts import Stuck, begin, claim, read_attempts
from agrpo_megatron.rollout.cache import RolloutCache
from agrpo_megatron.rollout.session import Safety
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.training.rl import collect_rollout
from tests.cli.test_main import call_all, write_settings
from tests.ranks import run_ranks
from tests.training.tiny import open_session, tiny


def _begin(folder, marks, *, unattended=True):
    """Begin an attempt for each mark; return which of them were refused."""
    os.environ.pop(attempts.UNATTENDED, None)
    if unattended:
        os.environ[attempts.UNATTENDED] = "1"
    ranks, refused = start_ranks(tiny()), []
    for number, mark in enumerate(marks):
        try:
            begin(folder, mark, most_idle=2, ranks=ranks)
        except Stuck as error:
            refused.append((number, str(error)))
    return refused


def _begin_watched(folder, marks):
    return _begin(folder, marks, unattended=False)


@pytest.mark.parametrize("size", [1, 2])
def test_two_attempts_without_progress_are_the_last(tmp_path, size):
    marks = [["a"], ["a"], ["b"], ["b", "1 row"], ["b", "1 row"], ["b", "1 row"], ["c"]]
    refused = run_ranks(size, _begin, tmp_path, marks)
    assert all(found == refused[0] for found in refused)
    ((number, reason),) = refused[0]
    assert number == 5 and reason.startswith("2 attempts in a row made no progress after b;")
    begun = read_attempts(tmp_path)
    assert [each["progress"] for each in begun] == [m for i, m in enumerate(marks) if i != 5]
    assert [each["attempt"] for each in begun] == list(range(6))


def test_somebody_who_looks_on_may_try_as_often_as_wanted(tmp_path):
    assert run_ranks(1, _begin_watched, tmp_path, [["a"]] * 5) == [[]]


def _write_after_a_claim(folder):
    """Write a line and a rollout; then another attempt begins. Says what it refuses and leaves."""
    session, engine = open_session(world_size=dist.get_world_size())
    ranks, is_main = session.run.ranks, session.run.ranks.is_main
    check = claim(folder, ranks)
    silent = tiny("logging.wandb=disabled")
    log = RunLog(folder, settings=silent, is_main=is_main, check=check)
    cache = RolloutCache(folder / "rollouts", ranks, run="this", check=check)
    session = replace(session, safety=Safety(cache=cache))
    log.metrics({"phase": "rl", "iteration": 1})
    collect_rollout(session, engine, 0)
    before = sorted(path.read_bytes() for path in folder.rglob("*.*"))
    claim(folder, ranks)()
    refused = 0
    for write in (
        lambda: log.metrics({"phase": "rl", "iteration": 2}),
        lambda: collect_rollout(session, engine, 1),
        lambda: cache.forget(1),
    ):
        with pytest.raises(RuntimeError, match="another attempt at .* has begun"):
            write()
        refused += 1
    left = [path for path in folder.rglob("*.*") if path.suffix != ".writing"]
    return refused, len(before), before == sorted(path.read_bytes() for path in left)


def test_a_late_attempt_writes_nothing_once_its_successor_has_begun(tmp_path):
    ((refused, files, is_same),) = run_ranks(1, _write_after_a_claim, tmp_path)
    assert refused == 3 and files >= 3 and is_same


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path):
    assert run_ranks(1, _begin, tmp_path, [["a"]]) == [[]]
    path = tmp_path / "launch" / "attempts.jsonl"
    path.write_text(path.read_text() + '\n{"attempt": 1, "progr')
    assert run_ranks(1, _begin, tmp_path, [["b"]]) == [[]]
    assert [each["progress"] for each in read_attempts(tmp_path)] == [["a"], ["b"]]


def test_what_one_rank_alone_refuses_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(exit_status, "MAIN_RANK_TIMEOUT", 0.3)
    monkeypatch.delenv(exit_status.OUTCOME, raising=False)
    assert exit_status.main_rank_reported("refused")  # no script reads it
    monkeypatch.setenv(exit_status.OUTCOME, str(tmp_path / "outcome"))
    assert not exit_status.main_rank_reported("refused")
    exit_status.report_outcome("refused", "why")
    assert exit_status.main_rank_reported("refused") and not exit_status.main_rank_reported("stuck")


@pytest.mark.parametrize("launcher", [None, *exit_status.LAUNCHERS])
def test_a_launcher_sees_no_status_that_it_would_restart_for(monkeypatch, launcher):
    for name in exit_status.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if launcher is not None:
        monkeypatch.setenv(launcher, "x")
    statuses = [0, 2, exit_status.REQUEUE, exit_status.STUCK]
    monkeypatch.delenv(exit_status.OUTCOME, raising=False)
    assert [exit_status.launcher_status(status) for status in statuses] == statuses
    monkeypatch.setenv(exit_status.OUTCOME, "file")
    expected = statuses if launcher is None else [0, 0, 0, 0]
    assert [exit_status.launcher_status(status) for status in statuses] == expected


def _asked_after_a_line(commands, folder):
    """Run commands; in each, SIGTERM comes after the first metric line."""
    own = RunLog.metrics

    def metrics(self, record):
        own(self, record)
        os.kill(os.getpid(), signal.SIGTERM)

    RunLog.metrics = metrics
    os.environ[exit_status.OUTCOME] = str(folder / "outcome")
    os.environ[attempts.UNATTENDED] = "1"
    found = []
    for command in commands:
        found.append((*call_all([command], folder)[0], (folder / "outcome").read_text()))
        RunLog.metrics = metrics if len(found) == 1 else own
    return found


@pytest.mark.slow
def test_the_command_tells_its_outcome_and_stops_trying(tmp_path):
    run = tmp_path / "run"
    file = write_settings(
        tmp_path / "run.yaml",
        run={"dir": str(run)},
        sft={"iterations": 2},
        train={"iterations": 1},
        checkpoint={"best": None},
    )
    train = ["train", file]
    wrong = [*train, "parallel.tensor=2"]
    stopped, refused, finished, again = run_ranks(
        1, _asked_after_a_line, [train, wrong, train, train], tmp_path
    )[0]
    assert stopped[0] == exit_status.REQUEUE
    assert stopped[2].startswith("requeue asked by SIGTERM; saved")
    assert refused[0] == 2 and refused[2].startswith("refused parallel.tensor=2 ")
    assert finished[0] == again[0] == 0 and finished[2] == again[2] == "finished\n"
    assert "resuming after sft iteration 1" in finished[1]
    progress = [each["progress"] for each in read_attempts(run)]
    assert progress == [["the start"], ["sft-000001"]]


def _stuck(file, folder):
    os.environ[exit_status.OUTCOME] = str(folder / "outcome")
    os.environ[attempts.UNATTENDED] = "1"
    status, printed = call_all([["train", file]], folder)[0]
    assert not dist.is_initialized()
    return status, printed, (folder / "outcome").read_text()


@pytest.mark.slow
def test_a_stuck_run_says_so_and_trains_nothing(tmp_path):
    run = tmp_path / "run"
    file = write_settings(tmp_path / "run.yaml", run={"dir": str(run)})
    (run / "launch").mkdir(parents=True)
    line = json.dumps({"attempt": 0, "progress": ["the start"]}) + "\n"
    (run / "launch" / "attempts.jsonl").write_text(2 * line)
    status, printed, outcome = run_ranks(1, _stuck, file, tmp_path)[0]
    assert status == exit_status.STUCK
    assert outcome.startswith("stuck 2 attempts in a row made no progress")
    assert "agrpo: stuck: 2 attempts in a row made no progress after the start" in printed
    assert not (run / "metrics.jsonl").exists()
