"""A misbehaving reward affects only the score of its completion."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader, as_reward, failing, failing_error
from agrpo_megatron.types import Problem, Reward
from tests.tasks.hostile import FAILING

FILE = Path(__file__).parent / "hostile.py"
SAID = {  # how the failure of each begins
    "raise": "KeyError: 'no such thing'",
    "hang": "timeout",
    "allocate": "memory",
    "kill": "ended with status -9",
    "exit": "ended with status 0",
    "nan": "ValueError: the score is nan",
    "text": "TypeError: the reward is of type str, not Reward",
}


def _settings(limit=2.0, **options):
    """Return settings of the hostile task, with a limit of seconds for each reward."""
    grader = {"seconds": limit, "memory": 256, "failed_score": -1.0}
    tree = {"name": str(FILE), "options": options, "grader": grader}
    return build(TaskSettings, tree, "task.")


@pytest.fixture
def opened():
    """Yield a function that opens a grader; close all graders at the end."""
    graders = []

    def open_grader(**options):
        settings = _settings(**options)
        task = build_task(settings)
        graders.append(Grader(task, settings))
        return graders[-1], {p.fields["deed"]: p for p in task.problems("train")}

    yield open_grader
    for grader in graders:
        grader.close()


def test_each_failure_is_told_and_scored_and_the_others_are_graded(opened, tmp_path):
    grader, problems = opened(folder=str(tmp_path))
    assert grader.has_workers and sorted(SAID) == sorted(FAILING)
    calls = [
        call
        for deed in FAILING
        for call in (Call(problems["answer"], deed), Call(problems[deed], deed))
    ]
    rewards = grader.grade(calls)
    assert len(rewards) == 2 * len(FAILING)
    for deed, good, bad in zip(FAILING, rewards[::2], rewards[1::2], strict=True):
        assert (good.score, good.failure) == (len(deed) / 10, None)
        assert good.parts == {"long": len(deed)}
        assert (bad.score, bad.correct) == (-1.0, False)
        assert bad.failure is not None and bad.failure.startswith(SAID[deed])


def test_a_reward_that_kills_the_server_costs_its_batch_alone(opened):
    grader, problems = opened(deeds=["answer", "kill the server"])
    good, bad = (Call(problems[deed], "text") for deed in ("answer", "kill the server"))
    assert [r.failure for r in grader.grade([good])] == [None]
    assert [r.failure for r in grader.grade([bad, bad])] == ["the workers were killed"] * 2
    assert [r.failure for r in grader.grade([good])] == [None]


def test_batches_are_graded_while_others_are_handed_in(opened):
    grader, problems = opened(deeds=["slow"], seconds=0.2)
    grader.grade([Call(problems["slow"], "the server has started")])
    batches = [grader.start([Call(problems["slow"], "x" * size)]) for size in range(6)]
    assert not batches[-1].done(), "handing in waits for nothing"
    scores = [batch.result()[0].score for batch in batches]
    assert scores == [size / 10 for size in range(6)]


def test_verdicts_get_the_raw_text(opened):
    """The default verdict is the reward."""
    grader, problems = opened(deeds=["answer"])
    assert grader.grade([Call(problems["answer"], "text", "text<|endoftext|>")])[0].score == 0.4


NUMBERS = {  # what a reward returns, and the score and verdict that it stands for
    "a float": (0.5, 0.5, False),
    "one": (1.0, 1.0, True),
    "more than one": (2, 2.0, True),
    "a bool": (True, 1.0, True),
    "false": (False, 0.0, False),
    "a negative int": (-3, -3.0, False),
    "numpy's": (numpy.float32(0.25), 0.25, False),
    "numpy's bool": (numpy.bool_(1), 1.0, True),
    "torch's": (torch.tensor(1.5), 1.5, True),
    "a Reward": (Reward(0.5, True), 0.5, True),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_a_reward_and_right_from_one_on(name):
    made, score, correct = NUMBERS[name]
    reward = as_reward(made)
    assert (reward.score, reward.correct) == (score, correct)
    assert (type(reward.score), type(reward.correct)) == (float, bool)


@pytest.mark.parametrize("made", [None, "1.0", [1.0], {"score": 1.0}, 1j])
def test_anything_else_is_no_reward(made):
    with pytest.raises(TypeError, match="the reward is of type .*, not Reward or a number"):
        as_reward(made)


def test_the_first_traceback_comes_from_the_worker(opened):
    grader, problems = opened(deeds=["answer", "raise", "exit"])
    assert grader.first_failure is None
    grader.grade([Call(problems[deed], "") for deed in ("answer", "exit", "raise")])
    reason, trace = grader.first_failure
    line = FILE.read_text().splitlines().index('            raise KeyError("no such thing")') + 1
    assert reason == "KeyError: 'no such thing'"
    assert trace.place == f"{FILE}:{line}"
    assert trace.text.startswith("Traceback") and "in _misbehave" in trace.text


def test_a_task_fails_if_most_of_its_own_rewards_do():
    good, bad = Reward(1.0, True), Reward(0.0, False, failure="KeyError: 'boom'")
    of = {label: Problem("", {}, "", label) for label in ("", "a", "b")}
    assert failing([of[""]] * 4, [good, bad, good, bad], 0.5) == ""
    assert failing([of[""]] * 3, [good, bad, bad], 0.5) == "2 of 3 rewards"
    assert failing([of[""]] * 3, [bad] * 3, 1.0) == ""
    mixed = [of["a"], of["a"], of["a"], of["b"]]
    assert failing(mixed, [good, good, good, bad], 0.5) == "b: 1 of 1 rewards"


def test_a_bounded_task_that_raises_after_all_costs_that_completion():
    settings = _settings()
    task = build_task(settings)
    task.is_bounded = True
    grader = Grader(task, settings)
    problems = {p.fields["deed"]: p for p in task.problems("train")}
    assert not grader.has_workers
    rewards = grader.grade([Call(problems[deed], "four") for deed in ("raise", "answer", "nan")])
    assert [reward.score for reward in rewards] == [-1.0, 0.4, -1.0]
    assert rewards[0].failure == "KeyError: 'no such thing'"


def test_a_failure_that_a_bounded_task_returns_is_the_first_one_of_an_error():
    settings = _settings()
    task = build_task(settings)
    task.is_bounded, bad = True, Reward(0.0, False, failure="no number")
    task.reward = lambda problem, completion: bad
    grader, problems = Grader(task, settings), task.problems("train")[:2]
    assert grader.grade([Call(problem, "4") for problem in problems]) == [bad, bad]
    found = failing(problems, [bad, bad], 0.5)
    error = failing_error(found, [grader.first_failure, None], when="of the first evaluation")
    assert str(error).startswith("2 of 2 rewards of the first evaluation failed, the first (no nu")


def test_a_grader_is_closed_while_a_reward_hangs(opened, tmp_path):
    grader, problems = opened(limit=30.0, deeds=["hang"], folder=str(tmp_path))
    batch = grader.start([Call(problems["hang"], "")])
    hung = _wait_for_hung(tmp_path)
    started = time.monotonic()
    grader.close()
    assert time.monotonic() - started < 15
    with pytest.raises(RuntimeError, match="ended"):
        batch.result(timeout=5)
    _assert_gone(hung)


def test_what_a_reward_started_ends_with_its_time(opened, tmp_path):
    grader, problems = opened(deeds=["start and hang"], folder=str(tmp_path))
    rewards = grader.grade([Call(problems["start and hang"], "")])
    assert [reward.failure for reward in rewards] == ["timeout"]
    hung = _wait_for_hung(tmp_path)
    assert len(hung) == 2
    _assert_gone(hung)


def test_what_a_reward_prints_is_no_output_of_the_run(opened, capfd):
    grader, problems = opened(deeds=["print"])
    assert grader.grade([Call(problems["print"], "")])[0].correct
    grader.close()
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "printed by a reward\n")


def test_a_task_that_workers_cannot_build_says_why(tmp_path):
    """Its file exists when the run begins, but not when the workers start."""
    file = tmp_path / "mine.py"
    file.write_text(FILE.read_text())
    settings = build(TaskSettings, {"name": str(file)}, "task.")
    task = build_task(settings)
    grader = Grader(task, settings)
    file.unlink()
    with pytest.raises(RuntimeError, match=r"mine\.py does not exist"):
        grader.grade([Call(task.problems("train")[0], "")])
    grader.close()


GRADES = """
import sys
from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader

