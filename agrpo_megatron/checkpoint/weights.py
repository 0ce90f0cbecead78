"""The tensors of a Megatron checkpoint under their Hugging Face names."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from agrpo_megatron.checkpoint.integrity import verify
from agrpo_megatron.checkpoint.lora.base import verify_base
from agrpo_megatron.checkpoint.lora.merged import MergedWeights
from agrpo_megatron.checkpoint.model_files import read_model
from agrpo_megatron.checkpoint.torch_dist import METADATA, TorchDist, checkpoint_place
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, settings_from_hf, weight_mappings
from agrpo_megatron.families.files import HfWeights, Stored
from agrpo_megatron.families.random_weights import RandomWeights
from agrpo_megatron.families.tensors import WeightMapping, megatron_shape
from agrpo_megatron.families.transforms import from_megatron
from agrpo_megatron.runs.base import read_base
from agrpo_megatron.runs.progress import BASE_FILE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

type Weights = HfWeights | MegatronWeights | MergedWeights


class MegatronWeights:
    """The tensors of a Megatron checkpoint, saved at any layout, under their Hugging Face names.

    Args:
        dtype: `fp32`, `bf16` or `fp16`; None keeps each tensor's own.

    Raises:
        ValueError: the checkpoint lacks a tensor, or has one of another shape or unknown.
    """

    def __init__(self, folder: Path, dtype: str | None = None):
        self.folder, self.model = folder, read_model(folder)
        self._checkpoint = TorchDist(folder)
        self._mappings: dict[str, tuple[WeightMapping, int]] = {}  # and the number of the part
        self.tensors: dict[str, Stored] = {}
        shapes = hf_shapes(self.model)
        for mapping in weight_mappings(self.model):
            stored = self._check(mapping, megatron_shape(mapping, shapes))
            chosen = DTYPES[dtype] if dtype else stored
            for number, name in enumerate(mapping.parts):
                self._mappings[name] = mapping, number
                self.tensors[name] = Stored(folder, chosen, shapes[name])
        self._refuse_unknown()
        # One layer's projections, as their parts are read one by one.
        self._fused = lru_cache(maxsize=2)(self._read_fused)

    def part(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return torch.cat(list(self.blocks(name)))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in blocks of rows; the padding of the vocabulary is left out."""
        (mapping, number), stored = self._mappings[name], self.tensors[name]
        if len(mapping.parts) > 1:
            yield self._fused(mapping)[number].to(stored.dtype)
            return
        place, rows = checkpoint_place(mapping.megatron, self.model), stored.shape[0]
        for block in self._checkpoint.row_blocks(place.key, place.index):
            if block.start < rows:
                part = slice(block.start, min(block.stop, rows))
                read = self._checkpoint.read(place.key, place.index, rows=part)
                yield read.to(stored.dtype)

    def _read_fused(self, mapping: WeightMapping) -> list[Tensor]:
        place = checkpoint_place(mapping.megatron, self.model)
        whole = self._checkpoint.read(place.key, place.index)
        return from_megatron([whole], mapping.transform, self.model)

    def _check(self, mapping: WeightMapping, shape: tuple[int, ...]) -> torch.dtype:
        place = checkpoint_place(mapping.megatron, self.model)
        stored, whole = self._checkpoint.tensor(place.key), (*place.counts, *shape)
        found = tuple(stored.size)
        padded = mapping.transform == "vocab" and found[0] >= whole[0] and found[1:] == whole[1:]
        if found != whole and not padded:
            raise ValueError(
                f"{self.folder}: tensor {place.key} has shape {list(found)}, and model.yaml asks "
                f"for {list(whole)}"
            )
        return stored.properties.dtype

    def _refuse_unknown(self) -> None:
        mappings = (mapping for mapping, _ in self._mappings.values())
        known = {checkpoint_place(mapping.megatron, self.model).key for mapping in mappings}
        for key in self._checkpoint.tensors():
            if key not in known and not key.startswith("optimizer."):
                raise ValueError(
                    f"{self.folder}: tensor {key} would be lost: the {self.model.family} family "
                    "has no such tensor"
                )


def is_megatron(path: Path) -> bool:
    """Return whether a directory is a Megatron checkpoint."""
    return (path / METADATA).is_file()


def open_weights(path: Path) -> tuple[ModelSettings, Weights]:
    """Open a Hugging Face directory or a Megatron checkpoint.

    Raises:
        ValueError: it is neither, damaged, or not of a known family.
    """
    if is_megatron(path):
        weights = open_checkpoint(path)
        return weights.model, weights
    model = settings_from_hf(path)
    return model, HfWeights(path, model)


def open_checkpoint(
    path: Path, *, dtype: str | None = None, base: Path | None = None
) -> MegatronWeights | MergedWeights:
    """Open a Megatron checkpoint; adapters are merged into their base.

    Args:
        dtype: `fp32`, `bf16` or `fp16`; None keeps each tensor's own.
        base: where the base of adapters is now; None: where it was.

    Raises:
        ValueError: a checkpoint is damaged, or the base is another one.
    """
    verify(path)
    if not (path / BASE_FILE).exists():
        return MegatronWeights(path, dtype)
    place, model = base or read_base(path).load, read_model(path)
    if place is None:
        weights = RandomWeights(model, read_base(path).seed)
    else:
        verify_base(path, Path(place))
        _, weights = open_weights(Path(place))
    return MergedWeights(path, weights, DTYPES[dtype] if dtype else None)
