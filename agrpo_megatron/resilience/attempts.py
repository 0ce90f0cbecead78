"""The attempts of a run: which one it is, whether they get on, and how one ended.

A job that is queued again each time it fails must not do so for ever: an attempt that would begin
where the last ones began, with nothing more kept, is refused. And only one attempt may write: a
node that SLURM gave up can come back and go on with an attempt whose successor already runs.
"""

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.outcome import LAUNCH_FOLDER
from agrpo_megatron.runs.files import write_whole

ATTEMPTS, CLAIM = "attempts.jsonl", "claim"
UNATTENDED = "AGRPO_UNATTENDED"  # set where a job queues itself again


class Stuck(Exception):
    """Attempts in a row got nowhere; another one would not either."""


class Attempt:
    """One attempt at a run, that claims its directory; the same on every rank.

    Args:
        token: tells it from all others.
    """

    def __init__(self, directory: Path, token: str):
        self._directory, self.token = directory, token

    def check(self) -> None:
        """Make sure that no later attempt has begun; called before anything is written.

        Raises:
            RuntimeError: one has; this one must not write any more.
        """
        if (self._directory / LAUNCH_FOLDER / CLAIM).read_text(encoding="utf-8") != self.token:
            raise RuntimeError(
                f"another attempt at {self._directory} has begun; this one ends here "
                "and writes nothing more"
            )


def claim(directory: Path, ranks: Ranks) -> Attempt:
    """Claim a run directory, before anything else is done in it; called by every rank."""
    shared = [secrets.token_hex(8)]
    dist.broadcast_object_list(shared, src=0)
    if ranks.is_main:
        (directory / LAUNCH_FOLDER).mkdir(parents=True, exist_ok=True)
        write_whole(directory / LAUNCH_FOLDER / CLAIM, shared[0])
    dist.barrier()
    return Attempt(directory, shared[0])


def begin(directory: Path, progress: list[str], *, most_idle: int, ranks: Ranks) -> None:
    """Note down an attempt; called by every rank.

    Args:
        progress: what there is to go on from; more of it means that the last attempt got on.
        most_idle: attempts in a row that may have got nowhere, where nobody looks on.

    Raises:
        Stuck: on every rank, where so many got nowhere.
    """
    said: list[str | None] = [None]
    if ranks.is_main:
        earlier = read_attempts(directory)
        idle = _idle(earlier, progress)
        if idle >= most_idle and os.environ.get(UNATTENDED):
            said = [
                f"{idle} attempts in a row got no further than {progress[0]}; the log of each "
                f"says why (resilience.idle_attempts={most_idle})"
            ]
        else:
            _note(directory, {"attempt": len(earlier), "progress": progress})
    dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise Stuck(said[0])


def read_attempts(directory: Path) -> list[dict]:
    """Return what is known of each attempt so far, oldest first."""
    path = directory / LAUNCH_FOLDER / ATTEMPTS
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # cut off by a kill
                found.append(json.loads(line))
    return found


def _idle(earlier: list[dict], progress: list[str]) -> int:
    """Return how many attempts, up to the last one, began just where this one does."""
    count = 0
    while count < len(earlier) and earlier[-1 - count]["progress"] == progress:
        count += 1
    return count


def _note(directory: Path, attempt: dict) -> None:
    path = directory / LAUNCH_FOLDER / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    job = {
        name.lower(): os.environ[name]
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
        if name in os.environ
    }
    with path.open("a", encoding="utf-8") as file:
        # On a line of its own, also after one that a kill has cut off.
        file.write("\n" + json.dumps({**attempt, "time": time.time(), **job}))
