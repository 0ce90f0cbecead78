"""`agrpo prefetch`: fetch weights, tokenizer and data sets of a settings file, to run offline."""

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrpo_megatron.cli.common import add_command, add_overrides
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import BASE, dump_yaml

DETAILS = """\
Fetch weights, tokenizer and data sets that a settings file names, so that the run needs no network.

It prints first what it would fetch, with sizes. Weights go to the folder that model.load names, or
below --to if it is a name of the hub; data sets below --to. Of weights only safetensors,
configuration and tokenizer are fetched, no pickles. The same command resumes. At the end it writes
a settings file that names all of it, for `agrpo train`. docs/offline.md has a walk-through.
"""


def add_prefetch(commands: argparse._SubParsersAction) -> None:
    """Add `prefetch`."""
    text = "fetch weights and data sets of a settings file, to run offline"
    command = add_command(commands, "prefetch", text, prefetch, details=DETAILS)
    command.add_argument("file", metavar="FILE", help="settings file (YAML)")
    command.add_argument(
        "--to", type=Path, default=Path("models"), metavar="DIR", help="folder; default: models"
    )
    command.add_argument("--weights", metavar="OWNER/NAME", help="model.load on the hub")
    command.add_argument("--all", action="store_true", help="every file, pickles included")
    command.add_argument("--dry-run", action="store_true", help="only print what it would fetch")
    add_overrides(command)


def prefetch(arguments: argparse.Namespace) -> int:
    """Print the missing files, fetch them, and write a settings file that names them."""
    settings = load(Settings, arguments.file, arguments.overrides)
    from agrpo_megatron.launch.prefetch.sources import overrides, sources
    from agrpo_megatron.scaling.forecast.disk import size

    found = sources(settings, arguments.to, weights=arguments.weights)
    if not found:
        print(f"{arguments.file} names nothing that is missing here")
        return 0
    from agrpo_megatron.launch.prefetch.hub import fetch, listing

    listings = [listing(source, takes_all=arguments.all) for source in found]
    for each in listings:
        source = each.source
        state = f"{size(each.total)} in {len(each.files)} files" if each.files else "is there"
        skipped = f", {size(each.skipped)} not needed" if each.skipped else ""
        print(f"{source.path}  {source.name}@{each.commit[:12]}  {state}{skipped}")
        for name, count in each.files.items():
            print(f"    {size(count):>9}  {name}")
    print(f"together {size(sum(each.total for each in listings))}")
    if arguments.dry_run:
        return 0
    for each in listings:
        fetch(each)
    written = _write(arguments, overrides(settings, found))
    words = shlex.join([str(written), *arguments.overrides])
    print(f"fetched; without network: HF_HUB_OFFLINE=1 agrpo train {words}")
    return 0


def _write(arguments: argparse.Namespace, named: Mapping[str, str]) -> Path:
    """Write a settings file on top of the given one that names what was fetched."""
    tree: dict[str, Any] = {}
    for key, value in named.items():
        *parts, last = key.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    file = Path(arguments.file)
    path = arguments.to / f"{file.stem}-offline.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(file.resolve(), path.parent.resolve())
    path.write_text(dump_yaml({BASE: base, **tree}), encoding="utf-8")
    return path
