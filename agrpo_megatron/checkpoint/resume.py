"""Find the checkpoint to resume from: the newest with intact files."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from agrpo_megatron.checkpoint.integrity import Damaged, verify
from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.runs.progress import (
    PROGRESS_FILE,
    Progress,
    checkpoints,
    read_progress,
    set_aside,
)


def find_checkpoint(
    root: Path, ranks: Ranks, warn: Callable[[str], None]
) -> tuple[Path, Progress] | None:
    """Return the newest intact checkpoint, or None for a new run; called by every rank.

    A damaged one is renamed, not deleted; `warn` gets the reason.

    Raises:
        RuntimeError: there are checkpoints, and all of them are damaged.
    """
    paths, problem = checkpoints(root), None
    for path, successor in itertools.zip_longest(paths, paths[1:]):
        has_progress = (path / PROGRESS_FILE).exists()
        problem = _problem(path, ranks) if has_progress else f"{path} is incomplete"
        if problem is None:
            return path, read_progress(path)
        if successor is not None and ranks.is_main:
            moved = set_aside(root, path, successor)
            warn(f"{problem}; resuming from {successor.name}, the damaged one is now {moved.name}")
        dist.barrier()
    if problem is not None:
        raise RuntimeError(f"{problem}; no other checkpoint is left, --restart starts again")
    return None


def verify_together(path: Path, ranks: Ranks) -> None:
    """Verify a checkpoint, each rank a share of its files; called by every rank.

    Raises:
        Damaged: some rank found a damaged file; raised by all of them.
    """
    if problem := _problem(path, ranks):
        raise Damaged(problem)


def _problem(path: Path, ranks: Ranks) -> str | None:
    """Return the problem of a checkpoint, the same on every rank; None if it is intact."""
    mine = None
    try:
        verify(path, share=ranks.rank, shares=ranks.world_size)
    except Damaged as error:
        mine = str(error)
    return next(filter(None, gather_objects(mine)), None)
