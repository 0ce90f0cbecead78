"""Stand-ins for the casts of the recipe mxfp8: 32 values share a power-of-two scale.

Scales are stored as Transformer Engine's Python code allocates them, padded, and compact: a GPU's
products need another order, which no Python code reads.
"""

import torch
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch

from tests.te.rules import refuse

BLOCK = 32
BIAS = 127  # of the exponent stored in a scale's byte


def fill(values: Tensor, quantizer, out) -> None:
    """Cast a float32 matrix into `out`, in blocks along its rows, along its columns, or both."""
    refuse("rows and columns in blocks of 32", all(size % BLOCK == 0 for size in values.shape))
    if out._rowwise_data is not None:
        encoded, scales = _cast(values, quantizer)
        _put(encoded, out._rowwise_data, scales, out._rowwise_scale_inv)
    if out._columnwise_data is not None:
        encoded, scales = _cast(values.t(), quantizer)
        _put(encoded.t(), out._columnwise_data, scales.t(), out._columnwise_scale_inv)


def decode(x, *, rowwise: bool) -> Tensor:
    """Return float64 values from the bytes of one direction."""
    data = x._rowwise_data if rowwise else x._columnwise_data
    scales = x._rowwise_scale_inv if rowwise else x._columnwise_scale_inv
    values = data.view(TE_DType_To_Torch[x._fp8_dtype]).double().reshape(-1, data.shape[-1])
    factors = torch.exp2(scales.double() - BIAS).repeat_interleave(BLOCK, dim=1 if rowwise else 0)
    rows, columns = values.shape
    return (values * factors[:rows, :columns]).reshape(data.shape)


def _cast(values, quantizer):
    """Return bytes, and scale bytes: the smallest power of two that lets a block fit."""
    dtype = TE_DType_To_Torch[quantizer.dtype]
    largest = torch.finfo(dtype).max
    tiles = values.unflatten(1, (-1, BLOCK))
    mantissa, exponent = torch.frexp(tiles.abs().amax(dim=2) / largest)  # mantissa in [0.5, 1)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-BIAS, BIAS)
    encoded = torch.ldexp(tiles, -exponent[..., None]).clamp(-largest, largest).to(dtype)
    return encoded.view(torch.uint8).reshape(values.shape), (exponent + BIAS).to(torch.uint8)


def _put(encoded, data, scales, padded):
    data.copy_(encoded.reshape(data.shape))
    padded.zero_()
    padded[: scales.shape[0], : scales.shape[1]] = scales
