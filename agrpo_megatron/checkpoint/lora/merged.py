"""The weights of a checkpoint of adapters, with their product added to the base."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from agrpo_megatron.checkpoint.model_files import read_model
from agrpo_megatron.checkpoint.torch_dist import BLOCK, TorchDist, checkpoint_place
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.families import hf_shapes
from agrpo_megatron.families.files import Stored
from agrpo_megatron.families.lora import adapted_layers, trained_whole
from agrpo_megatron.families.transforms import Part, adapter_from_megatron
from agrpo_megatron.runs.progress import RUN_FILE

ADAPTERS = "adapters."  # before the names of their tensors, which are PEFT's


class Source(Protocol):
    """Whole tensors by their Hugging Face names."""

    def part(self, name: str) -> Part:
        """Return a tensor, or a lazy one."""
        ...


class AdapterTensors:
    """The tensors of a checkpoint of adapters, by PEFT's names within the model."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, read_model(folder)
        self.lora = load(Settings, folder / RUN_FILE).lora
        self.layers = adapted_layers(self.model, self.lora)
        self._by_name = {layer.name: layer for layer in self.layers}
        self._checkpoint = TorchDist(folder)

    def part(self, name: str) -> Tensor:
        """Return for instance `model.layers.0.mlp.up_proj.lora_A.weight`, [rank, inputs].

        A tensor that was trained whole has its Hugging Face name.
        """
        if name in self.whole:
            return self.whole[name]
        found = self._checkpoint.read(f"{ADAPTERS}{name}")
        owner, _, matrix = name.removesuffix(".weight").rpartition(".")
        layer = self._by_name[owner]
        found = found[: layer.outputs] if matrix == "lora_B" else found
        return adapter_from_megatron(found, matrix, layer.mapping.transform, self.model)

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """Return the tensors that were trained whole, by their Hugging Face names."""
        shapes = hf_shapes(self.model)
        return {
            name: self._checkpoint.read(checkpoint_place(megatron, self.model).key)[
                : shapes[name][0]
            ]
            for megatron, name in trained_whole(self.model, self.lora).items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of all adapters, which is that of the run."""
        stored = self._checkpoint.tensor(f"{ADAPTERS}{self.layers[0].name}.lora_A.weight")
        return stored.properties.dtype


class MergedWeights:
    """A model with its adapters merged, under its Hugging Face names.

    A weight has the dtype of its adapter, which is that of the run; so have all others.

    Args:
        dtype: of all tensors; None: the run's.
    """

    def __init__(self, folder: Path, base: Source, dtype: torch.dtype | None = None):
        self.folder, self._base, self._adapters = folder, base, AdapterTensors(folder)
        self.model, self._whole = self._adapters.model, self._adapters.whole
        layers = self._adapters.layers
        self._layers = {f"{layer.name}.weight": layer for layer in layers}
        kind = dtype or self._adapters.dtype
        shapes = hf_shapes(self.model)
        self.tensors = {name: Stored(folder, kind, shape) for name, shape in shapes.items()}

    def part(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return torch.cat(list(self.blocks(name)))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in blocks of rows."""
        stored, layer = self.tensors[name], self._layers.get(name)
        rows = max(1, BLOCK * stored.shape[0] // max(1, stored.nbytes))
        source = self._whole[name] if name in self._whole else self._base.part(name)
        pair = None
        if layer is not None:
            a, b = (self._adapters.part(f"{layer.name}.lora_{m}.weight").float() for m in "AB")
            pair = self._adapters.lora.scale * b, a
        for start in range(0, stored.shape[0], rows):
            block = source[start : start + rows]
            if pair is not None:
                block = block.float() + pair[0][start : start + rows] @ pair[1]
            yield block.to(stored.dtype)
