"""A rank that hangs is found soon after its limit, named with its stack, and all ranks end."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from agrpo_megatron.config.settings import ResilienceSettings, RunSettings, Settings
from agrpo_megatron.resilience.limits import LEARNED, Limits
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.watchdog import (
    HARD_EXIT_DELAY,
    Position,
    Watchdog,
    describe,
    hung_ranks,
    position_of,
)
from tests.ranks import run_ranks
from tests.resilience.leftovers import assert_gone

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "hanging.py"
LIMIT = 4.0  # seconds, of a section whose learned limit would be shorter
SOON = 5.0  # seconds after its limit in which a hang is found
GONE = 30.0  # seconds in which a launcher sees its ranks end, on a machine under load
WHERE = r"section rollout \(rl iteration 3\)"
# fault: the verdict, what it adds, and the function whose name the stacks show
FOUND = {
    "sleeps_for_ever": (f"rank 1 hangs in {WHERE}", ", at .*:[0-9]+ sleeps_for_ever$"),
    "holds_the_lock": (f"rank 1 hangs in {WHERE} of rank 0", ", without an answer$"),
    "backtracks": (f"rank 1 hangs in {WHERE} of rank 0", ", without an answer$"),
    "is_stopped": (f"rank 1 hangs in {WHERE} of rank 0", ", without an answer$"),
    "comes_back": (f"rank 1 hangs in {WHERE}", ", at "),
    "disagrees": (f"all ranks wait for each other in {WHERE} of rank [01]", "$"),
}


def _run(tmp_path, fault, *overrides, ranks=2):
    file = tmp_path / "run.yaml"
    file.write_text(f"run: {{dir: '{tmp_path / 'run'}'}}\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(ranks), str(SCRIPT), fault, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, f"resilience.least_timeout={LIMIT}", *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tmp_path,
    )


def _line(pattern, text):
    [line] = [line for line in text.splitlines() if re.search(pattern, line)]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("fault", FOUND)
def test_a_hung_rank_is_found_and_named_and_all_ranks_end(tmp_path, fault):
    done = _run(tmp_path, fault)
    ended = time.time()
    [struck] = re.findall(r"fault at ([0-9.]+)", done.stdout)
    assert done.returncode != 0 and "finished" not in done.stdout
    verdict, more = FOUND[fault]
    _line(f"^rank 0: ending, because {verdict}{more}", done.stderr)
    _line(f"^{verdict}[:;,]", done.stderr)  # the report; one rank gives it
    assert re.search(rf"hanging\.py\", line [0-9]+ in {fault}$", done.stderr, re.MULTILINE) or (
        fault == "is_stopped" and "rank 1's stacks:" in done.stderr
    )
    found = re.findall(rf"rank ([01]): {WHERE} has been open for ([0-9.]+) s", done.stderr)
    # A rank that was stopped finds it too, but when it is let go to its end.
    took = [seconds for rank, seconds in found if (fault, rank) != ("is_stopped", "1")]
    assert took and all(LIMIT <= float(seconds) < LIMIT + SOON for seconds in took)
    assert ended - float(struck) < LIMIT + HARD_EXIT_DELAY + GONE
    assert_gone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleeps_for_ever", "holds_the_lock"])
def test_a_single_rank_that_hangs_shows_its_stack_and_fails(tmp_path, fault):
    done = _run(tmp_path, fault, ranks=1)
    ended = time.time()
    [struck] = re.findall(r"fault at ([0-9.]+)", done.stdout)
    assert "exitcode: 1)" in done.stderr and done.returncode != 0
    assert re.search(rf"hanging\.py\", line [0-9]+ in {fault}$", done.stderr, re.MULTILINE)
    assert ended - float(struck) < LIMIT + HARD_EXIT_DELAY + GONE


@pytest.mark.slow
def test_what_was_learned_is_kept_and_a_restart_begins_with_it(tmp_path):
    done = _run(tmp_path, "is_well")
    assert done.returncode == 0, done.stderr
    learned = json.loads((tmp_path / "run" / "launch" / LEARNED).read_text())
    assert learned["seen"] == ["rl/rollout", "setup/setup"] and learned["world_size"] == 2
    assert 0 < learned["longest"]["rollout"] < LIMIT
    settings = Settings(run=RunSettings(dir=str(tmp_path / "run")))
    limits = Limits(settings, world_size=2, is_main=True)
    assert limits.of("rollout", "rl") == settings.resilience.least_timeout == 60.0
    limits.learn({"rollout": 20.0})
    again = Limits(settings, world_size=2, is_main=False)
    assert again.of("rollout", "rl") == 100.0  # five times the longest
    assert again.of("rollout", "sft") == again.of("update", "rl") == 1800.0
    other = Limits(settings, world_size=4, is_main=False)
    assert other.of("rollout", "rl") == 1800.0, "other ranks, other times"


def test_an_attempt_of_shorter_times_takes_no_limit_back(tmp_path):
    settings = Settings(run=RunSettings(dir=str(tmp_path)))
    for times in ({"rollout": 50.0}, {"rollout": 20.0, "update": 30.0}, {}):
        limits = Limits(settings, world_size=1, is_main=True)
        limits.ended("rollout", "rl")
        limits.ended("update", "rl")
        limits.learn(times)
        assert limits.of("rollout", "rl") == 250.0  # five times the longest
    assert limits.of("update", "rl") == 150.0
    limits.learn({"rollout": 70.0})
    assert limits.of("rollout", "rl") == 350.0


def test_nothing_is_learned_from_a_section_that_failed(tmp_path):
    limits = Limits(Settings(run=RunSettings(dir=str(tmp_path))), world_size=1, is_main=True)
    sections = Sections([Watchdog(limits, rank=0, ends=True)])
    try:
        sections.at("sft", 1)
        with sections("checkpoint"):
            time.sleep(0.01)
        longest = dict(sections.longest)
        sections.learn({"checkpoint": 50.0})
        assert limits.of("checkpoint", "sft") == 250.0
        sections.at("rl", 1)
        with pytest.raises(OSError, match="no room"), sections("update"):
            raise OSError("no room")
        with pytest.raises(OSError, match="no room"), sections("checkpoint"):
            raise OSError("no room")
    finally:
        sections.close()
    assert longest.keys() == {"checkpoint"} == sections.longest.keys()
    assert limits.of("checkpoint", "rl") == 1800.0, "it has not been through one in this phase"


def test_a_limit_that_is_set_is_the_limit(tmp_path):
    set_limits = ResilienceSettings(timeouts={"rollout": 7})
    settings = Settings(run=RunSettings(dir=str(tmp_path)), resilience=set_limits)
    limits = Limits(settings, world_size=1, is_main=True)
    limits.ended("rollout", "rl")
    limits.learn({"rollout": 50.0})
    assert limits.of("rollout", "rl") == 7.0


def test_watching_a_section_costs_next_to_nothing(tmp_path):
    limits = Limits(Settings(run=RunSettings(dir=str(tmp_path))), world_size=1, is_main=True)
    watchdog = Watchdog(limits, rank=0, ends=True)
    sections = Sections([watchdog])
    try:
        started = time.thread_time()
        for _ in range(500):
            with sections("rollout"):
                pass
        seconds = time.thread_time() - started  # of this thread: others use this machine too
    finally:
        sections.close()
    assert seconds / 500 < 50e-6


HOLDS_THE_LOCK = """
import ctypes, sys
from agrpo_megatron.config.schema import load
from agrpo_megatron.resilience import watchdog
from agrpo_megatron.resilience.failure import ending_together
from agrpo_megatron.resilience.monitors import monitors
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.config.settings import Settings

