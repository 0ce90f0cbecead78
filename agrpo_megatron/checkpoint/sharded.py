"""Save and load model, optimizer and schedule as Megatron's sharded `torch_dist` checkpoints.

A checkpoint appears under its final name only when it is whole, and `latest` is moved after
that; a kill at any moment leaves the previous one in place.
"""

import json
import os
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from agrpo_megatron.checkpoint.progress import PROGRESS_FILE, Progress
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network


def save_checkpoint(root: Path, engine: Engine, progress: Progress, *, keep: int) -> Path:
    """Write one checkpoint and move `latest` to it; called by every rank.

    Args:
        root: the run's `checkpoints` directory.
        keep: newest checkpoints of the phase that stay; the end of SFT always stays.
    """
    final, partial = root / progress.name, root / f".partial-{progress.name}"
    if engine.ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with _writers_in_process():
        dist_checkpointing.save(_state(engine, is_loading=False), str(partial))
    if engine.ranks.is_main:
        (partial / PROGRESS_FILE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = root / ".latest"
        pointer.write_text(progress.name, encoding="utf-8")
        os.replace(pointer, root / "latest")
        _remove_old(root, progress, keep)
    dist.barrier()
    return final


def load_checkpoint(path: Path, engine: Engine) -> None:
    """Load model, optimizer and schedule in place; called by every rank, at any layout."""
    with torch.no_grad(), _loadable_optimizer_state():
        _fill_adam_state(engine)
        state = _load(_state(engine, is_loading=True), path)
        _fill(engine.network, state)
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["scheduler"])
    _separate_adam_steps(engine, engine.scheduler.num_steps)


def load_weights(path: Path, network: Network) -> None:
    """Load the model's weights alone, in place; called by every rank, at any layout."""
    with torch.no_grad():
        _fill(network, _load(_model_state(network), path))


def _model_state(network: Network) -> dict[str, Any]:
    """Return the sharded state of each virtual stage, under the keys that Megatron's tools use."""
    if len(network.chunks) == 1:
        return {"model": network.chunks[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(network.chunks)}


def _fill(network: Network, state: dict[str, Any]) -> None:
    parts = [part for name, part in state.items() if name.startswith("model")]
    for chunk, part in zip(network.chunks, parts, strict=True):
        chunk.load_state_dict(part, strict=False)


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    loaded = dist_checkpointing.load(state, str(path))
    assert isinstance(loaded, dict)
    return loaded


def _state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    model = _model_state(engine.network)
    optimizer = engine.optimizer.sharded_state_dict(
        model,
        is_loading=is_loading,
        metadata={"distrib_optim_sharding_type": "fully_reshardable"},
    )
    scheduler = engine.scheduler.state_dict()
    return {**model, "optimizer": optimizer, "scheduler": scheduler}


@contextmanager
def _writers_in_process() -> Iterator[None]:
    """Hand Megatron's writer a queue of this process.

    A synchronous save writes in this process, yet Megatron starts a manager process to pass the
    results through, which imports everything again: over ten seconds for a tiny model.
    """
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None


@contextmanager
def _loadable_optimizer_state() -> Iterator[None]:
    """Let the distributed optimizer load torch Adam's state.

    Without Transformer Engine or Apex the optimizer is torch's, whose per-tensor `step` the
    loader does not expect to be absent from the checkpoint.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def patched(self, model_param, tensors):
        tensors.setdefault("step", None)
        return original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = patched
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original


def _distributed_adams(engine: Engine) -> Iterator[torch.optim.Optimizer]:
    """Yield torch's Adam inside distributed optimizers (Transformer Engine's needs no help)."""
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(optimizer, DistributedOptimizer) and isinstance(inner, torch.optim.AdamW):
            yield inner


def _fill_adam_state(engine: Engine) -> None:
    """Give a fresh distributed optimizer the Adam state that loading overwrites."""
    for adam in _distributed_adams(engine):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _separate_adam_steps(engine: Engine, steps: int) -> None:
    """Give every tensor its own step counter: loading leaves one that all would advance."""
    for adam in _distributed_adams(engine):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))


def _remove_old(root: Path, newest: Progress, keep: int) -> None:
    older = sorted(root.glob(f"{newest.phase}-*"))[:-keep]
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
