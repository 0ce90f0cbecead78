"""Adapters of all ranks, as whole tensors by PEFT's names."""

import torch
import torch.distributed as dist

from agrpo_megatron.families.lora import MATRICES, tensor_name
from agrpo_megatron.families.transforms import adapter_from_megatron
from agrpo_megatron.megatron.parallel import gather_objects


def whole_adapters(network, of=lambda parameter: parameter.detach()):
    """Return what `of` gives of every adapter matrix; called by every rank of a replica.

    With expert parallelism, every rank calls it.
    """
    ranks, found = network.ranks, {}
    for part in network.adapters.parts():
        tensor = ranks.split_of(part.linear.mapping.expert)
        for name in MATRICES:
            parameter = getattr(part, name)
            value = of(parameter).contiguous()
            if parameter.tensor_model_parallel:
                shards = [torch.empty_like(value) for _ in range(tensor.size)]
                dist.all_gather(shards, value, group=tensor.group)
                value = torch.cat(shards, parameter.partition_dim)
            rows = part.linear.outputs if name == "lora_B" else len(value)
            model = network.chunks[0].settings
            transform = part.linear.mapping.transform
            value = adapter_from_megatron(value[:rows], name, transform, model)
            found[tensor_name(part.linear, name)] = value
    for axis in (ranks.expert, ranks.pipeline):
        for held in gather_objects(found, axis.group):
            found |= held
    return found


def random_adapters(network, seed=0, scale=0.2, of=lambda drawn: drawn):
    """Fill adapters with `of` random numbers, B too, the same at any layout."""
    sizes = {}
    for part in network.adapters.parts():
        rank = len(part.lora_A)
        sizes[tensor_name(part.linear, "lora_A")] = (rank, part.linear.inputs)
        sizes[tensor_name(part.linear, "lora_B")] = (part.linear.outputs, rank)

    def draw(name):
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        return of(scale * torch.randn(sizes[name], generator=generator))

    network.adapters.fill(draw)
