"""The `local` layer spec: Megatron's transformer layer with our norm and packed attention."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from agrpo_megatron.megatron.layers.attention import PackedAttention


class RMSNorm(nn.Module):
    """Root-mean-square norm that also runs under sequence parallelism.

    The statistic is float32 and cast back before the weight multiplies, as in LLaDA. The weight
    is marked so that Megatron sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def local_spec(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """Return `layers` of the `local` spec: Megatron's, bidirectional, on packed rows."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.no_mask}
    attention.submodules.core_attention = PackedAttention
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
