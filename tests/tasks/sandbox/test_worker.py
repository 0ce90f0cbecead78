"""A worker makes many calls; what a call leaves behind does not reach the next one."""

import os
import signal
import time
from pathlib import Path

import pytest

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader
from agrpo_megatron.tasks.sandbox.worker import MOST_CALLS
from agrpo_megatron.types import Problem

# Runs the completion, which sets `found`; the reward is its value.
TASK = """
import os, random, signal, subprocess, sys, threading, time
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Reward

kept = []


class Runs(Task):
    def load(self):
        return {"train": [], "eval": []}

    def reward(self, problem, completion):
        names = dict(globals(), found=os.getpid())
        exec(completion, names)
        return Reward(float(names["found"]), True)
"""
PROBLEM = Problem("", {}, "")
WEAR = "kept.append(subprocess.Popen(['true']))"  # ends its worker


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Yield a function that runs texts one after the other in one worker."""
    path = tmp_path_factory.mktemp("own") / "runs.py"
    path.write_text(TASK)
    grader = {"seconds": 5.0, "memory": 256, "workers": 1}
    settings = build(TaskSettings, {"name": str(path), "grader": grader}, "task.")
    opened = Grader(build_task(settings), settings)

    def grade(*texts):
        return opened.grade([Call(PROBLEM, text) for text in texts])

    yield grade
    opened.close()


def _scores(rewards):
    assert [reward.failure for reward in rewards] == [None] * len(rewards)
    return [reward.score for reward in rewards]


def test_one_worker_makes_the_calls_of_several_batches(run):
    first, second = _scores(run("", ""))
    (third,) = _scores(run(""))
    assert first == second == third != os.getpid()


def test_a_call_that_raises_ends_no_worker(run):
    before, bad, after = run("", "1 / 0", "")
    assert before.score == after.score
    assert bad.failure == "ZeroDivisionError: division by zero"


def test_globals_stay_until_the_worker_is_replaced(run):
    """As docs/tasks.md says."""
    *_, last = _scores(run(WEAR, "kept.append(1)", "found = len(kept)"))
    assert last == 1


@pytest.mark.parametrize(
    "text",
    [
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "kept.append(bytearray(150 << 20))",
        "kept += [open(os.devnull) for _ in range(100)]",
        WEAR,
    ],
    ids=["threads", "memory", "files", "a process"],
)
def test_what_a_call_leaves_behind_ends_with_its_worker(run, text):
    before, during, after = _scores(run("", text, ""))
    assert before == during != after


def test_a_process_that_a_call_leaves_is_killed_though_the_call_ended_well(run):
    first, started, _ = _scores(run("", "found = subprocess.Popen(['sleep', '600']).pid", ""))
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{started:.0f}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_calls_start_alike(run):
    """They share numbers that are drawn, the folder, and no timer."""
    draw = "found = random.random()"
    first, second = _scores(run(draw, draw))
    assert first == second
    timer = "signal.setitimer(signal.ITIMER_REAL, 0.05)"
    _, _, slept = _scores(run("os.chdir('/')", timer, "time.sleep(0.2)"))
    folder = "found = os.getcwd() == '/'"
    assert _scores(run("os.chdir('/')", folder))[1] == 0.0
    assert slept == _scores(run(""))[0]


def test_the_child_of_a_call_that_forks_answers_nothing(run):
    texts = ["found = 7 if os.fork() else 8", "found = 9"]
    assert _scores(run(*texts)) == [7.0, 9.0]


def test_memory_of_a_call_is_bounded_also_after_others(run):
    """The limit is on what a call adds: 100 MiB that an earlier one left do not count."""
    texts = ["kept.append(bytearray(100 << 20))", "bytearray(200 << 20)", "bytearray(300 << 20)"]
    assert [reward.failure for reward in run(*texts)] == [None, None, "memory"]


def test_a_worker_that_is_killed_while_it_waits_costs_no_call(run):
    (worker,) = _scores(run(""))
    os.kill(int(worker), signal.SIGKILL)
    state, deadline = Path(f"/proc/{worker:.0f}/stat"), time.monotonic() + 10
    while state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (other,) = _scores(run(""))
    assert other != worker


def test_a_worker_is_replaced_after_its_calls(run):
    _, *scores = _scores(run(WEAR, *[""] * (MOST_CALLS + 1)))
    assert len(set(scores[:-1])) == 1
    assert scores[-1] != scores[0]
