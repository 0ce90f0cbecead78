"""From a run or a sweep to the script that submits it, its last checks, and its submission."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import LaunchSettings, Settings
from agrpo_megatron.launch.cluster import PATIENCE, ask_cluster, check_cluster, jobs_of
from agrpo_megatron.launch.job import Job, command, run_job, shell_script, wrapped_job
from agrpo_megatron.launch.plan import Plan, notes, plan_run, refuse_finished
from agrpo_megatron.launch.sweep import SWEEP, Sweep, check_directory, flow, make_sweep, read_grid
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.directory import free_name

END = "END_OF_SWEEP"  # of the text of a sweep's file within the script
# Said by `sbatch --test-only` of a job that would only have to wait.
WAITS = re.compile(r"busy|not available now|down, drained", re.IGNORECASE)


@dataclass(frozen=True)
class Launch:
    """What is to be submitted."""

    directory: Path  # absolute
    settings: LaunchSettings
    nodes: int
    notes: list[str]
    preparations: list[str]  # shell commands
    job: Job
    table: Job | None = None  # of a sweep: runs when the array has ended

    def script(self, told: Sequence[str]) -> str:
        """Return the shell script that prints the numbers of the jobs it submits."""
        commands = [*self.preparations, command(self.job)]
        if self.table is not None:
            # An array's number may be followed by ;CLUSTER.
            after = '--dependency="afterany:${array%%;*}"'
            array = f'array=$(\n{command(self.job)}\n)\necho "$array"'
            commands[-1:] = [array, command(self.table, extra=[after])]
        return shell_script([*self.notes, *told], commands)


def launch_run(file: str, overrides: Sequence[str], *, nodes: int, is_restart: bool) -> Launch:
    """Return what submits a run.

    Raises:
        ValueError: as `plan_run`, or the run is finished.
    """
    plan = plan_run(file, overrides, nodes=nodes, is_restart=is_restart)
    refuse_finished(plan)
    settings, directory = plan.settings.launch, plan.directory
    words = [file, *overrides]
    job = run_job(settings, directory, nodes=nodes, script="train.sbatch", arguments=words)
    prepared = _prepare(directory, is_restart=is_restart)
    return Launch(directory, settings, nodes, notes(plan), prepared, job)


def launch_sweep(
    file: str, overrides: Sequence[str], texts: Sequence[str], *, nodes: int, is_restart: bool
) -> Launch:
    """Return what submits a sweep: those members that are not finished, and its table.

    Raises:
        ValueError: as `launch_run` for any member, which is named; or the directory holds
            something else.
    """
    directory = Path(load(Settings, file, overrides).run.dir).absolute()
    sweep = make_sweep(file, overrides, read_grid(texts))
    if not is_restart:
        check_directory(directory, sweep)
    plans = [
        _plan_member(sweep, directory, name, nodes=nodes, is_restart=is_restart)
        for name in sweep.members
    ]
    left = [number for number, plan in enumerate(plans) if not plan.is_finished]
    if not left:
        raise ValueError(f"run.dir={directory}: all members are finished; add --restart")
    settings = plans[0].settings.launch
    job = run_job(
        settings,
        directory,
        nodes=nodes,
        script="sweep.sbatch",
        arguments=[str(directory)],
        array=ranges(left),
    )
    words = [sys.executable, "-m", "agrpo_megatron.launch", str(directory), "--table"]
    table = wrapped_job(settings, directory, name="table", words=words)
    prepared = _prepare(directory, is_restart=is_restart)
    file_text = f"cat > {shlex.quote(str(directory / SWEEP))} <<'{END}'\n{sweep.text()}{END}"
    told = [f"sweep     {directory}: {len(plans)} members, {len(left)} of them to run"]
    told += [
        f"  {_named(sweep, name)}: {plan.state}"
        for name, plan in zip(sweep.members, plans, strict=True)
    ]
    largest = max(plans, key=lambda plan: plan.memory.total)
    told += notes(largest)[1:]
    return Launch(directory, settings, nodes, told, [*prepared, file_text], job, table)


def check_job(launch: Launch, *, is_dry: bool) -> list[str]:
    """Ask the cluster whether it takes the job; returns notes.

    Args:
        is_dry: a cluster that cannot be asked is told in a note.

    Raises:
        ValueError: it refuses the job, or cannot be asked.
    """
    try:
        if shutil.which("sbatch") is None:
            raise RuntimeError("sbatch is not on PATH")
        partitions, jobs = ask_cluster(), jobs_of(str(launch.directory))
    except RuntimeError as error:
        if is_dry:
            return [f"cluster   not checked: {error}"]
        raise ValueError(
            f"{error}; submit from a machine of the cluster, or add --dry-run to see the job"
        ) from None
    check_cluster(launch.settings, launch.nodes, partitions)
    told = [f"cluster   {_test(launch.job)}"]
    is_ordered = any(o.startswith("--dependency") for o in launch.settings.options or [])
    if jobs and not is_ordered:
        said = f"run.dir={launch.directory}: job {jobs[0]} of it waits or runs"
        if not is_dry:
            raise ValueError(f"{said}; let it end, or stop it by scancel {jobs[0]}")
        told.append(f"warning   {said}")
    return told


def submit(script: str) -> list[str]:
    """Run a script that submits jobs; returns their numbers.

    Raises:
        ValueError: a command of it failed; says what that printed.
    """
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    numbers = [line.partition(";")[0] for line in done.stdout.split()]
    if done.returncode != 0:
        so_far = f" (submitted before that: {', '.join(numbers)})" if numbers else ""
        raise ValueError(f"nothing more was submitted: {_first_line(done.stderr)}{so_far}")
    return numbers


def _test(job: Job) -> str:
    """Return what `sbatch --test-only` says of a job that it takes.

    Raises:
        ValueError: it refuses the job.
    """
    words = ["sbatch", "--test-only", *job.words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"did not answer `sbatch --test-only` in {PATIENCE:g} seconds"
    said = _first_line(done.stderr or done.stdout)
    if done.returncode == 0:
        return f"takes it: {said}"
    if WAITS.search(said):
        return f"takes it, but it has to wait: {said}"
    raise ValueError(f"sbatch refuses the job: {said}")


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason was given"]
    return lines[0].removeprefix("sbatch: ").removeprefix("error: ")


def _prepare(directory: Path, *, is_restart: bool) -> list[str]:
    """Return the commands that make room for a run; SLURM does not make the folder of its logs."""
    here = shlex.quote(str(directory))
    moves = []
    if is_restart and directory.exists():
        moves = [f"mv -T -- {here} {shlex.quote(str(free_name(directory)))}"]
    return [*moves, f"mkdir -p -- {shlex.quote(str(directory / LAUNCH_FOLDER))}"]


def _plan_member(sweep: Sweep, directory: Path, name: str, *, nodes: int, is_restart: bool) -> Plan:
    file, *overrides = sweep.arguments(directory, name)
    try:
        return plan_run(file, overrides, nodes=nodes, is_restart=is_restart)
    except ValueError as error:
        raise ValueError(f"member {_named(sweep, name)}: {error}") from None


def _named(sweep: Sweep, name: str) -> str:
    values = sweep.members[name].items()
    return " ".join([name, *(f"{key}={flow(value)}" for key, value in values)])


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as SLURM writes them: 0-2,5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
