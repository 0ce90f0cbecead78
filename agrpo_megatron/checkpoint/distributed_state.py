"""A distributed optimizer's part of a checkpoint: each rank writes and reads what it owns.

Megatron's distributed optimizer gives each data-parallel rank a range of every flat buffer. So a
rank owns many whole weights, and a few that are cut anywhere, even within a row. What it owns of a
weight is stored as rectangular blocks of the whole tensor: nothing is gathered, no rank holds more
than its own range, and any other layout reads the blocks that overlap with its own. Names and
shapes are those of Megatron's format `fully_reshardable`, whose own implementation gathers all
ranges on every rank; each reads what the other wrote.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

FORMAT = "fully_reshardable"
Shape = tuple[int, ...]


def owned_state(
    optimizer: DistributedOptimizer, model: dict[str, Any], *, is_loading: bool
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """Return what this rank owns: float32 blocks, by weight, kind of state, and place.

    Args:
        model: the network's sharded state.
        is_loading: leave the blocks empty, else fill them with copies on the host.
    """
    kinds = (ShardedTensor, ShardedTensorFactory)
    leaves = {leaf.data: leaf for leaf in nested_values(model) if isinstance(leaf, kinds)}
    result = {}
    for number, (weight, start, stop) in enumerate(_owned(optimizer)):
        blocks = list(_blocks(optimizer, leaves[weight], start, stop))
        own = {} if is_loading else _own_state(optimizer, weight)
        result[number] = {
            kind: {
                place: _filled(block, kind, own[kind][begin:] if own else None)
                for place, (begin, block) in enumerate(blocks)
            }
            for kind in ("param", *optimizer.optimizer_state_keys)
        }
    return result


def fill_owned(
    optimizer: DistributedOptimizer, loaded: dict[int, dict[str, dict[int, Tensor]]]
) -> None:
    """Put the loaded blocks into the optimizer; consumes `loaded`."""
    for number, (weight, _, _) in enumerate(_owned(optimizer)):
        state = {
            kind: torch.cat([block.flatten() for _, block in sorted(blocks.items())])
            for kind, blocks in loaded.pop(number).items()
        }
        if getattr(optimizer.optimizer, "store_param_remainders", False):
            state["param"] = lower_halves(_shard(optimizer, weight), state["param"])
        # Torch's Adam has a step for each tensor, which no checkpoint holds.
        optimizer._set_main_param_and_optimizer_states(weight, {"step": None, **state})
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield (corner, shape) of the boxes that hold elements [start, stop) of a flattened tensor.

    Each box is contiguous, and they come in the order of the elements: of a matrix the end of a
    row, whole rows, and the beginning of a row, as far as there are any.
    """
    inner, row = shape[1:], math.prod(shape[1:])
    ends = {start, min(stop, -(-start // row) * row), max(start, stop // row * row), stop}
    for begin, end in itertools.pairwise(sorted(ends)):
        number = begin // row
        if begin % row == 0 and end % row == 0:
            yield (number, *(0 for _ in inner)), ((end - begin) // row, *inner)
        else:
            for corner, size in boxes(inner, begin - number * row, end - number * row):
                yield (number, *corner), (1, *size)


def whole_weights(weights: Tensor, lower: Tensor) -> Tensor:
    """Return float32 weights from bf16 weights and their signed lower halves.

    A negative half means that the bf16 weight was rounded up: the sum is right in both cases.
    Source: `multi_tensor_adam_param_remainder` of Transformer Engine.

    Args:
        weights: [n] bf16.
        lower: [n] int16.
    """
    upper = weights.detach().view(torch.int16).to(torch.int32) << 16
    return (upper + lower.to(torch.int32)).view(torch.float32)


def lower_halves(weights: Tensor, whole: Tensor) -> Tensor:
    """Return the lower halves [n] int16 that complete bf16 weights to float32.

    The bf16 weight is the one nearest to the float32 weight. On a tie the kernel takes the bf16
    weight further from zero; with the other, the result is one float32 step nearer to zero.
    """
    upper = weights.detach().view(torch.int16).to(torch.int32) << 16
    missing = whole.to(weights.device, torch.float32).view(torch.int32) - upper
    return missing.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """Yield each weight that this rank owns elements of, and which: [start, stop)."""
    for buffer in optimizer.gbuf_ranges:
        for bucket in itertools.chain.from_iterable(buffer.values()):
            for weight, ranges in bucket["param_map"].items():
                yield weight, ranges["param"].start, ranges["param"].end


def _blocks(
    optimizer: DistributedOptimizer, leaf: Any, start: int, stop: int
) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield the empty blocks of elements [start, stop) of a weight, and where each begins there."""
    begin = 0
    for first, part in _parts(leaf):
        lead, replica = (0,) * part.prepend_axis_num, part.replica_id
        inside = max(start - first, 0), min(stop - first, math.prod(part.local_shape))
        if inside[0] >= inside[1]:
            continue
        for corner, shape in boxes(part.local_shape, *inside):
            offset = zip(part.global_offset, lead + corner, strict=True)
            block = replace(
                part,
                data=None,
                dtype=torch.float32,
                local_shape=(1,) * len(lead) + shape,
                global_offset=tuple(map(sum, offset)),
                axis_fragmentations=None,  # no regular grid
                prepend_axis_num=0,
                # The last place counts the data-parallel ranks that have the same.
                replica_id=(*replica[:2], optimizer.distributed_optimizer_instance_id),
            )
            yield begin, block
            begin += math.prod(shape)


def _parts(leaf: Any) -> list[tuple[int, Any]]:
    """Return the parts in which a weight is stored, and the element where each begins.

    Gate and up projection are one weight of the model, and apart in the stored tensor.
    """
    if not isinstance(leaf, ShardedTensorFactory):
        return [(0, leaf)]
    stand_in = torch.empty(leaf.data.shape, device="meta")
    parts = list(nested_values(leaf.build_fn(leaf.key, stand_in, leaf.replica_id, None)))
    assert all(part.data.is_contiguous() for part in parts), leaf.key
    return [(part.data.storage_offset(), part) for part in parts]


def _filled(block: ShardedTensor, kind: str, own: Tensor | None) -> ShardedTensor:
    """Return a block under the name of a kind of state, with a copy of its numbers on the host.

    Args:
        own: the numbers from the beginning of the block on; None leaves it empty.
    """
    data = None
    if own is not None:
        data = own[: math.prod(block.local_shape)].view(block.local_shape)
        # Also from the host: a background save writes while the optimizer continues.
        data = data.to("cpu", torch.float32, copy=True)
    return replace(block, key=f"optimizer.state.{kind}.{block.key}", data=data)


def _own_state(optimizer: DistributedOptimizer, weight: Tensor) -> dict[str, Tensor]:
    """Return the main weight and the moments of what this rank owns of a weight, unscaled [n]."""
    state = optimizer._get_main_param_and_optimizer_states(weight)
    if state["param"].dtype == torch.int16:
        state["param"] = whole_weights(_shard(optimizer, weight), state["param"])
    return {kind: tensor.detach() for kind, tensor in state.items()}


def _shard(optimizer: DistributedOptimizer, weight: Tensor) -> Tensor:
    """Return the part of a weight that this rank's optimizer updates."""
    group, order = optimizer.model_param_group_index_map[weight]
    return optimizer.optimizer.param_groups[group]["params"][order]
