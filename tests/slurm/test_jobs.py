"""Each job script runs on a cluster and finishes; wrong input and broken nodes are reported."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import (
    PATIENCE,
    ROOT,
    metrics,
    read_log,
    submit,
    undisturbed,
)
from tests.training.tiny import TIMED, same_metrics

SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])
SHORT = ["train.iterations=1", "sft.iterations=1"]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module")
def trained(cluster, folder):
    """Train on two nodes; returns the run directory and the job's log."""
    words = ["--", folder / "my settings.yaml", f"run.dir={folder / 'a run'}"]
    number = submit(cluster, "train.sbatch", folder, "--nodes=2", *words)
    state = cluster.wait(number, *ENDS, timeout=PATIENCE)["JobState"]
    log = read_log(folder, number)
    assert state == "COMPLETED", log
    return folder / "a run", number, log


def _run(cluster, folder, script, *words, **environment):
    """Submit a job and wait for its end; returns its state, status and log."""
    number = submit(cluster, script, folder, *words, **environment)
    job = cluster.wait(number, *ENDS, timeout=PATIENCE)
    return job["JobState"], job["ExitCode"].partition(":")[0], read_log(folder, number)


def _close(ours, theirs):
    """Return whether numbers agree to 1e-5, and all else is equal; times are ignored."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for name in {name for name in other if not name.startswith(TIMED)} - LAYOUT:
            assert mine[name] == pytest.approx(other[name], abs=1e-5), (name, mine, other)
    return True


# How rows are packed depends on the number of ranks.
LAYOUT = {"micro_batches", "perf/packing_efficiency"}


@pytest.mark.slow
def test_training_on_two_nodes_is_that_of_one_process(folder, trained):
    directory, number, log = trained
    ours = metrics(directory)
    assert same_metrics(ours, undisturbed(folder, 2)), "the job does what its ranks do without it"
    assert _close(ours, undisturbed(folder, 1))
    assert "agrpo: finished" in log
    latest = directory / "launch" / number / "latest"
    assert latest.is_symlink()
    assert "rl           1/5" in (latest / "rank-0.log").read_text()
    assert "rl           1/5" in log, "the job's log has rank 0's output"
    assert (latest / "rank-1.log").exists()


@pytest.mark.slow
def test_an_evaluation_with_two_ranks_on_a_node(cluster, folder, trained):
    state, _, log = _run(
        cluster, folder, "evaluate.sbatch", "--", trained[0], AGRPO_RANKS_PER_NODE="2"
    )
    assert state == "COMPLETED", log
    assert list((trained[0] / "evaluations").glob("*/results.json"))


@pytest.mark.slow
def test_a_conversion(cluster, folder, trained):
    words = ["to-hf", trained[0], folder / "exported"]
    state, _, log = _run(cluster, folder, "convert.sbatch", "--", *words)
    assert state == "COMPLETED", log
    assert list((folder / "exported").glob("*.safetensors"))


@pytest.mark.slow
def test_a_broken_node_is_named_and_left_out(cluster, folder):
    broken = cluster.nodes[0]
    words = ["--", folder / "my settings.yaml", f"run.dir={folder / 'broken'}", *SHORT]
    state, _, log = _run(
        cluster,
        folder,
        "train.sbatch",
        "--nodes=2",
        *words,
        AGRPO_HEALTH_COMMAND=f'[ "$SLURMD_NODENAME" != {broken} ] || {{ echo no heat; false; }}',
    )
    assert state == "COMPLETED", log
    reason = f"{broken} fails AGRPO_HEALTH_COMMAND: no heat"
    assert reason in (folder / "broken" / "launch" / "bad_nodes").read_text()
    assert f"requeued: without {broken}" in log
    assert "attempt 1, on" in log and "attempt 2, on" not in log


@pytest.mark.slow
def test_a_wish_to_stop_during_the_checks_blames_no_node(cluster, folder):
    """Both nodes get a signal while they are checked: the job requeues, and then finishes."""
    run, checked = folder / "signalled", folder / "checked"
    checked.mkdir()
    wait = (
        f'[ -e "{checked}/$SLURMD_NODENAME" ] || {{ touch "{checked}/$SLURMD_NODENAME"; sleep 9; }}'
    )
    words = ["--nodes=2", "--", folder / "my settings.yaml", f"run.dir={run}", *SHORT]
    number = submit(cluster, "train.sbatch", folder, *words, AGRPO_HEALTH_COMMAND=wait)
    deadline = time.monotonic() + PATIENCE
    while len(list(checked.iterdir())) < 2:
        assert time.monotonic() < deadline, read_log(folder, number)
        time.sleep(0.3)
    cluster.run("scancel", "--signal=USR1", number)
    state = cluster.wait(number, *ENDS, timeout=PATIENCE)["JobState"]
    log = read_log(folder, number)
    assert state == "COMPLETED", log
    assert "requeued: ended or stopped during the node check" in log
    assert not (run / "launch" / "bad_nodes").exists(), log


def test_too_few_good_nodes_end_a_job(cluster, folder):
    words = ["--", folder / "my settings.yaml", f"run.dir={folder / 'few'}", *SHORT]
    state, status, log = _run(
        cluster,
        folder,
        "train.sbatch",
        f"--nodes={len(cluster.nodes)}",
        *words,
        AGRPO_HEALTH_COMMAND=f'[ "$SLURMD_NODENAME" != {cluster.nodes[0]} ]',
    )
    assert (state, status) == ("FAILED", "93"), log
    assert f"without {cluster.nodes[0]}, partition batch has too few nodes: 3" in log


def test_when_no_node_is_good_the_nodes_are_not_to_blame(cluster, folder):
    words = ["--", folder / "my settings.yaml", f"run.dir={folder / 'none'}", *SHORT]
    given = {"AGRPO_HEALTH_DISK": str(10**12)}
    state, status, log = _run(cluster, folder, "train.sbatch", "--nodes=2", *words, **given)
    assert (state, status) == ("FAILED", "2"), log
    assert "every node fails the check" in log
    assert "AGRPO_HEALTH_DISK" in log


def test_wrong_settings_end_a_job_for_good(cluster, folder):
    words = ["--", folder / "my settings.yaml", "train.iteration=1"]
    state, status, log = _run(cluster, folder, "train.sbatch", *words)
    assert (state, status) == ("FAILED", "2"), log
    assert "did you mean train.iterations?" in log


def test_a_script_far_from_its_project_says_so(tmp_path):
    script = ROOT / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "x.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 2
    assert f"{tmp_path} holds no slurm/common.sh" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: Path(path).name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        if os.environ.get("AGRPO_REQUIRE_SLURM"):
            pytest.fail("AGRPO_REQUIRE_SLURM is set, but shellcheck is not on PATH")
        pytest.skip("shellcheck is not on PATH")
    done = subprocess.run(
        ["shellcheck", "--external-sources", str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
