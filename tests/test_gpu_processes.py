"""Tasks of a GPU check run in order; one that ends its processes does not take others along."""

import importlib
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.append(str(TOOLS))
processes = importlib.import_module("gpu_processes")
# Of each rank: does what the names ask, in order; the first rank reports.
WORKER = f"""
import os, pathlib, sys, time
sys.path.append({str(TOOLS)!r})
from gpu_processes import append_result
rank, results, *names = sys.argv[1:]
for name in names:
    if name.startswith("die"):
        os._exit(7) if rank == name[-1] else time.sleep(60)
    if name == "hang":
        time.sleep(60)
    if name == "nothing":
        sys.exit()
    if rank == "0":
        append_result(pathlib.Path(results), name, {{"pid": os.getpid()}})
"""


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Let a process have 5 seconds to start, and a task 1."""
    monkeypatch.setattr(processes, "START", 5.0)
    monkeypatch.setattr(processes, "LEAST", 1.0)


def _run(names, *, ranks=1, seconds=60.0):
    """Run tasks; return results by name, and the names that each set of processes was given."""
    began, sets = time.monotonic(), []

    def start(given, results):
        sets.append(given)
        command = [sys.executable, "-c", WORKER]
        return [
            subprocess.Popen([*command, str(rank), str(results), *given], start_new_session=True)
            for rank in range(ranks)
        ]

    tasks = [SimpleNamespace(name=name, seconds=1.0) for name in names]
    left = lambda: seconds - (time.monotonic() - began)  # noqa: E731
    return dict(processes.run_tasks(tasks, start, left=left, log="x.log")), sets


def test_tasks_share_a_process():
    found, sets = _run(["a", "b", "c"])
    assert sets == [["a", "b", "c"]] and list(found) == ["a", "b", "c"]
    assert len({result["pid"] for result in found.values()}) == 1


def test_a_task_that_ends_its_process_fails_alone():
    found, sets = _run(["a", "die 0", "b"])
    assert sets == [["a", "die 0", "b"], ["b"]]
    assert found["die 0"] == {"failed": "failed with status 7; see x.log"}
    assert found["a"]["pid"] != found["b"]["pid"]


def test_a_rank_that_dies_is_named_and_the_others_are_ended():
    found, sets = _run(["die 1", "b"], ranks=2)
    assert sets == [["die 1", "b"], ["b"]]
    assert found["die 1"] == {"failed": "rank 1 failed with status 7; see x.log"}
    assert "pid" in found["b"]


def test_a_task_that_hangs_is_ended_and_the_next_ones_run():
    found, sets = _run(["a", "hang", "b"])
    assert sets == [["a", "hang", "b"], ["b"]]
    assert found["hang"]["failed"].startswith("hangs or is far too slow: not done in 1 s")
    assert "pid" in found["b"]


def test_a_process_that_ends_early_has_failed():
    found, _ = _run(["nothing", "b"])
    assert found["nothing"] == {"failed": "ended without a result; see x.log"}
    assert "pid" in found["b"]


def test_tasks_that_no_time_is_left_for_are_cut():
    assert _run(["a", "b"], seconds=0.5) == (
        {"a": {"cut": processes.NO_TIME}, "b": {"cut": processes.NO_TIME}},
        [],
    )
    found, sets = _run(["hang", "b"], seconds=2.0)
    assert sets == [["hang", "b"]]
    assert found == {"hang": {"cut": processes.NO_TIME}, "b": {"cut": processes.NO_TIME}}
