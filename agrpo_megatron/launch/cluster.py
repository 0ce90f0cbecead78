"""The partitions of a cluster, as `sinfo` prints them, and whether they can run a job.

Pure functions read and check the text; only `ask_cluster` and `jobs_of` call SLURM.
"""

import difflib
import re
import subprocess
from dataclasses import dataclass

from agrpo_megatron.config.settings import LaunchSettings

SINFO = ("sinfo", "--noheader", "--all", "--exact", "--format=%P|%D|%c|%G|%l|%L")
SQUEUE = ("squeue", "--noheader", "--format=%F %k")
SLURM_TIMEOUT = 30.0  # seconds for one SLURM command
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GPUS = re.compile(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)")


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of a partition."""

    count: int
    cpus: int  # of each
    gpus: int  # of each


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster."""

    name: str
    is_default: bool
    time_limit: int | None  # seconds; None: no limit
    default_time: int | None  # seconds of a job without a limit; None: the partition's limit
    nodes: tuple[Nodes, ...]


def ask_cluster() -> list[Partition]:
    """Return the cluster's partitions.

    Raises:
        RuntimeError: SLURM is not installed here or does not answer; the reason in one line.
    """
    return read_partitions(_run(SINFO))


def jobs_of(comment: str) -> list[str]:
    """Return the numbers of the pending or running jobs with this comment.

    Raises:
        RuntimeError: as `ask_cluster`.
    """
    rows = (row.strip().partition(" ") for row in _run(SQUEUE).splitlines())
    return list(dict.fromkeys(number for number, _, found in rows if found == comment))


def read_partitions(text: str) -> list[Partition]:
    """Read the output of `SINFO`: a row for each kind of node of each partition.

    Raises:
        RuntimeError: a row has another form.
    """
    found: dict[str, Partition] = {}
    for row in text.splitlines():
        try:
            shown, count, cpus, gres, limit, default = row.split("|")
            nodes = Nodes(int(count), int(cpus), sum(map(int, _GPUS.findall(gres))))
            times = parse_time(limit), None if default == "n/a" else parse_time(default)
        except ValueError:
            raise RuntimeError(f"sinfo printed {row!r}, which is not understood") from None
        name = shown.removesuffix("*")
        others = found[name].nodes if name in found else ()
        found[name] = Partition(name, shown != name, *times, (*others, nodes))
    return list(found.values())


def parse_time(text: str | int) -> int | None:
    """Return a time limit in seconds, None for no limit; a single number is minutes.

    Raises:
        ValueError: SLURM would not accept it.
    """
    written = str(text)
    if written.lower() in ("infinite", "unlimited"):
        return None
    match = _TIME.fullmatch(written)
    if match is None:
        raise ValueError(
            f"{text} is not a time; write minutes, hours:minutes:seconds such as 04:00:00, or "
            "days-hours:minutes:seconds"
        )
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    # Without days, one number is minutes and two are minutes:seconds.
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    seconds = sum(unit * number for unit, number in zip(units, numbers, strict=False))
    return seconds + 86400 * int(days or 0) or None  # 0 asks for no limit


def write_time(seconds: int) -> str:
    """Return seconds as SLURM writes a time limit."""
    minutes, rest = divmod(seconds, 60)
    days, minutes = divmod(minutes, 24 * 60)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"
    return f"{days}-{clock}" if days else clock


def check_cluster(launch: LaunchSettings, nodes: int, partitions: list[Partition]) -> None:
    """Check a job against its partitions, or the default partition, if there is one.

    Raises:
        ValueError: there is no such partition, or no named partition can ever run the job.
    """
    if launch.partition is None:
        chosen = [partition for partition in partitions if partition.is_default]
    else:
        chosen = [_named(name, partitions) for name in launch.partition.split(",")]
    problems = [_problem(launch, nodes, partition) for partition in chosen]
    if problems and all(problems):
        raise ValueError(problems[0])


def _run(words: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SLURM_TIMEOUT)
    except FileNotFoundError:
        raise RuntimeError(f"{words[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{words[0]} did not answer in {SLURM_TIMEOUT:g} seconds") from None
    if done.returncode != 0:
        reason = done.stderr.strip() or f"{words[0]} ended with status {done.returncode}"
        raise RuntimeError(reason.splitlines()[0])
    return done.stdout


def _named(name: str, partitions: list[Partition]) -> Partition:
    known = {partition.name: partition for partition in partitions}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "name one of them, or leave it null"
    raise ValueError(
        f"launch.partition={name} is not a partition of this cluster, which has "
        f"{', '.join(known) or 'none'}; {hint}"
    )


def _problem(launch: LaunchSettings, nodes: int, partition: Partition) -> str | None:
    """Return why a partition can never run a job, or None if it can."""
    name = f"partition {partition.name}"
    real = [group for group in partition.nodes if group.count > 0]
    for key, value, most in (
        ("gpus_per_node", launch.gpus_per_node, max((group.gpus for group in real), default=0)),
        ("cpus_per_task", launch.cpus_per_task, max((group.cpus for group in real), default=0)),
    ):
        if value is not None and value > most:
            return f"launch.{key}={value} is more than any node of {name} has; use at most {most}"
    gpus, cpus = launch.gpus_per_node, launch.cpus_per_task or 1
    count = sum(group.count for group in real if group.gpus >= gpus and group.cpus >= cpus)
    if nodes > count:
        having = f" with {gpus} GPUs" if gpus else ""
        return f"--nodes {nodes}: {name} has {count} nodes{having}; use at most {count}"
    return _time_problem(launch, partition)


def _time_problem(launch: LaunchSettings, partition: Partition) -> str | None:
    most, name = partition.time_limit, f"partition {partition.name}"
    if launch.time is not None:
        asked = parse_time(launch.time)
        if most is not None and (asked is None or asked > most):
            said = f"launch.time={launch.time} is over the limit of {name}"
            return f"{said}; use at most {write_time(most)}"
        return None  # check_launch has compared grace with launch.time
    limit = partition.default_time or most
    if limit is not None and launch.grace >= limit:
        return (
            f"launch.grace={launch.grace} is not shorter than the {limit} seconds that {name} "
            "gives; lower it, or set launch.time"
        )
    return None
