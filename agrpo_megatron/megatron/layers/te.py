"""The `te` layer spec: Megatron's transformer layer of Transformer Engine's fused modules.

The norms are fused into the two column-parallel products after them, so a layer's own names differ
from the local spec's; `Network.named_parameters` yields the local spec's names.
Imported only to build a model with this spec: Transformer Engine is optional.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.attention.rope import FusedRoPEFunc  # type: ignore[reportMissingImports]

from agrpo_megatron.config.settings import MoeSettings
from agrpo_megatron.megatron.layers.attention import PackedAttention
from agrpo_megatron.megatron.layers.context import gather_keys
from agrpo_megatron.megatron.layers.local import use_router
from agrpo_megatron.megatron.layers.packed import PackedLayout
from agrpo_megatron.megatron.layers.rotary import scaled


class TeAttention(TEDotProductAttention):
    """Bidirectional fused attention within each packed row.

    One kernel rotates queries and keys in float32, from an angle for each token: rows may begin
    anywhere, also within the part of another context-parallel rank. Keys and values are gathered
    for rows that cross parts, as in the local spec; Transformer Engine's own context parallelism
    needs every row split over all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ):
        whole = replace(config, context_parallel_size=1)
        super().__init__(whole, *args, pg_collection=pg_collection, **kwargs)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        *,
        packed_seq_params: PackedLayout,
        **_: object,
    ) -> Tensor:
        """Attend within rows: [T, heads, head_dim], keys and values [T, groups, head_dim]."""
        layout = packed_seq_params
        query = scaled(_rotate(query, layout), layout.query_scale)
        key = _rotate(key, layout)
        if layout.keys is not None:
            key, value = gather_keys(key, value, layout.keys, group=self.context_group)
        return super().forward(
            query, key, value, None, attn_mask_type, packed_seq_params=packed_seq_params
        )


def te_spec(
    config: TransformerConfig,
    layers: Sequence[MoeSettings | None],
    *,
    has_patterns: bool = False,
    groups_experts: bool = True,
) -> TransformerBlockSubmodules:
    """Return layers of the `te` spec: Megatron's, on packed rows.

    Args:
        layers: for each layer its experts; None: a SwiGLU.
        has_patterns: whether rows have patterns of attention, which Transformer Engine's own
            attention does not know.
        groups_experts: whether the products of experts are grouped; else each expert has linear
            layers of its own, as adapters need.
    """
    core = PackedAttention if has_patterns else TeAttention
    made = {moe: _layer(config, moe, core, groups=groups_experts) for moe in set(layers)}
    return TransformerBlockSubmodules(layer_specs=[made[moe] for moe in layers], layer_norm=TENorm)


def _layer(
    config: TransformerConfig, moe: MoeSettings | None, core: type, *, groups: bool
) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=moe and moe.experts,
        moe_grouped_gemm=groups,
        qk_layernorm=config.qk_layernorm,
        use_te_activation_func=config.use_te_activation_func,
    )
    parts: Any = layer.submodules
    attention = parts.self_attention
    # Megatron passes `no_mask` on as `padding` for packed rows.
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.no_mask}
    attention.submodules.core_attention = core
    if moe is not None:
        use_router(parts, moe)
    return layer


def _rotate(x: Tensor, layout: PackedLayout) -> Tensor:
    """Rotate the two halves of each head, [T, heads, head_dim]."""
    assert layout.angles is not None
    # As one sequence of T positions, with one angle for each.
    rotated = FusedRoPEFunc.apply(x[:, None], layout.angles[:, None])
    assert isinstance(rotated, torch.Tensor)
    return rotated.squeeze(1)
