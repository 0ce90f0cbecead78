"""How an attempt ended, told to the job's script; imports neither torch nor Megatron."""

import os
import time
from pathlib import Path

from agrpo_megatron.runs.files import write_whole

OUTCOME = "AGRPO_OUTCOME"  # names the file that the job's script reads
# Exit statuses: stopped, to go on later; got nowhere, not to be tried again.
REQUEUE, STUCK = 85, 93
AGREE = 10.0  # seconds for the main rank to refuse the same wrong input
LAUNCH_FOLDER = "launch"  # of a run directory: its attempts, and the logs of its jobs
FT_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"
LAUNCHERS = ("TORCHELASTIC_RUN_ID", FT_SOCKET)  # set below torchrun, ft_launcher


def tell_outcome(word: str, reason: str = "") -> None:
    """Write how this attempt ended to where the job's script looks, if one asked for it."""
    path = os.environ.get(OUTCOME)
    if path:
        write_whole(Path(path), f"{word} {reason}".strip() + "\n")


def is_told(word: str) -> bool:
    """Say whether the main rank tells this outcome within a moment, where anybody reads it."""
    path, deadline = os.environ.get(OUTCOME), time.monotonic() + AGREE
    if not path:
        return True
    while not (Path(path).exists() and Path(path).read_text(encoding="utf-8").startswith(word)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def exit_status(status: int) -> int:
    """Return a status for this process: 0 where a launcher would restart ranks for any other.

    That is so where the job's script is told by `tell_outcome` what it means.
    """
    has_launcher = any(name in os.environ for name in LAUNCHERS)
    return 0 if has_launcher and os.environ.get(OUTCOME) else status
