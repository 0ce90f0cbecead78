"""A training job outlives its nodes: one is set down, on another slurmd dies."""

import os
import signal

import pytest

from tests.slurm.conftest import cluster_or_skip
from tests.slurm.jobs import (
    PATIENCE,
    await_update,
    check_nothing_is_lost,
    metrics,
    read_log,
    submit_slow,
    undisturbed,
)
from tests.training.tiny import same_metrics

pytestmark = pytest.mark.slow
MISSED = 15  # seconds after which SLURM misses a node
SECONDS = 6.0  # of each part: the job must not be over before that


@pytest.fixture
def cluster():
    """Run a separate cluster, which misses a node sooner than the others do."""
    with cluster_or_skip(node_timeout=MISSED) as cluster:
        yield cluster


def _nodes(cluster, number):
    listed = cluster.job(number)["NodeList"]
    return cluster.run("scontrol", "show", "hostnames", listed).split()


def test_a_job_moves_from_lost_nodes_to_others(cluster, folder):
    number = submit_slow(cluster, folder, "run", seconds=SECONDS)
    await_update(folder, "run", number, iteration=1)
    down = _nodes(cluster, number)[1]
    cluster.run("scontrol", "update", f"nodename={down}", "state=down", "reason=test")
    await_update(folder, "run", number, iteration=2)
    # The job's script, a rank and its launcher keep running on the node. Nothing ends them.
    deaf = _nodes(cluster, number)[0]
    assert deaf != down
    os.kill(cluster.pid(deaf), signal.SIGKILL)
    job = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", timeout=PATIENCE)
    log = read_log(folder, number)
    assert job["JobState"] == "COMPLETED", log
    restarts = int(job["Restarts"])
    assert restarts >= 2, log  # a busy machine may lose a node by itself
    assert not {down, deaf} & set(_nodes(cluster, number))
    assert same_metrics(metrics(folder / "run"), undisturbed(folder, 2)), log
    check_nothing_is_lost(folder / "run", disturbances=restarts)
