"""The plan of a job: settings, with the job's own checks, and notes on the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo_megatron.config.parallel import layout_name
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import LaunchSettings, Settings
from agrpo_megatron.launch.cluster import parse_time, write_time
from agrpo_megatron.launch.forecast import GIB, forecast, memory_text
from agrpo_megatron.launch.job import check_launch, ranks_per_node
from agrpo_megatron.launch.speed import Assumed, speed_of
from agrpo_megatron.launch.sweep import SWEEP
from agrpo_megatron.runs.directory import is_finished, plan_settings, progress
from agrpo_megatron.runs.odd_values import odd_values
from agrpo_megatron.runs.sizes import Sizes, measure
from agrpo_megatron.scaling.memory import SPARE, Memory, worst_rank
from agrpo_megatron.training.passed import check_start


@dataclass(frozen=True)
class JobPlan:
    """A run before its submission."""

    settings: Settings  # complete, and checked for the ranks of the job
    nodes: int
    state: str  # new, resumes, or finished
    is_finished: bool
    memory: Memory  # of the rank that needs the most
    missing: tuple[str, ...]  # lines on what the run needs and this machine lacks
    sizes: Sizes  # of its prompts
    assumed: tuple[str, ...]  # lines on what the plan assumes, and on what later commands lack


def plan_run(
    file: str | Path, overrides: Sequence[str], *, nodes: int, is_restart: bool
) -> JobPlan:
    """Load and check the settings of a run at the ranks of its job.

    Args:
        is_restart: whether an earlier run in the directory is moved away first.

    Raises:
        ValueError: wrong settings, an impossible layout, too little memory, or a
            directory with another run or a sweep, or that cannot be written.
    """
    settings = load(Settings, file, overrides)
    check_launch(settings.launch, nodes)
    world_size = nodes * ranks_per_node(settings.launch)
    planned = plan_settings(settings, world_size=world_size, is_restart=is_restart)
    settings, directory = planned.settings, Path(planned.settings.run.dir)
    if (directory / SWEEP).exists() and not is_restart:
        raise ValueError(f"run.dir={directory} holds a sweep; choose another run.dir")
    memory = worst_rank(settings, world_size)
    _check_memory(settings, memory, world_size)
    done = None if is_restart else progress(settings)
    is_over, state = is_finished(settings, done), "new"
    if not is_over:
        check_start(planned, world_size)
    if is_over:
        state = "finished"
    elif done is not None:
        of = settings.train.iterations if done.phase == "rl" else settings.sft.iterations
        state = f"resumes after {done.phase} iteration {done.iteration} of {of}"
    sizes = measure(planned)
    lacks = planned.missing, sizes, planned.notes
    return JobPlan(settings, nodes, state, is_over, memory, *lacks)


def notes(plan: JobPlan, assumed: Assumed) -> list[str]:
    """Return notes on a run: directory, layout, memory, time, forecast and warnings."""
    settings, launch = plan.settings, plan.settings.launch
    ranks = ranks_per_node(launch)
    layout = layout_name(settings.parallel, plan.nodes * ranks)
    found = [
        f"run       {Path(settings.run.dir).absolute()} ({plan.state})",
        f"layout    {layout} on {_count(plan.nodes, 'node')} x {_count(ranks, 'rank')}",
        f"memory    {memory_text(plan.memory, launch)}",
        f"time      {_time_text(launch)}",
    ]
    speed = speed_of(assumed, settings.precision, has_gpus=launch.gpus_per_node > 0)
    found += forecast(settings, plan.sizes, speed, world_size=plan.nodes * ranks)
    found += [f"note      {line}" for line in plan.assumed]
    return found + [f"warning   {warning}" for warning in _warnings(plan)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _check_memory(settings: Settings, memory: Memory, world_size: int) -> None:
    launch = settings.launch
    if launch.gpus_per_node and memory.total > launch.gpu_memory * GIB:
        name = layout_name(settings.parallel, world_size)
        raise ValueError(
            f"launch.gpu_memory={launch.gpu_memory:g} is under the {memory.total / GIB:.1f} GiB of "
            f"the fullest rank at parallel={name}; split the model over more ranks "
            f"(python tools/layouts.py FILE --ranks {world_size} compares layouts)"
        )


def _time_text(launch: LaunchSettings) -> str:
    limit = "the partition's limit"
    if launch.time is not None:
        seconds = parse_time(launch.time)
        limit = "no limit" if seconds is None else f"limit {write_time(seconds)}"
    signal = f"a signal {launch.grace} s before, to save and requeue" if launch.grace else ""
    return f"{limit}, {signal or 'no signal before it ends'}"


def _warnings(plan: JobPlan) -> list[str]:
    launch, found = plan.settings.launch, []
    if launch.gpus_per_node and plan.memory.total > SPARE * launch.gpu_memory * GIB:
        found.append(
            f"memory is over {100 * SPARE:.0f} % of launch.gpu_memory, and the rest is needed for "
            "communication and fragments"
        )
    ranks = plan.nodes * ranks_per_node(launch)
    found += odd_values(plan.settings, plan.sizes, world_size=ranks)
    idle = launch.gpus_per_node - ranks_per_node(launch)
    if launch.gpus_per_node and idle:
        found.append(f"{_count(idle, 'GPU')} of each node would be idle: launch.ranks_per_node")
    return found
