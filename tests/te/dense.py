"""Stand-ins for Transformer Engine's matrix products, norms, rotations and activations.

They compute in float64 and round once, so a result does not depend on the order of a sum: if two
calls differ by a bit, their inputs differed. The kernels' requirements on operands are checked
here, since a GPU would refuse a violation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.pytorch.constants import DType, TE_DType

from tests.te.quantize import check_product, quantize, whole
from tests.te.rules import refuse

TORCH_DTYPE = {int(number): dtype for dtype, number in TE_DType.items()}


def torch_dtype(number: DType | int) -> torch.dtype:
    """Return torch's name for one of Transformer Engine's dtypes."""
    return TORCH_DTYPE[int(number)]


def generic_gemm(  # noqa: PLR0913
    a,
    trans_a,
    b,
    trans_b,
    out,
    quantizer,
    output_dtype,
    bias,
    bias_type,
    gelu,
    gelu_input,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    *,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    """Return [op(b) @ op(a), gradient of the bias, None, None]; `accumulate` adds to `out`."""
    unused = (quantizer, gelu_input, comm_overlap, comm_type, extra_output)
    refuse("only plain products have a stand-in", all(part is None for part in unused))
    refuse("only plain products have a stand-in", not gelu, not bulk_overlap, alpha == 1.0)
    refuse("beta is 1 where the product is added", beta == (1.0 if accumulate else 0.0))
    refuse("the workspace has the size that is said", len(workspace) == workspace_size)
    check_product(a, b, trans_a=trans_a, trans_b=trans_b)
    left, right = whole(b, rowwise=not trans_b), whole(a, rowwise=trans_a)
    leading = left.shape[:-1]
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    right = right.t() if trans_a else right
    result = (left.t() if trans_b else left) @ right
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = left.sum(0).to(torch_dtype(bias_type))
    elif bias is not None:
        refuse("the bias has the dtype that is said", bias.dtype == torch_dtype(bias_type))
        result = result + bias.double()
    if out is None:
        assert output_dtype is not None or isinstance(a, Tensor)
        dtype = a.dtype if output_dtype is None else torch_dtype(output_dtype)
        shape = result.shape if trans_b else (*leading, result.shape[-1])
        return [result.reshape(shape).to(dtype), bias_gradient, None, None]
    refuse("the output is contiguous", out.is_contiguous())
    result = result.reshape(out.shape)
    out.copy_(out.double() + result if accumulate else result)
    return [out, bias_gradient, None, None]


def te_general_grouped_gemm(  # noqa: PLR0913
    a,
    trans_a,
    b,
    trans_b,
    out,
    out_dtype,
    counts,
    bias,
    bias_type,
    single_output,
    gelu_inputs,
    grad,
    workspaces,
    workspace_size,
    accumulate,
    use_split_accumulator,
    sm_margin,
):
    """Write op(b) @ op(a) of each expert to its output, or to its rows of a single one."""
    refuse("each expert has operands", len(a) == len(b), not any(len(part) for part in bias))
    if single_output:
        refuse("one output has the rows of all", len(out) == 1, sum(counts) == len(out[0]))
        out = out[0].split(counts)
    for left, right, result in zip(a, b, out, strict=True):
        if not result.numel() or 0 in right.size():
            result.copy_(result if accumulate else torch.zeros_like(result))
            continue
        beta = 1.0 if accumulate else 0.0
        shared = (workspaces[0], workspace_size, accumulate, use_split_accumulator)
        operands = (left, trans_a, right, trans_b, result, None, out_dtype)
        generic_gemm(*operands, None, bias_type, False, None, grad, *shared, beta=beta)  # noqa: FBT003
    return bias


def fused_multi_row_padding(x, out, counts, padded):
    """Copy the rows of each expert, and fill up with rows of zeros."""
    refuse("the rows are those of all experts", sum(counts) == len(x), sum(padded) == len(out))
    for part, filled in zip(x.split(counts), out.split(padded), strict=True):
        filled[: len(part)], filled[len(part) :] = part, 0


def fused_multi_row_unpadding(x, out, padded, counts):
    """Copy the rows of each expert without those that fill up."""
    refuse("the rows are those of all experts", sum(counts) == len(out), sum(padded) == len(x))
    for filled, part in zip(x.split(padded), out.split(counts), strict=True):
        part.copy_(filled[: len(part)])


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """Return [the norm of every row, None, 1 / root mean square of each]."""
    refuse("rows are a contiguous matrix", x.dim() == 2, x.is_contiguous(), weight.is_contiguous())
    refuse("a weight for each column", weight.shape == x.shape[1:], not zero_centered)
    refuse("values are of 16 or 32 bits", x.dtype in TE_DType, out is None)
    wide = x.double()
    scale = (wide.square().mean(-1) + eps).rsqrt().float()
    normed = (wide * scale.double()[:, None] * weight.double()).to(torch_dtype(dtype))
    return [quantize(normed, quantizer) if quantizer else normed, None, scale]


def rmsnorm_bwd(grad, x, scale, weight, sm_margin, zero_centered):
    """Return the gradients of input and weight."""
    refuse("rows are contiguous", grad.is_contiguous(), x.is_contiguous(), not zero_centered)
    refuse("shapes agree", grad.shape == x.shape, scale.shape == x.shape[:1])
    refuse("dtypes agree", grad.dtype == x.dtype, scale.dtype == torch.float32)
    normed, grad = x.double() * scale.double()[:, None], grad.double()
    through = grad * weight.double()
    along = (through * normed).mean(-1, keepdim=True)
    into_x = scale.double()[:, None] * (through - normed * along)
    return [into_x.to(x.dtype), (grad * normed).sum(0).to(weight.dtype)]


def fused_rope_forward(x, angles, starts, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    """Rotate the two halves of each head by `angles` [s, 1, 1, head_dim]."""
    return _rotate(x, angles, starts, layout, interleaved, cu_seqlens, cp_size, sign=1)


def fused_rope_backward(x, angles, starts, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    """Rotate back."""
    return _rotate(x, angles, starts, layout, interleaved, cu_seqlens, cp_size, sign=-1)


def _rotate(x, angles, starts, layout, interleaved, cu_seqlens, cp_size, *, sign):
    refuse("rows of s, b, h, d without context parallelism", layout.name == "NVTE_SBHD")
    refuse("nothing else has a stand-in", starts is None, cu_seqlens is None, cp_size == 1)
    refuse("halves are rotated", not interleaved, x.dim() == 4)
    refuse("angles are float32 [s, 1, 1, d]", angles.dtype == torch.float32, angles.dim() == 4)
    refuse("an angle for each position", angles.shape[1:3] == (1, 1), len(angles) >= len(x))
    width = angles.shape[-1]
    refuse("the first numbers of a head are rotated", width <= x.shape[-1], angles.is_contiguous())
    wide, angles = x[..., :width].double(), angles[: len(x)].double()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = (wide * angles.cos() + sign * turned * angles.sin()).to(x.dtype)
    return torch.cat([rotated, x[..., width:]], dim=-1)


def swiglu(x, quantizer):
    """Return silu(first half) * second half."""
    refuse("the halves are equal", x.shape[-1] % 2 == 0, x.is_contiguous())
    first, second = x.double().chunk(2, dim=-1)
    value = (F.silu(first) * second).to(x.dtype)
    return quantize(value, quantizer) if quantizer else value


def dswiglu(grad, x, quantizer):
    """Return the gradient of `swiglu`'s input."""
    refuse("operands are contiguous", grad.is_contiguous(), x.is_contiguous())
    with torch.enable_grad():
        wide = x.detach().double().requires_grad_()
        first, second = wide.chunk(2, dim=-1)
        (into,) = torch.autograd.grad(F.silu(first) * second, wide, grad.double())
    into = into.to(x.dtype)
    return quantize(into, quantizer) if quantizer else into
