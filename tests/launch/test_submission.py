"""`agrpo launch` against a cluster that answers: what it refuses, and what it is given.

Jobs are submitted held, so that none of them runs.
"""

import re
import subprocess

import pytest

from agrpo_megatron.launch.cluster import ask_cluster, jobs_of
from tests.cli.test_main import write_settings

HELD = ("launch.gpus_per_node=0", "launch.options=[--hold]")


@pytest.fixture(autouse=True)
def slurm(cluster, monkeypatch):
    """Let SLURM's commands ask the cluster of the tests."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def jobs():
    """Return a list of job numbers that are cancelled in the end."""
    numbers = []
    yield numbers
    for number in numbers:
        subprocess.run(["scancel", number], check=True)


def shown(number):
    """Return what the controller knows of a job, by name."""
    command = ["scontrol", "show", "job", number]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(re.findall(r"(?m)([\w/:]+)=(.*?)(?=\s+[\w/:]+=|$)", done.stdout))


@pytest.fixture
def partition():
    """Return the default partition."""
    return next(partition for partition in ask_cluster() if partition.is_default)


def test_what_the_cluster_cannot_run_is_refused(launch, partition, tmp_path):
    run = tmp_path / "run"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(run)})
    gpus = max(nodes.gpus for nodes in partition.nodes)
    cpus = max(nodes.cpus for nodes in partition.nodes)
    count = sum(nodes.count for nodes in partition.nodes)
    name = partition.name
    for given, said in (
        (
            [f"launch.partition={name}x"],
            f"launch.partition={name}x is not a partition of this cluster, which has .*{name}.*; "
            f"did you mean {name}",
        ),
        (
            [f"launch.gpus_per_node={gpus + 1}"],
            f"launch.gpus_per_node={gpus + 1} is more than any node of partition {name} has; use "
            f"at most {gpus}",
        ),
        (
            [f"launch.cpus_per_task={cpus + 1}", "launch.gpus_per_node=0"],
            f"launch.cpus_per_task={cpus + 1} is more than any node",
        ),
        (
            ["launch.gpus_per_node=0", "--nodes", count + 1],
            f"--nodes {count + 1}: partition {name} has {count} nodes; use at most {count}",
        ),
        (
            ["launch.gpus_per_node=0", "launch.exclude=no-such-node"],
            "sbatch refuses the job: .*[Nn]ode",
        ),
        (
            ["launch.gpus_per_node=0", "launch.options=[--reservation=none]"],
            "sbatch refuses the job: .*reservation",
        ),
        (
            ["launch.gpus_per_node=0", "launch.options=[--no-such-option]"],
            "sbatch refuses the job: unrecognized option '--no-such-option'",
        ),
    ):
        status, printed, errors = launch(file, "--nodes", 1, *given)
        assert (status, printed) == (2, "")
        assert re.fullmatch(f"agrpo: error: {said}.*\n", errors), errors
        assert not run.exists()


def test_a_controller_that_does_not_answer_is_told(launch, monkeypatch, tmp_path):
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(tmp_path / "run")})
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setattr("agrpo_megatron.launch.cluster.SLURM_TIMEOUT", 5.0)
    status, script, errors = launch(file, "--nodes", 1, "--dry-run", HELD[0])
    assert (status, errors) == (0, "")
    assert "\n# cluster   not checked: " in script
    status, printed, errors = launch(file, "--nodes", 1, HELD[0])
    assert (status, printed) == (2, "")
    assert "; submit from a machine of the cluster, or add --dry-run" in errors


def test_a_run_is_submitted_as_shown(launch, jobs, tmp_path):
    run = tmp_path / "it's a $run"
    file = write_settings(tmp_path / "s e t.yaml", run={"dir": str(run)})
    chosen = ["launch.time=01:30:00", "launch.grace=120", "launch.ranks_per_node=2"]
    status, printed, errors = launch(file, "--nodes", 2, *HELD, *chosen)
    assert (status, errors) == (0, "")
    assert "\n# cluster   accepted: Job " in printed
    number = re.findall(r"(?m)^job     (\d+)$", printed)[0]
    jobs.append(number)
    for line in (f"wait    squeue -j {number}", f"stop    scancel {number} "):
        assert f"\n{line}" in printed
    job = shown(number)
    assert job["JobState"] == "PENDING" and job["Requeue"] == "1"
    assert job["JobName"] == f"agrpo-{run.name}"
    assert job["NumNodes"].startswith("2") and job["TimeLimit"] == "01:30:00"
    status, printed, errors = launch(file, "--nodes", 2, *HELD, *chosen)
    assert (status, printed) == (2, "")
    assert errors == (
        f"agrpo: error: run.dir={run}: its job {number} is pending or running; let it end, or "
        f"stop it by scancel {number}\n"
    )
    after = f"launch.options=[--hold, --dependency=afterany:{number}]"
    status, printed, _ = launch(file, "--nodes", 2, *HELD, after)
    jobs += re.findall(r"(?m)^job     (\d+)$", printed)
    assert status == 0 and len(jobs) == 2, "one job after another may wait"
    assert job["StdOut"] == f"{run}/launch/{number}.log" and (run / "launch").is_dir()


def test_a_sweep_is_submitted_with_its_table(launch, jobs, tmp_path):
    directory = tmp_path / "sweep"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(directory)})
    status, printed, errors = launch(file, "--nodes", 1, *HELD, "--sweep", "run.seed=[0, 1, 2]")
    assert (status, errors) == (0, "")
    array, table = re.findall(r"(?m)^job     (\d+), and (\d+) for the table$", printed)[0]
    jobs += [array, table]
    assert shown(array)["ArrayTaskId"] == "0-2"
    assert shown(table)["Dependency"].startswith(f"afterany:{array}_*")
    assert (directory / "sweep.yaml").is_file()
    assert set(jobs_of(str(directory))) == {array, table}


def test_a_submission_that_fails_is_told(launch, monkeypatch, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "launch").write_text("in the way")
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(run)})
    status, _, errors = launch(file, "--nodes", 1, *HELD)
    assert status == 2
    assert errors.startswith("agrpo: error: nothing more was submitted: mkdir: ")
