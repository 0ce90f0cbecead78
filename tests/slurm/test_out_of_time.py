"""A training job whose time runs out is requeued, and ends as an undisturbed one."""

import pytest

from tests.slurm.jobs import PATIENCE, check_finished, read_log, submit_slow, undisturbed

pytestmark = pytest.mark.slow


def test_a_job_out_of_time_goes_on(cluster, folder):
    expected = undisturbed(folder, 2)
    name = "out of time"
    options = ["--time=2", "--signal=USR1@0"]  # without a signal before the limit
    margin = ["resilience.stop_margin=45"]  # else most of two minutes would pass
    number = submit_slow(cluster, folder, name, *options, seconds=9.0, settings=margin)
    job = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=2 * PATIENCE)
    restarts = int(job["Restarts"])
    assert restarts > 0
    assert "the job's time is up" in read_log(folder, number)
    check_finished(cluster, folder, expected, name, number, disturbances=restarts)
