"""A real SLURM cluster on this machine: several slurmd, each a node with its own name.

    with running_cluster(folder) as cluster:
        job = cluster.sbatch("job.sbatch")
        cluster.wait(job, "COMPLETED")

All daemons run as root with files below `folder`, on ports and under node names of their own, so
that several clusters can run side by side. A separate process stops them all at the end,
also where the tests are killed:

    python -m tests.slurm.cluster FOLDER NODE...    stops a cluster when its standard input ends
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
HOSTS = Path("/etc/hosts")
PORTS = range(12000, 19000)  # Linux hands out those from 32768; rendezvous takes 20000 to 32000
CPUS, GPUS, MEMORY = 8, 4, 4096  # that a node says it has
UP = ("idle", "mixed", "allocated", "completing")
CONFIG = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job may start again so many seconds after it was queued again; less than 5 counts as 120.
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
# Neither cgroups nor systemd are needed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# Jobs of other clusters use other ports, which follow from their job numbers.
FirstJobId={first_job}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=1
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
MinJobAge=3600
BatchStartTimeout=10
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobs
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    root: Path
    nodes: tuple[str, ...]
    environment: dict[str, str]  # for SLURM's commands

    def run(self, *command: str | Path, **environment: str) -> str:
        """Return what a command prints.

        Raises:
            AssertionError: it failed; with what it printed.
        """
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **self.environment, **environment},
        )
        shown = f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        assert done.returncode == 0, shown
        return done.stdout

    def sbatch(self, *words: str | Path, **environment: str) -> str:
        """Submit a job; returns its number."""
        return self.run("sbatch", "--parsable", *words, **environment).strip()

    def job(self, number: str, timeout: float = 60) -> dict[str, str]:
        """Return what SLURM knows of a job, for instance JobState and Restarts.

        Raises:
            AssertionError: it knows no such job, or a busy controller did not answer all the time.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._job(number)
            except (AssertionError, subprocess.TimeoutExpired):
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.3)

    def wait(self, number: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job is in one of some states.

        Raises:
            AssertionError: it takes too long.
        """
        deadline = time.monotonic() + timeout
        while (job := self.job(number, deadline - time.monotonic()))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is still {job['JobState']}: {job}"
            time.sleep(0.3)
        return job

    def pid(self, daemon: str) -> int:
        """Return the process of slurmctld, munged, or of a node's slurmd."""
        return int((self.root / "run" / f"{daemon}.pid").read_text())

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.run("slurmd", "-f", self.root / "etc" / "slurm.conf", "-N", node)

    def await_nodes(self, timeout: float = 60) -> None:
        """Wait until all nodes answer, and bring back what a test has set down.

        Raises:
            AssertionError: it takes too long; with the ends of the daemons' logs.
        """
        deadline = time.monotonic() + timeout
        while missing := set(self.nodes) - self._nodes(*UP):
            for node in missing & self._nodes("down", "drained"):
                with contextlib.suppress(AssertionError):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume")
            assert time.monotonic() < deadline, f"nodes not up: {missing}\n{self._logs()}"
            time.sleep(0.3)

    def processes(self, node: str, number: str | None = None) -> list[int]:
        """Return the processes that jobs, or one job, run on a node."""
        wanted = {f"SLURMD_NODENAME={node}".encode()}
        if number is not None:
            wanted.add(f"SLURM_JOB_ID={number}".encode())
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
        return found

    def _job(self, number: str) -> dict[str, str]:
        for line in self.run("scontrol", "--oneliner", "show", "job", number).splitlines():
            found = dict(re.findall(r"(?:^| )([\w:/]+)=(\S*)", line))
            if number in (found["JobId"], f"{found.get('ArrayJobId')}_{found.get('ArrayTaskId')}"):
                return found
        raise AssertionError(f"there is no job {number}")

    def _nodes(self, *states: str) -> set[str]:
        listed = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
        rows = (line.split() for line in listed if line)
        return {name for name, state in rows if state in states}

    def _logs(self) -> str:
        ends = (
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-10:])
            for path in sorted((self.root / "log").glob("*.log"))
        )
        return "\n".join(ends)


