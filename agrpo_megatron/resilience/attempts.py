"""The attempts of a run: count them, refuse attempts without progress, allow one writer.

A job that requeues itself must not do so forever: after several attempts without new saved data,
the next one is refused. Only one attempt may write: a node that SLURM declared lost can come back
and continue an attempt whose successor already runs.
"""

import itertools
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.files import append_records, read_records, write_whole

ATTEMPTS, CLAIM = "attempts.jsonl", "claim"
UNATTENDED = "AGRPO_UNATTENDED"  # set in jobs that requeue themselves


class Stuck(Exception):
    """Several attempts in a row made no progress."""


def claim(directory: Path, ranks: Ranks) -> Callable[[], None]:
    """Claim a run directory before any other write; called by every rank.

    Returns:
        The check to call before every write: it raises RuntimeError once a later attempt has begun.
    """
    path = directory / LAUNCH_FOLDER / CLAIM
    (token, *_) = gather_objects(secrets.token_hex(8))
    if ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, token)
    dist.barrier()

    def check() -> None:
        if path.read_text(encoding="utf-8") != token:
            raise RuntimeError(
                f"another attempt at {directory} has begun; this one ends here "
                "and writes nothing more"
            )

    return check


def begin(directory: Path, progress: list[str], *, most_idle: int, ranks: Ranks) -> None:
    """Record an attempt; called by every rank.

    Args:
        progress: names of the data to resume from; a change means that the last attempt advanced.
        most_idle: limit of attempts in a row without progress, in unattended jobs.

    Raises:
        Stuck: on every rank, if that limit is reached.
    """
    refusal = None
    if ranks.is_main:
        earlier = read_attempts(directory)
        same = itertools.takewhile(lambda each: each["progress"] == progress, reversed(earlier))
        idle = len(list(same))
        if idle >= most_idle and os.environ.get(UNATTENDED):
            refusal = (
                f"{idle} attempts in a row made no progress after {progress[0]}; see the log of "
                f"each (resilience.idle_attempts={most_idle})"
            )
        else:
            _record(directory, {"attempt": len(earlier), "progress": progress})
    (refusal, *_) = gather_objects(refusal)
    if refusal is not None:
        raise Stuck(refusal)


def read_attempts(directory: Path) -> list[dict]:
    """Return the record of each attempt so far, oldest first."""
    return read_records(directory / LAUNCH_FOLDER / ATTEMPTS)


def _record(directory: Path, attempt: dict) -> None:
    path = directory / LAUNCH_FOLDER / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    job = {
        name.lower(): os.environ[name]
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
        if name in os.environ
    }
    append_records(path, [{**attempt, "time": time.time(), **job}])
