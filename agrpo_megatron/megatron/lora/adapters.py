"""The adapters of a network: built, filled by name, merged for rollouts, and saved."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import Tensor, nn

from agrpo_megatron.config.settings import LoraSettings, ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.lora import (
    MATRICES,
    Linear,
    adapted_layers,
    tensor_name,
    trained_whole,
)
from agrpo_megatron.families.transforms import Part, Split, adapter_to_megatron
from agrpo_megatron.megatron.lora.layers import (
    BESIDE,
    MERGED,
    OFF,
    AdaptedLinear,
    LowRank,
    Mode,
    has_token_shares,
)
from agrpo_megatron.megatron.parallel import Ranks

ROOT = "adapters"  # the module of a virtual stage that holds them; a name's dots become slashes

# By Megatron's name of its weight: a linear layer of this rank, and the virtual stage it is in.
Held = Mapping[str, tuple[nn.Module, nn.Module]]


class Adapters:
    """The adapters of a rank's linear layers; the other weights of the rank are frozen."""

    def __init__(self, held: Held, model: ModelSettings, lora: LoraSettings, ranks: Ranks):
        self._mode, self._layers, self._ranks = Mode(), list[AdaptedLinear](), ranks
        self._model = model
        self._merges, self._kept = lora.merge_rollouts, dict[AdaptedLinear, Tensor]()
        wanted = {layer.name: layer for layer in adapted_layers(model, lora)}
        whole, shapes = trained_whole(model, lora), hf_shapes(model)
        for chunk in {chunk for _, chunk in held.values()}:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad = name in whole
        for mapping in weight_mappings(model):
            linears = [wanted.get(name.removesuffix(".weight")) for name in mapping.parts]
            if mapping.megatron in held and any(linears):
                split = ranks.split_of(mapping.expert).size
                sizes = [shapes[name][0] // split for name in mapping.parts]
                self._attach(*held[mapping.megatron], linears, sizes, model, lora)

    def _attach(
        self,
        module: Any,
        chunk: nn.Module,
        linears: list[Linear | None],
        sizes: list[int],
        model: ModelSettings,
        lora: LoraSettings,
    ) -> None:
        """Give a linear layer of Megatron the adapters of the published layers that it holds."""
        assert lora.rank is not None
        weight, parts = module.weight, list[LowRank | None]()
        sizes = [len(weight)] if len(sizes) == 1 else sizes  # the head is padded
        for linear, rows in zip(linears, sizes, strict=True):
            if linear is None:
                parts.append(None)
                continue
            part = LowRank(
                linear,
                rows,
                weight.shape[1],
                rank=lora.rank,
                like=weight,
                is_sequence_parallel=has_token_shares(linear, self._ranks),
            )
            if not hasattr(chunk, ROOT):
                chunk.add_module(ROOT, nn.ModuleDict())
            getattr(chunk, ROOT)[linear.name.replace(".", "/")] = part
            parts.append(part)
        common = {"model": model, "lora": lora, "ranks": self._ranks, "mode": self._mode}
        self._layers.append(AdaptedLinear(module, parts, sizes, **common))

    def parts(self) -> Iterator[LowRank]:
        """Yield the adapters of this rank."""
        for layer in self._layers:
            yield from layer.adapters

    def for_updates(self) -> None:
        """Apply the adapters beside the weights, which are as they were loaded, bit for bit."""
        self._use(BESIDE)

    def for_rollouts(self) -> None:
        """Apply the adapters as `lora.merge_rollouts` has it."""
        self._use(MERGED if self._merges else BESIDE)

    def switch_off(self) -> None:
        """Leave the adapters out: the network is the frozen model."""
        self._use(OFF)

    @torch.no_grad()
    def _use(self, mode: str) -> None:
        for layer, kept in self._kept.items():
            if mode != MERGED:
                layer.weight.copy_(kept)
        if mode != MERGED:
            self._kept.clear()
        elif not self._kept:
            for layer in self._layers:
                self._kept[layer] = layer.weight.detach().clone()
                layer.weight.copy_(layer.merged())
        self._mode.name = mode

    @torch.no_grad()
    def fill(self, read: Callable[[str], Part]) -> None:
        """Fill this rank's part of every adapter from whole tensors, by PEFT's names.

        Args:
            read: returns for instance `model.layers.0.mlp.up_proj.lora_A.weight`, [rank, inputs];
                `lora_B` is [outputs, rank].
        """
        self.for_updates()  # merged weights would keep the old ones
        for part in self.parts():
            axis = self._ranks.split_of(part.linear.mapping.expert)
            split = Split(axis.rank, axis.size)
            for name in MATRICES:
                matrix, whole = getattr(part, name), read(tensor_name(part.linear, name))
                whole = adapter_to_megatron(whole, name, part.linear.mapping.transform, self._model)
                matrix.copy_(_share(matrix, whole, split))

    def initialise(self, seed: int) -> None:
        """Draw new adapters by name, so they are the same at any layout; their product is zero.

        A is uniform between +-1 / sqrt(inputs), and B zero. Source: PEFT's `reset_lora_parameters`.
        """
        shapes = {
            tensor_name(part.linear, name): (part.linear, getattr(part, name))
            for part in self.parts()
            for name in MATRICES
        }

        def _draw(name: str) -> Tensor:
            linear, matrix = shapes[name]
            if name.endswith("lora_B.weight"):
                return torch.zeros(linear.outputs, matrix.shape[1])
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            drawn = torch.rand(len(matrix), linear.inputs, generator=generator)
            return (2 * drawn - 1) / linear.inputs**0.5

        self.fill(_draw)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Return the adapters as Megatron saves them, by parameter of their virtual stage."""
        groups, state = self._ranks.groups, {}
        for part in self.parts():
            place = f"{ROOT}.{part.linear.name.replace('.', '/')}"
            common = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
            if part.linear.is_expert:
                common = {"tp_group": groups.expt_tp, "dp_cp_group": groups.expt_dp}
            for name in MATRICES:
                matrix, key = getattr(part, name), f"{ROOT}.{tensor_name(part.linear, name)}"
                if matrix.tensor_model_parallel:
                    state[f"{place}.{name}"] = make_tp_sharded_tensor_for_checkpoint(
                        matrix,
                        key,
                        tp_axis=matrix.partition_dim,
                        allow_shape_mismatch=part.linear.is_head,
                        **common,
                    )
                else:
                    state[f"{place}.{name}"] = make_sharded_tensor_for_checkpoint(
                        matrix, key, **common
                    )
        return state


def _share(matrix: Any, whole: Part, split: Split) -> Tensor:
    """Return this rank's part of a whole matrix; rows beyond the vocabulary are zero."""
    if not matrix.tensor_model_parallel:
        return whole[:]
    if matrix.partition_dim == 1:
        return whole[:, split.of(whole.shape[1])]
    start = split.rank * len(matrix)
    rows = whole[min(start, whole.shape[0]) : min(start + len(matrix), whole.shape[0])]
    return torch.cat([rows, rows.new_zeros(len(matrix) - len(rows), rows.shape[1])])
