"""How an attempt ended, told to the job's script; imports neither torch nor Megatron."""

import os
from pathlib import Path

OUTCOME = "AGRPO_OUTCOME"  # names the file that the job's script reads
# Exit statuses: stopped, to go on later; got nowhere, not to be tried again.
REQUEUE, STUCK = 85, 93
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "FT_RANK_MONITOR_IPC_SOCKET")


def tell_outcome(word: str, reason: str = "") -> None:
    """Write how this attempt ended to where the job's script looks, if one asked for it."""
    path = os.environ.get(OUTCOME)
    if path:
        Path(path).write_text(f"{word} {reason}".strip() + "\n", encoding="utf-8")


def exit_status(status: int) -> int:
    """Return a status for this process: 0 where a launcher would restart ranks for any other.

    That is so where the job's script is told by `tell_outcome` what it means.
    """
    has_launcher = any(name in os.environ for name in LAUNCHERS)
    return 0 if has_launcher and os.environ.get(OUTCOME) else status
