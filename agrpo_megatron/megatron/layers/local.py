"""The `local` layer spec: Megatron's transformer layer with our norm and packed attention."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from agrpo_megatron.megatron.layers.context import gather_keys
from agrpo_megatron.megatron.layers.packed import PackedLayout


class PackedAttention(MegatronModule):
    """Bidirectional attention within each packed row, through torch SDPA.

    Neighbouring rows of equal length are one batched call. Queries and keys are rotated here,
    all rows at once, in float32 as LLaDA does (`rope_full_precision`). Under context parallelism
    keys and values are gathered for rows that cross from one rank's part into the next.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        assert pg_collection is not None and pg_collection.cp is not None
        self.softmax_scale, self.context_group = softmax_scale, pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedLayout,
        **_: object,
    ) -> Tensor:
        """Attend within rows: [T, heads, head_dim], keys and values [T, groups, head_dim]."""
        layout = packed_seq_params
        query, key = _rotate(query, layout), _rotate(key, layout)
        if layout.keys is not None:
            key, value = gather_keys(key, value, layout.keys, group=self.context_group)
        outputs, start = [], 0
        for run in layout.runs:
            end = start + run.rows * run.queries
            keys = slice(run.start, run.start + run.rows * run.keys)
            out = F.scaled_dot_product_attention(
                _by_row(query[start:end], run.rows),
                _by_row(key[keys], run.rows),
                _by_row(value[keys], run.rows),
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(out.transpose(1, 2).reshape(end - start, -1))
            start = end
        return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


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


def _by_row(x: Tensor, rows: int) -> Tensor:
    """Turn [rows * length, heads, head_dim] into [rows, heads, length, head_dim]."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def _rotate(x: Tensor, layout: PackedLayout) -> Tensor:
    """Rotate the two halves of each head, [T, heads, head_dim]."""
    assert layout.cosines is not None and layout.sines is not None
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * layout.cosines + turned * layout.sines).to(x.dtype)
