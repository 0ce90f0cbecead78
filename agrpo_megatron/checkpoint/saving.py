"""Save checkpoints of a run atomically, optionally in the background.

A checkpoint is written under a temporary name. When all ranks have written, it gets checksums and
its name, and `latest` is moved; a kill at any moment leaves the previous one in place.
"""

import json
import os
import pickle
import queue
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support

from agrpo_megatron.checkpoint.integrity import digests, seal
from agrpo_megatron.checkpoint.sharded import run_state
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.runs.progress import (
    BEST,
    LATEST,
    PARTIAL,
    PROGRESS_FILE,
    Progress,
    point,
    pointed,
)

SUMS = ".sums-"
STRATEGIES = {  # background writers: package, module of the queue
    "nvrx": ("nvidia_resiliency_ext.checkpointing.async_ckpt", "core"),
    "mcore": ("megatron.core.dist_checkpointing.strategies", "async_utils"),
}


class Saver:
    """Saves a run's checkpoints, one at a time; every call is made by every rank.

    Args:
        root: the run's `checkpoints` directory.
        keep: newest checkpoints of a phase that stay; the best and the end of SFT always stay.
        is_async: write in a separate process while training continues.
        files: a folder whose content is copied into each checkpoint, such as the tokenizer.
        check: called before a checkpoint gets its name; raises if this attempt must not write.
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        *,
        keep: int,
        is_async: bool,
        files: Path | None,
        check: Callable[[], None] = lambda: None,
    ):
        self._root, self._engine, self._keep, self._check = root, engine, keep, check
        self._is_async, self._files = is_async, files
        # Without nvidia-resiliency-ext, Megatron's own; both fork a process for each save.
        self._strategy = "nvrx" if is_async and has_nvrx_async_support() else "mcore"
        package, queue_module = STRATEGIES[self._strategy]
        self._queue = import_module(f"{package}.{queue_module}").AsyncCallsQueue(persistent=False)
        self._writer: Any = import_module(f"{package}.filesystem_async")
        if engine.ranks.is_main:
            for left in root.glob(f"{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)

    def save(self, progress: Progress) -> Path:
        """Finish an earlier save, then save or start to. Returns the path of the checkpoint."""
        self.finish()
        self._engine.finish_parameters()
        folder = self._new_folder(progress)
        self._writer._results_queue = _FileQueue()
        try:
            state, strategy = run_state(self._engine), self._strategy
            request = dist_checkpointing.save(
                state, str(folder), async_sharded_save=True, async_strategy=strategy
            )
        finally:
            self._writer._results_queue = None
        assert request is not None
        if request.async_fn is not None:  # else this rank has nothing to write
            write = partial(_write, request.async_fn, folder, dist.get_rank())
            request = request._replace(async_fn=write)
        request.add_finalize_fn(partial(self._publish, folder, progress))
        if self._is_async:
            with warnings.catch_warnings():  # the child only writes files
                warnings.simplefilter("ignore", DeprecationWarning)
                self._queue.schedule_async_request(request)
        else:
            request.execute_sync()
        return self._root / progress.name

    def poll(self) -> None:
        """Publish a fully written checkpoint, if any, without waiting."""
        self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait until nothing is being written."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def _new_folder(self, progress: Progress) -> Path:
        """Make a folder that no process of an earlier attempt still writes to."""
        name = [f"{PARTIAL}{progress.name}-{time.time_ns():x}"]
        dist.broadcast_object_list(name, src=0)
        folder = self._root / name[0]
        if self._engine.ranks.is_main:
            folder.mkdir(parents=True)
            if self._files is not None:
                shutil.copytree(self._files, folder, copy_function=_link, dirs_exist_ok=True)
        dist.barrier()
        return folder

    def _publish(self, folder: Path, progress: Progress) -> None:
        if self._engine.ranks.is_main:
            self._check()
            sums: dict[str, str] = {}
            for file in folder.glob(f"{SUMS}*"):
                sums |= json.loads(file.read_text(encoding="utf-8"))
                file.unlink()
            text = json.dumps(asdict(progress), indent=1)
            (folder / PROGRESS_FILE).write_text(text, encoding="utf-8")
            seal(folder, sums)
            final = self._root / progress.name
            if final.exists():
                final.rename(folder.with_name(f"{folder.name}-replaced"))
            folder.rename(final)
            point(self._root, LATEST, progress.name)
            if progress.is_best:
                point(self._root, BEST, progress.name)
            self._remove_old(progress)
        dist.barrier()

    def _remove_old(self, newest: Progress) -> None:
        older = sorted(self._root.glob(f"{newest.phase}-*"))[: -self._keep]
        kept = pointed(self._root, BEST)
        replaced = self._root.glob(f"{PARTIAL}*-replaced")
        for path in (*(path for path in older if path.name != kept), *replaced):
            shutil.rmtree(path, ignore_errors=True)


def _write(own: Callable[..., Any], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Write this rank's files, as Megatron does it, and record their checksums."""
    own(*args, **kwargs)
    files = (path.name for path in folder.glob(f"__{rank}_*"))
    text = json.dumps(digests(folder, files))
    (folder / f"{SUMS}{rank}").write_text(text, encoding="utf-8")


class _FileQueue:
    """Returns one result from the writing process; a pipe would fill up and block it.

    Megatron's own queue needs a manager process, whose start imports everything again: over ten
    seconds for a tiny model.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object

    def put(self, item: Any) -> None:
        """Write the result; called in the process that wrote."""
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Read the result.

        Raises:
            queue.Empty: the writing process died.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None


def _link(source: str, target: str) -> None:
    """Hard-link a file of the run, so that no bytes are copied; copy it if that fails."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
