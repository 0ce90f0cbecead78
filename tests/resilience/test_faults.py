"""Injected faults strike at their place, once over all attempts, and nowhere else."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agrpo_megatron.config.settings import ResilienceSettings, Settings
from agrpo_megatron.resilience import monitors
from agrpo_megatron.resilience.sections import Sections
from tools.faults import FAULTS, FOLDER, Faults, parse_faults

ROOT = Path(__file__).parent.parent.parent
# A rank that goes through its iterations: rollout, update, checkpoint, each of this many seconds.
RANK = """
import os, signal, sys, time
from agrpo_megatron.resilience.sections import Sections
from tools.faults import Faults

def on_signal(number, frame):
    print("got a stop signal", flush=True)

signal.signal(signal.SIGUSR1, on_signal)
sections = Sections([Faults.from_environment(int(os.environ.get("RANK", 0)))])
for iteration in (1, 2, 3):
    sections.at("rl", iteration)
    for section in ("rollout", "update", "checkpoint"):
        with sections(section):
            print(section, iteration, flush=True)
            time.sleep(float(sys.argv[1]))
print("finished", flush=True)
"""


def _environment(tmp_path, faults, **more):
    plain = {key: v for key, v in os.environ.items() if not key.startswith(("SLURM", "TORCHEL"))}
    plain |= {"PYTHONPATH": str(ROOT), FAULTS: faults, FOLDER: str(tmp_path / "struck")}
    return {**plain, **more}


def _run(tmp_path, faults, *, seconds=0.0, **environment):
    command = [sys.executable, "-c", RANK, str(seconds)]
    variables = _environment(tmp_path, faults, **environment)
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)


def _notes(tmp_path):
    return sorted(path.name for path in (tmp_path / "struck").glob("*"))


@pytest.fixture
def faults(monkeypatch, tmp_path):
    """Return a maker of one rank's sections under a text of faults."""

    def make(text, rank=0):
        monkeypatch.setenv(FAULTS, text)
        monkeypatch.setenv(FOLDER, str(tmp_path / "struck"))
        return Sections([Faults.from_environment(rank)])

    return make


def _go_through(sections, phase="rl", iterations=3):
    """Go through iterations; returns what each error came from."""
    struck = []
    for iteration in range(1, iterations + 1):
        sections.at(phase, iteration)
        for name in ("rollout", "update", "checkpoint"):
            try:
                with sections(name):
                    pass
            except (RuntimeError, OSError) as error:
                struck.append((name, iteration, error))
    return struck


def test_without_the_variable_nothing_strikes(monkeypatch, tmp_path):
    monkeypatch.delenv(FAULTS, raising=False)
    monkeypatch.delenv(FOLDER, raising=False)
    assert _go_through(Sections([Faults.from_environment(0)])) == []


def test_a_fault_strikes_once_over_all_attempts_on_its_rank_in_its_phase(faults, tmp_path, capfd):
    text = "raise:rank=1,section=update,iteration=2"
    assert _go_through(faults(text, rank=0)) == []
    assert _go_through(faults(text, rank=1), phase="sft") == []
    [(section, iteration, error)] = _go_through(faults(text, rank=1))
    assert (section, iteration, str(error)) == ("update", 2, "injected fault")
    assert capfd.readouterr().err == "fault raise: rank 1, section update, rl iteration 2\n"
    assert _go_through(faults(text, rank=1)) == [], "the next attempt is spared"
    assert len(_notes(tmp_path)) == 1


def test_a_fault_may_strike_several_times_and_in_any_iteration(faults, tmp_path):
    sections = faults("raise:rank=0,section=rollout,times=2,phase=sft")
    assert [place[:2] for place in _go_through(sections, phase="sft")] == [
        ("rollout", 1),
        ("rollout", 2),
    ]
    assert len(_notes(tmp_path)) == 2


def test_a_fault_may_wait_for_a_time_of_day(faults):
    early = f"raise:rank=0,section=rollout,at={time.time() + 600:.1f}"
    late = f"raise:rank=0,section=update,at={time.time() - 600:.1f}"
    assert [place[:2] for place in _go_through(faults(f"{early}; {late}"))] == [("update", 1)]


def test_setup_belongs_to_no_phase(faults):
    sections = faults("raise:rank=0,section=setup")
    with pytest.raises(RuntimeError, match="injected fault"), sections("setup"):
        pass


def test_a_save_fails_as_on_a_full_disk(faults):
    [(section, iteration, error)] = _go_through(faults("fail_save:rank=0,iteration=3"))
    assert (section, iteration, error.errno) == ("checkpoint", 3, errno.ENOSPC)


def test_a_slow_rank_is_slow_every_time(faults, tmp_path):
    sections = faults("slow:rank=0,section=update,seconds=0.05")
    _go_through(sections)
    taken = sections.take()
    assert taken["update"] >= 0.15 > taken["rollout"]
    assert _notes(tmp_path) == []


def test_a_killed_rank_is_spared_the_next_time(tmp_path):
    fault = "kill:rank=0,section=update,iteration=2"
    first = _run(tmp_path, fault)
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.split("\n")[-2] == "rollout 2"
    assert first.stderr == "fault kill: rank 0, section update, rl iteration 2\n"
    second = _run(tmp_path, fault)
    assert second.stdout.endswith("finished\n"), second.stderr


