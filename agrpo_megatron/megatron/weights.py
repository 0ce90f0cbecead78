"""Import and export weights of a built model, by the names of its family."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from agrpo_megatron.config.rules.model import AUTOREGRESSIVE
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, settings_from_hf, weight_mappings
from agrpo_megatron.families.files import HfWeights
from agrpo_megatron.families.random_weights import RandomWeights
from agrpo_megatron.families.starts.weights import started_part
from agrpo_megatron.families.tensors import HEAD_WEIGHT
from agrpo_megatron.families.transforms import Part, Split, from_megatron, to_megatron
from agrpo_megatron.megatron.layers.head import copy_tied_weights
from agrpo_megatron.megatron.lora.adapters import ROOT
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Axis, Ranks, gather_objects


def load_hf(network: Network, settings: ModelSettings, directory: str | Path) -> dict[str, Tensor]:
    """Read the safetensors of a Hugging Face directory into the network; mutates its weights.

    Each rank reads only its shards. Pickled weights are never opened.

    Returns:
        The uncast values of FP8 weights, see `load_named`.

    Raises:
        ValueError: a tensor is missing, unknown, damaged or has the wrong shape.
    """
    stored = settings
    if settings.family in AUTOREGRESSIVE:
        stored = settings_from_hf(directory)
    read = started_part(HfWeights(directory, stored).part, stored, settings)
    return load_named(network, settings, read)


def initialise(network: Network, settings: ModelSettings, seed: int) -> dict[str, Tensor]:
    """Draw random weights by tensor name, so they are the same under any layout.

    Returns:
        The uncast values of FP8 weights, see `load_named`.
    """
    return load_named(network, settings, RandomWeights(settings, seed).part)


def load_named(
    network: Network,
    settings: ModelSettings,
    read: Callable[[str], Part],
    *,
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Fill the parameters this rank holds from whole Hugging Face tensors; mutates them.

    Args:
        only: Megatron's names of those to fill; None: all but adapters.

    Returns:
        By Megatron's name, the values of FP8 weights before their cast: the float32 main weights
        start from them. Empty without FP8 weights.
    """
    uncast: dict[str, Tensor] = {}
    parameters = {
        name: parameter
        for name, parameter in network.named_weights()
        if not name.startswith(f"{ROOT}.") and (only is None or name in only)
    }
    for mapping in weight_mappings(settings):
        if mapping.megatron not in parameters:
            continue  # another pipeline stage or rank of experts holds it
        parameter, tensor = parameters.pop(mapping.megatron), network.ranks.split_of(mapping.expert)
        split = Split(tensor.rank, tensor.size, vocab_rows=len(parameter) * tensor.size)
        with torch.no_grad():
            parts = [read(name) for name in mapping.parts]
            value = to_megatron(parts, mapping.transform, settings, split)
            parameter.copy_(value)
        if is_float8tensor(parameter):
            uncast[mapping.megatron] = value
    if settings.tie_embeddings:
        parameters.pop(HEAD_WEIGHT, None)  # the last stage's copy
        for chunk in network.chunks:
            copy_tied_weights(chunk)
    if parameters:
        raise RuntimeError(f"no weights are named for {', '.join(parameters)}")
    return uncast


def export_hf(
    tensors: Mapping[str, Tensor], settings: ModelSettings, ranks: Ranks
) -> dict[str, Tensor]:
    """Return whole Hugging Face tensors on every rank; called by every rank of a replica.

    With expert parallelism, every rank calls it.

    Args:
        tensors: Megatron parameter name -> this rank's shard (weights or gradients), with
            global layer numbers.
    """
    mine: dict[str, Tensor] = {}
    for mapping in weight_mappings(settings):
        if mapping.megatron not in tensors:
            continue
        shard = tensors[mapping.megatron]
        shard = (shard.dequantize() if is_float8tensor(shard) else shard).contiguous()
        tensor = ranks.split_of(mapping.expert)
        shards = [torch.empty_like(shard) for _ in range(tensor.size)]
        dist.all_gather(shards, shard, group=tensor.group)
        parts = from_megatron(shards, mapping.transform, settings)
        mine.update(zip(mapping.parts, parts, strict=True))
    for axis in (ranks.expert, ranks.pipeline):
        mine = _from_all(axis, mine, settings)
    return mine


def _from_all(axis: Axis, mine: dict[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
    """Add the tensors that other ranks of an axis hold, in the order of the family's table."""
    if axis.size == 1:
        return mine
    held = gather_objects({name: each.dtype for name, each in mine.items()}, axis.group)
    members = dist.get_process_group_ranks(axis.group)
    copies = Counter(name for names in held for name in names)
    owners = {
        name: (members[rank], names[name]) for rank, names in enumerate(held) for name in names
    }
    like, result = next(iter(mine.values())), {}
    for name, shape in hf_shapes(settings).items():
        if name not in owners:
            continue
        owner, dtype = owners[name]
        tensor = mine[name].contiguous() if name in mine else like.new_empty(shape, dtype=dtype)
        if copies[name] < axis.size:
            dist.broadcast(tensor, owner, group=axis.group)
        result[name] = tensor
    return result
