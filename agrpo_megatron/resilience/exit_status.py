"""How an attempt ended: its exit status, and the file that the job's script reads.

Imports neither torch nor Megatron.
"""

import json
import os
import time
from pathlib import Path

from agrpo_megatron.runs.files import write_whole

OUTCOME = "AGRPO_OUTCOME"  # names the file that the job's script reads
# Exit statuses: stopped and resumable; no progress, so another attempt is useless.
REQUEUE, STUCK = 85, 93
MAIN_RANK_TIMEOUT = 10.0  # seconds to wait for the main rank to refuse the same input
LAUNCH_FOLDER = "launch"  # of a run directory: its attempts, and the logs of its jobs
FT_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun ends its report with the message in this file
LAUNCHERS = ("TORCHELASTIC_RUN_ID", FT_SOCKET)  # set by torchrun and ft_launcher


def report_outcome(word: str, reason: str = "") -> None:
    """Write how this attempt ended to the file of the job's script, if there is one."""
    path = os.environ.get(OUTCOME)
    if path:
        write_whole(Path(path), f"{word} {reason}".strip() + "\n")


def report_refusal(reason: str) -> None:
    """Have torchrun end its traceback, which follows any failed rank, with the refusal."""
    path = os.environ.get(ERROR_FILE)
    if path:
        extra = {"timestamp": int(time.time()), "py_callstack": reason}
        message = {"message": reason, "errorCode": 2, "extraInfo": extra}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def main_rank_reported(word: str) -> bool:
    """Wait up to MAIN_RANK_TIMEOUT for the main rank to report this outcome.

    Returns:
        Whether the main rank reported it; True where no script reads outcomes.
    """
    path, deadline = os.environ.get(OUTCOME), time.monotonic() + MAIN_RANK_TIMEOUT
    if not path:
        return True
    while not (Path(path).exists() and Path(path).read_text(encoding="utf-8").startswith(word)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def launcher_status(status: int) -> int:
    """Return the exit status of this process: `status`, or 0 for a launcher in a job.

    The launcher would restart the ranks for any other status, and the job's script reads the file
    of `report_outcome` instead.
    """
    has_launcher = any(name in os.environ for name in LAUNCHERS)
    return 0 if has_launcher and os.environ.get(OUTCOME) else status
