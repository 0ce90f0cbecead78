"""The weights of a folder as a run starts from them: more rows, or a head of its own.

A run of masked diffusion needs a mask token. Where no row of the embedding is free, the vocabulary
grows: each added row of the embedding, and of the head, is the mean of the rows that are there, so
that its logit and its state are those of an average token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.tensors import EMBEDDING_WEIGHT, HEAD_WEIGHT
from agrpo_megatron.families.transforms import Part

BLOCK = 1 << 14  # rows that are read at a time


class GrownRows:
    """A tensor with added rows, each the mean of those that are there; slices of rows are read."""

    def __init__(self, part: Part, rows: int):
        self._part, self._mean = part, None
        self.shape: Sequence[int] = (rows, *part.shape[1:])

    def __getitem__(self, index: slice) -> Tensor:
        """Return some rows."""
        start, stop, _ = index.indices(self.shape[0])
        own = self._part.shape[0]
        found = self._part[min(start, own) : min(stop, own)]
        added = stop - max(start, own)
        if added <= 0:
            return found
        mean = self._mean_row().to(found.dtype)
        return torch.cat([found, mean.expand(added, *self.shape[1:])])

    def _mean_row(self) -> Tensor:
        if self._mean is None:
            rows = self._part.shape[0]
            blocks = (self._part[at : min(at + BLOCK, rows)] for at in range(0, rows, BLOCK))
            self._mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / rows
        return self._mean


def started_part(
    read: Callable[[str], Part], stored: ModelSettings, model: ModelSettings
) -> Callable[[str], Part]:
    """Return what reads the tensors of a run's model from those of a folder.

    Args:
        read: reads a tensor of the folder, by its Hugging Face name.
        stored: the folder's model.
        model: the run's: the same, or with more rows, or with a head in place of a tied one.
    """
    if stored.vocab_size == model.vocab_size and stored.tie_embeddings == model.tie_embeddings:
        return read
    names = {mapping.megatron: mapping.parts[0] for mapping in weight_mappings(model)}
    embedding, head = names[EMBEDDING_WEIGHT], names.get(HEAD_WEIGHT)
    shapes = hf_shapes(model)

    def part(name: str) -> Part:
        """Return a tensor of the run's model."""
        is_copied = name == head and stored.tie_embeddings
        found = read(embedding if is_copied else name)
        rows = shapes[name][0]
        grows = name in (embedding, head) and found.shape[0] < rows
        return GrownRows(found, rows) if grows else found

    return part
