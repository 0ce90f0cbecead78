"""Stand-ins for Transformer Engine's FP8 casts: by blocks, by the whole tensor, delayed.

Data and scales have the layout that its Python code documents and its kernels read on Hopper,
where column-wise data is stored transposed. Its own Python code transposes them back.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

from tests.te import micro
from tests.te.rules import calls, refuse

KNOWN = Float8BlockQuantizer | Float8CurrentScalingQuantizer | MXFP8Quantizer
BLOCK = 128
EXPONENT = -0x00800000  # the bits of a float32 that are not its mantissa


def quantize(x, quantizer, out=None, noop=None):
    """Cast to FP8 into `out`, or into a new tensor; a `noop` flag of 1 leaves `out` as it is."""
    calls[f"quantize by {type(quantizer).__name__}"] += 1
    if getattr(quantizer, "block_scaling_dim", 1) == 2:
        calls["quantize a weight"] += 1  # only weights have square blocks
    if noop is not None and noop.item() == 1:
        return out
    if out is None:
        out = create_empty_quantized_tensor(quantizer, x.shape, x.dtype, x.device, False)
    refuse("the output has the input's shape", out.size() == x.shape)
    values = x.detach().reshape(-1, x.shape[-1]).float()
    if isinstance(quantizer, Float8BlockQuantizer):
        _fill_blocks(values, quantizer, out)
    elif isinstance(quantizer, MXFP8Quantizer):
        micro.fill(values, quantizer, out)
    else:
        _fill_whole(values, quantizer, out)
    return out


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory):
    """Return a tensor of the shape; Transformer Engine's own code defines its contents."""
    shape, device = tuple(shape), "cpu" if torch.device(device).type == "cuda" else device
    if isinstance(quantizer, Float8Quantizer):
        return _empty_delayed(quantizer, shape, dtype, device)
    refuse(f"{type(quantizer).__name__} has no stand-in", isinstance(quantizer, KNOWN))
    parts = quantizer.alloc_tensors(shape, device=device)
    context = quantizer.create_metadata(shape, dtype=dtype)
    return context["cls"].__tensor_unflatten__(parts, context, shape, None)


def dequantize(x, dtype):
    """Return the values of an FP8 tensor."""
    return x.dequantize(dtype=TE_DType_To_Torch[dtype])


def from_mxfp8(_, x, dtype):
    """Return the values of an MXFP8 tensor, which Transformer Engine expects on a GPU."""
    return whole(x, rowwise=x._rowwise_data is not None).to(dtype)


def bgrad_quantize(x, quantizer):
    """Return the sum over rows, and the cast."""
    return [x.double().sum(0).to(x.dtype), quantize(x, quantizer)]


def fp8_transpose(x, dtype, *, out):
    """Move the last dimension of FP8 bytes to the front."""
    refuse("bytes", x.dtype == torch.uint8, x.is_contiguous())
    moved = x.movedim(-1, 0).contiguous()
    return moved if out is None else out.copy_(moved)


def swap_first_dims(x, *, out):
    """Swap the first two dimensions."""
    swapped = x.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped.view(out.shape))


def fused_amax_and_scale_update_after_reduction(
    amaxes, histories, scales, algorithm, dtype, margin
):
    """Store the largest values of the last forwards; compute the scales of the next."""
    refuse("the largest of the history decides", algorithm == "max")
    largest = torch.finfo(TE_DType_To_Torch[dtype]).max
    parts = amaxes.split([scale.numel() for scale in scales])
    for amax, history, scale in zip(parts, histories, scales, strict=True):
        history[0] = amax
        found = history.amax(dim=0)
        usable = (found > 0) & found.isfinite()
        scale.copy_(torch.where(usable, largest / found / 2**margin, scale))
        history.copy_(history.roll(-1, dims=0))
        history[0] = 0


def whole(x: Tensor | QuantizedTensorStorage, *, rowwise: bool) -> Tensor:
    """Return float64 values from the bytes that a product reads: by row or by column."""
    if not isinstance(x, QuantizedTensorStorage):
        return x.double()
    if isinstance(x, MXFP8TensorStorage):
        return micro.decode(x, rowwise=rowwise)
    if isinstance(x, Float8BlockwiseQTensorStorage):
        only = Float8BlockwiseQTensorStorage(
            x._rowwise_data if rowwise else None,
            x._rowwise_scale_inv if rowwise else None,
            None if rowwise else x._columnwise_data,
            None if rowwise else x._columnwise_scale_inv,
            x._fp8_dtype,
            x._quantizer,
            x._is_2D_scaled,
        )
    else:
        only = Float8TensorStorage(
            data=x._data if rowwise else None,
            data_transpose=None if rowwise else x._transpose,
            fp8_scale_inv=x._scale_inv,
            fp8_dtype=x._fp8_dtype,
        )
    return only.dequantize(dtype=torch.float32).double()


