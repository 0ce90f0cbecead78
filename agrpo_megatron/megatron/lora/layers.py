"""A low-rank adapter on a linear layer of Megatron, split as the layer is.

The layer computes y = x W^T, and the adapter adds scale * x A^T B^T. Where the layer's outputs are
split over tensor-parallel ranks (query, key, value, gate, up, head), B is split by rows and A is
whole; where its inputs are split (attention's output, down), A is split by columns and B is whole.
So ranks exchange r numbers per token, and no gradient needs more than that of a norm does: with
sequence parallelism the whole matrix has seen some tokens only, and Megatron sums its gradient.
The ranks that split an expert all have its tokens, and Megatron sums its outputs and the gradients
of its inputs: they exchange the gradient of the whole matrix alone.
Source: LoRA (arXiv 2106.09685), equation 3; rsLoRA (arXiv 2312.03732).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from agrpo_megatron.config.settings import LoraSettings, ModelSettings
from agrpo_megatron.families.lora import Linear
from agrpo_megatron.megatron.parallel import Ranks

BESIDE, MERGED, OFF = "beside", "merged", "off"


@dataclass
class Mode:
    """What the adapters of a network do: one of the three above; shared by all of them."""

    name: str = BESIDE


class LowRank(nn.Module):
    """This rank's part of a published layer's two matrices.

    Args:
        rows, columns: outputs and inputs of the layer that this rank has.
        like: the layer's weight, which gives dtype and device.
        is_sequence_parallel: whether the layer's inputs or outputs are split by tokens.
    """

    def __init__(
        self,
        linear: Linear,
        rows: int,
        columns: int,
        *,
        rank: int,
        like: Tensor,
        is_sequence_parallel: bool,
    ):
        super().__init__()
        self.linear, kind = linear, {"dtype": like.dtype, "device": like.device}
        self.lora_A = nn.Parameter(torch.empty(rank, columns, **kind))
        self.lora_B = nn.Parameter(torch.empty(rows, rank, **kind))
        split, whole, dim = self.lora_B, self.lora_A, 0
        if linear.is_split_by_inputs:
            split, whole, dim = self.lora_A, self.lora_B, 1
        set_tensor_model_parallel_attributes(split, is_parallel=True, dim=dim, stride=1)
        set_tensor_model_parallel_attributes(whole, is_parallel=False, dim=-1, stride=1)
        whole.sequence_parallel = is_sequence_parallel  # type: ignore[attr-defined]
        for matrix in (split, whole):  # data parallelism of experts has groups of its own
            matrix.allreduce = getattr(like, "allreduce", True)  # type: ignore[attr-defined]


def has_token_shares(linear: Linear, ranks: Ranks) -> bool:
    """Whether sequence parallelism splits a layer's inputs or outputs by tokens."""
    return ranks.parallel.sequence and not linear.is_head and not linear.is_expert


class AdaptedLinear:
    """A linear layer of Megatron with the adapters of the published layers that it holds.

    Args:
        parts: the adapters, in the order of the mapping; None where a published layer has none.
        sizes: outputs that each published layer has on this rank.
    """

    def __init__(
        self,
        layer: Any,
        parts: Sequence[LowRank | None],
        sizes: Sequence[int],
        *,
        model: ModelSettings,
        lora: LoraSettings,
        ranks: Ranks,
        mode: Mode,
    ):
        self.layer, self.parts, self.sizes = layer, parts, sizes
        self.adapters = [part for part in parts if part is not None]
        self.scale, self.dropout, self.mode = lora.scale, lora.dropout, mode
        linear = self.adapters[0].linear
        self.transform, self.by_inputs = linear.mapping.transform, linear.is_split_by_inputs
        self.is_expert = linear.is_expert
        self.is_sequence = has_token_shares(linear, ranks)
        self.group = ranks.split_of(linear.mapping.expert).group
        # Whether the inputs differ over tensor-parallel ranks, of which each expert may have one.
        differs = self.by_inputs or self.is_sequence or self.group.size() < ranks.tensor.size
        self.drops_own = differs and ranks.tensor.size > 1
        self.query_groups = (
            model.num_query_groups or model.num_attention_heads
        ) // self.group.size()
        # Transformer Engine fuses the norm into the layer; it then also returns the normed input.
        self.is_fused = hasattr(layer, "return_layernorm_output")
        if self.is_fused:
            layer.return_layernorm_output = True
        layer.adapted = self
        layer.register_forward_hook(self._add)

    @property
    def is_beside(self) -> bool:
        """Whether a forward adds the adapters to the layer's output."""
        return self.mode.name == BESIDE

    @property
    def weight(self) -> Tensor:
        """Return the layer's own weight, this rank's part."""
        return self.layer.weight

    def _add(self, layer: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> Any:
        """Add the adapters to the layer's output; its forward hook."""
        result, bias = output
        x = inputs[0]
        if self.is_fused:
            result, x = result
        if not self.is_beside:
            return result, bias
        if self.dropout and layer.training:
            x = self._dropped(x)
        return result + self._product(x), bias

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop inputs; ranks that hold different ones drop them by noise of their own."""
        if not self.drops_own:
            return F.dropout(x, self.dropout)
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork():
            return F.dropout(x, self.dropout)

    def _product(self, x: Tensor) -> Tensor:
        """Return the adapters' part of the output: [T, 1, outputs of this rank].

        Of an expert it is [T, outputs].
        """
        first = torch.cat([part.lora_A for part in self.adapters])
        if self.is_expert and not self.by_inputs:
            first = copy_to_tensor_model_parallel_region(first, group=self.group)
        inner = F.linear(x, first) * self.scale
        if self.is_expert and self.by_inputs:
            last = copy_to_tensor_model_parallel_region(self.adapters[0].lora_B, group=self.group)
            return F.linear(inner, last)
        if self.by_inputs:
            reduce = reduce_from_tensor_model_parallel_region
            if self.is_sequence:
                reduce = reduce_scatter_to_sequence_parallel_region
            return F.linear(reduce(inner, group=self.group), self.adapters[0].lora_B)
        if self.is_sequence:
            inner = gather_from_sequence_parallel_region(inner, group=self.group)
        elif not self.is_expert:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.group)
        pieces = iter(inner.chunk(len(self.adapters), -1))
        return self._joined(
            [
                inner.new_zeros(*inner.shape[:-1], size)
                if part is None
                else F.linear(next(pieces), part.lora_B)
                for part, size in zip(self.parts, self.sizes, strict=True)
            ]
        )

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Lay the outputs [..., rows] of published layers out as Megatron's layer has them."""
        if self.transform != "qkv":
            return torch.cat(parts, -1)
        grouped = [part.unflatten(-1, (self.query_groups, -1)) for part in parts]
        return torch.cat(grouped, -1).flatten(-2)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return this rank's weight with the adapters' product added, in the weight's dtype."""
        columns = self.adapters[0].lora_A.shape[1]
        products = [
            self.weight.new_zeros(columns, size, dtype=torch.float32)
            if part is None
            else self.scale * (part.lora_B.float() @ part.lora_A.float()).T
            for part, size in zip(self.parts, self.sizes, strict=True)
        ]
        return (self.weight.float() + self._joined(products).T).to(self.weight.dtype)
