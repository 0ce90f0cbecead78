"""The attempts of a run: count them, refuse attempts without progress, allow one writer.

A job that requeues itself must not do so forever: after several attempts without new saved data,
the next one is refused. Only one attempt may write: a node that SLURM declared lost can come back
and continue an attempt whose successor already runs.
"""

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.files import write_whole

ATTEMPTS, CLAIM = "attempts.jsonl", "claim"
UNATTENDED = "AGRPO_UNATTENDED"  # set in jobs that requeue themselves


class Stuck(Exception):
    """Several attempts in a row made no progress."""


class Attempt:
    """One attempt at a run, which claims the run directory; the same on every rank.

    Args:
        token: unique id of this attempt.
    """

    def __init__(self, directory: Path, token: str):
        self._directory, self.token = directory, token

    def check(self) -> None:
        """Check that no later attempt has begun; called before every write.

        Raises:
            RuntimeError: a later attempt has begun; this one must not write any more.
        """
        if (self._directory / LAUNCH_FOLDER / CLAIM).read_text(encoding="utf-8") != self.token:
            raise RuntimeError(
                f"another attempt at {self._directory} has begun; this one ends here "
                "and writes nothing more"
            )


def claim(directory: Path, ranks: Ranks) -> Attempt:
    """Claim a run directory before any other write; called by every rank."""
    shared = [secrets.token_hex(8)]
    dist.broadcast_object_list(shared, src=0)
    if ranks.is_main:
        (directory / LAUNCH_FOLDER).mkdir(parents=True, exist_ok=True)
        write_whole(directory / LAUNCH_FOLDER / CLAIM, shared[0])
    dist.barrier()
    return Attempt(directory, shared[0])


def begin(directory: Path, progress: list[str], *, most_idle: int, ranks: Ranks) -> None:
    """Record an attempt; called by every rank.

    Args:
        progress: names of the data to resume from; a change means that the last attempt advanced.
        most_idle: limit of attempts in a row without progress, in unattended jobs.

    Raises:
        Stuck: on every rank, if that limit is reached.
    """
    refusal: list[str | None] = [None]
    if ranks.is_main:
        earlier = read_attempts(directory)
        idle = _idle(earlier, progress)
        if idle >= most_idle and os.environ.get(UNATTENDED):
            refusal = [
                f"{idle} attempts in a row made no progress after {progress[0]}; see the log of "
                f"each (resilience.idle_attempts={most_idle})"
            ]
        else:
            _record(directory, {"attempt": len(earlier), "progress": progress})
    dist.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise Stuck(refusal[0])


def read_attempts(directory: Path) -> list[dict]:
    """Return the record of each attempt so far, oldest first."""
    path = directory / LAUNCH_FOLDER / ATTEMPTS
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # truncated by a kill
                found.append(json.loads(line))
    return found


def _idle(earlier: list[dict], progress: list[str]) -> int:
    """Return how many attempts, up to the last one, began with the same progress."""
    count = 0
    while count < len(earlier) and earlier[-1 - count]["progress"] == progress:
        count += 1
    return count


def _record(directory: Path, attempt: dict) -> None:
    path = directory / LAUNCH_FOLDER / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    job = {
        name.lower(): os.environ[name]
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
        if name in os.environ
    }
    with path.open("a", encoding="utf-8") as file:
        # A new line, even after a line that a kill has truncated.
        file.write("\n" + json.dumps({**attempt, "time": time.time(), **job}))