def what_is_missing() -> str | None:
    """Say why no cluster can run here, or None."""
    missing = [name for name in BINARIES if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not on PATH; `make slurm` installs SLURM"
    if os.geteuid() != 0:
        return "a cluster's daemons need root"
    return None


@contextlib.contextmanager
def running_cluster(
    root: Path, *, nodes: int = 4, node_timeout: int = 60, kill_wait: int = 8
) -> Iterator[Cluster]:
    """Run a cluster.

    Args:
        root: an empty folder; its path is short enough for a socket in it, and everyone may
            enter the folders above it.
        node_timeout: seconds after which a node that does not answer is down.
        kill_wait: seconds between a job's SIGTERM and its SIGKILL.
    """
    name = f"agrpo{secrets.token_hex(3)}"
    names = tuple(f"{name}n{number}" for number in range(1, nodes + 1))
    cluster = _cluster(root, names)
    _write_files(cluster, name, node_timeout=node_timeout, kill_wait=kill_wait)
    with _stopped_at_the_end(cluster):
        _edit_hosts(lambda before: [*before, *_host_lines(names)])
        _start(cluster)
        yield cluster


def _cluster(root: Path, names: tuple[str, ...]) -> Cluster:
    return Cluster(root, names, {"SLURM_CONF": str(root / "etc" / "slurm.conf")})


def _write_files(cluster: Cluster, name: str, *, node_timeout: int, kill_wait: int) -> None:
    root = cluster.root
    for folder in ("etc", "run", "log", "state", "dev", "munge/key"):
        (root / folder).mkdir(parents=True)
    for folder in (root, root / "munge"):  # munged wants its socket reachable, its key private
        folder.chmod(0o711)
    (root / "munge" / "key").chmod(0o700)
    key = root / "munge" / "key" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().partition(".")[0]
    port, *ports = _free_ports(1 + len(cluster.nodes))
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={its} CPUs={CPUS} "
        f"RealMemory={MEMORY} Gres=gpu:{GPUS} State=UNKNOWN"
        for node, its in zip(cluster.nodes, ports, strict=True)
    ]
    config = CONFIG.format(
        name=name,
        host=host,
        port=port,
        root=root,
        nodes="\n".join(lines),
        node_timeout=node_timeout,
        kill_wait=kill_wait,
        first_job=1 + secrets.randbelow(50000),
    )
    (root / "etc" / "slurm.conf").write_text(config)
    (root / "etc" / "gres.conf").write_text(_gres(root))
    for node in cluster.nodes:
        (root / "spool" / node).mkdir(parents=True)


def _gres(root: Path) -> str:
    """Return the GPUs of every node: device files that no process opens, or only a count."""
    try:
        for number in range(GPUS):
            os.mknod(root / "dev" / f"gpu{number}", 0o020666, os.makedev(1, 3))
    except OSError:
        return f"Name=gpu Count={GPUS} Flags=CountOnly\n"
    return f"Name=gpu File={root}/dev/gpu[0-{GPUS - 1}]\n"


def _start(cluster: Cluster) -> None:
    root = cluster.root
    cluster.run(
        "munged",
        "--force",
        f"--key-file={root}/munge/key/munge.key",
        f"--socket={root}/munge/socket",
        f"--pid-file={root}/run/munged.pid",
        f"--log-file={root}/log/munged.log",
        f"--seed-file={root}/munge/seed",
    )
    cluster.run("slurmctld", "-f", root / "etc" / "slurm.conf")
    for node in cluster.nodes:
        cluster.start_node(node)
    cluster.await_nodes()


def _stop(cluster: Cluster) -> None:
    """End all jobs, then all daemons, each by its pid file."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        _end_jobs(cluster)
    for node in cluster.nodes:  # what a lost node has left running
        _end(cluster.processes(node))
    for daemon, comm in (
        *((node, "slurmd") for node in cluster.nodes),
        ("slurmctld", "slurmctld"),
        ("munged", "munged"),
    ):
        with contextlib.suppress(OSError, ValueError):
            pid = cluster.pid(daemon)
            if Path(f"/proc/{pid}/comm").read_text().strip() == comm:
                _end([pid])


def _end_jobs(cluster: Cluster) -> None:
    numbers = cluster.run("squeue", "--noheader", "--format=%A").split()
    if numbers:
        cluster.run("scancel", "--signal=KILL", *numbers)
        cluster.run("scancel", *numbers)
    deadline = time.monotonic() + 20
    while cluster.run("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.3)


def _end(pids: list[int]) -> None:
    """End processes; kill them if they take too long."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def _stopped_at_the_end(cluster: Cluster) -> Iterator[None]:
    """Let a process stop the cluster when this one leaves, or dies."""
    words = [sys.executable, "-m", "tests.slurm.cluster", cluster.root, *cluster.nodes]
    stopper = subprocess.Popen(
        words, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2], start_new_session=True
    )
    assert stopper.stdin is not None
    try:
        yield
    finally:
        stopper.stdin.close()
        stopper.wait(timeout=120)


def _host_lines(names: tuple[str, ...]) -> list[str]:
    """Return what lets names stand for this machine: jobs meet at the first node's name."""
    return [f"127.0.0.1 {name}\n" for name in names]


def _edit_hosts(change) -> None:
    """Rewrite the file in place, since containers mount it; one process at a time."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = change(file.read().splitlines(keepends=True))
        file.seek(0)
        file.writelines(lines)
        file.truncate()


def _free_ports(count: int) -> list[int]:
    """Return free ports; another cluster begins at another port."""
    start, found = secrets.randbelow(len(PORTS)), []
    for offset in range(len(PORTS)):
        port = PORTS[(start + offset) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def main() -> None:
    """Stop a cluster when the standard input ends, and forget its nodes' names."""
    root, *names = sys.argv[1:]
    cluster = _cluster(Path(root), tuple(names))
    sys.stdin.buffer.read()
    _stop(cluster)
    lines = _host_lines(cluster.nodes)
    _edit_hosts(lambda before: [line for line in before if line not in lines])


if __name__ == "__main__":
    main()
