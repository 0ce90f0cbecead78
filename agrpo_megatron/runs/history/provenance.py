"""Where the numbers of a run come from: code, versions, command, host and devices, by attempt."""

import importlib.metadata
import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agrpo_megatron import __version__
from agrpo_megatron.config.parallel import layout_text
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.files import append_records, read_records

PROVENANCE = "provenance.jsonl"  # in a run directory: a line for each attempt
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "flash-attn", "numpy")
GIT_SECONDS = 5.0
ROOT = Path(__file__).parent.parent.parent  # the package


def provenance(settings: Settings, *, ranks: int, device: str, seconds: float) -> dict[str, Any]:
    """Return what produces the numbers of an attempt that begins now; one rank.

    Args:
        device: of each rank, in words.
        seconds: of the attempts before it.
    """
    is_tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git("rev-parse", "HEAD") if is_tracked else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": commit,
        "changed": bool(_git("status", "--porcelain", "--", ".")) if commit else None,
        "packages": {"python": sys.version.split()[0], **_versions()},
        "command": _command(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "ranks": ranks,
        "device": device,
        "layout": layout_text(settings.parallel),
        "precision": settings.precision,
        "seconds_before": seconds,
    }


def write_provenance(directory: Path, record: dict[str, Any]) -> None:
    """Append the line of an attempt."""
    append_records(directory / PROVENANCE, [record])


def read_provenance(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of all attempts, oldest first; those cut short by a kill are left out."""
    return read_records(directory / PROVENANCE)


def _command() -> str:
    """Return the command line, without the folder of the program."""
    program, *arguments = sys.argv or ["agrpo"]
    name = Path(program).name
    name = "agrpo" if name == "__main__.py" else name
    return shlex.join([name, *arguments])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git(*arguments: str) -> str | None:
    """Return what git prints about the package's folder; None if it fails or is missing."""
    command = ["git", "-C", str(ROOT), *arguments]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
