"""Make the script that submits a run or a sweep, check it with the cluster, and run it."""

import itertools
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
from agrpo_megatron.launch.cluster import SLURM_TIMEOUT, ask_cluster, check_cluster, jobs_of
from agrpo_megatron.launch.job import Job, command, run_job, shell_script, wrapped_job
from agrpo_megatron.launch.plan import JobPlan, notes, plan_run
from agrpo_megatron.launch.speed import Assumed
from agrpo_megatron.launch.sweep import SWEEP, Sweep, check_directory, flow, make_sweep, read_grid
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.files import free_name

END = "END_OF_SWEEP"  # ends the text of a sweep's file within the script
# Printed by `sbatch --test-only` for a job that would only have to wait.
WAITS = re.compile(r"busy|not available now|down, drained", re.IGNORECASE)


@dataclass(frozen=True)
class Launch:
    """A run or a sweep, ready to be submitted."""

    directory: Path  # absolute
    settings: LaunchSettings
    nodes: int
    notes: list[str]
    preparations: list[str]  # shell commands
    job: Job
    missing: list[str]  # lines on files of model.load and data that this machine lacks
    table: Job | None = None  # of a sweep: runs after the array has ended

    def script(self, more_notes: Sequence[str]) -> str:
        """Return the shell script that prints the numbers of the jobs it submits."""
        missing = [f"missing   {line}" for line in self.missing]
        commands = [*self.preparations, command(self.job)]
        if self.table is not None:
            # An array's number may be followed by ;CLUSTER.
            after = '--dependency="afterany:${array%%;*}"'
            array = f'array=$(\n{command(self.job)}\n)\necho "$array"'
            commands[-1:] = [array, command(self.table, extra=[after])]
        return shell_script([*self.notes, *missing, *more_notes], commands)


def launch_run(
    file: str, overrides: Sequence[str], *, nodes: int, is_restart: bool, assumed: Assumed
) -> Launch:
    """Return the submission of a run.

    Args:
        assumed: by the forecast.

    Raises:
        ValueError: as `plan_run`, or the run is finished.
    """
    plan = plan_run(file, overrides, nodes=nodes, is_restart=is_restart)
    settings, directory = plan.settings.launch, Path(plan.settings.run.dir).absolute()
    if plan.is_finished:
        fix = "add --restart to move it away and run it again"
        raise ValueError(f"run.dir={plan.settings.run.dir} is finished; {fix}")
    words = [file, *overrides]
    layouts = [plan.settings.parallel, plan.settings.rollout_layout]
    job = run_job(settings, directory, nodes=nodes, arguments=words, layouts=layouts)
    prepared = _prepare(directory, is_restart=is_restart)
    found, missing = notes(plan, assumed), list(plan.missing)
    return Launch(directory, settings, nodes, found, prepared, job, missing)


def launch_sweep(
    file: str,
    overrides: Sequence[str],
    texts: Sequence[str],
    *,
    nodes: int,
    is_restart: bool,
    assumed: Assumed,
) -> Launch:
    """Return the submission of a sweep: its unfinished members, and its table.

    Raises:
        ValueError: as `launch_run`, with the member's name; or the directory holds another run
            or sweep.
    """
    directory = Path(load(Settings, file, overrides).run.dir).absolute()
    sweep = make_sweep(file, overrides, read_grid(texts))
    if not is_restart:
        check_directory(directory, sweep)
    plans: list[JobPlan] = []
    for name in sweep.members:
        file, *words = sweep.arguments(directory, name)
        try:
            plans.append(plan_run(file, words, nodes=nodes, is_restart=is_restart))
        except ValueError as error:
            raise ValueError(f"member {_named(sweep, name)}: {error}") from None
    left = [number for number, plan in enumerate(plans) if not plan.is_finished]
    if not left:
        raise ValueError(f"run.dir={directory}: all members are finished; add --restart")
    settings = plans[0].settings.launch
    words, array = [str(directory)], ranges(left)
    layouts = [p for plan in plans for p in (plan.settings.parallel, plan.settings.rollout_layout)]
    job = run_job(settings, directory, nodes=nodes, arguments=words, layouts=layouts, array=array)
    words = [sys.executable, "-m", "agrpo_megatron.launch", str(directory), "--table"]
    table = wrapped_job(settings, directory, name="table", words=words)
    prepared = _prepare(directory, is_restart=is_restart)
    file_text = f"cat > {shlex.quote(str(directory / SWEEP))} <<'{END}'\n{sweep.text()}{END}"
    found = [f"sweep     {directory}: {len(plans)} members, {len(left)} of them to run"]
    found += [
        f"  {_named(sweep, name)}: {plan.state}"
        for name, plan in zip(sweep.members, plans, strict=True)
    ]
    found += notes(max(plans, key=lambda plan: plan.memory.total), assumed)[1:]
    missing = list(dict.fromkeys(line for plan in plans for line in plan.missing))
    prepared.append(file_text)
    return Launch(directory, settings, nodes, found, prepared, job, missing, table)


