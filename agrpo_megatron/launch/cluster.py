"""What a cluster has, as `sinfo` tells it, and what it would refuse of a job.

The facts come as text and are checked by pure functions; only `ask_cluster` talks to SLURM.
"""

import difflib
import re
import subprocess
from dataclasses import dataclass

from agrpo_megatron.config.settings import LaunchSettings

SINFO = ("sinfo", "--noheader", "--all", "--exact", "--format=%P|%D|%c|%G|%l|%L")
SQUEUE = ("squeue", "--noheader", "--format=%F %k")
PATIENCE = 30.0  # seconds that SLURM's commands may take
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GPUS = re.compile(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)")


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int  # of each
    gpus: int  # of each


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster."""

    name: str
    is_default: bool
    time_limit: int | None  # seconds; None: none
    default_time: int | None  # seconds of a job that names no limit; None: the partition's own
    nodes: tuple[Nodes, ...]


def ask_cluster() -> list[Partition]:
    """Return the cluster's partitions.

    Raises:
        RuntimeError: SLURM is not installed here, or does not answer; says why in one line.
    """
    return read_partitions(_ask(SINFO))


def jobs_of(comment: str) -> list[str]:
    """Return the numbers of the jobs, waiting or running, that carry a comment.

    Raises:
        RuntimeError: as `ask_cluster`.
    """
    rows = (row.strip().partition(" ") for row in _ask(SQUEUE).splitlines())
    return list(dict.fromkeys(number for number, _, said in rows if said == comment))


def read_partitions(text: str) -> list[Partition]:
    """Read what `SINFO` prints: a row for each kind of nodes of each partition.

    Raises:
        RuntimeError: a row is not of that form.
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
    """Return a time limit in seconds, None for no limit; a number alone is minutes.

    Raises:
        ValueError: SLURM would not take it.
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
    """Compare a job with the partitions it names, or with the default one, if there is one.

    Raises:
        ValueError: there is no such partition, or none of those named can ever run the job.
    """
    if launch.partition is None:
        chosen = [partition for partition in partitions if partition.is_default]
    else:
        chosen = [_named(name, partitions) for name in launch.partition.split(",")]
    problems = [_problem(launch, nodes, partition) for partition in chosen]
    if problems and all(problems):
        raise ValueError(problems[0])


def _ask(words: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise RuntimeError(f"{words[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{words[0]} did not answer in {PATIENCE:g} seconds") from None
    if done.returncode != 0:
        said = done.stderr.strip() or f"{words[0]} ended with status {done.returncode}"
        raise RuntimeError(said.splitlines()[0])
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
    """Say why a partition can never run a job; None where it can."""
    name = f"partition {partition.name}"
    real = [group for group in partition.nodes if group.count > 0]
    for key, value, most in (
        ("gpus_per_node", launch.gpus_per_node, max((group.gpus for group in real), default=0)),
        ("cpus_per_task", launch.cpus_per_task, max((group.cpus for group in real), default=0)),
    ):
        if value is not None and value > most:
            return f"launch.{key}={value} is more than any node of {name} has; use at most {most}"
    fit = [g for g in real if g.gpus >= launch.gpus_per_node and g.cpus >= _cpus(launch)]
    count = sum(group.count for group in fit)
    if nodes > count:
        such = f" with {launch.gpus_per_node} GPUs" if launch.gpus_per_node else ""
        return f"--nodes {nodes}: {name} has {count} nodes{such}; use at most {count}"
    return _time_problem(launch, partition)


def _cpus(launch: LaunchSettings) -> int:
    return launch.cpus_per_task or 1


def _time_problem(launch: LaunchSettings, partition: Partition) -> str | None:
    most, name = partition.time_limit, f"partition {partition.name}"
    if launch.time is not None:
        asked = parse_time(launch.time)
        if most is not None and (asked is None or asked > most):
            return (
                f"launch.time={launch.time} is over the limit of {name}; "
                f"use at most {write_time(most)}"
            )
        return None  # its grace was compared with it without a cluster
    given = partition.default_time or most
    if given is not None and launch.grace >= given:
        return (
            f"launch.grace={launch.grace} is not shorter than the {given} seconds that {name} "
            "gives; lower it, or set launch.time"
        )
    return None