tree = {"name": sys.argv[1], "options": {"deeds": ["hang"], "folder": sys.argv[2]}}
settings = build(TaskSettings, {**tree, "grader": {"seconds": 600}}, "task.")
task = build_task(settings)
Grader(task, settings).grade([Call(task.problems("train")[0], "")] * 2)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", GRADES, str(FILE), str(tmp_path)])
    try:
        hung = _wait_for_hung(tmp_path)
        servers = {_parent(child) for child in hung}
        assert len(servers) == 1 and _parent(*servers) == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _assert_gone([*hung, *servers])


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPS_LATER = """
import json, signal, sys
from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader

seen = set()
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: seen.add(number))
tree = {"name": sys.argv[1], "options": {"deeds": ["slow"], "seconds": 4.0}}
settings = build(TaskSettings, {**tree, "grader": {"seconds": 60, "workers": 2}}, "task.")
task = build_task(settings)
grader = Grader(task, settings)
[problem] = task.problems("train")
rewards = grader.grade([Call(problem, "x" * size) for size in range(2)])
grader.close()
print(json.dumps([[reward.score, reward.failure] for reward in rewards]), len(seen))
"""


def test_signals_to_all_processes_of_a_job_leave_its_rewards_alone():
    """As SLURM sends them; the run handles them and ends later, with correct rewards."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_LATER, str(FILE)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while (
            len(below := psutil.Process(process.pid).children(recursive=True)) < 3
        ):  # the server and its two
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        for number in SIGNALS:
            os.killpg(process.pid, number)  # the run and the server; a child leads its own group
            for child in (child for child in below if child.ppid() != process.pid):
                child.send_signal(number)
        ended, _ = psutil.wait_procs(below, timeout=1)
        assert not ended, "a server that is killed once is replaced, and hides it"
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert printed == "[[0.0, null], [0.1, null]] 3\n"


def _wait_for_hung(folder):
    """Wait for hung rewards and return their process ids."""
    deadline = time.monotonic() + 60
    while not (found := list(folder.glob("hung-*"))):
        assert time.monotonic() < deadline, "no reward was called"
        time.sleep(0.02)
    return [int(path.name.partition("-")[2]) for path in found]


def _parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _assert_gone(processes):
    deadline = time.monotonic() + 10
    while any(_is_running(process) for process in processes):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.02)


def _is_running(process):
    """Return whether a process exists and is not a zombie."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
