"""Random weights by tensor name: the same under any layout."""

import zlib

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings


class RandomWeights:
    """Draws the tensors of a model, by their Hugging Face names.

    Norms are 1, biases 0, everything else is normal with `model.init_std`; projections back into
    the residual stream are scaled by 1 / sqrt(2 * num_layers), as Megatron does.
    """

    def __init__(self, model: ModelSettings, seed: int):
        self._model, self._seed, self._shapes = model, seed, hf_shapes(model)
        mappings = weight_mappings(model)
        self._into_residual = {n for m in mappings if m.transform == "row" for n in m.parts}

    def part(self, name: str) -> Tensor:
        """Return a whole tensor, float32."""
        shape, std = self._shapes[name], self._model.init_std
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if name in self._into_residual:
            std /= (2 * self._model.num_layers) ** 0.5
        return torch.randn(shape, generator=generator) * std
