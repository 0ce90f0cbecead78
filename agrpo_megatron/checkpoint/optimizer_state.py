"""The optimizer's part of a checkpoint, exchanged between all kinds of optimizers.

Adam's moments are stored in float32 under the names of the weights, whichever optimizer wrote
them. Kinds differ in where they keep float32 weights and in their non-tensor state:

    optimizer.state.param.NAME        distributed optimizer
    optimizer.state.fp32_param.NAME   float32 copies of bf16 weights, not distributed
    NAME                              the weights themselves, where they are float32

A loaded optimizer keeps its own non-tensor state, as that of another kind does not fit: the
schedule gives learning rates and the step count.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from agrpo_megatron.checkpoint.distributed_state import FORMAT, fill_owned, owned_state
from agrpo_megatron.megatron.engine import Engine

MAIN = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def sharded_optimizer(engine: Engine, model: dict[str, Any], *, is_loading: bool) -> dict[Any, Any]:
    """Return the optimizer's sharded state; called by every rank.

    The weights of experts may have an optimizer of their own. Then the states are under its number,
    and their tensors are named as if there were one optimizer.
    """
    if is_loading:
        _prepare_to_load(engine)
    parts = [_sharded(part, model, is_loading=is_loading) for part in engine.optimizers]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _sharded(part: Any, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(model, is_loading=is_loading)
    if is_loading:
        part.load_state_dict(part.state_dict())  # allocates what is missing
    return {
        **part.state_dict(),
        "param_state": owned_state(part, model, is_loading=is_loading),
        "param_state_sharding_type": FORMAT,
    }


def use_stored_names(wanted: dict[str, Any], stored: set[str]) -> None:
    """Rename weights to the names of the stored float32 weights; mutates `wanted`."""

    def renamed(leaf: Any) -> Any:
        """Return the leaf, under the best name that the checkpoint has."""
        if not isinstance(leaf, ShardedBase):
            return leaf
        data: Any = leaf.data
        prefix = next((p for p in MAIN if p in leaf.key), None)
        names: list[str] = []
        if is_float8tensor(data):
            names = [p + leaf.key for p in MAIN]
        elif prefix is not None and leaf.key not in stored:
            names = [p + leaf.key.removeprefix(prefix) for p in (*MAIN, "")]
        leaf.key = next((name for name in names if name in stored), leaf.key)
        return leaf

    dict_list_map_inplace(renamed, wanted)


def fill_optimizer(engine: Engine, loaded: dict[Any, Any], steps: int) -> None:
    """Put loaded state in place; called by every rank, after the weights are loaded.

    Args:
        loaded: the tensors of this optimizer, and the checkpoint's non-tensor state.
        steps: optimizer steps done.
    """
    parts = engine.optimizers
    for number, part in enumerate(parts):
        _fill(part, loaded if len(parts) == 1 else loaded[number], steps)
        _count(part.optimizer, steps)


def _fill(part: Any, loaded: dict[str, Any], steps: int) -> None:
    own: Any = part.state_dict()
    if isinstance(part, DistributedOptimizer):
        for group in own["optimizer"]["param_groups"]:
            group["step"] = steps
        part.load_state_dict(own)
        fill_owned(part, loaded["param_state"])
    elif "fp32_from_fp16_params" in own:
        adam = {**own["optimizer"], "state": _moments(part, loaded["optimizer"], steps)}
        main = loaded["fp32_from_fp16_params"]
        part.load_state_dict({**own, "optimizer": adam, "fp32_from_fp16_params": main})
    else:
        part.load_state_dict({**own, "state": _moments(part, loaded, steps)})


def _prepare_to_load(engine: Engine) -> None:
    """Give a fresh distributed optimizer the state of torch's Adam that loading overwrites.

    Transformer Engine's Adam has its state. An offloading optimizer takes a step, which changes
    weights: load them afterwards.
    """
    for part in engine.optimizers:
        adam = part.optimizer
        if isinstance(adam, HybridDeviceOptimizer) and not adam.state:
            adam.dummy_step()
        if not isinstance(part, DistributedOptimizer) or not isinstance(adam, torch.optim.AdamW):
            continue
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _moments(part: Any, loaded: dict[str, Any], steps: int) -> dict[Any, Any]:
    """Return the loaded moments by parameter, with the step if torch's Adam needs one."""
    state = {key: value for key, value in loaded["state"].items() if key != "common_step"}
    if isinstance(part.optimizer, torch.optim.AdamW):
        state["common_step"] = torch.tensor(float(steps))
    return state


def _count(adam: Any, steps: int) -> None:
    """Set the number of steps where an optimizer counts them; mutates it.

    Torch's Adam counts per tensor, and loading leaves one counter that all would advance. Fused
    optimizers count per group. An offloading optimizer copies its groups' values to the inner
    optimizers at every step, so it must not have a stale counter.
    """
    if isinstance(adam, HybridDeviceOptimizer):
        for group in adam.param_groups:
            group.pop("step", None)
        for inner in adam.sub_optimizers:
            _count(inner, steps)
    elif isinstance(adam, torch.optim.AdamW):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))
    else:
        for group in adam.param_groups:
            group["step"] = steps
