"""A job for `sbatch`: options, script, arguments and environment; also as a shell script."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.config.settings import LaunchSettings, ParallelSettings
from agrpo_megatron.launch.cluster import parse_time
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.files import shipped

# Options that every command sets itself, and the key that sets them.
OWN_OPTIONS = {
    "--nodes": "--nodes N",
    "--partition": "launch.partition",
    "--account": "launch.account",
    "--qos": "launch.qos",
    "--time": "launch.time",
    "--signal": "launch.grace",
    "--gpus-per-node": "launch.gpus_per_node",
    "--ntasks-per-node": "launch.ranks_per_node",
    "--cpus-per-task": "launch.cpus_per_task",
    "--exclude": "launch.exclude",
    "--output": "run.dir",
    "--array": "--sweep",
    "--comment": "run.dir",
}
LITERAL = "# shellcheck disable=SC1003,SC2016 # every word is literal"


@dataclass(frozen=True)
class Job:
    """One call of `sbatch`."""

    words: tuple[str, ...]  # options, then script and its arguments
    environment: dict[str, str]  # passed to the job by --export=ALL


def scripts_root() -> Path:
    """Return the directory of `slurm/`: the installed package, or its parent.

    Raises:
        RuntimeError: neither has the scripts.
    """
    return shipped("slurm/train.sbatch").parent.parent


def ranks_per_node(launch: LaunchSettings) -> int:
    """Return the ranks per node: as set, else one per GPU, or one on CPUs."""
    return launch.ranks_per_node or launch.gpus_per_node or 1


def check_launch(launch: LaunchSettings, nodes: int) -> None:
    """Check the settings of a job that need no cluster.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    if nodes < 1:
        raise ValueError(f"--nodes {nodes} is below 1; give the number of nodes")
    gpus, ranks = launch.gpus_per_node, ranks_per_node(launch)
    if gpus and ranks > gpus:
        raise ValueError(
            f"launch.ranks_per_node={ranks} is over launch.gpus_per_node={gpus}, and each rank "
            f"needs its own GPU; use at most {gpus}, or launch.gpus_per_node=0 for CPUs"
        )
    if launch.time is not None:
        try:
            limit = parse_time(launch.time)
        except ValueError as error:
            raise ValueError(f"launch.time={error}") from None
        if limit is not None and launch.grace >= limit:
            raise ValueError(
                f"launch.grace={launch.grace} is not shorter than launch.time={launch.time}, "
                f"{limit} seconds; lower it"
            )
    for option in launch.options or []:
        name = option.partition("=")[0]
        if not option.startswith("--") or name == "--":
            raise ValueError(f"launch.options={option} is not an option; write --name=value")
        if name in OWN_OPTIONS:
            raise ValueError(f"launch.options={option} is set elsewhere; use {OWN_OPTIONS[name]}")


def run_job(
    launch: LaunchSettings,
    directory: Path,
    *,
    nodes: int,
    arguments: Sequence[str],
    layouts: Sequence[ParallelSettings],
    array: str | None = None,
) -> Job:
    """Return the job of a run, or of a sweep.

    Args:
        directory: absolute path of the run or of the sweep.
        layouts: all layouts of the ranks, of training and of rollouts.
        array: indices of the sweep's members as SLURM writes them; None for a single run.
    """
    root = scripts_root()
    options, script, number = [], "train.sbatch", "%j"
    if array is not None:
        options, script, number = [f"--array={array}"], "sweep.sbatch", "%A_%a"
    words = [
        *options,
        *_common(launch, directory, "", number),
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={launch.gpus_per_node}"] if launch.gpus_per_node else []),
        f"--cpus-per-task={launch.cpus_per_task}" if launch.cpus_per_task else "--exclusive",
        *([f"--signal=USR1@{launch.grace}"] if launch.grace else []),
        "--requeue",
        str(root / "slurm" / script),
        *arguments,
    ]
    environment = {
        "AGRPO_ROOT": str(root),
        "AGRPO_PYTHON": sys.executable,
        "AGRPO_RUN_DIR": str(directory),
        "AGRPO_RANKS_PER_NODE": str(ranks_per_node(launch)),
        "AGRPO_LAUNCHER": launch.launcher,
        "AGRPO_RESTARTS": str(launch.restarts),
        **_one_queue(layouts),
    }
    return Job(tuple(words), environment)


def wrapped_job(launch: LaunchSettings, directory: Path, *, name: str, words: Sequence[str]) -> Job:
    """Return a job of one task that runs a command on any node."""
    common = _common(launch, directory, f"-{name}", "%j")
    return Job((*common, "--nodes=1", "--ntasks=1", f"--wrap={shlex.join(words)}"), {})


def command(job: Job, *, extra: Sequence[str] = ()) -> str:
    """Return the shell command that submits a job, one option per line.

    Args:
        extra: options as shell text; they override the options of the job.
    """
    lines = [f"{name}={shlex.quote(value)}" for name, value in job.environment.items()]
    words = [*(shlex.quote(word) for word in job.words), *extra]
    return " \\\n".join([*lines, "sbatch", *(f"    {word}" for word in words)])


def shell_script(notes: Sequence[str], commands: Sequence[str]) -> str:
    """Return a script for bash: notes as comments, then commands."""
    body = "\n".join(commands)
    comments = [f"# {line}".rstrip() for note in notes for line in note.splitlines()]
    literal = [LITERAL] if any(mark in body for mark in "$`\\") else []
    return "\n".join(["#!/usr/bin/env bash", *literal, *comments, "set -euo pipefail", body, ""])


def _one_queue(layouts: Sequence[ParallelSettings]) -> dict[str, str]:
    """Return the variable that lets a GPU start kernels in the order in which they are queued.

    Before Blackwell, Megatron-Core overlaps the messages of tensor and context parallelism with
    computation only then; between pipeline stages, messages overlap only without it.
    """
    is_split = any(max(layout.tensor, layout.context) > 1 for layout in layouts)
    has_stages = any(layout.pipeline > 1 for layout in layouts)
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if is_split and not has_stages else {}


def _common(launch: LaunchSettings, directory: Path, suffix: str, number: str) -> list[str]:
    """Return the options of every job of a run; `number` is how SLURM writes the job's number."""
    chosen = {"partition": launch.partition, "account": launch.account, "qos": launch.qos}
    chosen |= {"time": launch.time, "exclude": launch.exclude}
    folder = str(directory / LAUNCH_FOLDER).replace("%", "%%")  # SLURM reads % in a file's name
    return [
        "--parsable",
        "--export=ALL",
        f"--job-name=agrpo-{directory.name}{suffix}",
        f"--comment={directory}",  # identifies the run of a job
        f"--chdir={Path.cwd()}",
        f"--output={folder}/{number}.log",
        "--open-mode=append",
        *(f"--{name}={value}" for name, value in chosen.items() if value is not None),
        *(launch.options or []),
    ]
