"""The optimizer's part of a checkpoint, exchanged between all kinds of optimizers.

Adam's moments are stored under the names of the weights, whichever optimizer wrote them. Kinds
differ in where they keep float32 weights, and in what they note beside the tensors:

    optimizer.state.param.NAME        distributed optimizer
    optimizer.state.fp32_param.NAME   float32 copies of bf16 weights, not distributed
    NAME                              the weights themselves, where they are float32
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from agrpo_megatron.megatron.engine import Engine

MAIN = ("optimizer.state.param.", "optimizer.state.fp32_param.")
FORMAT = "fully_reshardable"


def sharded_optimizer(engine: Engine, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Return the optimizer's sharded state; called by every rank."""
    metadata = {"distrib_optim_sharding_type": FORMAT}
    return engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)


def prepare_to_load(engine: Engine) -> None:
    """Give a fresh distributed optimizer the Adam state that loading overwrites."""
    for adam in _distributed_adams(engine):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def ask_for_what_is_stored(wanted: dict[str, Any], stored: set[str]) -> None:
    """Rename float32 weights to the name that the checkpoint keeps them under; mutates it."""

    def renamed(leaf: Any) -> Any:
        """Return the leaf, under a name that the checkpoint has."""
        prefix = next((p for p in MAIN if isinstance(leaf, ShardedBase) and p in leaf.key), None)
        if prefix is not None and leaf.key not in stored:
            name = leaf.key.removeprefix(prefix)
            other = (p + name for p in (*MAIN, ""))
            leaf.key = next((key for key in other if key in stored), leaf.key)
        return leaf

    dict_list_map_inplace(renamed, wanted)


def fill_optimizer(engine: Engine, loaded: dict[str, Any], steps: int) -> None:
    """Put loaded state in place; called by every rank, under `loadable`.

    Args:
        loaded: the tensors that this optimizer asked for, beside what the one that wrote the
            checkpoint noted.
        steps: optimizer steps behind it.
    """
    is_distributed = any(True for _ in _distributed_adams(engine))
    if ("param_state_sharding_type" in loaded) != is_distributed:
        loaded = _of_other_kind(engine, loaded, steps, is_distributed=is_distributed)
    engine.optimizer.load_state_dict(loaded)
    # Loading leaves one step counter that all tensors would advance.
    for adam in _distributed_adams(engine):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))


@contextmanager
def loadable() -> Iterator[None]:
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


def _of_other_kind(
    engine: Engine, loaded: dict[str, Any], steps: int, *, is_distributed: bool
) -> dict[str, Any]:
    """Return this optimizer's own notes, with the tensors that were loaded for it."""
    own: Any = engine.optimizer.state_dict()
    if is_distributed:
        for group in own["optimizer"]["param_groups"]:
            group["step"] = steps
        return {**own, "param_state": loaded["param_state"], "param_state_sharding_type": FORMAT}
    step = torch.tensor(float(steps))
    if "fp32_from_fp16_params" in loaded:
        adam = {**own["optimizer"], "state": {**loaded["optimizer"]["state"], "common_step": step}}
        main = {"fp32_from_fp16_params": loaded["fp32_from_fp16_params"]}
        return {**own, "optimizer": adam, **main}
    return {**own, "state": {**loaded["state"], "common_step": step}}


def _distributed_adams(engine: Engine) -> Iterator[torch.optim.Optimizer]:
    """Yield torch's Adam inside distributed optimizers (Transformer Engine's needs no help)."""
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(optimizer, DistributedOptimizer) and isinstance(inner, torch.optim.AdamW):
            yield inner
