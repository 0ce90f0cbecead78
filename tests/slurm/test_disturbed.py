"""Disturbed training jobs all finish, and their metrics are bit-identical."""

import os
import re
import signal

import pytest

from tests.slurm.jobs import (
    await_update,
    check_finished,
    rank_of,
    read_log,
    script_of,
    submit_slow,
    undisturbed,
)

pytestmark = pytest.mark.slow
RESTARTED = "ranks restart, 1 of 3"  # within the job


@pytest.fixture(scope="module")
def expected(folder):
    return undisturbed(folder, 2)


def _stop_kindly(cluster, number):
    cluster.run("scancel", "--signal=USR1", number)


def _requeue(cluster, number):
    cluster.run("scontrol", "requeue", number)


def _kill_rank(cluster, number):
    os.kill(rank_of(cluster, number, 1), signal.SIGKILL)


def _kill_script(cluster, number):
    os.kill(script_of(cluster, number), signal.SIGKILL)


DISTURBANCES = [_kill_rank, _stop_kindly, _requeue, _kill_script]  # in an iteration each


def test_a_job_goes_on_after_each_disturbance(cluster, folder, expected):
    number = submit_slow(cluster, folder, "disturbed")
    for iteration, disturb in enumerate(DISTURBANCES, start=1):
        await_update(folder, "disturbed", number, iteration=iteration)
        disturb(cluster, number)
    disturbances = len(DISTURBANCES)
    check_finished(cluster, folder, expected, "disturbed", number, disturbances=disturbances)
    assert int(cluster.job(number)["Restarts"]) >= disturbances - 1
    assert RESTARTED in read_log(folder, number), "the killed rank needed no new attempt"


def test_a_hung_rank_shows_its_stack_and_the_job_goes_on(cluster, folder, expected):
    name = "hung"
    number = submit_slow(
        cluster,
        folder,
        name,
        seconds=0.1,
        faults="hang:rank=1,section=rollout,iteration=3",
        settings=["resilience.timeouts={rollout: 30}"],
    )
    check_finished(cluster, folder, expected, name, number, disturbances=1)
    log = read_log(folder, number)
    assert log.count("fault hang: rank 1, section rollout, rl iteration 3") == 1
    assert "rank 1 hangs in section rollout (rl iteration 3)" in log
    assert re.search(r'faults.py", line [0-9]+ in _hang$', log, re.MULTILINE), "its stack"
    assert RESTARTED in log
