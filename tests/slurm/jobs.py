"""Jobs of the tests: a run of seconds, its undisturbed metrics, and what its attempts did."""

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cli.test_main import write_settings
from tests.ranks import run_ranks
from tests.slurm.cluster import Cluster
from tests.training.tiny import same_metrics

ROOT = Path(__file__).parent.parent.parent
ITERATIONS = 5
PATIENCE = 400  # seconds for what a job has to do, on a busy machine
# Slow enough to be disturbed at a moment that the test chooses; rank 0 says when each part begins.
SLOW = "slow:rank=0,section=rollout,seconds={0}; slow:rank=0,section=update,seconds={0}"
BEGUN = re.compile(r"fault slow: rank 0, section (rollout|update), rl iteration (\d+)")


def settings_file(folder: Path, **changes: dict) -> Path:
    """Write settings below a folder, under a name with a space."""
    train = {"iterations": ITERATIONS, **changes.pop("train", {})}
    resilience = {"idle_attempts": 4}  # a busy machine may need more than a job's minute to start
    return write_settings(
        folder / "my settings.yaml",
        train=train,
        checkpoint={"interval": 1},
        resilience=resilience,
        **changes,
    )


def submit(cluster: Cluster, script: str, folder: Path, *words: str | Path, **environment) -> str:
    """Submit a job script with options and arguments; its log is FOLDER/NUMBER.log.

    Args:
        words: options of sbatch, then "--", then the script's arguments.
    """
    at = words.index("--")
    project = folder / "the project"
    if not project.exists():
        project.symlink_to(ROOT)
    given = {"AGRPO_ROOT": str(project), "AGRPO_PYTHON": sys.executable, "COLUMNS": "200"}
    return cluster.sbatch(
        f"--chdir={ROOT}",
        f"--output={folder}/%j.log",
        *words[:at],
        project / "slurm" / script,
        *words[at + 1 :],
        **{**given, **environment},
    )


def submit_slow(
    cluster: Cluster,
    folder: Path,
    name: str,
    *options: str,
    seconds: float = 1.0,
    faults: str = "",
    settings: Sequence[str] = (),
) -> str:
    """Submit a slow training job of two nodes, under torchrun, in the run directory FOLDER/NAME."""
    return submit(
        cluster,
        "train.sbatch",
        folder,
        "--nodes=2",
        *options,
        "--",
        folder / "my settings.yaml",
        f"run.dir={folder / name}",
        *settings,
        AGRPO_LAUNCHER="torchrun",
        AGRPO_FAULTS="; ".join(filter(None, [SLOW.format(seconds), faults])),
        AGRPO_FAULTS_DIR=str(folder / f"faults of {name}"),
    )


def read_log(folder: Path, number: str) -> str:
    """Return a job's log so far."""
    path = folder / f"{number}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def metrics(directory: Path) -> list[dict]:
    """Return a run's metrics."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def undisturbed(folder: Path, world_size: int) -> list[dict]:
    """Train without a job, and return the metrics."""
    directory = folder / f"undisturbed {world_size}"
    words = ["train", str(folder / "my settings.yaml"), f"run.dir={directory}"]
    assert run_ranks(world_size, _call, words, folder) == [0] * world_size
    return metrics(directory)


def begun(directory: Path) -> list[tuple[str, int]]:
    """Return which parts of iterations a run began, over all attempts, in order."""
    logs = sorted(directory.glob("launch/*/attempt-*/rank-0.log"), key=_place)
    text = "\n".join(path.read_text(errors="replace") for path in logs)
    return [(section, int(number)) for section, number in BEGUN.findall(text)]


def await_update(folder: Path, name: str, number: str, *, iteration: int) -> None:
    """Wait until a job, in the run directory FOLDER/NAME, begins to update in an iteration.

    Raises:
        AssertionError: it takes too long; with the job's log.
    """
    deadline = time.monotonic() + PATIENCE
    while ("update", iteration) not in begun(folder / name):
        assert time.monotonic() < deadline, read_log(folder, number)
        time.sleep(0.3)


def check_nothing_is_lost(directory: Path, *, disturbances: int) -> None:
    """Make sure that at most an iteration was repeated each time, and no complete rollout.

    Raises:
        AssertionError: more was.
    """
    parts = begun(directory)
    updates = [number for section, number in parts if section == "update"]
    assert set(updates) == set(range(1, ITERATIONS + 1)), parts
    assert len(updates) - len(set(updates)) <= disturbances, parts
    complete = set()  # the rollout of an iteration that went on to its update
    for section, number in parts:
        assert section == "update" or number not in complete, f"rollout {number} again: {parts}"
        if section == "update":
            complete.add(number)


def check_finished(
    cluster: Cluster,
    folder: Path,
    expected: list[dict],
    name: str,
    number: str,
    *,
    disturbances: int,
) -> None:
    """Wait for the end of a job: its results must equal those of an undisturbed job."""
    job = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=PATIENCE)
    log = read_log(folder, number)
    assert job["JobState"] == "COMPLETED", log
    assert "agrpo: finished" in log
    assert same_metrics(metrics(folder / name), expected), log
    check_nothing_is_lost(folder / name, disturbances=disturbances)


def _place(path: Path) -> tuple[int, int]:
    attempt, job = path.parent.name, path.parent.parent.name
    return int(job), int(attempt.removeprefix("attempt-"))


def _call(words: list[str], folder: Path) -> int:
    """Call the command on this rank, with what it prints sent to a file."""
    from tests.cli.test_main import call

    status, printed = call(words, folder)
    if status:
        print(printed, file=sys.stderr)
    return status


def script_of(cluster: Cluster, number: str) -> int:
    """Return the process of a job's script on its first node."""
    node = cluster.job(number)["BatchHost"]
    for pid in sorted(cluster.processes(node, number)):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"/slurm_script") for word in words[:2]):
            return pid
    raise AssertionError(f"job {number} has no script")


def rank_of(cluster: Cluster, number: str, rank: int) -> int:
    """Return the process of a job's rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={number}".encode(), f"RANK={rank}".encode()}
        conf = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
        if {*wanted, conf} <= set(variables) and b"agrpo_megatron" in words:
            return int(path.name)
    raise AssertionError(f"job {number} has no rank {rank}")
