"""Stand-ins for Transformer Engine's fused attention on packed rows (cuDNN's), bidirectional."""

import torch
import transformer_engine.pytorch  # noqa: F401  loads the extension
import transformer_engine_torch as tex
from torch import Tensor

from tests.te.rules import refuse

PACKED = tex.NVTE_QKV_Layout.NVTE_THD_THD_THD
WIDEST_HEAD = 256  # that cuDNN runs forward and backward on Hopper


def get_fused_attn_backend(params):
    """Return cuDNN's attention for supported inputs, and refuse others.

    Transformer Engine itself would fall back to slow attention for them, and only log it.
    """
    for what, holds in _support(params).items():
        refuse(f"fused attention is for {what}", holds)
    return tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def _support(params):
    heads = (params.num_attn_heads, params.num_gqa_groups)
    widths = (params.head_dim_qk, params.head_dim_v)
    return {
        "packed rows (thd)": params.qkv_layout == PACKED,
        "the padding mask": params.attn_mask_type == tex.NVTE_Mask_Type.NVTE_PADDING_MASK,
        "bfloat16": int(params.qkv_dtype) == int(tex.DType.kBFloat16),
        "equal heads for each group": heads[0] % heads[1] == 0,
        "a head of a multiple of 8": all(width % 8 == 0 for width in widths),
        f"a head of at most {WIDEST_HEAD}": max(widths) <= WIDEST_HEAD,
        "no dropout": params.dropout == 0.0,
        "no window": (params.window_size_left, params.window_size_right) == (-1, -1),
    }


def fused_attn_fwd(  # noqa: PLR0913
    longest_q,
    longest_k,
    is_training,
    scale,
    dropout,
    fast_zero_fill,
    layout,
    out_format,
    scale_format,
    bias_type,
    mask_type,
    softmax_type,
    window,
    bottom_right,
    cu_q,
    cu_k,
    q,
    k,
    v,
    dtype,
    cu_q_padded,
    cu_k_padded,
    *more,
):
    """Return the output [T, heads, head_dim] and the context of the backward pass."""
    _check(layout, out_format, mask_type, bias_type, softmax_type, window)
    _check_rows(q, longest_q, cu_q, cu_q_padded)
    _check_rows(k, longest_k, cu_k, cu_k_padded)
    _check_heads(q, k, v)
    refuse("no dropout, no paging, no quantizer", dropout == 0.0, *(x is None for x in more[:6]))
    refuse("the dtype is said", q.dtype == dtype)
    out = _attend(q, k, v, scale, cu_q, cu_k)
    statistics = torch.zeros(*q.shape[:2], 1)
    # Also outside training: Transformer Engine always unpacks them.
    return [out, statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(  # noqa: PLR0913
    longest_q,
    longest_k,
    scale,
    dropout,
    fast_zero_fill,
    layout,
    out_format,
    grad_format,
    grads_layout,
    scale_format,
    grad_scale_format,
    bias_type,
    mask_type,
    softmax_type,
    window,
    bottom_right,
    deterministic,
    cu_q,
    cu_k,
    q,
    k,
    v,
    out,
    grad,
    dtype,
    saved,
    cu_q_padded,
    cu_k_padded,
    *quantizers_and_graph,
):
    """Return the gradients of queries, keys and values, and None twice."""
    _check(layout, out_format, mask_type, bias_type, softmax_type, window)
    _check(grads_layout, grad_format, mask_type, bias_type, softmax_type, window)
    _check_rows(q, longest_q, cu_q, cu_q_padded)
    _check_rows(k, longest_k, cu_k, cu_k_padded)
    _check_heads(q, k, v)
    refuse("the output's gradient is as the output", grad.shape == out.shape == q.shape)
    refuse("the output's gradient is contiguous", grad.is_contiguous(), grad.dtype == q.dtype)
    refuse("the forward pass was one of training", len(saved) == 2)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = _attend(q, k, v, scale, cu_q, cu_k)
        refuse("the output is that of these operands", torch.equal(again, out.view_as(again)))
        gradients = torch.autograd.grad(again, (q, k, v), grad)
    return [*gradients, None, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    outputs, repeats = [], q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1).double() for x in (k, v))
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for row in range(len(bounds_q) - 1):
        mine = q[bounds_q[row] : bounds_q[row + 1]].double()
        theirs = slice(bounds_k[row], bounds_k[row + 1])
        weights = torch.einsum("qhd,khd->hqk", mine, keys[theirs]).mul(scale).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values[theirs]))
    return torch.cat(outputs).to(q.dtype)


def _check(layout, out_format, mask_type, bias_type, softmax_type, window):
    refuse("rows are packed", layout == PACKED, out_format == tex.NVTE_QKV_Format.NVTE_THD)
    refuse("packed rows want the padding mask", mask_type == tex.NVTE_Mask_Type.NVTE_PADDING_MASK)
    refuse("no bias", bias_type == tex.NVTE_Bias_Type.NVTE_NO_BIAS)
    refuse("a plain softmax", softmax_type == tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX)
    refuse("no window", tuple(window) == (-1, -1))


def _check_rows(x, longest, cu_seqlens, padded):
    lengths = cu_seqlens.diff()
    refuse("boundaries are int32", cu_seqlens.dtype == torch.int32, cu_seqlens.is_contiguous())
    refuse("boundaries ascend from 0", int(cu_seqlens[0]) == 0, bool((lengths >= 0).all()))
    refuse("boundaries end at the last token", int(cu_seqlens[-1]) == len(x))
    refuse("the longest row is no longer than said", int(lengths.max()) <= longest)
    refuse("rows follow each other", padded is None or torch.equal(padded, cu_seqlens))


def _check_heads(q, k, v):
    refuse("tokens, heads, head_dim", q.dim() == k.dim() == v.dim() == 3, k.shape == v.shape)
    refuse("equal heads for each group", q.shape[1] % k.shape[1] == 0, q.shape[2] == k.shape[2])
    refuse("a head of a multiple of 8", q.shape[2] % 8 == 0, q.shape[2] <= WIDEST_HEAD)
    refuse("bfloat16", q.dtype == k.dtype == v.dtype == torch.bfloat16)
    refuse("contiguous", q.is_contiguous(), k.is_contiguous(), v.is_contiguous())
