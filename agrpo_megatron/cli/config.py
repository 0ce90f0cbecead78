"""`agrpo config`: the reference of the settings, or a settings file checked and resolved."""

import argparse
import sys
from typing import TYPE_CHECKING

from agrpo_megatron.cli.common import (
    add_assumed,
    add_command,
    add_overrides,
    assumed,
    run_file,
    world_size,
)
from agrpo_megatron.config.schema import describe, load, to_yaml
from agrpo_megatron.config.settings import Settings

if TYPE_CHECKING:
    from agrpo_megatron.launch.speed import Assumed
    from agrpo_megatron.runs.sizes import Sizes


def add_config(commands: argparse._SubParsersAction) -> None:
    """Add `config`."""
    command = add_command(commands, "config", "explain all settings, or check a file", config)
    command.add_argument("file", nargs="?", metavar="FILE", help="check this and print it resolved")
    command.add_argument(
        "--ranks", type=int, metavar="N", help="check the layout for this many ranks; default: 1"
    )
    command.add_argument(
        "--section", default="", metavar="PREFIX", help="only settings or metrics with this prefix"
    )
    command.add_argument("--tasks", action="store_true", help="explain the options of each task")
    command.add_argument("--metrics", action="store_true", help="explain what a run logs")
    command.add_argument(
        "--frozen", action="store_true", help="explain what may change when a run resumes"
    )
    command.add_argument(
        "--markdown",
        action="store_true",
        help="print docs/settings.md, or with --metrics that page",
    )
    add_assumed(command)
    add_overrides(command)


def config(arguments: argparse.Namespace) -> int:
    """Print a reference, or check a file and print it resolved."""
    if arguments.file is None:
        _reference(arguments)
        return 0
    prints = (arguments.tasks, arguments.metrics, arguments.frozen, arguments.markdown)
    if any(prints) or arguments.section:
        raise ValueError(
            f"agrpo config {arguments.file} checks a file; --section, --tasks, --metrics, --frozen "
            "and --markdown are for the references: leave one of the two out"
        )
    settings = load(Settings, *run_file(arguments.file, arguments.overrides))
    from agrpo_megatron.runs.directory import plan_settings
    from agrpo_megatron.training.passed import check_start

    ranks = arguments.ranks or world_size()
    planned = plan_settings(settings, world_size=ranks)
    check_start(planned, ranks)
    from agrpo_megatron.runs.odd_values import odd_values
    from agrpo_megatron.runs.sizes import measure

    sizes = measure(planned)
    lines = _forecast(planned.settings, sizes, assumed(arguments), ranks)
    print(to_yaml(planned.settings), end="")
    for line in lines:
        print(f"# {line}")  # what is printed stays a settings file
    for line in odd_values(planned.settings, sizes, world_size=ranks):
        print(f"warning: {line}", file=sys.stderr)
    for line in (*planned.missing, *planned.notes):
        print(f"note: {line}", file=sys.stderr)
    return 0


def _reference(arguments: argparse.Namespace) -> None:
    """Print the settings, the options of tasks, or the metrics.

    Raises:
        ValueError: options that exclude each other, or a prefix of nothing.
    """
    from rich.console import Console

    from agrpo_megatron.reports import reference
    from agrpo_megatron.runs.metrics import chosen_metrics
    from agrpo_megatron.tasks import describe_tasks

    prefix, console = arguments.section, Console()
    others = arguments.metrics or arguments.markdown or prefix
    if arguments.tasks and (others or arguments.frozen):
        raise ValueError("--tasks prints the options of all tasks; leave out the other options")
    if arguments.frozen and others:
        raise ValueError("--frozen prints all that may change; leave out the other options")
    if arguments.markdown and prefix:
        raise ValueError(f"--markdown prints a whole page; leave out --section {prefix}")
    if arguments.markdown:
        page = reference.metrics_page() if arguments.metrics else reference.settings_page()
        print(page, end="")
    elif arguments.frozen:
        reference.changes_reference(console)
    elif arguments.metrics:
        reference.metrics_reference(chosen_metrics(prefix), console)
    elif arguments.tasks:
        for name, described in describe_tasks().items():
            console.print(f"[bold]task.name={name}[/]")
            reference.settings_reference(described, console)
    else:
        reference.settings_reference(describe(Settings), console, prefix=prefix)


def _forecast(settings: Settings, sizes: "Sizes", assumed: "Assumed", ranks: int) -> list[str]:
    """Return what a run of the settings will take on so many ranks."""
    from agrpo_megatron.launch.forecast import forecast, memory_text
    from agrpo_megatron.launch.speed import speed_of
    from agrpo_megatron.reports.text import counted
    from agrpo_megatron.scaling.memory import worst_rank

    speed = speed_of(assumed, settings.precision)
    lines = forecast(settings, sizes, speed, world_size=ranks)
    memory = memory_text(worst_rank(settings, ranks), settings.launch)
    return [f"forecast for {counted(ranks, 'rank')}", *lines, f"memory    {memory}"]