def check_job(launch: Launch, *, is_dry: bool) -> list[str]:
    """Ask the cluster whether it accepts the job; returns notes.

    Args:
        is_dry: whether an unreachable cluster is only a note, and missing files are allowed.

    Raises:
        ValueError: the cluster refuses the job or is unreachable, or files of model.load or
            data are missing.
    """
    if launch.missing and not is_dry:
        fix = "put there what is missing (agrpo prefetch FILE), or add --dry-run to see the job"
        raise ValueError(f"{launch.missing[0]}; {fix}")
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
    found = [f"cluster   {_test(launch.job)}"]
    is_ordered = any(o.startswith("--dependency") for o in launch.settings.options or [])
    if jobs and not is_ordered:
        problem = f"run.dir={launch.directory}: its job {jobs[0]} is pending or running"
        if not is_dry:
            raise ValueError(f"{problem}; let it end, or stop it by scancel {jobs[0]}")
        found.append(f"warning   {problem}")
    return found


def submit(script: str) -> list[str]:
    """Run a script that submits jobs; returns their numbers.

    Raises:
        ValueError: a command failed; the message has its output.
    """
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    numbers = [line.partition(";")[0] for line in done.stdout.split()]
    if done.returncode != 0:
        so_far = f" (submitted before that: {', '.join(numbers)})" if numbers else ""
        raise ValueError(f"nothing more was submitted: {_reason(done.stderr)}{so_far}")
    return numbers


def _test(job: Job) -> str:
    """Return the answer of `sbatch --test-only` for a job that it accepts.

    Raises:
        ValueError: sbatch refuses the job.
    """
    words = ["sbatch", "--test-only", *job.words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SLURM_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"did not answer `sbatch --test-only` in {SLURM_TIMEOUT:g} seconds"
    answer = _reason(done.stderr or done.stdout)
    if done.returncode == 0:
        return f"accepted: {answer}"
    if WAITS.search(answer):
        return f"accepted, but it has to wait: {answer}"
    raise ValueError(f"sbatch refuses the job: {answer}")


def _reason(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason was given"]
    return lines[0].removeprefix("sbatch: ").removeprefix("error: ")


def _prepare(directory: Path, *, is_restart: bool) -> list[str]:
    """Return the commands that prepare a run's directory; SLURM does not create the log folder."""
    commands = [["mkdir", "-p", "--", str(directory / LAUNCH_FOLDER)]]
    if is_restart and directory.exists():
        commands.insert(0, ["mv", "-T", "--", str(directory), str(free_name(directory))])
    return [shlex.join(words) for words in commands]


def _named(sweep: Sweep, name: str) -> str:
    values = sweep.members[name].items()
    return " ".join([name, *(f"{key}={flow(value)}" for key, value in values)])


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as SLURM writes them: 0-2,5."""
    # Consecutive numbers have the same difference from their index.
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
