"""A training job that was stopped for good continues as another job, to bit-identical metrics."""

import pytest

from tests.slurm.jobs import (
    PATIENCE,
    await_update,
    check_finished,
    read_log,
    submit_slow,
    undisturbed,
)

pytestmark = pytest.mark.slow


def test_a_job_that_was_stopped_for_good_goes_on_as_another(cluster, folder):
    expected, name = undisturbed(folder, 2), "stopped"
    first = submit_slow(cluster, folder, name)
    await_update(folder, name, first, iteration=1)
    cluster.run("scontrol", "update", f"jobid={first}", "requeue=0")
    cluster.run("scancel", "--signal=USR1", first)
    cluster.wait(first, "COMPLETED", timeout=PATIENCE)
    assert "not requeued, since the job has Requeue=0" in read_log(folder, first)
    second = submit_slow(cluster, folder, name)
    await_update(folder, name, second, iteration=3)
    cluster.run("scancel", second)
    cluster.wait(second, "CANCELLED", timeout=PATIENCE)
    third = submit_slow(cluster, folder, name)
    check_finished(cluster, folder, expected, name, third, disturbances=2)
    assert cluster.job(first)["Restarts"] == "0"
    assert cluster.job(second)["JobState"] == "CANCELLED", "nor was it requeued later"
