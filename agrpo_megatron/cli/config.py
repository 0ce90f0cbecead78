"""`agrpo config`: the reference of the settings, or a settings file checked and resolved."""

import argparse
import sys

from agrpo_megatron.cli.common import add_command, add_overrides, world_size
from agrpo_megatron.config.schema import describe, load, to_yaml
from agrpo_megatron.config.settings import Settings


def add_config(commands: argparse._SubParsersAction) -> None:
    """Add `config`."""
    command = add_command(commands, "config", "explain all settings, or check a file", config)
    command.add_argument("file", nargs="?", metavar="FILE", help="check this and print it resolved")
    command.add_argument(
        "--ranks", type=int, metavar="N", help="check the layout for this many ranks; default: 1"
    )
    command.add_argument("--section", default="", help="only settings with this prefix")
    command.add_argument("--tasks", action="store_true", help="explain the options of each task")
    add_overrides(command)


def config(arguments: argparse.Namespace) -> int:
    """Print the settings reference, or check a file and print it resolved."""
    from rich.console import Console

    from agrpo_megatron.reports.tables import settings_reference

    if arguments.tasks:
        from agrpo_megatron.tasks import describe_tasks

        for name, described in describe_tasks().items():
            Console().print(f"[bold]task.name={name}[/]")
            settings_reference(described, Console())
        return 0
    if arguments.file is None:
        settings_reference(describe(Settings), Console(), prefix=arguments.section)
        return 0
    settings = load(Settings, arguments.file, arguments.overrides)
    from agrpo_megatron.runs.directory import plan_settings
    from agrpo_megatron.training.passed import check_start

    planned = plan_settings(settings, world_size=arguments.ranks or world_size())
    check_start(planned)
    print(to_yaml(planned.settings), end="")
    if planned.missing is not None:
        print(f"note: {planned.missing}", file=sys.stderr)
    return 0
