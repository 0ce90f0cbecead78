"""The record of a check: when, of which commit, on which machine; written after each result."""

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-3")
REHEARSAL = (
    "**REHEARSAL at tiny sizes on a CPU: it shows that the check runs. No figure here is a "
    "measurement.**"
)
FACTS = ("commit", "date", "command", "seconds")

Record = dict[str, Any]


def begin(*, schema: int, is_rehearsal: bool, commit: str | None, command: str | None) -> Record:
    """Return the record of a check that starts now.

    Args:
        commit: null asks git, or reads `.gpu/commit`.
        command: what started the check; null: this process.
    """
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    machine: Record = {"python": sys.version.split()[0], "driver": driver}
    for name in PACKAGES:
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    return {
        "schema": schema,
        "rehearsal": is_rehearsal,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _commit(),
        "command": command or shlex.join(sys.argv),
        "seconds": 0.0,
        "machine": machine,
    }


def write(record: Record, path: Path, table: Callable[[Record], str]) -> None:
    """Write a record as `path`, which ends in .json, and its table into the same folder."""
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(record))


def heading(record: Record, title: str) -> list[str]:
    """Return the first lines of a table: title, machine and circumstances."""
    machine = record["machine"]
    lines = [f"# {title}: {machine.get('gpu') or 'no GPU'}", ""]
    lines += [REHEARSAL, ""] if record["rehearsal"] else []
    lines += [f"- {name}: {machine[name]}" for name in sorted(machine)]
    return lines + [f"- {name}: {record[name]}" for name in FACTS]


def shown(value: float | None) -> str:
    """Return a figure with four digits; empty for None."""
    return "" if value is None else f"{value:.4g}"


def _commit() -> str:
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    note = ROOT / ".gpu" / "commit"  # for a machine that has only the files
    return described or (note.read_text().strip() if note.exists() else "unknown")


def _output(*command: str) -> str | None:
    """Return the first line of a command's output; None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