watchdog.HARD_EXIT_DELAY = 1.0
settings = load(Settings, sys.argv[1], ["resilience.timeouts={reward: 1, update: 100}"])
with ending_together():
    sections = Sections(monitors(settings))
    with sections("reward"):
        pass
    with sections("update"):
        ctypes.PyDLL(None).sleep(int(sys.argv[2]))
    sections.close()
print("finished")
"""


def test_the_last_resort_of_a_section_does_not_strike_in_the_next(tmp_path):
    """Whose code holds Python's lock from its first moment on, within its own limit."""
    file = tmp_path / "run.yaml"
    file.write_text(f"run: {{dir: '{tmp_path / 'run'}'}}\n")
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(file), "4"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr


def _position(place, *, waits=False):
    return Position("section update (rl iteration 1)", waits, (place,))


@pytest.mark.parametrize(
    "positions, hung",
    [
        ([_position("a", waits=True), _position("b")], [1]),
        ([_position("a"), None, _position("b", waits=True)], [1]),
        ([_position("a"), _position("a"), _position("b"), _position("a")], [2]),
        ([_position("a", waits=True), _position("b", waits=True)], []),
    ],
    ids=["one works", "one is silent", "one is elsewhere", "all wait"],
)
def test_who_hangs_follows_from_where_the_ranks_stand(positions, hung):
    positions = dict(enumerate(positions))
    assert hung_ranks(positions) == hung
    failure, report = describe(hung, positions, asker=0, section="section update")
    assert failure.startswith(f"rank {hung[0]} hangs in" if hung else "all ranks wait")
    assert len(report.splitlines()) <= 1 + len(positions)


def _where_it_stands():
    """Return whether each rank waits, as another thread of it sees; rank 1 comes late."""
    worker, seen = threading.get_ident(), []

    def look():
        seen.append(position_of(sys._current_frames()[worker], section="").waits)

    looking = threading.Timer(1.0, look)
    looking.start()
    if dist.get_rank() == 1:
        time.sleep(2)
    dist.barrier()
    looking.join()
    return seen


def test_a_rank_that_waits_in_torch_distributed_is_told_from_one_that_does_not():
    assert run_ranks(2, _where_it_stands) == [[True], [False]]
