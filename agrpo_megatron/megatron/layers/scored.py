"""The last layer on scored tokens: no head needs what the layer would return at other tokens.

Its attention reads all tokens. The product that follows the attention, the residual stream and the
SwiGLU see the scored tokens only.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from agrpo_megatron.megatron.layers.packed import PackedLayout

# A matrix of fewer rows takes another CPU kernel, which sums in another order: a token's logits
# would depend on how many tokens share its forward pass.
LEAST_ROWS = 4


def filled(places: Tensor, multiple: int) -> Tensor:
    """Append copies of the first token to scored ones [S], for kernels that need more rows.

    Args:
        multiple: of rows; FP8 products take whole blocks.
    """
    most = max(LEAST_ROWS, len(places))
    return F.pad(places, (0, most + -most % multiple - len(places)))


class ScoredTokens:
    """Lets a layer of Megatron return scored tokens only, [S, 1, hidden], if a pass names them.

    A pass names them in `PackedLayout.scored`. Hooks do it, so that the layer, its parameters and
    their names stay those of Megatron in any specification.
    """

    def __init__(self, layer: Any):
        self._places: Tensor | None = None
        self._bda = layer.self_attn_bda
        layer.self_attn_bda = self._make_add
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.self_attention.core_attention.register_forward_hook(_chosen, with_kwargs=True)

    def _begin(self, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Note the tokens of a forward pass; also if the layer is computed again."""
        self._places = inputs["packed_seq_params"].scored

    def _make_add(self, *flags: bool) -> Any:
        """Return Megatron's function that adds the attention to the residual stream."""
        add, places = self._bda(*flags), self._places

        def add_at(output: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output, residual if places is None else residual[places], dropout)

        return add_at


def _chosen(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any], output: Tensor) -> Tensor:
    layout: PackedLayout = inputs["packed_seq_params"]
    return output if layout.scored is None else output[layout.scored]
