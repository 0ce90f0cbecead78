"""`agrpo doctor`: what a machine has, and which kernels a run takes on it."""

import argparse
from pathlib import Path

from agrpo_megatron.cli.common import add_command, add_overrides
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    command = add_command(commands, "doctor", "what is installed, and a run's kernels", doctor)
    command.add_argument("file", nargs="?", metavar="FILE", help="settings of the run (YAML)")
    add_overrides(command)


def doctor(arguments: argparse.Namespace) -> int:
    """Print what is installed, and which kernels the settings use with it."""
    from rich.console import Console

    from agrpo_megatron.config.rules.precision import trained_phases, validate_precision
    from agrpo_megatron.hardware.doctor import examine, print_findings, print_kernels
    from agrpo_megatron.hardware.kernels import kernels_for

    file, overrides = arguments.file, arguments.overrides
    if file is not None and "=" in file and not Path(file).exists():
        file, overrides = None, [file, *overrides]
    settings = load(Settings, file, overrides)
    validate_precision(settings)
    console = Console()
    print_findings(examine(), console)
    console.print()
    of = " ".join([file or "default settings", *overrides])
    if file is None and not overrides:
        of += "; agrpo doctor FILE, or precision=bf16, shows the kernels of other settings"
    print_kernels(kernels_for(settings, phases=trained_phases(settings)), of, console)
    return 0
