"""Training jobs that are disturbed all end up finished, and no bit of their metrics differs."""

import os
import signal
import time

import pytest

from tests.slurm.jobs import (
    begun,
    check_nothing_is_lost,
    metrics,
    rank_of,
    read_log,
    script_of,
    settings_file,
    submit_slow,
    undisturbed,
)
from tests.training.tiny import same_metrics

pytestmark = pytest.mark.slow
PATIENCE = 240  # seconds for all jobs together, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with settings, whose path has a space."""
    folder = tmp_path_factory.mktemp("a folder")
    settings_file(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return undisturbed(folder, 2)


def _reaches(folder, name, iteration):
    return ("update", iteration) in begun(folder / name)


def _stop_kindly(cluster, number):
    cluster.run("scancel", "--signal=USR1", number)


def _queue_again(cluster, number):
    cluster.run("scontrol", "requeue", number)


def _kill_rank(cluster, number):
    os.kill(rank_of(cluster, number, 1), signal.SIGKILL)


def _kill_script(cluster, number):
    os.kill(script_of(cluster, number), signal.SIGKILL)


def _nothing(cluster, number):
    """Let the job's time run out."""


def _cancel(cluster, number):
    cluster.run("scancel", number)


DISTURBANCES = {
    "asked to stop": (_stop_kindly, []),
    "queued again": (_queue_again, []),
    "rank killed": (_kill_rank, []),
    "script killed": (_kill_script, []),
    "out of time": (_nothing, ["--time=1", "--signal=USR1@0"]),
    "cancelled": (_cancel, []),
}


def _disturb_all(cluster, folder):
    """Run a job for each disturbance, at once; returns the numbers of those that end them."""
    numbers = {}
    for name, (_, options) in DISTURBANCES.items():
        seconds = 12.0 if name == "out of time" else 1.0
        numbers[name] = submit_slow(cluster, folder, name, *options, seconds=seconds)
    waiting, deadline = set(DISTURBANCES), time.monotonic() + PATIENCE
    while waiting:
        assert time.monotonic() < deadline, {n: read_log(folder, numbers[n]) for n in waiting}
        for name in [name for name in waiting if _reaches(folder, name, 2)]:
            DISTURBANCES[name][0](cluster, numbers[name])
            waiting.remove(name)
        time.sleep(0.3)
    cluster.wait(numbers["cancelled"], "CANCELLED", timeout=60)
    again = submit_slow(cluster, folder, "cancelled")
    return {**numbers, "cancelled, first": numbers["cancelled"], "cancelled": again}


@pytest.fixture(scope="module")
def jobs(cluster, folder):
    return _disturb_all(cluster, folder)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbed_job_ends_as_if_nothing_had_happened(cluster, folder, expected, jobs, name):
    job = cluster.wait(jobs[name], "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=PATIENCE)
    log = read_log(folder, jobs[name])
    assert job["JobState"] == "COMPLETED", log
    assert "agrpo: finished" in log
    assert same_metrics(metrics(folder / name), expected), log
    check_nothing_is_lost(folder / name, disturbances=1 + int(job["Restarts"]))
    was_queued = name not in ("rank killed", "cancelled")
    assert (int(job["Restarts"]) > 0) == was_queued


def test_a_cancelled_job_is_not_queued_again(cluster, jobs):
    job = cluster.job(jobs["cancelled, first"])
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def test_a_job_whose_requeueing_was_switched_off_stops_and_stays_away(cluster, folder):
    number = submit_slow(cluster, folder, "held")
    deadline = time.monotonic() + PATIENCE
    while not _reaches(folder, "held", 2):
        assert time.monotonic() < deadline, read_log(folder, number)
        time.sleep(0.3)
    cluster.run("scontrol", "update", f"jobid={number}", "requeue=0")
    cluster.run("scancel", "--signal=USR1", number)
    job = cluster.wait(number, "COMPLETED", "FAILED", timeout=60)
    log = read_log(folder, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), log
    assert "not queued again, as the job was told (Requeue=0)" in log
    assert (folder / "held" / "checkpoints" / "latest").exists()
