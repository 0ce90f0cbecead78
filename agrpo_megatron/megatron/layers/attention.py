"""Attention of packed rows by torch: SDPA run by run, or FlexAttention for all rows at once."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from agrpo_megatron.diffusion.patterns import part_mask, span_keys, span_mask, span_slice
from agrpo_megatron.megatron.layers.context import gather_keys
from agrpo_megatron.megatron.layers.flex import attend
from agrpo_megatron.megatron.layers.packed import PackedLayout, Run
from agrpo_megatron.megatron.layers.rotary import scaled
from agrpo_megatron.types import KeyStore, Row


class PackedAttention(MegatronModule):
    """Attention within each packed row, by its pattern.

    Through SDPA, neighbouring rows of equal length and pattern are one batched call. Queries and
    keys are rotated here, all rows at once, in float32 as LLaDA does (`rope_full_precision`). Under
    context parallelism keys and values are gathered for rows that cross from one rank's part into
    the next. With `takes_scored`, the queries are those of scored tokens if `PackedLayout.queries`
    lays them out.
    """

    takes_scored = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
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
        queries = layout.queries if self.takes_scored else None
        query = _rotated_queries(query, layout, None if queries is None else layout.scored)
        key = _rotate(key, layout)
        if layout.keys is not None:
            key, value = gather_keys(key, value, layout.keys, group=self.context_group)
        if layout.block_mask is not None:
            return attend(query, key, value, layout.block_mask, scale=self.softmax_scale)
        outputs, start, cached = [], 0, layout.cached
        if cached is not None:
            cached.store.copy(self.layer_number, cached.copies)
        for number, run in enumerate(layout.runs if queries is None else queries.runs):
            end = start + run.rows * run.queries
            keys = slice(run.start, run.start + run.rows * run.keys)
            own = query[start:end] if queries is None else query[queries.grids[number].flatten()]
            parts = [_by_row(x, run.rows) for x in (own, key[keys], value[keys])]
            if cached is not None and run.slots:
                out = self._attend_cached(*parts, run, cached.store, layout.slots[number])
            else:
                out = self._attend(*parts, run.pattern)
            outputs.append(out.transpose(1, 2).reshape(len(own), -1))
            start = end
        mixed = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
        return mixed if queries is None else mixed[queries.order]

    def _attend_cached(
        self, query: Tensor, key: Tensor, value: Tensor, run: Run, store: KeyStore, slots: Tensor
    ) -> Tensor:
        """Attend from some tokens of rows to whole rows, whose other keys are cached."""
        assert run.pattern is not None
        new = [x[:, :, : run.keep] for x in (key, value)]
        end = run.before + run.queries
        if run.before + run.after:
            before = store.read(self.layer_number, slots, 0, run.before)
            after = store.read(self.layer_number, slots, end, end + run.after)
            parts = zip(before, (key, value), after, strict=True)
            key, value = (torch.cat(part, 2) for part in parts)
        if run.keep:
            store.write(self.layer_number, slots, run.before, *new)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=part_mask(run.pattern, slice(run.before, end), query.device),
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pattern: Row | None) -> Tensor:
        """Attend within rows of one pattern, [rows, heads, tokens, head_dim]; a call for each span.

        A copy sees the context and itself, so its calls do not grow with the number of copies.
        """
        outputs = []
        for number in range(1 if pattern is None else len(pattern)):
            if pattern is not None and not pattern[number].length:
                continue  # states of the first block have no text before them
            mask, own, seen = None, query, (key, value)
            if pattern is not None:
                mask = span_mask(pattern, number, query.device)
                own, parts = query[:, :, span_slice(pattern, number)], span_keys(pattern, number)
                seen = [_joined([x[:, :, part] for part in parts]) for x in seen]
            out = F.scaled_dot_product_attention(
                own,
                *seen,
                attn_mask=mask,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(out)
        return _joined(outputs)


def _joined(parts: list[Tensor]) -> Tensor:
    """Join tokens of rows, [rows, heads, tokens, head_dim]."""
    return torch.cat(parts, 2) if len(parts) != 1 else parts[0]


def _by_row(x: Tensor, rows: int) -> Tensor:
    """Turn [rows * length, heads, head_dim] into [rows, heads, length, head_dim]."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def _rotated_queries(query: Tensor, layout: PackedLayout, places: Tensor | None) -> Tensor:
    """Rotate and scale the queries of all tokens [T, heads, head_dim], or of tokens `places`."""
    scale = layout.query_scale
    if scale is not None and places is not None:
        scale = scale[places]
    return scaled(_rotate(query, layout, places), scale)


def _rotate(x: Tensor, layout: PackedLayout, places: Tensor | None = None) -> Tensor:
    """Rotate the two halves of each head's rotated part, [T, heads, head_dim].

    Args:
        places: the tokens of `x`; None: all.
    """
    cosines, sines = layout.cosines, layout.sines
    assert cosines is not None and sines is not None
    if places is not None:
        cosines, sines = cosines[places], sines[places]
    width = cosines.shape[-1]
    wide = x[..., :width].float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = (wide * cosines + turned * sines).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)
