"""The `local` layer spec: Megatron's transformer layer with our norm and packed attention."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from agrpo_megatron.config.settings import MoeSettings
from agrpo_megatron.megatron.layers.attention import PackedAttention
from agrpo_megatron.megatron.layers.router import ExpertRouter


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


def local_spec(
    config: TransformerConfig, layers: Sequence[MoeSettings | None]
) -> TransformerBlockSubmodules:
    """Return layers of the `local` spec: Megatron's, bidirectional, on packed rows.

    Args:
        layers: for each layer its experts; None: a SwiGLU.
    """
    made = {moe: _layer(config, moe) for moe in set(layers)}
    return TransformerBlockSubmodules(layer_specs=[made[moe] for moe in layers], layer_norm=RMSNorm)


def _layer(config: TransformerConfig, moe: MoeSettings | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=moe and moe.experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    parts: Any = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.no_mask}
    attention.submodules.core_attention = PackedAttention
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    if moe is not None:
        use_router(parts, moe)
    return layer


def use_router(parts: Any, moe: MoeSettings) -> None:
    """Give a layer of experts our router, and the checkpoint names of any specification."""
    parts.mlp.keywords["submodules"].router = partial(ExpertRouter, moe=moe)
    # Transformer Engine fuses no norm into a layer of experts.
    parts.sharded_state_dict_keys_map = {
        ours: theirs
        for ours, theirs in parts.sharded_state_dict_keys_map.items()
        if not ours.startswith("pre_mlp_layernorm")
    }


def mark_gates(model: nn.Module) -> None:
    """Mark first matrices of grouped experts as gate and up, as those of a loop of experts are.

    Each is split over ranks; resharding to another split reads the mark. Mutates the parameters.
    """
    for name, weight in model.named_parameters():
        if ".experts.linear_fc1.weight" in name:
            weight.partition_stride = 2  # type: ignore[attr-defined]
