"""What `sinfo` says is read and compared with a job; pure functions on text."""

import pytest

from agrpo_megatron.config.settings import LaunchSettings
from agrpo_megatron.launch.cluster import (
    Nodes,
    Partition,
    check_cluster,
    parse_time,
    read_partitions,
    write_time,
)

# Two kinds of nodes in the default partition, one of them with two kinds of GPUs.
SINFO = """\
gpu*|2|64|gpu:a100:4(S:0-1)|2-00:00:00|01:00:00
gpu*|6|128|gpu:h100:4,gpu:h200:4,shard:16|2-00:00:00|01:00:00
cpu|10|32|(null)|infinite|n/a
debug|1|8|gpu:8|30:00|05:00
empty|0|0|(null)|infinite|n/a
"""
PARTITIONS = read_partitions(SINFO)


def check(nodes=1, **launch):
    """Check a job of these settings; without GPUs unless said."""
    check_cluster(LaunchSettings(**{"gpus_per_node": 0, **launch}), nodes, PARTITIONS)


def test_partitions_are_read_with_their_nodes_gpus_and_times():
    expected = [
        Partition("gpu", True, 172800, 3600, (Nodes(2, 64, 4), Nodes(6, 128, 8))),
        Partition("cpu", False, None, None, (Nodes(10, 32, 0),)),
        Partition("debug", False, 1800, 300, (Nodes(1, 8, 8),)),
        Partition("empty", False, None, None, (Nodes(0, 0, 0),)),
    ]
    assert read_partitions(SINFO) == expected and read_partitions("") == []


@pytest.mark.parametrize("row", ["gpu*|2", "gpu|many|8|gpu:8|infinite|n/a", "a|1|1|b|soon|n/a"])
def test_a_row_that_is_not_understood_is_said_to_be_so(row):
    with pytest.raises(RuntimeError, match="is not understood"):
        read_partitions(row)


TIMES = {
    "30": 1800,
    90: 5400,
    "30:15": 1815,
    "04:00:00": 14400,
    "1-12": 129600,
    "1-12:30": 131400,
    "2-00:00:01": 172801,
    "infinite": None,
    "UNLIMITED": None,
    "0": None,
}


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["abc", "", "1:2:3:4", "-5", "4h", "1-", "1.5", "1-2:3:4:5"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="is not a time; write minutes"):
        parse_time(text)


@pytest.mark.parametrize("seconds", [1, 60, 3599, 86399, 86400, 172801])
def test_a_time_that_is_written_reads_back(seconds):
    assert parse_time(write_time(seconds)) == seconds


FITS = {
    "default": {},
    "all nodes": {"nodes": 8, "gpus_per_node": 4},
    "all with eight": {"nodes": 6, "gpus_per_node": 8, "time": "2-00:00:00"},
    "named": {"partition": "cpu", "nodes": 10, "time": "9-00"},
    "one of several": {"partition": "debug,cpu", "nodes": 10},
    "no limit where there is none": {"partition": "cpu", "time": "infinite"},
}


@pytest.mark.parametrize("name", FITS)
def test_what_fits_is_let_through(name):
    check(**FITS[name])


WRONG = {
    "launch.partition=gpus is not a partition of this cluster, which has gpu, cpu, debug, empty; "
    "did you mean gpu?": {"partition": "gpus"},
    "launch.partition=xyz is not a partition of this cluster, which has gpu, cpu, debug, empty; "
    "name one of them, or leave it null": {"partition": "cpu,xyz"},
    "launch.gpus_per_node=9 is more than any node of partition gpu has; use at most 8": {
        "gpus_per_node": 9
    },
    "launch.gpus_per_node=1 is more than any node of partition cpu has; use at most 0": {
        "gpus_per_node": 1,
        "partition": "cpu",
    },
    "launch.cpus_per_task=129 is more than any node of partition gpu has; use at most 128": {
        "cpus_per_task": 129
    },
    "--nodes 7: partition gpu has 6 nodes with 8 GPUs; use at most 6": {
        "nodes": 7,
        "gpus_per_node": 8,
    },
    "--nodes 11: partition cpu has 10 nodes; use at most 10": {"nodes": 11, "partition": "cpu"},
    "--nodes 1: partition empty has 0 nodes; use at most 0": {"partition": "empty"},
    "launch.time=3-00 is over the limit of partition gpu; use at most 2-00:00:00": {"time": "3-00"},
    "launch.time=infinite is over the limit of partition debug; use at most 00:30:00": {
        "time": "infinite",
        "partition": "debug",
    },
    "launch.grace=300 is not shorter than the 300 seconds that partition debug gives; lower it, "
    "or set launch.time": {"partition": "debug"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_run_is_refused_with_the_fix(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check(**WRONG[message])
    assert str(error.value) == message


def test_without_a_default_partition_nothing_is_compared():
    others = [partition for partition in PARTITIONS if not partition.is_default]
    check_cluster(LaunchSettings(gpus_per_node=99), 99, others)
