"""Adapters of all ranks, as whole tensors by PEFT's names."""

import torch
import torch.distributed as dist

from agrpo_megatron.families.lora import MATRICES, tensor_name


def whole_adapters(network, of=lambda parameter: parameter.detach()):
    """Return what `of` gives of every adapter matrix; called by every rank of a replica."""
    tensor, found = network.ranks.tensor, {}
    for part in network.adapters.parts():
        for name in MATRICES:
            parameter = getattr(part, name)
            value = of(parameter).contiguous()
            if parameter.tensor_model_parallel:
                shards = [torch.empty_like(value) for _ in range(tensor.size)]
                dist.all_gather(shards, value, group=tensor.group)
                value = torch.cat(shards, parameter.partition_dim)
            rows = part.linear.outputs if name == "lora_B" else len(value)
            found[tensor_name(part.linear, name)] = value[:rows]
    stages = [None] * network.ranks.pipeline.size
    dist.all_gather_object(stages, found, group=network.ranks.pipeline.group)
    return {name: value for stage in stages for name, value in stage.items()}


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