def check_product(a, b, *, trans_a: bool, trans_b: bool) -> None:
    """Raise if cuBLAS would refuse: operands, their bytes, and multiples of their sizes."""
    if not isinstance(a, QuantizedTensorStorage):
        refuse("both operands are FP8 or none", not isinstance(b, QuantizedTensorStorage))
        refuse("operands have one dtype", a.dtype == b.dtype)
        refuse("operands are contiguous", a.is_contiguous(), b.is_contiguous())
        return
    refuse("both operands are FP8 or none", isinstance(b, QuantizedTensorStorage))
    refuse("the first operand has the bytes that are read", _has(a, rowwise=trans_a))
    refuse("the second operand has the bytes that are read", _has(b, rowwise=not trans_b))
    columns, depth = _sizes(a, rowwise=trans_a)
    rows, other = _sizes(b, rowwise=not trans_b)
    refuse(f"{depth} = {other} values are summed", depth == other)
    refuse(f"{depth} summed FP8 values are a multiple of 16", depth % 16 == 0)
    refuse(f"{columns} columns are a multiple of 8", columns % 8 == 0)
    if isinstance(a, Float8BlockwiseQTensorStorage):
        refuse("both operands have scales of blocks", isinstance(b, Float8BlockwiseQTensorStorage))
        refuse("128 x 128 blocks in one operand at most", not (a._is_2D_scaled & b._is_2D_scaled))
        refuse(f"{rows} rows are a multiple of 8", b._is_2D_scaled or rows % 8 == 0)
    elif isinstance(a, MXFP8TensorStorage):
        refuse("both operands have scales of 32 values", isinstance(b, MXFP8TensorStorage))
        refuse(
            f"{depth} summed values, {rows}, {columns}: multiples of 32",
            all(size % micro.BLOCK == 0 for size in (depth, rows, columns)),
        )
    else:
        refuse("both operands have one scale", isinstance(b, Float8TensorStorage))


def _sizes(x, *, rowwise):
    """Return the outer size and the one that is summed over."""
    rows, columns = math.prod(x.size()[:-1]), x.size()[-1]
    return (rows, columns) if rowwise else (columns, rows)


def _has(x, *, rowwise):
    if isinstance(x, Float8BlockwiseQTensorStorage | MXFP8TensorStorage):
        return (x._rowwise_data if rowwise else x._columnwise_data) is not None
    if rowwise:
        return x._data is not None
    return x._transpose is not None and not x._transpose_invalid


def _fill_blocks(values, quantizer, out):
    refuse("one kind of blocks", out._is_2D_scaled == (quantizer.block_scaling_dim == 2))
    tall = BLOCK if out._is_2D_scaled else 1
    for part, data, scales in (
        (values, out._rowwise_data, out._rowwise_scale_inv),
        (values.t(), out._columnwise_data, out._columnwise_scale_inv),
    ):
        if data is None:
            continue
        encoded, inverse = _cast_blocks(part, tall, quantizer)
        inverse = inverse if out._is_2D_scaled else inverse.t()
        data.copy_(encoded.reshape(data.shape))
        scales.zero_()  # and rows of padding up to a multiple of 4
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse


def _cast_blocks(values, tall, quantizer):
    """Return bytes, and 1 / scale of every block of `tall` x 128."""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % BLOCK, 0, -rows % tall))
    tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, tall))
    scale = _scale(tiles.abs().amax(dim=(1, 3)), quantizer, pow2=quantizer.force_pow_2_scales)
    encoded = _encode(tiles * scale[:, None, :, None], quantizer).reshape(padded.shape)
    return encoded[:rows, :columns], scale.reciprocal()


def _fill_whole(values, quantizer, out):
    amax = values.abs().amax() if values.numel() else torch.zeros(())
    if isinstance(quantizer, Float8Quantizer):
        if quantizer.amax.numel():  # empty if the scale was set without it
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    else:
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = _scale(amax, quantizer, pow2=quantizer.force_pow_2_scales)
    encoded = _encode(values * scale, quantizer)
    out._scale_inv.copy_(scale.reciprocal())
    if out._data is not None:
        out._data.copy_(encoded.reshape(out._data.shape))
    if quantizer.columnwise_usage and out._transpose is not None:
        out._transpose.copy_(encoded.t().reshape(out._transpose.shape))
        out._transpose_invalid = False


def _scale(amax, quantizer, *, pow2):
    """Return the scale that maps the largest value to the largest of FP8; 1 if all are 0."""
    amax = amax.clamp(min=quantizer.amax_epsilon)
    largest = torch.finfo(TE_DType_To_Torch[quantizer.dtype]).max
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    if pow2:
        scale = (scale.view(torch.int32) & EXPONENT).view(torch.float32)
    return torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)


def _encode(values, quantizer):
    dtype = TE_DType_To_Torch[quantizer.dtype]
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).view(torch.uint8)


def _empty_delayed(quantizer, shape, dtype, device):
    """Return an FP8 tensor with a preset scale."""
    flipped = (shape[-1], *shape[:-1])
    parts = {
        "data": torch.empty(shape, dtype=torch.uint8, device=device),
        "fp8_scale_inv": torch.empty(1, dtype=torch.float32, device=device),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.columnwise_usage:
        parts["data_transpose"] = torch.empty(flipped, dtype=torch.uint8, device=device)
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **parts)
    return Float8Tensor(shape=shape, dtype=dtype, device=device, **parts)


def split_quantize(x, counts, quantizers, **_):
    """Return the casts of each expert's rows."""
    refuse("the rows are those of all experts", sum(counts) == len(x))
    parts = x.split(counts)
    return [quantize(part, each) for part, each in zip(parts, quantizers, strict=True)]
