"""The last layer on scored tokens: no head needs what the layer would return at other tokens.

Its attention reads the keys and values of all tokens. The queries, the product that follows the
attention, the residual stream and the SwiGLU are those of the scored tokens only.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from agrpo_megatron.megatron.layers.attention import PackedAttention
from agrpo_megatron.megatron.layers.packed import PackedLayout, Queries

# A matrix of fewer rows takes another CPU kernel, which sums in another order: a token's logits
# would depend on how many tokens share its forward pass.
LEAST_ROWS = 4
# A CPU attends with blocks of queries. One of 1 to 3 takes another kernel, which sums in another
# order: a token's logits would depend on how many tokens of its row are scored.
QUERY_MULTIPLE = 4


def filled(places: Tensor, multiple: int) -> Tensor:
    """Append copies of the first token to scored ones [S], for kernels that need more rows.

    Args:
        multiple: of rows; FP8 products take whole blocks.
    """
    most = max(LEAST_ROWS, len(places))
    return F.pad(places, (0, most + -most % multiple - len(places)))


def queries_of(layout: PackedLayout, places: Tensor) -> Queries | None:
    """Lay the scored tokens `layout.scored`, of which `places` [S] are the first, out as queries.

    Returns None where all tokens are queries: in rows with patterns or cached tokens, and on a GPU,
    where the host would have to wait for the number of queries of each row.
    """
    assert layout.scored is not None and layout.cu_seqlens_q is not None
    if places.device.type != "cpu" or layout.places is not None:
        return None
    bounds = layout.cu_seqlens_q.long()
    firsts = torch.searchsorted(places, bounds)  # scored token that each row begins with
    counts = firsts.diff()[bounds.diff() > 0]
    padded = (-(-counts // QUERY_MULTIPLE) * QUERY_MULTIPLE).tolist()
    if not any(padded):
        padded[0] = QUERY_MULTIPLE  # for the copies that `filled` adds
    firsts = firsts[:-1][bounds.diff() > 0]
    runs, grids, order, start, row = [], [], torch.zeros_like(layout.scored), 0, 0
    for run in layout.runs:
        end = row + run.rows
        while row < end:
            same = next((n for n in range(row, end) if padded[n] != padded[row]), end)
            if padded[row]:
                offset = run.start + (row - end + run.rows) * run.keys
                column = torch.arange(padded[row])
                is_query = column < counts[row:same, None]
                grid = torch.where(is_query, firsts[row:same, None] + column, 0)
                order[grid[is_query]] = start + is_query.flatten().nonzero().flatten()
                runs.append(replace(run, rows=same - row, queries=padded[row], start=offset))
                grids.append(grid)
                start += grid.numel()
            row = same
    return Queries(runs, grids, order)


class ScoredTokens:
    """Lets a layer of Megatron return scored tokens only, [S, 1, hidden], if a pass names them.

    A pass names them in `PackedLayout.scored`, and lays them out as queries in
    `PackedLayout.queries` if the layer's attention can take those only. Hooks do it, so that the
    layer, its parameters and their names stay those of Megatron in any specification.
    """

    def __init__(self, layer: Any):
        self._layout: PackedLayout | None = None
        self._bda, self._attention = layer.self_attn_bda, layer.self_attention
        self._project = self._attention.get_query_key_value_tensors
        core = self._attention.core_attention
        # Transformer Engine's product has the norm before it inside.
        has_norm = hasattr(self._attention.linear_qkv, "layer_norm_weight")
        self.takes_queries = isinstance(core, PackedAttention) and not has_norm
        layer.self_attn_bda = self._make_add
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        if self.takes_queries:
            core.takes_scored = True
            self._attention.get_query_key_value_tensors = self._projected
        core.register_forward_hook(_chosen, with_kwargs=True)
        layer.register_forward_hook(self._end)

    def _begin(self, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Note the tokens of a forward pass; also if the layer is computed again."""
        self._layout = inputs["packed_seq_params"]

    def _end(self, *_: Any) -> None:
        """Forget the tokens, whose tables would stay in memory."""
        self._layout = None

    def _make_add(self, *flags: bool) -> Any:
        """Return Megatron's function that adds the attention to the residual stream."""
        assert self._layout is not None
        add, places = self._bda(*flags), self._layout.scored

        def add_at(output: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output, residual if places is None else residual[places], dropout)

        return add_at

    def _projected(self, hidden: Tensor, *others: Any, **flags: Any) -> Any:
        """Return Megatron's queries, keys and values; queries of scored tokens if laid out."""
        assert self._layout is not None
        places, attention = self._layout.scored, self._attention
        if places is None or self._layout.queries is None:
            return self._project(hidden, *others, **flags)
        adapted = getattr(attention.linear_qkv, "adapted", None)
        if adapted is not None and adapted.is_beside:
            query, key, value = self._project(hidden, *others, **flags)
            return query[places], key, value
        hidden = copy_to_tensor_model_parallel_region(hidden, group=attention.linear_qkv.tp_group)
        weight, bias = attention.linear_qkv.weight, attention.linear_qkv.bias
        # Megatron's rows: of each group its queries, its key, its value.
        split = (attention.num_query_groups_per_partition, -1)
        split += (attention.hidden_size_per_attention_head,)
        weight = weight.unflatten(0, split)
        bias = None if bias is None else bias.unflatten(0, split)
        query = _product(hidden[places], weight, bias, slice(None, -2)).flatten(2, 3)
        key, value = _product(hidden, weight, bias, slice(-2, None)).unbind(3)
        if attention.q_layernorm is not None:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        return query, key, value


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, heads: slice) -> Tensor:
    """Return the outputs [T, 1, groups, heads, head_dim] of some heads of each group.

    Args:
        weight: [groups, all heads, head_dim, hidden]; the bias is [groups, all heads, head_dim].
    """
    rows = weight[:, heads]
    own = None if bias is None else bias[:, heads].flatten()
    return F.linear(hidden, rows.flatten(0, 2), own).unflatten(-1, rows.shape[:3])


def _chosen(_: Any, __: tuple[Any, ...], inputs: dict[str, Any], output: Tensor) -> Tensor:
    """Choose the scored tokens of an attention whose queries are all tokens."""
    layout: PackedLayout = inputs["packed_seq_params"]
    return output if layout.scored is None or layout.queries is not None else output[layout.scored]
