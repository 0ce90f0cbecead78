"""The `local` layer spec: Megatron's transformer layer with our norm and packed attention."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence record, with what our attention needs computed once a forward."""

    runs: list[tuple[int, int]] = field(default_factory=list)  # (rows, length) of equal neighbours
    cosines: Tensor | None = None  # [T, 1, head_dim] float32
    sines: Tensor | None = None  # [T, 1, head_dim] float32


def packed_layout(cu_seqlens: Tensor, *, head_dim: int, rope_theta: float) -> PackedLayout:
    """Describe packed rows: positions restart at every row, and rotate by `rope_theta`.

    Args:
        cu_seqlens: [rows + 1] int32 row boundaries.
    """
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1].repeat_interleave(lengths)
    positions = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device) - starts
    exponents = torch.arange(0, head_dim, 2, device=cu_seqlens.device).float() / head_dim
    angles = positions[:, None].float() * (1.0 / rope_theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    runs: list[tuple[int, int]] = []
    for length in lengths.tolist():
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    longest = max((length for _, length in runs), default=0)
    return PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=runs,
        cosines=angles.cos(),
        sines=angles.sin(),
    )


class PackedAttention(MegatronModule):
    """Bidirectional attention within each packed row, through torch SDPA.

    Neighbouring rows of equal length are one batched call. Queries and keys are rotated here,
    all rows at once, in float32 as LLaDA does (`rope_full_precision`).
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

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
        grouped = query.shape[1] != key.shape[1]
        outputs, start = [], 0
        for rows, length in layout.runs:
            end = start + rows * length
            q, k, v = (
                x[start:end].view(rows, length, x.shape[1], x.shape[2]).transpose(1, 2)
                for x in (query, key, value)
            )
            out = F.scaled_dot_product_attention(
                q, k, v, scale=self.softmax_scale, enable_gqa=grouped
            )
            outputs.append(out.transpose(1, 2).reshape(rows * length, -1))
            start = end
        return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


class RMSNorm(nn.Module):
    """Root-mean-square norm that also runs under sequence parallelism.

    The statistic is float32 and cast back before the weight multiplies, as LLaDA's. The weight
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


def local_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Return the layers of the `local` spec: Megatron's, bidirectional, on packed rows."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.no_mask}
    attention.submodules.core_attention = PackedAttention
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention.submodules.q_layernorm = norm
    attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)


def _rotate(x: Tensor, layout: PackedLayout) -> Tensor:
    """Rotate the two halves of each head, [T, heads, head_dim]."""
    assert layout.cosines is not None and layout.sines is not None
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * layout.cosines + turned * layout.sines).to(x.dtype)
