"""The table of a sweep: every member has its row, whatever became of it, the best first."""

import json
import os
import subprocess
import sys
import time

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.launch.sweep import SWEEP, make_sweep
from agrpo_megatron.launch.table import summarise
from tests.cli.test_main import ROOT, write_settings
from tests.launch.runs import leave_run

SEEDS = {"run.seed": [0, 1, 2, 3, 4, 5, 6]}
TRACEBACK = """\
rank 1 failed: RuntimeError: out of reach
Traceback (most recent call last):
  File "x.py", line 1, in <module>
RuntimeError: out of reach
E1125 torchrun: ChildFailedError: train FAILED
"""


def write_log(path, text, age=0.0):
    """Write a log that was last written so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


@pytest.fixture
def sweep(tmp_path):
    """Return a sweep's directory with members of every fate."""
    directory = tmp_path / "a sweep"
    directory.mkdir()
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(directory)})
    sweep = make_sweep(file, [], SEEDS)
    (directory / SWEEP).write_text(sweep.text())

    def leave(name, iteration, accuracies):
        _, *overrides = sweep.arguments(directory, name)
        return leave_run(file, overrides, iteration=iteration, accuracies=accuracies)

    # 00 finished, after an attempt that failed; 01 finished and better; 02 failed on its way.
    write_log(leave("00", 3, [0.2, 0.3, 0.4]) / "launch/7_0/attempt-0/rank-0.log", TRACEBACK)
    leave("01", 3, [0.2, 0.3, 0.6])
    failed = leave("02", 2, [0.25, 0.5])
    write_log(
        failed / "launch/7_2/attempt-9/rank-1.log", "rank 9 failed: ValueError: overcome\n", 60
    )
    write_log(failed / "launch/7_2/attempt-10/rank-0.log", "loss 1.0\nrank 0: ending\n", 1)
    write_log(failed / "launch/7_2/attempt-10/rank-1.log", TRACEBACK, 2)
    write_log(failed / "launch/7_2/attempt-11/rank-0.log", "agrpo: error: got no further\n")
    write_log(failed / "launch/7_2/attempt-11/outcome", "stuck got no further\n")
    (failed / "launch/7_2/latest").symlink_to("attempt-10")
    # 03 never began: its batch script says why. 04 was stopped, 05 cannot be read, 06 is missing.
    write_log(
        directory / "launch/7_3.log",
        "agrpo: error: old\nagrpo: job 7_3, attempt 1\nagrpo: node n1: x\nagrpo: no node can\n",
    )
    paused = leave("04", 1, [0.1]) / "launch/7_4/attempt-0"
    write_log(paused / "rank-0.log", TRACEBACK + "restarted, and saved\n")
    write_log(paused / "outcome", "requeue asked to stop\n")
    broken = leave("05", 1, [0.1])
    (broken / "config.yaml").write_text("train: {iterations: many}\n")
    (broken / "metrics.jsonl").write_bytes(b"\xff\x00 no line\n")
    return directory


def test_members_are_told_apart_by_their_fate_the_best_first(sweep):
    members = summarise(sweep)
    assert [(m.name, m.state, m.iterations, m.after) for m in members] == [
        ("01", "finished", "rl 3/3", 0.6),
        ("02", "failed", "rl 2/3", 0.5),
        ("00", "finished", "rl 3/3", 0.4),
        ("03", "failed", "", None),
        ("04", "stopped", "rl 1/3", None),
        ("05", "failed", "", None),
        ("06", "not begun", "", None),
    ]
    found = {member.name: member for member in members}
    assert found["01"].before == 0.2 and found["01"].after_interval == [0.5, 0.7]
    assert found["02"].error == "rank 1 failed: RuntimeError: out of reach"
    assert found["02"].log == str(sweep / "02/launch/7_2/attempt-10/rank-1.log")
    assert found["03"].error == "agrpo: no node can"
    assert found["03"].log == str(sweep / "launch/7_3.log")
    assert "train.iterations='many' has the wrong type" in (found["05"].error or "")
    assert [m.name for m in members if m.error] == ["02", "03", "05"]


def test_the_table_is_printed_and_written_whole(sweep, capsys):
    """Run as the job after the array runs it."""
    command = [sys.executable, "-m", "agrpo_megatron.launch", str(sweep), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert main(["report", str(sweep)]) == 0
    assert capsys.readouterr().out == done.stdout
    table = (sweep / "summary.md").read_text()
    lines = table.splitlines()
    assert lines[0] == (
        "| member | run.seed | state | iterations | accuracy before | accuracy after | gain |"
    )
    assert lines[2] == (
        "| 01 | 1 | finished | rl 3/3 | 20.0% (10.0% to 30.0%) | 60.0% (50.0% to 70.0%) | +40.0 |"
    )
    assert (
        "- 02 failed: `rank 1 failed: RuntimeError: out of reach`, see "
        f"`{sweep}/02/launch/7_2/attempt-10/rank-1.log`"
    ) in lines
    for text in ("60.0% (50.0% to 70.0%)", "02 failed: rank 1 failed", f"{sweep}/summary.md"):
        assert text in done.stdout
    tree = json.loads((sweep / "summary.json").read_text())
    assert [member["name"] for member in tree["members"]][:2] == ["01", "02"]
    assert tree["members"][0]["settings"] == {"run.seed": 1}
    assert sorted(path.name for path in sweep.glob("*summary*")) == ["summary.json", "summary.md"]


def test_a_directory_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no sweep\.yaml; give the directory of a sweep"):
        summarise(tmp_path)