def test_a_fault_may_come_in_the_middle_of_a_section(tmp_path):
    done = _run(tmp_path, "kill:rank=0,section=rollout,iteration=2,after=0.2", seconds=0.6)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.endswith("rollout 2\n")


def test_a_section_that_ends_before_its_fault_is_spared(tmp_path):
    done = _run(tmp_path, "kill:rank=0,section=rollout,iteration=2,after=0.2")
    assert done.returncode == 0 and done.stdout.endswith("finished\n")
    assert _notes(tmp_path) == []


def test_a_rank_is_asked_to_stop_as_a_job_asks_it(tmp_path):
    done = _run(tmp_path, "stop:rank=0,section=update,iteration=2")
    assert done.stdout.count("got a stop signal\n") == 1
    assert done.stdout.index("checkpoint 1") < done.stdout.index("got a stop signal")
    assert done.returncode == 0


def test_a_hung_rank_stays_where_it_is_and_no_request_to_stop_frees_it(tmp_path):
    variables = _environment(tmp_path, "hang:rank=0,section=update,iteration=1")
    command = [sys.executable, "-c", RANK, "0"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        try:
            assert rank.stdout.readline() == "rollout 1\n"
            rank.send_signal(signal.SIGUSR1)
            assert rank.stdout.readline() == "got a stop signal\n"
            time.sleep(0.3)
            assert rank.poll() is None
        finally:
            rank.kill()
        assert rank.stdout.read() == ""


def test_a_lost_node_takes_all_of_the_job_there_and_nothing_else(tmp_path):
    job = {"SLURM_JOB_ID": f"test-{os.getpid()}", "SLURMD_NODENAME": "n1"}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    no_job = _environment(tmp_path, "")
    here, there = (
        subprocess.Popen(sleep, env={**no_job, **job, "SLURMD_NODENAME": node})
        for node in ("n1", "n2")
    )
    try:
        done = _run(tmp_path, "lose_node:rank=0,section=update,iteration=1", seconds=0.5, **job)
        assert done.returncode == -signal.SIGKILL
        assert here.wait(timeout=20) == -signal.SIGKILL
        assert there.poll() is None
    finally:
        for process in (here, there):
            process.kill()
            process.wait()


def test_without_slurm_a_lost_node_is_the_launcher_and_its_ranks(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(script), "3"]
    variables = _environment(tmp_path, "lose_node:rank=1,section=update,iteration=1")
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL) as started:
        me, seen = psutil.Process(started.pid), []
        while started.poll() is None:
            seen = me.children(recursive=True) or seen if me.is_running() else seen
            time.sleep(0.1)
        assert started.returncode == -signal.SIGKILL
    assert len(seen) >= 2
    _, alive = psutil.wait_procs(seen, timeout=20)
    assert alive == []


WRONG = {
    "kil:rank=1,section=update": "'kil' is not a kind of fault; use kill, hang",
    "kill:rank=1,section=updat": "there is no section 'updat'; use setup, rollout",
    "kill:rank=1,section=update,phase=ppo": "there is no phase 'ppo'; use sft, rl",
    "kill:rank=one,section=update": "rank=one is not a number; use rank=1",
    "kill:rank=1,section=update,times=0": "times=0 is out of range; use times=1 or more",
    "kill:rank=1,section=update,round=2": "'round' is not an option; use rank, section",
    "kill:section=update": "it has no rank; use rank=...",
    "kill:rank=1": "it has no section; use section=...",
    "slow:rank=1,section=update": "seconds are missing; use seconds=...",
    "hang:rank=1,section=update,after=1": "hang strikes as its section begins; use after=... with",
    "fail_save:rank=1,section=update": "no save happens there; use section=checkpoint",
    "kill:rank=1,section=update,seconds=1": "only slow takes seconds; use after=...",
}


@pytest.mark.parametrize("part", WRONG)
def test_what_is_malformed_is_named_with_its_rule_and_a_fix(part):
    said = f"AGRPO_FAULTS: in '{part}', {WRONG[part]}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        parse_faults(f"slow:rank=0,section=update,seconds=1; {part}")


def test_faults_need_a_folder(monkeypatch):
    monkeypatch.setenv(FAULTS, "kill:rank=0,section=update")
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(ValueError, match="AGRPO_FAULTS needs AGRPO_FAULTS_DIR"):
        Faults.from_environment(1)


def test_a_run_loads_the_faults_from_the_source_tree_only(monkeypatch, tmp_path):
    settings = Settings(resilience=ResilienceSettings(watchdog="never"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "struck"))
    monkeypatch.setenv(FAULTS, "raise:rank=0,section=setup")
    sections = Sections(monitors.monitors(settings))
    with pytest.raises(RuntimeError, match="injected fault"), sections("setup"):
        pass
    monkeypatch.setattr(monitors, "FAULTS", tmp_path / "tools" / "faults.py")
    with pytest.raises(ValueError, match=r"^AGRPO_FAULTS needs .*/tools/faults\.py; run from the"):
        monitors.monitors(settings)
    monkeypatch.delenv(FAULTS)
    assert monitors.monitors(settings) == []
