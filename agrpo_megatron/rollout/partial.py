"""A rollout that was ended, or killed, before its last row: kept on disk, and gone on with."""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agrpo_megatron.diffusion.snapshot import Snapshot, complete_rows
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.stop import Stop, Turns

SUFFIX, WRITING = ".part", ".writing"
SHARE = 0.2  # of the time of a rollout that writing may take


class PartialRollout:
    """What one replica has sampled so far; an `Interruption` of the sampler.

    A file is written whenever rows are complete, so that a kill costs none of them, unless writing
    would take more than `SHARE` of the time; and always when the rollout ends, early or not. It
    holds for the ids, settings and layout that it was written under.

    Args:
        path: without a replica's number; None keeps nothing.
        run: says which settings and problems the rollouts are of.
        check: called before a file appears; raises where this attempt must not write.
    """

    def __init__(
        self,
        path: Path | None,
        rollout_ids: Tensor,
        *,
        run: str,
        ranks: Ranks,
        stop: Stop,
        check: Callable[[], None],
    ):
        name = f"{path.name}-{ranks.data.rank}{SUFFIX}" if path is not None else ""
        self._path = path.with_name(name) if path is not None else None
        self._ids, self._ranks = rollout_ids.cpu(), ranks
        layout = f"{ranks.parallel} {ranks.world_size}"
        self._about = {"run": run, "layout": layout}
        self._turns, self._check = Turns(stop, ranks), check
        self._free_at = 0.0  # when the next write takes no undue share of the time

    def begun(self) -> Snapshot | None:
        """Read the file of an earlier attempt, if all ranks of the replica see the same one."""
        if self._path is None:
            return None
        found = self._read()
        mine = (self._ranks.data.rank, None if found is None else int(found["step"].sum()))
        views: list[tuple[int, int | None] | None] = [None] * self._ranks.world_size
        dist.all_gather_object(views, mine)
        same = {view for view in views if view is not None and view[0] == mine[0]}
        return found if len(same) == 1 else None

    def is_asked(self) -> bool:
        """Say whether the ranks of the replica agreed to end here."""
        return self._turns.is_asked()

    def keep(self, snapshot: Snapshot, *, is_last: bool) -> None:
        """Write what there is, on one rank of the replica; it appears when it is whole."""
        if self._path is None or not self._ranks.speaks_for_replica:
            return
        started = time.monotonic()
        if started < self._free_at and not is_last:
            return
        writing = self._path.with_suffix(f".{secrets.token_hex(4)}{WRITING}")
        progress = {"complete": len(complete_rows(snapshot)), "steps": int(snapshot["step"].sum())}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in snapshot.items()}
        save_file(tensors, writing, metadata={"about": json.dumps({**self._about, **progress})})
        self._check()
        writing.replace(self._path)
        now = time.monotonic()
        self._free_at = now + (now - started) / SHARE

    def close(self) -> None:
        """Leave no question between ranks unanswered."""
        self._turns.close()

    def _read(self) -> Snapshot | None:
        """Read the file; None where it is damaged or of another rollout: it is sampled anew."""
        assert self._path is not None
        try:
            with safe_open(self._path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fits = about.items() >= self._about.items()
            return tensors if fits and tensors["rollout_ids"].equal(self._ids) else None
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None


def progress_in(path: Path) -> tuple[int, int]:
    """Return how many rows of a file are complete, and the denoising steps of all of them."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
        return about["complete"], about["steps"]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return 0, 0  # it cannot be read, and will not be gone on with
