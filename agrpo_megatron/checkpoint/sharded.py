"""The sharded state of a run in Megatron's `torch_dist` format: built, and loaded at any layout."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from agrpo_megatron.checkpoint.optimizer_state import (
    fill_optimizer,
    sharded_optimizer,
    use_stored_names,
)
from agrpo_megatron.checkpoint.torch_dist import read_metadata
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.model import expert_biases
from agrpo_megatron.megatron.network import Network


def run_state(engine: Engine) -> dict[str, Any]:
    """Return model, optimizer and schedule as Megatron saves them; called by every rank."""
    model = _model_state(engine.network)
    optimizer = sharded_optimizer(engine, model, is_loading=False)
    return {**model, "optimizer": optimizer, "scheduler": engine.scheduler.state_dict()}


def load_checkpoint(path: Path, engine: Engine) -> None:
    """Load model, optimizer and schedule in place; called by every rank, at any layout.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    stored = set(read_metadata(path).state_dict_metadata)
    with torch.no_grad():
        model = _model_state(engine.network)
        optimizer = sharded_optimizer(engine, model, is_loading=True)
        use_stored_names(optimizer, stored)
        # Two loads, as both may read the weights.
        state = _load({"optimizer": optimizer}, path)
        _fill(engine.network, _load(model, path))
        engine.scheduler.load_state_dict(state["scheduler"])
        fill_optimizer(engine, state["optimizer"], engine.scheduler.num_steps)
        engine.cast_weights()


def load_weights(path: Path, network: Network, *, is_base: bool = False) -> dict[str, Tensor]:
    """Load only the model's weights, in place; called by every rank, at any layout.

    Args:
        is_base: load all weights but adapters, in place of what is trained.

    Returns:
        The tensors that FP8 weights were cast from, by Megatron's name: main weights, if the
        checkpoint has them.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    stored = set(read_metadata(path).state_dict_metadata)
    with torch.no_grad():
        wanted = _model_state(network, is_base=is_base)
        use_stored_names(wanted, stored)
        return _fill(network, _load(wanted, path))


def _model_state(network: Network, *, is_base: bool = False) -> dict[str, Any]:
    """Return the sharded state of each virtual stage, under the keys that Megatron's tools use.

    Of a network with adapters it is that of what is trained, or else of the base.
    """
    states, adapters = [], network.adapters
    own = {} if adapters is None else adapters.sharded_state()
    for chunk in network.chunks:
        state = chunk.sharded_state_dict()
        kept = {name for name, p in chunk.named_parameters() if is_base or p.requires_grad}
        if is_base or adapters is None:
            kept |= {name for name, _ in expert_biases(chunk)}
        # The local specification's extra states are empty.
        mine = {key: state[key] for key in state if key in kept and key not in own}
        states.append(mine if is_base else mine | {key: own[key] for key in own if key in kept})
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def _fill(network: Network, state: dict[str, Any]) -> dict[str, Tensor]:
    """Fill the network's weights; return the sources of FP8 weights, by Megatron's name."""
    network.for_updates()
    parts = [part for name, part in state.items() if name.startswith("model")]
    names, sources = {p: name for name, p in network.named_parameters()}, {}
    for chunk, part in zip(network.chunks, parts, strict=True):
        chunk.load_state_dict(part, strict=False)
        in_fp8 = ((name, p) for name, p in chunk.named_parameters() if is_float8tensor(p))
        sources.update({names[p]: part[name] for name, p in in_fp8})
    return sources


def _load(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded = dist_checkpointing.load(wanted, str(path))
    except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: does not hold this model ({reason})") from error
    assert isinstance(loaded, dict)
    return loaded
