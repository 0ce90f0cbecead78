"""Keys and values of rows in flight: of finished blocks, or of an open block's first step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings, Settings
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.scaling.memory import row_bytes


class KeyValueStore:
    """A slot for each row in flight, in every layer of this rank; memory is taken at first use.

    Args:
        slots: rows that it holds.
        length: tokens of a slot.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self._layers: dict[int, Tensor] = {}  # [2, slots, groups, length, head_dim] by layer

    def copy(self, layer: int, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy the first tokens of slots to others: (from, to, tokens) each."""
        for source, target, count in copies:
            stored = self._layers[layer]
            stored[:, target, :, :count] = stored[:, source, :, :count]

    def read(self, layer: int, slots: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of slots, [rows, groups, end - first, head_dim] each."""
        keys, values = self._layers[layer][:, slots, :, first:end]
        return keys, values

    def write(self, layer: int, slots: Tensor, first: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [rows, groups, tokens, head_dim] from token `first` on."""
        if layer not in self._layers:
            shape = (2, self.slots, keys.shape[1], self.length, keys.shape[3])
            self._layers[layer] = torch.empty(shape, dtype=keys.dtype, device=keys.device)
        stored, end = self._layers[layer], first + keys.shape[2]
        stored[0, slots, :, first:end] = keys
        stored[1, slots, :, first:end] = values


def make_store(
    settings: Settings, ranks: Ranks, prompts: Sequence[Tensor], *, sampling: SamplingSettings
) -> KeyValueStore | None:
    """Return an empty cache for a rollout, the same on all ranks; None: nothing is cached.

    Raises:
        ValueError: `rollout.cache_memory` does not hold a row.
    """
    if not prompts or not settings.caches_keys(sampling):
        return None
    length = max(len(prompt) for prompt in prompts) + sampling.completion_length
    each = row_bytes(settings, ranks.parallel, length)
    rows = int(settings.rollout.cache_memory * 2**30) // each
    if rows == 0:
        raise ValueError(
            f"rollout.cache_memory={settings.rollout.cache_memory:g} GiB holds no row: one of "
            f"{length} tokens needs {each / 2**30:.3g}; raise it, or use rollout.cached=false"
        )
    return KeyValueStore(min(rows, len(prompts)), length)
